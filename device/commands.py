"""Commands over MQTT: each is checked, remembered before it is acknowledged, obeyed in a worker, and answered once.

`device/contract/commands.py` has what each takes. A shell on this board (`device.ask`) may give them too, and alone
`restore {"accept_loss": bool?}`.

Each id is answered once, whatever comes under it later, also after a restart.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from device.contract.commands import ARGUMENTS, answerable_id, read_command
from device.contract.errors import DeviceError, MessageError, one_line
from device.contract.messages import MAX_PAYLOAD_BYTES, Command, Reply, encode_reply
from device.contract.record import record
from device.contract.records import from_table
from device.spool import Spool

MAX_QUEUED = 100
MAX_ERROR_CHARACTERS = 1000
REMEMBERED_S = 86400.0
"""How long a payload without a readable expiry is remembered, unless too many come."""

log = logging.getLogger(__name__)

Handler = Callable[[Any, str], dict[str, Any]]
"""Obeys one verb, given its arguments record and the command's id; what it returns is the reply's result. Raises
DeviceError."""


@record(frozen=True, slots=True, kw_only=True)
class RestoreArguments:
    """A backup of learned state lies beside the request; may it replace classes that it does not have?"""

    accept_loss: bool = False


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
            command = read_command(payload)
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
        command_id = answerable_id(payload)
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
