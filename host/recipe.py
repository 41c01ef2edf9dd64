"""Recipes: TOML files that say what to train, how to compress it, and for which boards.

Every table becomes a frozen dataclass; an unknown key is an error. A stage may be missing: `distill` may be left out.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from device.contract.board import load_board
from device.contract.errors import ConfigError
from device.contract.records import from_table, to_table
from host.errors import RecipeError
from host.quantize.spec import QuantizeSpec
from host.training.config import TrainConfig

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
FORMATS = ("tflite", "coreml")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Where the images come from. `digits` are scikit-learn's; `held_back` classes are left for the field to teach."""

    source: str
    held_back: tuple[str, ...] = ("8", "9")

    def __post_init__(self) -> None:
        if self.source != "digits":
            raise RecipeError(f"data.source {self.source!r} is unknown; this version reads 'digits'")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A family and a variant, as `fieldvit models` lists them.

    `pretrained` starts from published weights: from the safetensors file `weights`, or where none is named from the hub.
    """

    family: str
    variant: str
    pretrained: bool = False
    weights: str = ""

    def __post_init__(self) -> None:
        if self.weights and not self.pretrained:
            raise RecipeError(f"model.weights = {self.weights!r} is only read with model.pretrained = true; add it")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """Distillation from a teacher that is trained first, on the same data."""

    method: str = "soft"
    teacher: str = "cnn"
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.method != "soft" or self.teacher != "cnn":
            raise RecipeError("distill: this version knows method 'soft' and teacher 'cnn'")
        if self.temperature <= 0 or not 0 <= self.weight <= 1:
            raise RecipeError("distill: temperature must be above 0 and weight within 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinualSpec:
    """What the board may learn, and how; `max_drop` is the share of old-class accuracy an update may cost."""

    method: str = "slda"
    shrinkage: float = 0.03
    max_classes: int = 32
    max_drop: float = 0.02

    def __post_init__(self) -> None:
        if self.method != "slda":
            raise RecipeError(f"continual.method {self.method!r} is unknown; this version knows 'slda'")
        if self.max_classes < 2:
            raise RecipeError(f"continual.max_classes must be 2 or more, got {self.max_classes}")
        if not 0 < self.shrinkage < 1 or not 0 <= self.max_drop <= 1:
            raise RecipeError("continual: shrinkage must be within 0..1 and max_drop within 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """Formats to write and boards to write them for."""

    formats: tuple[str, ...] = FORMATS
    boards: tuple[str, ...] = ("generic-x86-64",)

    def __post_init__(self) -> None:
        unknown = set(self.formats) - set(FORMATS)
        if unknown or "tflite" not in self.formats:
            raise RecipeError(f"export.formats must hold 'tflite' and may hold 'coreml', got {list(self.formats)}")
        if not self.boards:
            raise RecipeError("export.boards must name at least one board; 'fieldvit boards' lists them")
        for board in self.boards:
            load_board(board)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole recipe. `version` and `release` go into the manifest: raise both for every publication."""

    name: str
    data: DataSpec
    model: ModelSpec
    train: TrainConfig
    task: str = "classify"
    seed: int = 0
    version: str = "0.1.0"
    release: int = 1
    distill: DistillSpec | None = None
    quantize: QuantizeSpec = field(default_factory=QuantizeSpec)
    continual: ContinualSpec = field(default_factory=ContinualSpec)
    export: ExportSpec = field(default_factory=ExportSpec)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecipeError(f"name {self.name!r} must match {_NAME.pattern}")
        if self.task != "classify":
            raise RecipeError(f"task {self.task!r} is unknown; this version knows 'classify'")
        if self.seed < 0:
            raise RecipeError(f"seed must be 0 or more, got {self.seed}")
        if not _VERSION.fullmatch(self.version) or self.release < 1:
            raise RecipeError(f"version must be like 1.2.3 and release 1 or more, got {self.version!r}, {self.release}")

    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(to_table(self), sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: no such file, not TOML, or a wrong, unknown or missing key; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}); name a recipe, or start from a copy of host/recipes/quickstart.toml"
        ) from error
    return parse_recipe(text, where=str(path))


def builtin_recipe(name: str) -> Recipe:
    """A recipe that ships with the package."""
    text = resources.files("host.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, where=f"{name}.toml")


def parse_recipe(text: str, *, where: str) -> Recipe:
    """Build a recipe from TOML text; `where` names it in messages."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not TOML ({error})") from error
    try:
        return from_table(Recipe, table, where=where, error=RecipeError)
    except ConfigError as error:
        raise RecipeError(f"{where}: {error}") from error
