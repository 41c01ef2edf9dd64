"""Recipes: TOML files that say what to train, how to compress it, and for which boards.

Every table becomes a frozen dataclass; an unknown key is an error. A stage may be missing: `distill` may be left out.
"""

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from device.contract.board import board_names, load_board
from device.contract.errors import ConfigError
from device.contract.records import from_table, to_table
from host import zoo
from host.data.spec import DataSpec
from host.distill.spec import FROM_RECIPE, DistillSpec
from host.errors import RecipeError
from host.files import absolute
from host.quantize.spec import COREML_FORMS, HALF, QuantizeSpec
from host.training.config import TrainConfig
from host.zoo.cards import read_card

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
FORMATS = ("tflite", "coreml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A family and a variant, as `fieldvit models` lists them.

    Attributes:
        options: what the family's own arguments are to be instead of the variant's, for example `depth` or `stages`.
        pretrained: start from published weights: those in `weights`, or where no file is named the hub's.
        weights: `zoo:NAME`, or a safetensors file; a relative path starts at the recipe's folder, `~` is the home
            directory.
        licence: of those weights, as an SPDX identifier or in words; where it is empty, what the hub states.
    """

    family: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for name in ("weights", "licence"):
            value = getattr(self, name)
            if value and not self.pretrained:
                raise RecipeError(f"model.{name} = {value!r} is only read with model.pretrained = true; add it")

    def found_from(self, folder: Path) -> Self:
        """The same with the path of its weights made absolute, from the folder that the recipe lies in."""
        if self.weights.startswith(zoo.PREFIX):
            return replace(self, weights=str(zoo.find_checkpoint(self.weights.removeprefix(zoo.PREFIX))))
        return replace(self, weights=absolute(self.weights, folder)) if self.weights else self


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """The [teacher] table: a teacher that is trained first, on the same data."""

    model: ModelSpec
    train: TrainConfig

    def __post_init__(self) -> None:
        _require_weights(self.model, self.train, "teacher.")


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
    """Formats to write, the form of the Core ML package (`COREML_FORMS`), and boards to write them for.

    `migrate_from` names earlier bundles: what boards have learned on them is moved to this one, by projectors that it then
    holds. A relative path starts at the recipe's folder, `~` is the home directory.
    """

    formats: tuple[str, ...] = FORMATS
    coreml: str = HALF
    boards: tuple[str, ...] = ("generic-x86-64",)
    migrate_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.formats) - set(FORMATS)
        if unknown or "tflite" not in self.formats:
            raise RecipeError(f"export.formats must hold 'tflite' and may hold 'coreml', got {list(self.formats)}")
        if self.coreml not in COREML_FORMS:
            raise RecipeError(f"export.coreml must be one of {', '.join(COREML_FORMS)}, got {self.coreml!r}")
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
    teacher: TeacherSpec | None = None
    quantize: QuantizeSpec = field(default_factory=QuantizeSpec)
    continual: ContinualSpec = field(default_factory=ContinualSpec)
    export: ExportSpec = field(default_factory=ExportSpec)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecipeError(f"name {self.name!r} must match {_NAME.pattern}")
        if self.task != "classify":
            raise RecipeError(f"task {self.task!r} is unknown; this version knows 'classify'")
        if (self.distill is not None and self.distill.teacher == FROM_RECIPE) != (self.teacher is not None):
            raise RecipeError(
                'a table teacher, with model and train, and distill.teacher = "train" go together; give both or none'
            )
        _require_weights(self.model, self.train)
        if self.train.epochs == 0 and self.distill:
            raise RecipeError("train.epochs = 0 leaves the weights as they are; leave the table distill out")
        if self.seed < 0:
            raise RecipeError(f"seed must be 0 or more, got {self.seed}")
        if not _VERSION.fullmatch(self.version) or self.release < 1:
            raise RecipeError(f"version must be like 1.2.3 and release 1 or more, got {self.version!r}, {self.release}")

    def table(self) -> dict[str, Any]:
        """The resolved recipe as a bundle states it: of files and folders only the names, not where they lay."""
        table: dict[str, Any] = to_table(self)
        table["model"]["weights"] = Path(self.model.weights).name
        table["export"]["migrate_from"] = [Path(bundle).name for bundle in self.export.migrate_from]
        if self.data.is_path:
            table["data"]["source"] = f"{self.data.kind}:{Path(self.data.location).name}"
        if self.distill and self.distill.is_path:
            table["distill"]["teacher"] = Path(self.distill.teacher).name
        if self.teacher:
            table["teacher"]["model"]["weights"] = Path(self.teacher.model.weights).name
        return table

    def found_from(self, folder: Path) -> Self:
        """The same with all paths made absolute, from the folder that the recipe lies in."""
        teacher = self.teacher and replace(self.teacher, model=self.teacher.model.found_from(folder))
        distill = self.distill and self.distill.found_from(folder)
        earlier = tuple(absolute(bundle, folder) for bundle in self.export.migrate_from)
        return replace(
            self,
            data=self.data.found_from(folder),
            model=self.model.found_from(folder),
            distill=distill,
            teacher=teacher,
            export=replace(self.export, migrate_from=earlier),
        )

    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.table(), sort_keys=True).encode()).hexdigest()


def _require_weights(model: ModelSpec, train: TrainConfig, table: str = "") -> None:
    if train.epochs == 0 and not model.pretrained:
        raise RecipeError(
            f"{table}train.epochs = 0 leaves the weights as they are; start from some: {table}model.pretrained = true"
        )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; `zoo:NAME` is the recipe that takes a checkpoint of the zoo to boards as it is.

    Raises:
        RecipeError: no such file, not TOML, or a wrong, unknown or missing key; the message names it.
        ModelError: the zoo has no such checkpoint.
    """
    if str(path).startswith(zoo.PREFIX):
        return _zoo_recipe(str(path).removeprefix(zoo.PREFIX))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8'}); name a recipe, or start from a copy of host/recipes/quickstart.toml"
        ) from error
    return parse_recipe(text, where=str(path)).found_from(path.parent)


def builtin_recipe(name: str) -> Recipe:
    """A recipe that ships with the package."""
    text = resources.files("host.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return parse_recipe(text, where=f"{name}.toml")


def _zoo_recipe(name: str) -> Recipe:
    card = read_card(name)
    return Recipe(
        name=card.name,
        seed=card.seed,
        data=card.data,
        model=ModelSpec(
            family=card.family,
            variant=card.variant,
            pretrained=True,
            weights=str(zoo.find_checkpoint(name)),
            licence=card.terms,
        ),
        train=TrainConfig(epochs=0),
        continual=ContinualSpec(max_classes=4 * len(card.labels)),
        export=ExportSpec(boards=tuple(dict.fromkeys((*ExportSpec().boards, *board_names())))),
    )


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
