"""Which iOS a Core ML package is for: what a form needs, and what a board's profile says its boards run.

Source: coremltools 9.0, the opset in which an operation first stands (`iOS17`, `iOS18`), and its multifunction packages,
which are always of specification 9.
"""

from typing import Any

from converters.errors import ConversionError
from device.contract.board import Board

MINIMUM_IOS = 17
"""What every package here needs: int8 activations came with iOS 17."""
MULTIFUNCTION_IOS = 18
GROUPED_PALETTES_IOS = 18
_SPECIFICATION_MINUS_IOS = 8 - 17  # specification 8 is iOS 17, 9 is iOS 18
_NEWEST_IOS = 18


def coremltools_target(ct: Any, minimum_ios: int) -> Any:
    """The `minimum_deployment_target` of an iOS.

    Raises:
        ConversionError: not an iOS that we convert for.
    """
    if not MINIMUM_IOS <= minimum_ios <= _NEWEST_IOS:
        raise ConversionError(f"minimum_ios must be {MINIMUM_IOS}..{_NEWEST_IOS}, got {minimum_ios}")
    return getattr(ct.target, f"iOS{minimum_ios}")


def ios_of_specification(version: int) -> int:
    """The oldest iOS that reads a package of this specification version."""
    return version - _SPECIFICATION_MINUS_IOS


def require_ios(board: Board, needed: int, *, form: str) -> None:
    """Refuse a form of a package that a board cannot run.

    Args:
        board: the profile of the board that the package is for.
        needed: the oldest iOS that runs the form.
        form: what to call it in an error, for example "a multifunction package".

    Raises:
        ConversionError: the board runs no Core ML, or an older iOS than the form needs.
    """
    found = board.support.minimum_ios
    if found is None:
        raise ConversionError(f"board {board.name} does not run Core ML; choose a board whose formats name coreml")
    if found < needed:
        raise ConversionError(
            f"{form} needs iOS {needed}, but boards of {board.name} may run iOS {found}; raise support.minimum_ios in "
            f"firmware_configs/{board.name}.toml if all of them are newer, or choose another form"
        )
