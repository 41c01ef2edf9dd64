"""Every family in every form that the converters write, on real images; the table `conversion_matrix`.

    python -m bench.conversion_matrix [--workers N] [--only PART_OF_A_LABEL]

One small and one full-size variant of each family. A small one has the zoo's trained weights where the zoo has a
checkpoint of it, and its data's test images, read from FIELDVIT_DATA; the others have random weights with every branch
open (layer scales, biases and norms moved off their initial values, statistics of batch norms taken from images) and
random crops of the two photographs that ship with scikit-learn.

A quantized form has a rival: what the stock tool makes of the same float file and images. That is ai-edge-quantizer's
static recipe with its own calibration for TFLite int8, its dynamic recipe for `dynamic`, and coremltools' uniform
palette (its k-means does not run beside the scikit-learn that we pin). W8 is coremltools' own form, so its rival is
itself; W8A8 has none, since coremltools calibrates on macOS only.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.family_parity import FULL_SIZE, SMALL
from bench.jobs import Job, Table, digest, main_of
from bench.probes import photo_crops, randomize, settle_norms
from bench.record import Row
from bench.sources import digest_of, module_of
from converters import coreml, coreml_compress, coreml_w8a8, flatbuffer, gates, tflite
from converters.errors import ConversionError
from converters.isolate import opened
from converters.parity import Parity, compare
from converters.quiet import quiet
from converters.runners import open_features
from device.contract.board import load_board
from host.data.inputs import to_input
from host.files import sha256_of
from host.models.entry import ModelEntry
from host.models.registry import find_model
from host.recipe import load_recipe
from host.stages.data import base_test_images, input_spec, load_model, load_split
from host.stages.features import coreml_logits
from host.zoo import find_checkpoint
from host.zoo.cards import Card, list_cards

NUM_IMAGES, NUM_CALIBRATION = 256, 64
RECIPE: Mapping[str, Any] = {"version": 1, "images": NUM_IMAGES, "calibration": NUM_CALIBRATION}
"""Raise the version when what is measured below changes in effect."""
MEASURED_BY = ("bench.probes", "converters.runners", "converters.parity")
MADE_BY = {
    "tflite": ("converters.tflite", "converters.gates"),
    "coreml": ("converters.coreml", "converters.coreml_compress", "converters.coreml_w8a8", "converters.mil"),
}
FLOAT_COSINE = 0.9999
PALETTE_BITS = 6
BOARD = "iphone-15"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model to convert, and what it is asked.

    Args:
        entry: of the registry.
        deployed: its inference form.
        weights: what its weights are, in words.
        images: float32 [N, H, W, C].
        labels: int64 [N], or None where the model was not trained.
        calibration: other images, float32 [M, H, W, C].
        logits: PyTorch's of `images`, [N, K].
    """

    entry: ModelEntry
    deployed: nn.Module
    weights: str
    images: np.ndarray
    labels: np.ndarray | None
    calibration: np.ndarray
    logits: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, *self.images.shape[1:])

    @property
    def num_classes(self) -> int:
        return int(self.logits.shape[1])


Make = Callable[[Subject, Path], Path]
"""Writes a form into a folder and returns its path."""
Ask = Callable[[Subject, Path], np.ndarray]
"""The logits [N, K] that a form gives."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A form, how it is made, and its rival."""

    name: str
    make: Make
    stock: Make | None = None
    is_float: bool = False
    needs_argmax: bool = False
    without_rival: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    table = Table(
        name="conversion_matrix",
        command="python -m bench.conversion_matrix",
        seed=0,
        data=f"{NUM_IMAGES} test images of the zoo's data sets; for models that were not trained, {NUM_IMAGES} crops of the "
        "two photographs that ship with scikit-learn",
        title="Families in every form, against PyTorch and the stock tools",
        notes=_notes,
    )
    return main_of(table, list_jobs, measure, argv)


def list_jobs() -> list[Job]:
    """One per model and format; each gives a row per form."""
    return [
        Job(
            key={"model": name, "size": size, "format": format_},
            settings={**RECIPE, "weights": _weights_digest(name)},
            defined_by=digest(digest_of(module_of(_entry(name)), *MEASURED_BY, *MADE_BY[format_]), version_of_stock()),
        )
        for size, names in (("small", SMALL), ("full", FULL_SIZE))
        for name in names
        for format_ in MADE_BY
    ]


def version_of_stock() -> list[str]:
    """Of the tools that the rivals come from."""
    from importlib.metadata import version

    return [version(name) for name in ("ai-edge-quantizer", "coremltools", "litert-torch")]


def measure(job: Job) -> list[Row]:
    torch.set_num_threads(1)
    subject = make_subject(str(job.key["model"]))
    cells, ask = {"tflite": (TFLITE, tflite_logits), "coreml": (COREML, package_logits)}[str(job.key["format"])]
    with tempfile.TemporaryDirectory() as folder:
        return [{**job.key, "form": cell.name, **_measure(cell, subject, Path(folder), ask)} for cell in cells]


def _measure(cell: Cell, subject: Subject, folder: Path, ask: Ask) -> Row:
    row = {"weights": subject.weights, "images": len(subject.images)}
    try:
        path = cell.make(subject, folder)
        logits = ask(subject, path)
    except ConversionError as error:
        return row | {"verdict": "not made", "why": " ".join(str(error).split())[:200]}
    rival, refusal = _rival_logits(cell, subject, folder, ask)
    figures = _figures(subject, logits)
    row |= {"kb": round(_bytes(path) / 1000), **figures}
    if rival is not None:
        row |= {f"stock_{name}": value for name, value in _figures(subject, rival).items()}
    return row | _verdict(cell, row, refusal)


def _rival_logits(cell: Cell, subject: Subject, folder: Path, ask: Ask) -> tuple[np.ndarray | None, str]:
    """The stock tool's logits; without them, why there are none."""
    if cell.stock is None:
        return None, cell.without_rival
    try:
        return ask(subject, cell.stock(subject, folder)), ""
    except Exception as error:  # a rival that fails in whatever way is a finding
        return None, f"the stock tool fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _figures(subject: Subject, logits: np.ndarray) -> dict[str, Any]:
    parity: Parity = compare(subject.logits, logits)
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (subject.logits, logits)]
    accuracy = None if subject.labels is None else round(float((logits.argmax(axis=1) == subject.labels).mean()), 4)
    return {
        "min_cosine": round(parity.min_cosine, 7),
        "mean_cosine": round(float((unit[0] * unit[1]).sum(axis=1).mean()), 7),
        "argmax_agreement": round(parity.argmax_agreement, 4),
        "accuracy": accuracy,
    }


def _verdict(cell: Cell, row: Mapping[str, Any], refusal: str) -> dict[str, str | None]:
    """Whether the form meets its bar, and by what it fails."""
    failures = list(_failures(cell, row))
    return {"verdict": "passes" if not failures else "fails", "why": "; ".join(failures) or refusal or None}


def _failures(cell: Cell, row: Mapping[str, Any]) -> Iterator[str]:
    if cell.is_float and row["min_cosine"] < FLOAT_COSINE:
        yield f"lowest cosine below {FLOAT_COSINE}"
    if cell.needs_argmax and row["argmax_agreement"] < 1:
        yield "answers differ"
    if "stock_mean_cosine" in row:
        if row["mean_cosine"] < row["stock_mean_cosine"]:
            yield "mean cosine below the stock tool's"
        what = "argmax_agreement" if row["accuracy"] is None else "accuracy"
        if row[what] < row[f"stock_{what}"]:
            yield f"{what} below the stock tool's"


# --- models -----------------------------------------------------------------------------------------------------------


def make_subject(name: str) -> Subject:
    """A model with the zoo's weights where there are some, else with random ones that hide nothing."""
    entry, card = _entry(name), _card(name)
    return _trained(entry, card) if card else _random(entry)


@torch.no_grad()
def _random(entry: ModelEntry) -> Subject:
    size, channels = entry.image_size, entry.in_chans
    images = photo_crops(size, channels, count=NUM_IMAGES, seed=1)
    calibration = photo_crops(size, channels, count=NUM_CALIBRATION, seed=0)
    model = settle_norms(randomize(entry.create()), _nchw(calibration[:8]))
    return _subject(entry, model, "random, every branch open", images, None, calibration)


def _trained(entry: ModelEntry, card: Card) -> Subject:
    recipe = load_recipe(Path(f"zoo:{card.name}"))
    split, spec = load_split(recipe), input_spec(recipe)
    model = load_model(recipe, find_checkpoint(card.name))
    test = base_test_images(split)
    chosen = np.linspace(0, len(test) - 1, NUM_IMAGES).astype(int)
    images = to_input([test.images[int(index)] for index in chosen], spec)
    train = np.linspace(0, len(split.train) - 1, NUM_CALIBRATION).astype(int)
    calibration = to_input([split.train.images[int(index)] for index in train], spec)
    return _subject(entry, model, f"zoo, {card.test_accuracy:.2%}", images, test.labels[chosen], calibration)


@torch.no_grad()
def _subject(
    entry: ModelEntry,
    model: nn.Module,
    weights: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    calibration: np.ndarray,
) -> Subject:
    model.eval()
    logits = np.concatenate([model(_nchw(batch)).numpy() for batch in np.array_split(images, 16)])
    return Subject(
        entry=entry,
        deployed=model.deploy(),  # type: ignore[operator]
        weights=weights,
        images=images,
        labels=labels,
        calibration=calibration,
        logits=logits,
    )


def _nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _entry(name: str) -> ModelEntry:
    return find_model(*name.split("/"))


def _card(name: str) -> Card | None:
    """The zoo's card of a model; of several, that of the data with most classes."""
    cards = [card for card in list_cards() if f"{card.family}/{card.variant}" == name]
    return max(cards, key=lambda card: len(card.labels), default=None)


def _weights_digest(name: str) -> str:
    card = _card(name)
    return sha256_of(find_checkpoint(card.name)) if card else "random"


# --- forms ------------------------------------------------------------------------------------------------------------


def _float32(subject: Subject, folder: Path) -> Path:
    path = folder / "float32.tflite"
    if not path.exists():
        tflite.convert_float(subject.deployed, subject.shape, subject.num_classes, path)
        gates.assert_builtin_ops(path)
    return path


def _float16(subject: Subject, folder: Path) -> Path:
    return tflite.halve_weights(_float32(subject, folder), folder / "float16.tflite")


def _dynamic(subject: Subject, folder: Path) -> Path:
    return tflite.quantize_dynamic(_float32(subject, folder), folder / "dynamic.tflite")


def _int8(subject: Subject, folder: Path, *, has_islands: bool) -> Path:
    return tflite.quantize_static(
        _float32(subject, folder),
        subject.calibration,
        folder / f"int8-{has_islands}.tflite",
        float_scopes=subject.entry.float_scopes if has_islands else (),
        has_islands=has_islands,
    )


def _stock_tflite(subject: Subject, folder: Path, *, is_static: bool) -> Path:
    """Ai-edge-quantizer as it comes, but for the head's signatures and the edges, which stay float in ours too."""
    path = folder / f"stock-{is_static}.tflite"
    if path.exists():
        return path
    with quiet():
        from ai_edge_quantizer import quantizer, recipe_manager

        recipe = recipe_manager.RecipeManager()
        if is_static:
            recipe.add_static_config(".*", "*", 8, 8)
        else:
            recipe.add_dynamic_config(".*", "*", 8)
        for scope, operation in ((tflite.HEAD_TENSORS, "*"), (".*", "INPUT"), (".*", "OUTPUT")):
            recipe.add_quantization_config(scope, operation, algorithm_key="no_quantize")
        stock = quantizer.Quantizer(str(_float32(subject, folder)), recipe.get_quantization_recipe())
        samples = [{"images": image[None]} for image in subject.calibration]
        ranges = stock.calibrate({flatbuffer.FEATURES: samples}, num_threads=1) if is_static else None
        stock.quantize(ranges).export_model(str(path), overwrite=True)
    return path


def _coreml(subject: Subject, folder: Path) -> Path:
    path = folder / "float16.mlpackage"
    return path if path.exists() else coreml.convert(subject.deployed, subject.shape, path, **_facts(subject))


def _facts(subject: Subject) -> dict[str, Any]:
    return {"input_spec_metadata": {}, "labels": [str(label) for label in range(subject.num_classes)]}


def _w8(subject: Subject, folder: Path) -> Path:
    return coreml_compress.quantize_weights(_coreml(subject, folder), folder / "w8.mlpackage")


def _w8a8(subject: Subject, folder: Path) -> Path:
    path = folder / "w8a8.mlpackage"
    calibration = subject.calibration
    return coreml_w8a8.convert(subject.deployed, subject.shape, path, calibration_images=calibration, **_facts(subject))


def _palette(subject: Subject, folder: Path) -> Path:
    return coreml_compress.palettize_weights(
        _coreml(subject, folder), folder / "palette.mlpackage", board=load_board(BOARD), num_bits=PALETTE_BITS
    )


def _stock_palette(subject: Subject, folder: Path) -> Path:
    with quiet():
        import coremltools.optimize.coreml as cto

        config = cto.OpPalettizerConfig(
            mode="uniform", nbits=PALETTE_BITS, weight_threshold=coreml_compress.WEIGHT_THRESHOLD
        )
        compressed = cto.palettize_weights(
            coreml.load(_coreml(subject, folder)), cto.OptimizationConfig(global_config=config)
        )
    return coreml.save(compressed, folder / "stock-palette.mlpackage")


TFLITE = (
    Cell("float32", _float32, is_float=True, needs_argmax=True),
    Cell("float16", _float16, is_float=True),
    Cell("dynamic", _dynamic, stock=partial(_stock_tflite, is_static=False)),
    Cell("int8 static", partial(_int8, has_islands=False), stock=partial(_stock_tflite, is_static=True)),
    Cell("int8 mixed", partial(_int8, has_islands=True), stock=partial(_stock_tflite, is_static=True)),
)
COREML = (
    Cell("float16", _coreml, is_float=True),
    Cell("w8", _w8, without_rival="coremltools' own form"),
    Cell("w8a8", _w8a8, without_rival="coremltools calibrates on macOS only"),
    Cell("palette6", _palette, stock=_stock_palette),
)


def tflite_logits(subject: Subject, path: Path) -> np.ndarray:
    """LiteRT's features, in a process of its own, through the model's linear head."""
    with opened(open_features, path) as features_of:
        features = np.concatenate([features_of(image[None]) for image in subject.images])
    with torch.no_grad():
        return np.asarray(subject.deployed.head(torch.from_numpy(features)).numpy())  # type: ignore[operator]


def package_logits(subject: Subject, path: Path) -> np.ndarray:
    """The saved program, evaluated in a process of its own."""
    with opened(coreml_logits, path) as logits_of:
        return np.concatenate([logits_of(image[None]) for image in subject.images])


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _notes(rows: Sequence[Row]) -> str:
    verdicts = [str(row["verdict"]) for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("passes", "fails", "not made"))
    trained = sorted({str(row["model"]) for row in rows if str(row["weights"]).startswith("zoo")})
    return (
        f"Cells so far: {counts}. Trained weights: {', '.join(trained) or 'none yet'}. A float form passes with a lowest "
        f"cosine of {FLOAT_COSINE} to PyTorch's logits, float32 also with the same answer to every image; a quantized one "
        "with a mean cosine and an accuracy (of untrained models: agreement with PyTorch) no lower than its rival's. "
        "Core ML is evaluated from the saved program, with what it declares float16 rounded so."
    )


if __name__ == "__main__":
    sys.exit(main())
