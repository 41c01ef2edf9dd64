"""Ask the agent that runs on this board: to look for an update, or to obey a command as one that comes over MQTT.

    ROOT/ask/ID.ask       the command; appears whole, and is taken away before it is obeyed
    ROOT/ask/ID.data      what belongs to it and is too large for JSON, for example a backup
    ROOT/ask/ID.answer    the reply, for who asked to read and remove

A directory, because whoever may write it may do anything to this board anyway: it belongs to the agent's user, and nobody
else may look in. What lies there when the agent starts is from before, and goes.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device.contract.errors import AgentBusyError, ArtifactError, DeviceError, MessageError, UpdateRefusedError
from device.contract.files import write_atomic
from device.contract.messages import (
    MAX_PAYLOAD_BYTES,
    Command,
    Reply,
    decode_command,
    decode_reply,
    encode_command,
    encode_reply,
)
from device.journal import Entry
from device.slots import NAMES, Slots

PATIENCE_S = 1800.0
"""A slow source, a self-test of every candidate, and the soak of the slowest board profile."""
POLL_S = 0.2
ASK_DIRECTORY = "ask"
EXPIRES_S = 60.0
"""An agent that has not taken a request by then need not any more."""
_ID = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger(__name__)


class Asked:
    """The agent's end: takes requests from the directory, which it makes and empties."""

    def __init__(self, root: Path, obey: Callable[[Command, Callable[[Reply], None]], None]) -> None:
        self._directory, self._obey = root / ASK_DIRECTORY, obey
        shutil.rmtree(self._directory, ignore_errors=True)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:  # a disk that cannot be written must not stop inference
            log.warning("%s: cannot be made (%s); hand tools will not reach this agent", self._directory, error)

    def poll(self) -> None:
        """Hand over what has come since; returns at once."""
        try:
            names = [name for name in os.listdir(self._directory) if name.endswith(".ask")]
        except OSError:
            return
        for name in sorted(names):
            try:
                command = self._take(self._directory / name)
            except (OSError, MessageError) as error:
                log.warning("%s: request not taken: %s", name, error)
                continue
            self._obey(command, self._answer)

    def _take(self, path: Path) -> Command:
        try:
            with path.open("rb") as file:
                command = decode_command(file.read(MAX_PAYLOAD_BYTES + 1))
        finally:
            path.unlink()
        if command.id != path.stem or not _ID.fullmatch(command.id):
            raise MessageError(f"its id {command.id[:40]!r} is not that of its file")
        return command

    def _answer(self, reply: Reply) -> None:
        attachment_path(self._directory.parent, reply.id).unlink(missing_ok=True)
        write_atomic(self._directory / f"{reply.id}.answer", encode_reply(reply), mode=0o600)


def attachment_path(root: Path, command_id: str) -> Path:
    """Where what belongs to a request lies."""
    return root / ASK_DIRECTORY / f"{command_id}.data"


def read_attachment(path: Path, max_bytes: int) -> bytes:
    """Its content, or one byte more than `max_bytes` of it; ArtifactError where it is missing."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}); ask again") from error


def ask(
    root: Path,
    pid: int,
    verb: str,
    arguments: dict[str, Any],
    *,
    attachment: bytes | None = None,
    patience_s: float = PATIENCE_S,
) -> dict[str, Any]:
    """Have a running agent obey a command; returns its result.

    Args:
        root: the data directory.
        pid: the agent's process.
        verb: one of `commands.LOCAL_ARGUMENTS`.
        arguments: of the verb.
        attachment: what the verb wants beside them.
        patience_s: how long it may take.

    Raises:
        AgentBusyError: the agent belongs to somebody else.
        DeviceError: it was refused, or there was no answer in time.
    """
    command = Command(id=os.urandom(16).hex(), verb=verb, expires=time.time() + EXPIRES_S, arguments=arguments)
    payload = encode_command(command)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"{verb}: {len(payload)} bytes, {MAX_PAYLOAD_BYTES} are allowed; name fewer frames")
    answer = root / ASK_DIRECTORY / f"{command.id}.answer"
    request = answer.with_suffix(".ask")
    is_taken_by = time.monotonic() + EXPIRES_S
    try:
        if not answer.parent.is_dir():
            raise FileNotFoundError(answer.parent)
        if attachment is not None:
            _put(attachment_path(root, command.id), attachment)
        _put(request, payload)
        _wait(lambda: not request.exists(), pid, is_taken_by)
        _wait(answer.exists, pid, time.monotonic() + patience_s)
        reply = decode_reply(answer.read_bytes())
    except PermissionError as error:
        raise _someone_elses(root, pid) from error
    except FileNotFoundError as error:
        raise DeviceError(f"{root}: its agent (process {pid}) takes no requests ({error}); restart it") from error
    finally:
        for suffix in (".ask", ".data", ".answer"):
            with contextlib.suppress(OSError):
                answer.with_suffix(suffix).unlink()
    if not reply.ok:
        raise DeviceError(str(reply.error))
    return reply.result


def _put(path: Path, content: bytes) -> None:
    """Write a file whole, for the agent's user to read: root may ask, too."""
    part = path.with_suffix(".part")
    write_atomic(part, content, mode=0o600)
    owner = path.parent.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(part, owner.st_uid, owner.st_gid)
    os.replace(part, path)


def _someone_elses(root: Path, pid: int) -> AgentBusyError:
    return AgentBusyError(
        f"{root}: its agent (process {pid}) runs as another user; be that user, or send it a command over MQTT"
    )


def ask_for_update(
    root: Path,
    pid: int,
    *,
    accept_loss: bool = False,
    patience_s: float = PATIENCE_S,
    tell: Callable[[str], None] = lambda _: None,
) -> bool:
    """Have a running agent take what its channel offers; returns whether something new was confirmed.

    Args:
        root: the data directory.
        pid: the agent's process.
        accept_loss: also where a class taught here would be dropped.
        patience_s: how long the verdict may take.
        tell: gets a line when something goes on.

    Raises:
        UpdateRefusedError: it was refused, or taken back on probation; with the reason.
        AgentBusyError: the agent belongs to somebody else.
        DeviceError: no verdict in time, or the agent ended.
    """
    deadline = time.monotonic() + patience_s
    before, mark = _checks(root, pid), Slots(root).last_number
    tell(f"the agent (process {pid}) looks for an update")
    if accept_loss:  # a signal cannot say that
        ask(root, pid, "update", {"accept_loss": True}, patience_s=patience_s)
    else:
        _signal(root, pid)
        _wait(lambda: _checks(root, pid) > before, pid, deadline)
        check = _agent_table(root, pid).get("last_check", {})
        if check.get("outcome") == "refused":
            raise UpdateRefusedError(str(check.get("reason")), str(check.get("detail")))
    if testing := _testing(root):
        tell(f"{testing.name} {testing.version} {testing.precision} serves on probation in slot {testing.slot}")
    _wait(lambda: _testing(root) is None, pid, deadline)
    return _verdict(Slots(root).history(after=mark))


def _signal(root: Path, pid: int) -> None:
    try:
        os.kill(pid, signal.SIGHUP)
    except PermissionError as error:
        raise _someone_elses(root, pid) from error


def _verdict(entries: list[Entry]) -> bool:
    for entry in entries:
        if entry.state == "rejected" and entry.was == "testing":
            raise UpdateRefusedError(
                entry.reason, f"{entry.name} {entry.version} was taken back ({entry.reason}): {entry.detail}"
            )
    return any(entry.state == "confirmed" and entry.was == "testing" for entry in entries)


def _testing(root: Path) -> Entry | None:
    slots = Slots(root)
    return next((entry for slot in NAMES if (entry := slots.state(slot)).state == "testing"), None)


def _checks(root: Path, pid: int) -> int:
    return int(_agent_table(root, pid).get("last_check", {}).get("number", 0))


def _agent_table(root: Path, pid: int) -> dict[str, Any]:
    try:
        table = json.loads((root / "agent.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) and table.get("pid") == pid else {}


def _wait(is_true: Callable[[], bool], pid: int, deadline: float) -> None:
    while not is_true():
        if time.monotonic() > deadline:
            raise DeviceError(
                f"the agent (process {pid}) gave no verdict in time; see 'fieldvit-device status --history'"
            )
        if not _is_alive(pid):
            raise DeviceError(f"the agent (process {pid}) ended meanwhile; see its log, and start it again")
        time.sleep(POLL_S)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
