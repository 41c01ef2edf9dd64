"""What is left of classes taught on a board when its backbone is replaced.

    python -m bench.migration [--only PART_OF_A_LABEL]

Two recipes on the same images, eight classes of ten; the second bundle is exported with a projector from the first. Two
classes are taught on the first in its int8 artifact, with `LABELS_PER_CLASS` images each, as a board would do; then the second
bundle takes over. Accuracy is on the test images, in LiteRT, of the classes taught and of those shipped:

- `before`: on the first bundle;
- `migrated`: on the second, moved by the projector past the guard, from the lessons' features;
- `from_sums`: the same where the lessons are forgotten but for their sums, as older ones are;
- `relearned`: the same images taught to the second bundle itself, which a board cannot do, for it keeps no image;
- `dropped`: without migration the taught classes are gone: the accuracy of all classes then.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np

import device.history
from bench.jobs import Job, Table, digest_code, main_of
from bench.record import Row
from device.contract.board import load_board
from device.contract.bundle import extract
from device.preprocess import preprocess
from device.serving import Model, Serving
from device.slots import Slots
from host.data.splits import ImageSplits
from host.models.registry import find_model
from host.recipe import ExportSpec, ModelSpec, Recipe, builtin_recipe
from host.stages.data import load_split
from host.stages.export import bundle_name
from host.stages.order import run_recipe
from tests.support.agent import REPO_ROOT

RUNS = REPO_ROOT / "runs" / "bench-migration"
LABELS_PER_CLASS = 20
SEEDS = (0, 1, 2)
NEW = {
    "the same, trained again for longer": ("efficientformer", "field-32", 30),
    "another family": ("cnn", "small", 10),
}
OLD_EPOCHS = 15
RUNTIME = load_board("generic-x86-64").runtime

TABLE = Table(
    name="migration",
    command="python -m bench.migration",
    seed=0,
    data=f"scikit-learn's digits, 8 and 9 held back and taught with {LABELS_PER_CLASS} images each; test images, int8 in LiteRT",
    title="Taught classes when the backbone is replaced",
    notes=lambda rows: _notes(rows),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing of the table."""
    return main_of(TABLE, list_jobs, measure, argv)


def list_jobs() -> list[Job]:
    """One job for each new backbone and seed."""
    parts = ("device/migration.py", "device/learning/projector.py", "host/continual/projector.py", "bench/migration.py")
    code = digest_code(*(REPO_ROOT / part for part in parts))
    return [Job(key={"new_backbone": new, "seed": seed}, defined_by=code) for new in NEW for seed in SEEDS]


@dataclass
class Board:
    """A board's slots, without an agent, and the images it is shown."""

    serving: Serving
    slots: Slots
    split: ImageSplits

    @classmethod
    def create(cls, root: Path, bundle: Path, split: ImageSplits) -> "Board":
        root.mkdir()
        slots = Slots(root)
        board = cls(Serving(slots, RUNTIME), slots, split)
        board.install(bundle)
        board.serving.confirm()
        return board

    @property
    def model(self) -> Model:
        assert self.serving.model
        return self.serving.model

    def install(self, bundle: Path) -> dict[str, str]:
        """Take a bundle, whatever it costs; returns why taught classes stayed behind."""
        entry = self.slots.stage(bundle.name, lambda directory: extract(bundle, directory))
        return self.serving.activate(entry.slot, "int8", accept_loss=True).reasons

    def teach(self) -> None:
        for label in np.unique(self.split.field.labels):
            chosen = np.flatnonzero(self.split.field.labels == label)[:LABELS_PER_CLASS]
            name = self.split.label_names[label]
            self.model.classifier.learn(self.features([self.split.field.images[int(i)] for i in chosen]), name)

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        spec = self.model.manifest.input
        return np.stack([self.model.engine.features(preprocess(image[None], spec)) for image in images])

    def accuracy(self) -> dict[str, float]:
        """Share of right answers on the test images of the taught classes, of the shipped ones, and of all."""
        test = self.split.test
        answers = [self.model.infer(test.images[i])[1].label for i in range(len(test))]
        is_right = np.array([self.split.label_names[k] == a for k, a in zip(test.labels, answers, strict=True)])
        is_taught = test.labels >= self.split.num_base
        parts = {"taught": is_taught, "shipped": ~is_taught, "all": np.ones(len(test), bool)}
        return {name: round(float(is_right[chosen].mean()), 4) for name, chosen in parts.items()}


def measure(job: Job) -> Row:
    """Train both backbones, teach, replace, and count."""
    family, variant, epochs = NEW[job.key["new_backbone"]]
    seed = job.key["seed"]
    old_recipe = _recipe(seed, "old", "efficientformer", "field-32", OLD_EPOCHS)
    old = _export(old_recipe)
    new = _export(_recipe(seed, f"{family}-{epochs}", family, variant, epochs, earlier=old))
    split = load_split(old_recipe)
    with tempfile.TemporaryDirectory(prefix="migration-") as name:
        directory = Path(name)
        board = Board.create(directory / "lessons", old, split)
        board.teach()
        backbone, before = board.model.artifact.backbone, board.accuracy()
        left = board.install(new)
        migrated = board.accuracy()
        with mock.patch.object(device.history, "MAX_LESSONS", 0):
            board = Board.create(directory / "sums", old, split)
            board.teach()
            board.install(new)
        from_sums = board.accuracy()
        board = Board.create(directory / "fresh", new, split)
        dropped = board.accuracy()
        board.teach()
        relearned = board.accuracy()
        entry = board.model.manifest.projector(backbone, board.model.artifact.backbone)
        assert entry
    fit = {name: round(getattr(entry, name), 4) for name in ("r2", "mean_cosine", "head_agreement")}
    return {
        **fit,
        **_columns("before", before),
        **_columns("migrated", migrated),
        **_columns("from_sums", from_sums),
        **_columns("relearned", relearned),
        "dropped_all": dropped["all"],
        "left_behind": len(left),
    }


def _columns(name: str, shares: dict[str, float]) -> dict[str, float]:
    return {f"{name}_{part}": shares[part] for part in ("taught", "shipped")}


def _recipe(seed: int, name: str, family: str, variant: str, epochs: int, *, earlier: Path | None = None) -> Recipe:
    base = builtin_recipe("quickstart")
    find_model(family, variant)
    return replace(
        base,
        name=f"{name}-{seed}",
        seed=seed,
        release=2 if earlier else 1,
        model=ModelSpec(family=family, variant=variant),
        train=replace(base.train, epochs=epochs),
        distill=None,
        teacher=None,
        quantize=replace(base.quantize, precisions=("int8", "float32"), max_accuracy_drop=0.05),
        export=ExportSpec(formats=("tflite",), migrate_from=(str(earlier),) if earlier else ()),
    )


def _export(recipe: Recipe) -> Path:
    RUNS.mkdir(parents=True, exist_ok=True)
    directory = run_recipe(recipe, RUNS, until="export", report=lambda *progress: None)
    return directory / "export" / bundle_name(recipe)


def _notes(rows: Sequence[Row]) -> str:
    kept = [row["migrated_taught"] / row["before_taught"] for row in rows if row.get("before_taught")]
    return (
        f"Of the taught classes' accuracy on the old backbone, the migrated head keeps {min(kept):.1%} or more, "
        f"{sum(kept) / len(kept):.1%} on average, in {len(rows)} replacements. `left_behind` counts classes that the guard "
        "did not let move. The projector has seen no image of the taught classes."
    )


if __name__ == "__main__":
    sys.exit(main())
