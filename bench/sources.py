"""The files whose code decides a measurement, found by following imports: what a row's recipe is a digest of.

A list kept by hand is out of date with the first helper that a colleague takes out of a model.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bench.jobs import digest_code
from host.models.entry import ModelEntry

ROOT = Path(__file__).parents[1]
UNDECIDING = frozenset({"errors", "files", "quiet"})
"""Last names of modules that decide no figure: wording of errors, atomic writing, silence."""


def code_of(*modules: str) -> tuple[Path, ...]:
    """The files of modules and of all that they import from this repository, directly or through others, sorted."""
    found: set[Path] = set()
    todo = [_file(module) for module in modules]
    while todo:
        path = todo.pop()
        if path is not None and path not in found and path.stem not in UNDECIDING:
            found.add(path)
            todo += map(_file, _imports(path))
    return tuple(sorted(found))


@cache
def digest_of(*modules: str) -> str:
    """`digest_code` of all that modules come down to."""
    return digest_code(*code_of(*modules))


def module_of(entry: ModelEntry) -> str:
    """Where a model is built: not every family has a file of its own name."""
    return str(getattr(entry.build, "func", entry.build).__module__)


def _imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, wherever in it; names that are functions or classes come along."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> Path | None:
    """None for a package, a name that is no module, and what others wrote."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return path if path.is_file() else None
