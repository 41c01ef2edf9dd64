"""The cards of checkpoints: what each is, what it was trained on under which terms, and how well it does."""

import json
from dataclasses import dataclass
from pathlib import Path

from device.contract.records import from_table
from host import zoo
from host.data.spec import DataSpec
from host.errors import ModelError

KEY = "card"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a checkpoint is, what it was trained on under which terms, and how well it does.

    Attributes:
        name: of the file, without its ending.
        family, variant: of the model.
        labels: the classes, in the order of the logits.
        data: as a recipe says it.
        seed: of the split of the data, and of training.
        description: of the data, in words.
        terms: of the data.
        recipe: hash of how it was trained; `bench/zoo.py` has the recipe.
        epochs: passes over the training images.
        test_accuracy: share of the test images, 0..1, of this file.
        test_images: how many there were.
    """

    name: str
    family: str
    variant: str
    labels: tuple[str, ...]
    data: DataSpec
    seed: int
    description: str
    terms: str
    recipe: str
    epochs: int
    test_accuracy: float
    test_images: int


def read_card(name: str) -> Card:
    """The card of one checkpoint.

    Raises:
        ModelError: there is none of that name, or its file is damaged.
    """
    path = zoo.find_checkpoint(name)
    try:
        table = json.loads(_metadata(path)[KEY])
    except (ValueError, KeyError) as error:
        raise ModelError(f"{path}: has no card that can be read ({error!r}); install the package again") from error
    return from_table(Card, table, where=path.name, error=ModelError)


def list_cards() -> list[Card]:
    """All checkpoints, by name."""
    return [read_card(path.stem) for path in sorted(zoo.FOLDER.glob("*.safetensors"))]


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes with the length of its header, little-endian, then the header in JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut off")
        metadata: dict[str, str] = json.loads(file.read(length))["__metadata__"]
    return metadata
