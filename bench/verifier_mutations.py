"""Does the verifier find what is broken? Artifacts with one deliberate defect each; the table `verifier_mutations`.

    python -m bench.verifier_mutations [--only PART_OF_A_NAME]

Small variants of several families, with random weights and every branch open, are converted to TFLite float32 and int8.
Each is broken in one place, drawn by a fixed seed, and counts only if its features move by 1e-3 of the largest or more.
`caught`: `host.artifact_checks`, which is what `fieldvit verify` runs, refuses it. `right_place`: the first departed tensor,
which `--layers` names, is the broken one, or of the same module.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench.family_parity import convert_tflite
from bench.jobs import Job, Table, main_of
from bench.mutations import FLOAT_KINDS, INT8_KINDS, Mutation
from bench.probes import photos, randomize, settle_norms
from bench.record import Row
from bench.sources import digest_of, module_of
from converters import flatbuffer, tflite
from converters.errors import ConversionError
from converters.isolate import opened
from converters.layers import difference
from converters.layers_tflite import module_of as module_in
from converters.layers_tflite import scopes_of
from converters.runners import open_features
from converters.torch_trace import ROOT, trace
from device.contract.errors import DeviceError
from device.contract.manifest import InputSpec
from device.contract.records import to_table
from host.artifact_checks import Examiner
from host.data.inputs import to_input
from host.data.splits import LabeledImages
from host.models.registry import find_model
from host.stages.features import torch_features
from host.stages.head import LinearHead
from host.stages.proof import Reference

FLOAT, INT8 = "float32", "int8"
CASES = {
    ("efficientformer/field-32", FLOAT): 7,
    ("deit/field-32", FLOAT): 6,
    ("ninformer/field-32", FLOAT): 6,
    ("nextvit/field-64", FLOAT): 6,
    ("efficientformer/field-32", INT8): 7,
    ("deit/field-32", INT8): 6,
    ("ninformer/field-32", INT8): 6,
    ("nextvit/field-64", INT8): 6,
}
"""How many broken artifacts are made of each: 50."""
MIN_CHANGE = 1e-3
NUM_PHOTOS = 8
MEAN, STD = 0.45, 0.25
DRAWS = 100
VERIFIER = (
    "bench.mutations",
    "bench.probes",
    "converters.isolate",
    "converters.layers",
    "converters.layers_tflite",
    "converters.tflite",
    "converters.tflite_tensors",
    "converters.torch_trace",
    "host.artifact_checks",
    "host.stages.proof",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A sound model: its files by precision, what they are compared with, and the head of each."""

    files: dict[str, Path]
    heads: dict[str, LinearHead]
    features: dict[str, np.ndarray]
    examiner: Examiner


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """An artifact with one defect: where it is, what it changes, and by what examiner it is judged."""

    kind: str
    path: Path
    where: str
    change: float
    examiner: Examiner


def main(argv: Sequence[str] | None = None) -> int:
    torch.set_num_threads(1)
    table = Table(
        name="verifier_mutations",
        command="python -m bench.verifier_mutations",
        seed=0,
        data=f"{NUM_PHOTOS} crops of the two photographs that ship with scikit-learn",
        title="Broken artifacts and the verifier",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv)


def list_jobs() -> list[Job]:
    return [
        Job(
            key={"family": family, "precision": precision},
            settings={"count": count, "min_change": MIN_CHANGE},
            defined_by=digest_of(module_of(find_model(*family.split("/"))), *VERIFIER),
        )
        for (family, precision), count in CASES.items()
    ]


def measure(job: Job) -> list[Row]:
    """Break one model's artifact of one precision as often as the job says, and judge each."""
    family, precision = str(job.key["family"]), str(job.key["precision"])
    subject = make_subject(family)
    require_sound(subject, precision)
    with tempfile.TemporaryDirectory() as directory:
        broken = break_artifact(subject, precision, Path(directory), seed=list(CASES).index((family, precision)))
        return [judge(subject, precision, next(broken)) for _ in range(int(job.settings["count"]))]


@cache
def make_subject(family: str) -> Subject:
    """Convert a model and gather what its artifacts are compared with; kept for the other precision."""
    entry = find_model(*family.split("/"))
    directory = Path(tempfile.mkdtemp(prefix="fieldvit-mutations-"))
    spec = InputSpec(
        height=entry.image_size,
        width=entry.image_size,
        channels=entry.in_chans,
        mean=(MEAN,) * entry.in_chans,
        std=(STD,) * entry.in_chans,
        color_order="rgb",
    )
    frames = _frames(spec)
    images = to_input(frames, spec)
    model = settle_norms(randomize(entry.create()), torch.from_numpy(images).permute(0, 3, 1, 2))
    deployed = model.deploy()  # type: ignore[operator]
    float_path = convert_tflite(deployed, entry, directory)
    described = flatbuffer.read_model(float_path)
    flatbuffer.add_metadata(described, {flatbuffer.INPUT_METADATA: to_table(spec)})
    flatbuffer.write_model(described, float_path)
    files = {FLOAT: float_path, INT8: directory / "int8.tflite"}
    tflite.quantize_static(float_path, images, files[INT8], float_scopes=entry.float_scopes)
    features = {precision: _features(path, images) for precision, path in files.items()}
    expected = torch_features(model)(images)
    head = _nearest_photo(expected)
    reference = Reference(
        images=LabeledImages(images=frames, labels=np.arange(NUM_PHOTOS)),
        spec=spec,
        features=expected,
        logits=head.logits(expected),
    )
    examiner = Examiner(reference=reference, spec=spec, float_path=float_path)
    examiner = replace(examiner, traced=trace(deployed, examiner.images()))
    heads = {precision: _nearest_photo(values) for precision, values in features.items()}
    return Subject(files=files, heads=heads, features=features, examiner=examiner)


def require_sound(subject: Subject, precision: str) -> None:
    """Raise RuntimeError if the verifier refuses what is not broken."""
    found = subject.examiner.check(subject.files[precision], precision, subject.heads[precision])
    if found.problems:
        raise RuntimeError(f"the sound {precision} file is refused: {'; '.join(found.problems)}")


def break_artifact(subject: Subject, precision: str, directory: Path, *, seed: int) -> Iterator[Broken]:
    """Artifacts with a defect that counts, the kinds in turn, for as long as draws give one."""
    rng = np.random.default_rng(seed)
    breakers = [*(_by_mutation(kind) for kind in (FLOAT_KINDS if precision == FLOAT else INT8_KINDS)), _wrong_record]
    seen: set[tuple[str, str]] = set()
    for number in range(seed * 3, seed * 3 + DRAWS):  # another precision, another family: other kinds first
        path = directory / f"{number}.tflite"
        broken = breakers[number % len(breakers)](subject, precision, path, rng)
        if broken and broken.change >= MIN_CHANGE and (broken.kind, broken.where) not in seen:
            seen.add((broken.kind, broken.where))
            yield broken


def judge(subject: Subject, precision: str, broken: Broken) -> Row:
    """What the verifier says of a broken artifact."""
    found = broken.examiner.check(broken.path, precision, subject.heads[precision])
    layer = found.layers.first_departed if found.layers else None
    return {
        "kind": broken.kind,
        "where": short(broken.where),
        "output_change": float(f"{broken.change:.2e}"),
        "caught": bool(found.problems),
        "named": short(layer.name) if layer else None,
        "right_place": layer is not None and is_same_place(layer.name, broken.where),
    }


def is_same_place(named: str, broken: str) -> bool:
    """Whether two tensors are one, or of one module below the model itself; a fused operation is of two."""
    modules = set(scopes_of(named)) & set(scopes_of(broken)) - {ROOT}
    return named == broken or bool(modules)


def short(name: str) -> str:
    """A tensor's name with its module as a dotted path, for the table."""
    module = module_in(name)
    return f"{module}{name[name.rfind(';') :]}" if module and ";" in name else name.rpartition("/")[2]


Breaker = Callable[[Subject, str, Path, np.random.Generator], Broken | None]


def _by_mutation(mutation: Mutation) -> Breaker:
    def breaker(subject: Subject, precision: str, path: Path, rng: np.random.Generator) -> Broken | None:
        model = flatbuffer.read_model(subject.files[precision])
        where = mutation(model, rng)
        if where is None:
            return None
        flatbuffer.write_model(model, path)
        examiner = subject.examiner
        try:
            change = difference(_features(path, examiner_images(examiner)), subject.features[precision])
        except (ConversionError, DeviceError):  # it does not run at all, so there is no output to speak of
            return None
        return Broken(kind=mutation.__name__, path=path, where=where, change=change, examiner=examiner)

    return breaker


def _wrong_record(subject: Subject, precision: str, path: Path, rng: np.random.Generator) -> Broken | None:
    """Mean or deviation is wrong, in the file's metadata or in the bundle's record."""
    spec = subject.examiner.spec
    is_mean, is_metadata = rng.integers(2, size=2)
    wrong = replace(spec, mean=(MEAN + 0.1,) * spec.channels) if is_mean else replace(spec, std=(1.0,) * spec.channels)
    model = flatbuffer.read_model(subject.files[precision])
    examiner = subject.examiner
    if is_metadata:
        flatbuffer.add_metadata(model, {flatbuffer.INPUT_METADATA: to_table(wrong)})
    else:
        examiner = replace(examiner, reference=replace(examiner.reference, spec=wrong))
    flatbuffer.write_model(model, path)
    images = to_input(examiner.reference.images.images[:], wrong)
    change = difference(_features(path, images), subject.features[precision])
    kind = f"wrong_{'mean' if is_mean else 'std'}_in_{'metadata' if is_metadata else 'bundle'}"
    return Broken(kind=kind, path=path, where="images", change=change, examiner=examiner)


def examiner_images(examiner: Examiner) -> np.ndarray:
    """All photographs, pre-processed as they should be."""
    return to_input(examiner.reference.images.images[:], examiner.spec)


def _frames(spec: InputSpec) -> np.ndarray:
    """The photographs as a camera gives them, uint8 [N, H, W, C]."""
    return (
        np.rint((photos(spec.height, spec.channels, count=NUM_PHOTOS) * STD + MEAN) * 255).clip(0, 255).astype(np.uint8)
    )


def _features(path: Path, images: np.ndarray) -> np.ndarray:
    with opened(open_features, path) as features_of:
        return np.asarray(features_of(images))


def _nearest_photo(features: np.ndarray) -> LinearHead:
    """A head that tells the photographs apart, from features [N, D]."""
    centred = features - features.mean(axis=0)
    weight = (centred / np.linalg.norm(centred, axis=1, keepdims=True)).T
    return LinearHead(weight.astype(np.float32), -(features.mean(axis=0) @ weight).astype(np.float32))


def _notes(rows: Sequence[Row]) -> str:
    caught, right = sum(bool(row["caught"]) for row in rows), sum(bool(row["right_place"]) for row in rows)
    return f"""Caught: {caught} of {len(rows)}. Right place: {right} of {len(rows)}. The sound file of every row passes.

`output_change`: the largest difference of a feature from the sound file's, as a share of the largest feature, over the
photographs. `where`: the tensor that the broken operation makes. Files that do not load any more are not counted.

The limits were set on sound files of these families, and weights have been compared one by one since a draw of these
kinds (two int8 codes one step apart changed places) was missed. Core ML programs are not in the table."""


if __name__ == "__main__":
    sys.exit(main())
