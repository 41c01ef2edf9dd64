"""Small trained checkpoints that ship with the package: safetensors in float16, each with a card in its header.

`fieldvit models zoo` lists them, `fieldvit run zoo:NAME` takes one to a board as it is, and a recipe starts from one with
`model = { family = …, variant = …, pretrained = true, weights = "zoo:NAME" }`. Finding them and reading their cards needs
the standard library only; `host.zoo.save` writes them.
"""

import difflib
from pathlib import Path

from host.errors import ModelError

FOLDER = Path(__file__).parent
PREFIX = "zoo:"


def find_checkpoint(name: str) -> Path:
    """The file of a checkpoint.

    Raises:
        ModelError: there is none of that name; the message lists them.
    """
    path = FOLDER / f"{name}.safetensors"
    names = sorted(file.stem for file in FOLDER.glob("*.safetensors"))
    if path.stem not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(f"the zoo has no {name!r}; it has {', '.join(names) or 'no checkpoint yet'}{hint}")
    return path
