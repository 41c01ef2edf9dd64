"""What is wrong with this board's setup, and what to do about it; see also `device.doctor_checks`."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from device.config import AgentConfig, load_config, resolve_runtime
from device.contract.board import Board, load_board
from device.contract.errors import DeviceError
from device.doctor_checks import (
    CERTIFICATE_DAYS,
    DAY_S,
    Finding,
    check_certificates,
    check_delegate,
    check_owner,
    check_runtime,
    check_secrets,
    check_spool,
    check_temperature,
)
from device.doctor_sources import check_source
from device.lock import lock_owner
from device.mqtt import probe
from device.selftest import run_in_child
from device.slots import Slots

EARLIEST_SANE_S = 1_767_225_600  # 2026-01-01: before this software existed
FREE_BYTES_NEEDED = 256 << 20


def examine(root: Path) -> Iterator[Finding]:
    """Run all checks that make sense; each finding comes as soon as it is known."""
    if not root.is_dir():
        yield Finding(
            check="root", ok=False, text=f"{root} is not a directory", advice=f"mkdir -p {root}, or pass --root DIR"
        )
        return
    yield Finding(check="root", ok=True, text=str(root))
    yield _disk(root)
    yield _clock(root)
    try:
        config = load_config(root)
        board = load_board(config.board)
    except DeviceError as error:
        yield Finding(check="config", ok=False, text=str(error), advice="correct agent.toml")
        return
    yield Finding(check="config", ok=True, text=f"{config.id}, channel {config.channel}")
    yield Finding(check="board", ok=True, text=f"{board.name}: {board.description}")
    yield _trusted_root(root)
    yield _lock(root)
    yield _model(root, config, board)
    yield check_runtime()
    yield check_delegate(resolve_runtime(board, config.runtime))
    yield check_temperature(board)
    yield check_source(root, config.source, is_running=_is_running(root))
    yield check_secrets(root, config)
    yield check_owner(root)
    yield check_spool(root, config)
    yield from check_certificates(root, config, end_of=_certificate_end)
    yield _broker(root, config)


def _certificate_end(path: Path) -> float:
    from device.identity import certificate_end  # here: few boards without a certificate need it

    return certificate_end(path)


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    text = f"{free >> 20} MiB free on the disk of {root}"
    return Finding(
        check="disk",
        ok=free >= FREE_BYTES_NEEDED,
        text=text,
        advice=f"an update may need {FREE_BYTES_NEEDED >> 20} MiB; make room",
    )


def _clock(root: Path) -> Finding:
    now, history = time.time(), Slots(root).history()
    known = max([EARLIEST_SANE_S, *(entry.time for entry in history[-1:])])
    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    advice = "this clock is behind; set it (NTP, or a clock chip): signatures expire by it"
    return Finding(check="clock", ok=now >= known, text=text, advice=advice)


def _trusted_root(root: Path) -> Finding:
    path = root / "root.json"
    try:
        is_root = json.loads(path.read_bytes())["signed"]["_type"] == "root"
    except FileNotFoundError:
        return Finding(
            check="trust",
            ok=False,
            text=f"{path} is missing",
            advice="copy 1.root.json of your update repository there",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding(
            check="trust",
            ok=False,
            text=f"{path}: {error!r}",
            advice="copy 1.root.json of your update repository there again",
        )
    return Finding(
        check="trust",
        ok=is_root,
        text=str(path),
        advice="it is no TUF root; copy 1.root.json of your update repository there",
    )


def _is_running(root: Path) -> bool:
    owner = lock_owner(root)
    return owner is not None and owner.purpose == "run"


def _lock(root: Path) -> Finding:
    owner = lock_owner(root)
    text = "no agent is running ('fieldvit-device run' starts it)"
    if owner:
        text = "an agent is running" if owner.purpose == "run" else f"'fieldvit-device {owner.purpose}' is at work here"
    return Finding(check="agent", ok=True, text=text)


def _model(root: Path, config: AgentConfig, board: Board) -> Finding:
    entry = Slots(root).serving()
    if entry is None:
        return Finding(
            check="model", ok=False, text="no model is installed", advice="fieldvit-device update --root " + str(root)
        )
    runtime = resolve_runtime(board, config.runtime)
    name = f"{entry.name} {entry.version} {entry.precision}, slot {entry.slot}, {entry.state}"
    try:
        test = run_in_child(
            Slots(root).directory(entry.slot), entry.precision, threads=runtime.threads, delegate=runtime.delegate
        )
    except DeviceError as error:
        return Finding(
            check="model",
            ok=False,
            text=f"{name}: {error}",
            advice="fieldvit-device rollback, or update to a newer model",
        )
    return Finding(
        check="model", ok=True, text=f"{name}: self-test passed, p50 {test.latency_p50_ms:.1f} ms on {test.delegate}"
    )


def _broker(root: Path, config: AgentConfig) -> Finding:
    if config.broker is None:
        return Finding(check="broker", ok=True, text="none configured: messages stay in the spool")
    try:
        expires = probe(config.broker, root)
    except DeviceError as error:
        return Finding(check="broker", ok=False, text=str(error), advice="messages wait in the spool until then")
    text = f"{config.broker.hostname}:{config.broker.port} accepts the login"
    if expires is None:
        return Finding(check="broker", ok=True, text=text)
    days = (expires - time.time()) / DAY_S
    return Finding(
        check="broker",
        ok=days >= CERTIFICATE_DAYS,
        text=f"{text}; its certificate is valid for {days:.0f} more days",
        advice="have it renewed, before no board can connect: fieldvit fleet renew-broker",
    )
