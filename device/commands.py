"""Commands over MQTT: each is checked, remembered before it is acknowledged, obeyed in a worker, and answered once.

learn         {"label": L, "frame_ids": [...]} or {"label": L, "features": [[...], ...], "backbone": SHA256?}
undo          {"lesson": ID?}        the command id of a lesson; without it, the last one
update        {"source": "dir:PATH"?, "channel": C?, "force": bool?, "accept_loss": bool?, "dry_run": bool?}
rollback      {}
set-sampling  {"max_fps": F?, "telemetry_interval_s": S?, "results": bool?, "reset": bool?}
snapshot      {}                     only where agent.toml says snapshot = true
rebirth       {}                     the retained state is published again
diagnostics   {}
status        {}

restore       {"accept_loss": bool?} only from a shell on this board (`device.ask`), which may give the others too

A payload that cannot be read is answered too: under its id where that can be read, else under `unreadable-` and the
beginning of its SHA-256. Each id is answered once, whatever comes under it later, also after a restart.
"""

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from device.contract.errors import DeviceError, MessageError, one_line
from device.contract.messages import MAX_PAYLOAD_BYTES, Command, Reply, decode_command, encode_reply
from device.contract.record import record
from device.contract.records import from_table
from device.contract.topics import is_id
from device.sampling import SamplingChange
from device.spool import Spool

MAX_QUEUED = 100
MAX_ID_CHARACTERS = 128
MAX_ERROR_CHARACTERS = 1000
REMEMBERED_S = 86400.0
"""How long a payload without a readable expiry is remembered, unless too many come."""

log = logging.getLogger(__name__)

Handler = Callable[[Any, str], dict[str, Any]]
"""Obeys one verb, given its arguments record and the command's id; what it returns is the reply's result. Raises
DeviceError."""


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
class RestoreArguments:
    """A backup of learned state lies beside the request; may it replace classes that it does not have?"""

    accept_loss: bool = False


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
LOCAL_ARGUMENTS: dict[str, type[Any]] = ARGUMENTS | {"restore": RestoreArguments}
"""Of what a shell on this board may ask for."""


class Commands:
    """Takes payloads from the MQTT thread and runs handlers in workers: one for slots (minutes), one for the rest.

    Args:
        spool: remembers commands and holds the replies.
        handlers: one for each verb of `LOCAL_ARGUMENTS`.
        refused: verbs that this board's operator does not want obeyed.
        was_done: the result of a command, by its id, that is known to be done though it has no reply yet.
        clock: wall-clock seconds, to compare with a command's expiry.
    """

    def __init__(
        self,
        spool: Spool,
        handlers: dict[str, Handler],
        *,
        refused: Collection[str] = (),
        was_done: Callable[[str], dict[str, Any] | None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._spool, self._handlers, self._was_done, self._clock = spool, handlers, was_done, clock
        self._refused = refused
        self.updates = Worker("updates")
        self._quick = Worker("commands")

    def start(self) -> None:
        """Answer what a crash interrupted, then start the workers."""
        for command_id in self._spool.unanswered_commands():
            result = self._was_done(command_id)
            unknown = "the agent stopped while this waited or ran; it may have been done, ask for the status first"
            self._answer(
                Reply(id=command_id, ok=False, error=unknown)
                if result is None
                else Reply(id=command_id, ok=True, result=result)
            )
        self.updates.start()
        self._quick.start()

    @property
    def threads(self) -> list["Worker"]:
        return [self.updates, self._quick]

    def receive(self, payload: bytes) -> None:
        """Take one command. When this returns, it is remembered on the disk, so the broker may forget it."""
        try:
            command = decode_command(payload)
            if not is_command_id(command.id):
                raise MessageError(f"its id must have 1 to {MAX_ID_CHARACTERS} printable ASCII characters")
        except MessageError as error:
            self._refuse_unreadable(payload, error)
            return
        if not self._spool.receive_command(command.id, command.expires):
            return
        self._take(command, ARGUMENTS, self._answer, refused=self._refused)

    def ask(self, command: Command, answer: Callable[[Reply], None]) -> None:
        """Take a command from a shell on this board; the reply is for that alone."""
        self._take(command, LOCAL_ARGUMENTS, answer)

    def _take(
        self,
        command: Command,
        verbs: Mapping[str, type[Any]],
        answer: Callable[[Reply], None],
        *,
        refused: Collection[str] = (),
    ) -> None:
        try:
            arguments = self._check(command, verbs, refused)
        except MessageError as error:
            answer(Reply(id=command.id, ok=False, error=one_line(error)))
            return
        worker = self.updates if command.verb in ("update", "rollback") else self._quick
        if not worker.submit(lambda: self._obey(command, arguments, answer)):
            answer(Reply(id=command.id, ok=False, error=f"{MAX_QUEUED} commands are waiting; send it later"))

    def _check(self, command: Command, verbs: Mapping[str, type[Any]], refused: Collection[str]) -> Any:
        if command.verb not in verbs or command.verb not in self._handlers:
            known = sorted(verbs.keys() & self._handlers.keys())
            raise MessageError(f"verb {command.verb!r} is unknown; verbs are {', '.join(known)}")
        if command.verb in refused:
            raise MessageError(f"{command.verb} is not allowed on this board; see refused_commands in its agent.toml")
        arguments = from_table(verbs[command.verb], command.arguments, where=command.verb, error=MessageError)
        self._require_fresh(command)
        return arguments

    def _require_fresh(self, command: Command) -> None:
        if command.expires <= self._clock():
            raise MessageError(
                f"expired {self._clock() - command.expires:.0f} s ago by this board's clock; send it again"
            )

    def _obey(self, command: Command, arguments: Any, answer: Callable[[Reply], None]) -> None:
        reply = Reply(id=command.id, ok=False, error="internal error; see the agent's log")
        try:
            self._require_fresh(command)  # it may have waited
            reply = Reply(id=command.id, ok=True, result=self._handlers[command.verb](arguments, command.id))
        except DeviceError as error:
            log.warning("%s refused: %s", command.verb, error)
            reply = Reply(id=command.id, ok=False, error=one_line(error))
        finally:
            answer(reply)

    def _refuse_unreadable(self, payload: bytes, error: MessageError) -> None:
        """Answer a payload that breaks the contract, under its own id where that can be read."""
        log.warning("command refused: %s", one_line(error)[:MAX_ERROR_CHARACTERS])
        command_id = _readable_id(payload) or f"unreadable-{hashlib.sha256(payload).hexdigest()[:32]}"
        if self._spool.receive_command(command_id, self._clock() + REMEMBERED_S):
            self._answer(Reply(id=command_id, ok=False, error=one_line(error)))

    def _answer(self, reply: Reply) -> None:
        self._spool.answer_command(reply.id, _encode(reply))


def _encode(reply: Reply) -> bytes:
    """The reply's payload; one that cannot be sent becomes an error that says so."""
    if reply.error is not None and len(reply.error) > MAX_ERROR_CHARACTERS:
        reply = replace(reply, error=f"{reply.error[:MAX_ERROR_CHARACTERS]}...")
    try:
        payload = encode_reply(reply)
        problem = f"{len(payload)} bytes" if len(payload) > MAX_PAYLOAD_BYTES else ""
    except (TypeError, ValueError) as error:
        payload, problem = b"", str(error)
    if not problem:
        return payload
    log.error("the result of command %s cannot be sent: %s", reply.id, problem)
    done = f"it was done, but its result cannot be sent ({problem})" if reply.ok else "its error cannot be sent"
    return encode_reply(Reply(id=reply.id, ok=False, error=f"{done}; see the agent's log"))


def _readable_id(payload: bytes) -> str | None:
    try:
        table = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    command_id = table.get("id") if isinstance(table, dict) else None
    return command_id if isinstance(command_id, str) and is_command_id(command_id) else None


def is_command_id(text: str) -> bool:
    """Whether a command may be called so: 1 to 128 printable ASCII characters."""
    return 0 < len(text) <= MAX_ID_CHARACTERS and text.isascii() and text.isprintable()


class Worker(threading.Thread):
    """Runs jobs one after the other. An unexpected exception is logged: inference and the next job go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=MAX_QUEUED)
        self._busy_since: float | None = None

    def busy_s(self) -> float:
        """How long the present job has given no sign of life, seconds; 0 without one."""
        since = self._busy_since
        return time.monotonic() - since if since is not None else 0.0

    def beat(self) -> None:
        """The present job is not done, but goes on; called by the job."""
        self._busy_since = time.monotonic()

    def submit(self, job: Callable[[], None]) -> bool:
        """Queue a job; False when too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            self._busy_since = time.monotonic()
            try:
                job()
            except Exception:  # this thread's outer loop: for example a disk that is full
                log.exception("unexpected error in a command; going on")
            self._busy_since = None
