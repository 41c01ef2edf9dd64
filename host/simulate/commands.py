"""Commands to one simulated board: each id is obeyed at most once and answered once, as by the agent's `device/commands.py`."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from device.contract.commands import ARGUMENTS, answerable_id, read_command
from device.contract.errors import DeviceError, MessageError, one_line
from device.contract.messages import Command, Reply
from device.contract.records import from_table

MAX_QUEUED = 100
MAX_COMMANDS = 10_000
"""Ids remembered; the oldest are forgotten first."""
MAX_ERROR_CHARACTERS = 1000
LONG = ("update", "rollback")
"""What takes minutes on a board: obeyed one after the other, beside the rest."""
INTERRUPTED = "the agent stopped while this waited or ran; it may have been done, ask for the status first"

Result = dict[str, Any]
Quick = Callable[[Any, str], Result]
Long = Callable[[Any, str], Awaitable[Result]]
"""Obey a verb, given its arguments and the command's id; the reply's result, or DeviceError."""


class Commands:
    """Takes payloads and answers them.

    Args:
        quick: for each verb but those of `LONG`.
        long: for those.
        answer: gets each reply, once.
        clock: the board's wall clock, Unix seconds.
        start: runs a coroutine for as long as this boot lasts.
    """

    def __init__(
        self,
        *,
        quick: Mapping[str, Quick],
        long: Mapping[str, Long],
        answer: Callable[[Reply], None],
        clock: Callable[[], float],
        start: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._quick, self._long, self._answer, self._clock, self._start = quick, long, answer, clock, start
        self._known: dict[str, None] = {}
        self._open: dict[str, None] = {}
        self._turn = asyncio.Lock()

    def receive(self, payload: bytes) -> bool:
        """Take one command; False when its id is known already."""
        try:
            command = read_command(payload)
        except MessageError as error:
            return self._refuse(answerable_id(payload), error)
        if not self._remember(command.id):
            return False
        try:
            arguments = self._check(command)
        except MessageError as error:
            self._reply(command.id, error=one_line(error))
            return True
        if command.verb not in LONG:
            self._obey(command, arguments)
        elif len(self._open) > MAX_QUEUED:
            self._reply(command.id, error=f"{MAX_QUEUED} commands are waiting; send it later")
        else:
            self._start(self._obey_in_turn(command, arguments))
        return True

    def interrupt(self) -> None:
        """The board has rebooted: answer what it was about to do."""
        self._turn = asyncio.Lock()
        for command_id in list(self._open):
            self._reply(command_id, error=INTERRUPTED)

    def _refuse(self, command_id: str, error: MessageError) -> bool:
        if not self._remember(command_id):
            return False
        self._reply(command_id, error=one_line(error))
        return True

    def _remember(self, command_id: str) -> bool:
        if command_id in self._known:
            return False
        self._known[command_id] = self._open[command_id] = None
        while len(self._known) > MAX_COMMANDS:
            self._known.pop(next(iter(self._known)))
        return True

    def _check(self, command: Command) -> Any:
        if command.verb not in ARGUMENTS:
            known = sorted(ARGUMENTS)
            raise MessageError(f"verb {command.verb!r} is unknown; verbs are {', '.join(known)}")
        arguments = from_table(ARGUMENTS[command.verb], command.arguments, where=command.verb, error=MessageError)
        self._require_fresh(command)
        return arguments

    def _require_fresh(self, command: Command) -> None:
        late_s = self._clock() - command.expires
        if late_s >= 0:
            raise MessageError(f"expired {late_s:.0f} s ago by this board's clock; send it again")

    def _obey(self, command: Command, arguments: Any) -> None:
        try:
            self._reply(command.id, result=self._quick[command.verb](arguments, command.id))
        except DeviceError as error:
            self._reply(command.id, error=one_line(error))

    async def _obey_in_turn(self, command: Command, arguments: Any) -> None:
        async with self._turn:
            try:
                self._require_fresh(command)  # it may have waited
                self._reply(command.id, result=await self._long[command.verb](arguments, command.id))
            except DeviceError as error:
                self._reply(command.id, error=one_line(error))

    def _reply(self, command_id: str, *, result: Result | None = None, error: str | None = None) -> None:
        del self._open[command_id]
        if error is not None and len(error) > MAX_ERROR_CHARACTERS:
            error = f"{error[:MAX_ERROR_CHARACTERS]}..."
        self._answer(Reply(id=command_id, ok=error is None, result=result or {}, error=error))
