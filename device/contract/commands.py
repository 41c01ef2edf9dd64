"""The arguments of each command, and the id under which a command is answered: the same for agents and who simulates them.

learn         {"label": L, "frame_ids": [...]} or {"label": L, "features": [[...], ...], "backbone": SHA256?}
undo          {"lesson": ID?}        the command id of a lesson; without it, the last one
update        {"source": "dir:PATH"?, "channel": C?, "force": bool?, "accept_loss": bool?, "dry_run": bool?}
rollback      {}
set-sampling  {"max_fps": F?, "telemetry_interval_s": S?, "results": bool?, "reset": bool?}
snapshot      {}                     only where agent.toml says snapshot = true
rebirth       {}                     the retained state is published again
diagnostics   {}
status        {}

A payload that cannot be read is answered too: under its id where that can be read, else under `unreadable-` and the
beginning of its SHA-256.
"""

import hashlib
import json
from typing import Any

from device.contract.errors import MessageError
from device.contract.messages import Command, decode_command
from device.contract.record import record
from device.contract.topics import is_id

MAX_ID_CHARACTERS = 128
MAX_FPS = 1000.0
TELEMETRY_S = (1.0, 86400.0)


@record(frozen=True, slots=True, kw_only=True)
class LearnArguments:
    """One label, and the examples of it: frames still in the ring, or features [n, D].

    `backbone` is whose features they are, where the sender knows; another one's are refused.
    """

    label: str
    frame_ids: tuple[str, ...] = ()
    features: tuple[tuple[float, ...], ...] = ()
    backbone: str | None = None

    def __post_init__(self) -> None:
        if bool(self.frame_ids) == bool(self.features):
            raise MessageError("learn: give either frame_ids or features")


@record(frozen=True, slots=True, kw_only=True)
class UpdateArguments:
    """Where to look, instead of the configured source, and what to do with what is there.

    Attributes:
        source: None: the configured one.
        channel: None: the configured one. It counts for this update only.
        force: try a bundle again that was rejected here before.
        accept_loss: take it also where classes taught here would be dropped.
        dry_run: install nothing, say what is offered and what would become of the taught classes.
    """

    source: str | None = None
    channel: str | None = None
    force: bool = False
    accept_loss: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.channel is not None and not is_id(self.channel):
            raise MessageError(f"update: channel {self.channel!r:.100} is no name; use letters, digits, - and _")


@record(frozen=True, slots=True, kw_only=True)
class UndoArguments:
    """Which lesson to take back, by the id of its command; None: the last one."""

    lesson: str | None = None


@record(frozen=True, slots=True, kw_only=True)
class SamplingChange:
    """What was set by command; None: as configured, or in a command: as it was. `reset` forgets what was set before."""

    max_fps: float | None = None
    telemetry_interval_s: float | None = None
    results: bool | None = None
    reset: bool = False

    def __post_init__(self) -> None:
        if self.max_fps is not None and not 0 <= self.max_fps <= MAX_FPS:
            raise MessageError(f"set-sampling: max_fps must be 0..{MAX_FPS:g}, got {self.max_fps:g}")
        low, high = TELEMETRY_S
        if self.telemetry_interval_s is not None and not low <= self.telemetry_interval_s <= high:
            raise MessageError(
                f"set-sampling: telemetry_interval_s must be {low:g}..{high:g}, got {self.telemetry_interval_s:g}"
            )

    @property
    def is_empty(self) -> bool:
        return self == SamplingChange()


@record(frozen=True, slots=True, kw_only=True)
class NoArguments:
    """For verbs that take none."""


ARGUMENTS: dict[str, type[Any]] = {
    "learn": LearnArguments,
    "undo": UndoArguments,
    "update": UpdateArguments,
    "rollback": NoArguments,
    "set-sampling": SamplingChange,
    "snapshot": NoArguments,
    "rebirth": NoArguments,
    "diagnostics": NoArguments,
    "status": NoArguments,
}


def read_command(payload: bytes) -> Command:
    """Read a command that can be remembered under its id; MessageError says what is wrong with another."""
    command = decode_command(payload)
    if not is_command_id(command.id):
        raise MessageError(f"its id must have 1 to {MAX_ID_CHARACTERS} printable ASCII characters")
    return command


def is_command_id(text: str) -> bool:
    """Whether a command may be called so: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= MAX_ID_CHARACTERS and text.isascii() and text.isprintable()


def answerable_id(payload: bytes) -> str:
    """The id under which a payload is answered that `read_command` refused."""
    try:
        table = json.loads(payload)
    except (ValueError, RecursionError):
        table = None
    command_id = table.get("id") if isinstance(table, dict) else None
    if isinstance(command_id, str) and is_command_id(command_id):
        return command_id
    return f"unreadable-{hashlib.sha256(payload).hexdigest()[:32]}"
