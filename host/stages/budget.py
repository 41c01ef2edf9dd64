"""Whether artifacts fit a board: estimated before training, counted before they are shipped to it.

A bundle may hold a float32 artifact that is too large for one of its boards: the board takes the smallest it runs.
"""

from collections.abc import Mapping, Sequence

from device.contract.board import Board
from host.errors import ExportError
from host.models.entry import ModelEntry

_BYTES = {"int8": 1, "float32": 4}
"""What a parameter takes in each TFLite artifact; the graph and the scales come on top."""
_COREML_BYTES = 2  # float16


def int8_bytes(parameters: int) -> int:
    """Bytes of the int8 artifact, estimated: it is a little larger."""
    return parameters * _BYTES["int8"]


def over_budget(board: Board, parameters: int, *, has_coreml: bool) -> tuple[str, int] | None:
    """The first artifact of a model that is over the board's budget, with its estimated bytes; None where all fit."""
    sizes = {precision: parameters * size for precision, size in _BYTES.items()}
    return _first_over(board, _offered(board, sizes, parameters * _COREML_BYTES if has_coreml else 0))


def require_room(
    name: str, parameters: int, boards: Sequence[Board], family: Sequence[ModelEntry], *, has_coreml: bool
) -> None:
    """Refuse before it is trained what `require_budget` would refuse afterwards.

    Args:
        name: of the model.
        parameters: as it will be trained, with the data's classes.
        boards: profiles of all boards that it is for.
        family: the models to choose a smaller one from.
        has_coreml: whether Core ML will be written too.

    Raises:
        ExportError: an artifact is over a board's budget by its estimate; names the largest model that would fit all.
    """
    for board in boards:
        over = over_budget(board, parameters, has_coreml=has_coreml)
        if over:
            fitting = [
                m for m in family if not any(over_budget(b, m.parameters, has_coreml=has_coreml) for b in boards)
            ]
            largest = max(fitting, key=lambda entry: entry.parameters, default=None)
            raise ExportError(
                f"{board.name}: the {over[0]} artifact of {name} would have about {over[1] / 1e6:.1f} MB ({parameters:,} "
                f"parameters), its budget is {board.budget.artifact_bytes / 1e6:.1f} MB; choose "
                f"{largest.name if largest else 'another family'}, or take the board out of export.boards"
            )


def require_budget(board: Board, sizes: Mapping[str, int], *, coreml_bytes: int = 0) -> None:
    """Refuse artifacts that a board cannot take.

    Args:
        board: its profile.
        sizes: bytes of each TFLite artifact, by precision.
        coreml_bytes: bytes of the Core ML package; 0 where there is none.

    Raises:
        ExportError: the board runs none of them, or the smallest that it runs is over its budget.
    """
    offered = _offered(board, sizes, coreml_bytes)
    if not offered:
        raise ExportError(f"{board.name}: runs none of the artifacts; take it out of export.boards")
    over = _first_over(board, offered)
    if over:
        raise ExportError(
            f"{board.name}: the {over[0]} artifact has {over[1]} bytes, its budget is {board.budget.artifact_bytes}; "
            "choose a smaller variant, or take the board out of export.boards"
        )


def _offered(board: Board, sizes: Mapping[str, int], coreml_bytes: int) -> dict[str, int]:
    """What a board needs to have room for, with its bytes: one TFLite artifact, the smallest that it runs, and Core ML."""
    runs = {name: size for name, size in sizes.items() if name in board.support.precisions}
    offered: dict[str, int] = {}
    if "tflite" in board.support.formats and runs:
        smallest = min(runs, key=runs.__getitem__)
        offered[smallest] = runs[smallest]
    if "coreml" in board.support.formats and coreml_bytes:
        offered["Core ML"] = coreml_bytes
    return offered


def _first_over(board: Board, offered: Mapping[str, int]) -> tuple[str, int] | None:
    return next(((name, size) for name, size in offered.items() if size > board.budget.artifact_bytes), None)
