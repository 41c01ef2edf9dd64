"""Malformed MQTT payloads and configuration files, by the hundred thousand: nothing may crash, hang or grow.

Commands go through the agent's own receiver, spool and workers, and each must be answered once at most. What devices say
goes through the monitor's own ingest into its store, where all that cannot be read must end in quarantine. Configuration
files must be read, or refused with the one class of error that the command line shows as one line.
"""

import json
import logging
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from bench.fuzz_inputs import json_inputs, text_inputs
from bench.jobs import Job, Table, digest, main_of
from bench.record import Row

INPUTS = 120_000
SHARES = {
    "command": 0.35,
    "telemetry": 0.2,
    "event": 0.1,
    "state": 0.08,
    "reply": 0.04,
    "result": 0.03,
    "agent.toml": 0.1,
    "board profile": 0.08,
    "enrolment token": 0.02,
}
HANG_S = 10
SEED = 7

Check = Callable[[bytes], bool]
"""Takes one input; True if it was accepted, False if it was refused as it should be. Anything raised is a crash."""


class HungError(BaseException):
    """One input took too long. Not an Exception: nothing under test may catch it."""


def measure(job: Job) -> Row:
    """Feed one target."""
    target, count = str(job.key["target"]), int(job.settings["inputs"])
    rng = random.Random(f"{SEED} {target}")
    accepted = crashes = hangs = 0
    slowest_s = 0.0
    with (
        tempfile.TemporaryDirectory() as directory,
        _quiet() as unexpected,
        TARGETS[target](Path(directory), rng) as parts,
    ):
        make, check = parts
        memory_before = 0
        for number in range(count):
            data = make()
            started = time.perf_counter()
            try:
                with _deadline():
                    accepted += check(data)
            except HungError:
                hangs += 1
            except Exception:
                crashes += 1
                print(f"{target}: input {number}: {data[:300]!r}\n{traceback.format_exc()}", file=sys.stderr)
            slowest_s = max(slowest_s, time.perf_counter() - started)
            if number == count // 5:  # caches and buffers are full by now
                memory_before = _memory_bytes()
        growth = _memory_bytes() - memory_before
    return {
        "inputs": count,
        "accepted": accepted,
        "refused": count - accepted - crashes - hangs,
        "crashes": crashes + len(unexpected),
        "hangs": hangs,
        "slowest_ms": round(1000 * slowest_s, 1),
        "memory_growth_mb": round(growth / 1e6, 2),
    }


Parts = tuple[Callable[[], bytes], Check]


@contextmanager
def fuzz_commands(directory: Path, rng: random.Random) -> Iterator[Parts]:
    """The agent's receiver with its spool and workers; handlers only note what they are given."""
    from device.commands import Commands
    from device.contract.commands import ARGUMENTS
    from device.contract.messages import VERBS, decode_reply
    from device.spool import COMMANDS_KEPT, Spool

    spool = Spool(directory / "spool.db", max_bytes=4 << 20, max_age_s=86400)
    obeyed: deque[str] = deque(maxlen=COMMANDS_KEPT // 2)

    def obey(_: Any, command_id: str) -> dict[str, Any]:
        obeyed.append(command_id)
        return {}

    commands = Commands(spool, dict.fromkeys(ARGUMENTS, obey))
    commands.start()
    answered: deque[str] = deque(maxlen=COMMANDS_KEPT // 2)  # what is older may be forgotten, and answered anew

    def check(payload: bytes) -> bool:
        commands.receive(payload)
        for worker in commands.threads:
            assert worker.is_alive(), f"the worker {worker.name} has ended"
        is_obeyed = False
        deadline = time.monotonic() + 2
        while spool.unanswered_commands():
            assert time.monotonic() < deadline, "a command was not answered"
            time.sleep(0.0005)
        for message in spool.pending(0, 100):
            spool.acknowledge(message.id)
            reply = decode_reply(message.payload)
            assert reply.id not in answered, f"command {reply.id!r} was answered twice"
            answered.append(reply.id)
            is_obeyed |= reply.ok
        assert len(obeyed) == len(set(obeyed)), "a command was obeyed twice"
        return is_obeyed

    seeds: list[Any] = []
    payloads = json_inputs(seeds, rng)

    def make() -> bytes:
        seeds[:] = [_command(rng.choice(VERBS), rng)]
        return payloads()

    yield make, check
    spool.close()


def _command(verb: str, rng: random.Random) -> dict[str, Any]:
    arguments: dict[str, dict[str, Any]] = {
        "learn": {"label": "leaf", "features": [[0.5, 1.0], [0.25, 2.0]]},
        "undo": {"lesson": "c1"},
        "update": {"source": "dir:updates", "force": True},
        "set-sampling": {"max_fps": 5, "telemetry_interval_s": 60.0, "results": True},
    }
    chosen = arguments.get(verb, {}) if rng.random() < 0.8 else {"label": "leaf", "frame_ids": ["a", "b"]}
    number = rng.randrange(10**9) if rng.random() < 0.9 else rng.randrange(300)  # some come again
    return {"id": f"c{number}", "verb": verb, "expires": 4e9, "arguments": chosen, "schema": 1}


@contextmanager
def fuzz_ingest(kind: str, directory: Path, rng: random.Random) -> Iterator[Parts]:
    """The monitor's own path of one kind of message, from paho's message to the store."""
    import paho.mqtt.client as mqtt

    from device.contract.topics import DeviceId
    from host.monitor.broker import BrokerAddress
    from host.monitor.ingest import Ingest
    from host.monitor.store import open_store

    store = open_store(directory / "monitor.sqlite")
    ingest = Ingest(store, BrokerAddress(hostname="127.0.0.1"))
    device = DeviceId("lab", "cam-1")

    def check(payload: bytes) -> bool:
        message = mqtt.MQTTMessage(topic=device.topic(kind).encode())
        message.payload = payload
        before = store.quarantined_total()
        with store.transaction():
            ingest._record(message)
        return store.quarantined_total() == before

    yield json_inputs(_messages(kind), rng), check
    store.device(device)
    store.close()


def _messages(kind: str) -> list[Any]:
    from device.contract import messages as m
    from device.contract.topics import DeviceId

    device = DeviceId("lab", "cam-1")
    if kind == "telemetry":
        values = dict.fromkeys(m.UNITS, 0.5) | {"class/0": 3.0}
        payloads = [
            m.encode_telemetry(device, m.Telemetry(boot="b1", sequence=n, time=1.7e9 + n, values=values))
            for n in (1, 2, 9)
        ]
    elif kind == "event":
        payloads = [
            m.encode_event(
                device, m.Event(kind=name, boot="b1", sequence=n, time=1.7e9, data={"reason": "x", "n": [1]})
            )
            for n, name in enumerate(m.EVENT_KINDS, start=1)
        ]
    elif kind == "state":
        model = m.ModelState(name="x", version="1.0.0", release=1, precision="int8", backbone="ab" * 32)
        payloads = [
            m.encode_state(m.State(status="online", boot="b1", time=1.7e9, model=model, labels=("a", "b"))),
            m.encode_state(m.State(status="offline", boot="b1")),
        ]
    elif kind == "reply":
        payloads = [m.encode_reply(m.Reply(id="c1", ok=True, result={"labels": ["a"], "version": 1, "image": "AAAA"}))]
    else:
        payloads = [m.encode_result(m.Result(frame_id="f", label="a", confidence=0.5, time=1.7e9))]
    return [json.loads(payload) for payload in payloads]


AGENT_TOML = """site = "lab"
device = "cam-1"
board = "raspberry-pi-5"
channel = "stable"
precision = ""
results = false
snapshot = false
refused_commands = ["learn"]
[broker]
hostname = "broker.local"
port = 8883
keepalive_s = 60
username = "cam-1"
password_file = "secret"
ca_file = "ca.pem"
cert_file = "device.pem"
key_file = "device.key"
[source]
path = "frames"
poll_s = 0.2
max_fps = 0
[update]
source = "dir:updates"
check_interval_s = 0
[runtime]
threads = 2
spool_bytes = 1000000
telemetry_interval_s = 10.0"""


@contextmanager
def fuzz_agent_toml(directory: Path, rng: random.Random) -> Iterator[Parts]:
    """`agent.toml`, up to the runtime values that the board profile gives."""
    from device.config import CONFIG_NAME, load_config, resolve_runtime
    from device.contract.board import load_board
    from device.contract.errors import DeviceError

    def check(data: bytes) -> bool:
        (directory / CONFIG_NAME).write_bytes(data)
        try:
            config = load_config(directory)
            resolve_runtime(load_board(config.board), config.runtime)
        except DeviceError as error:
            _require_line(error)
            return False
        return True

    yield text_inputs([AGENT_TOML], rng), check


@contextmanager
def fuzz_boards(directory: Path, rng: random.Random) -> Iterator[Parts]:
    """Board profiles, as text."""
    from device.contract.board import board_names, parse_board_text
    from device.contract.errors import DeviceError

    def check(data: bytes) -> bool:
        try:
            parse_board_text(name, data)
        except DeviceError as error:
            _require_line(error)
            return False
        return True

    name = board_names()[0]
    texts = [resources.files("firmware_configs").joinpath(f"{name}.toml").read_text(encoding="utf-8")]
    yield text_inputs(texts, rng), check


@contextmanager
def fuzz_tokens(directory: Path, rng: random.Random) -> Iterator[Parts]:
    """Enrolment tokens."""
    from base64 import urlsafe_b64encode

    from device.contract.errors import DeviceError
    from device.identity import TOKEN_PREFIX, decode_token

    payloads = json_inputs([["https://broker.local:8443", "ab" * 32, "secret"]], rng)

    def make() -> bytes:
        return TOKEN_PREFIX.encode() + urlsafe_b64encode(payloads()).rstrip(b"=")

    def check(data: bytes) -> bool:
        try:
            decode_token(data.decode("latin-1"))
        except DeviceError as error:
            _require_line(error)
            return False
        return True

    yield make, check


def _require_line(error: Exception) -> None:
    text = str(error)
    assert text, "an error without a word"
    assert len(text) < 20_000, f"an error of {len(text)} characters"


TARGETS: dict[str, Callable[[Path, random.Random], Any]] = {
    "command": fuzz_commands,
    **{kind: partial(fuzz_ingest, kind) for kind in ("telemetry", "event", "state", "reply", "result")},
    "agent.toml": fuzz_agent_toml,
    "board profile": fuzz_boards,
    "enrolment token": fuzz_tokens,
}


@contextmanager
def _deadline() -> Iterator[None]:
    def hung(*_: object) -> None:
        raise HungError

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Unexpected(logging.Handler):
    """Collects what the parts under test caught and logged with a traceback: that is a crash, too."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._found.append(record.getMessage())
            print(f"{record.getMessage()}\n{record.exc_info[1]!r}", file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """No refusal is printed; yields the tracebacks that were logged."""
    found: list[str] = []
    root, handler = logging.getLogger(), _Unexpected(found)
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield found
    finally:
        root.handlers[:] = before


def _memory_bytes() -> int:
    from device.telemetry import memory_bytes

    return memory_bytes()


def list_jobs(*, inputs: int = INPUTS) -> list[Job]:
    """One job for each target; together `inputs` inputs, or a few more."""
    return [
        Job(key={"target": target}, settings={"inputs": math.ceil(inputs * share)}, defined_by=digest("fuzz 1"))
        for target, share in SHARES.items()
    ]


def notes(rows: Sequence[Row]) -> str:
    total = {name: sum(int(row[name]) for row in rows) for name in ("inputs", "crashes", "hangs")}
    return (
        f"Together {total['inputs']} inputs: {total['crashes']} crashes, {total['hangs']} hangs (more than {HANG_S} s). A crash "
        "is any error but the one class that the command line shows as one line, one that a part caught and logged with a "
        "traceback, a worker that ended, and a command that was obeyed or answered twice. Memory growth is that of the whole "
        "process after the first fifth of the inputs."
    )


TABLE = Table(
    name="fuzz",
    command="python -m bench.fuzz",
    data="valid messages and files, changed in structure and in bytes",
    title="Malformed MQTT payloads and configuration files",
    notes=notes,
    seed=SEED,
)


def main(argv: Sequence[str] | None = None) -> int:
    return main_of(TABLE, list_jobs, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
