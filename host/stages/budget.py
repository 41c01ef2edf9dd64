"""Whether artifacts fit a board, before they are shipped to it."""

from collections.abc import Mapping

from device.contract.board import Board
from host.errors import ExportError


def require_budget(board: Board, sizes: Mapping[str, int], *, coreml_bytes: int = 0) -> None:
    """Refuse artifacts that a board cannot take.

    Args:
        board: its profile.
        sizes: bytes of each TFLite artifact, by precision.
        coreml_bytes: bytes of the Core ML package; 0 where there is none.

    Raises:
        ExportError: the board runs none of them, or one that it would run is over its budget.
    """
    offered: dict[str, int] = {}
    if "tflite" in board.support.formats:
        offered |= {name: size for name, size in sizes.items() if name in board.support.precisions}
    if "coreml" in board.support.formats and coreml_bytes:
        offered["Core ML"] = coreml_bytes
    if not offered:
        raise ExportError(f"{board.name}: runs none of the artifacts; take it out of export.boards")
    for name, size in offered.items():
        if size > board.budget.artifact_bytes:
            raise ExportError(
                f"{board.name}: the {name} artifact has {size} bytes, its budget is {board.budget.artifact_bytes}; "
                "choose a smaller variant, or take the board out of export.boards"
            )
