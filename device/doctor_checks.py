"""Checks of the doctor that look at files and sensors: spool, certificates, secrets, temperature, runtime, delegate."""

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from device.config import AgentConfig
from device.contract.board import Board, Runtime
from device.contract.errors import DeviceError
from device.contract.record import record
from device.delegates import find_library, is_library
from device.runtime import tflite_runtime
from device.telemetry import soc_temp_celsius

DAY_S = 86400.0
CERTIFICATE_DAYS = 7
"""The agent renews a certificate long before; one that has so few days left could not be renewed."""
MANY_MESSAGES = 10_000


@record(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check: what was found, and the next step if it is not well. Advice alone does not fail the doctor."""

    check: str
    ok: bool
    text: str
    advice: str = ""


def check_spool(root: Path, config: AgentConfig) -> Finding:
    """The messages that wait; only looked at, also beside a running agent."""
    path = root / "spool.db"
    if path.with_name("spool.db.damaged").exists():
        advice = f"the disk may be failing; look at it, then remove {path}.damaged"
        return Finding(check="spool", ok=False, text=f"{path}.damaged: a damaged spool was set aside", advice=advice)
    if not path.exists():
        return Finding(check="spool", ok=True, text="no message was ever stored")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5)) as db:
            verdict = db.execute("PRAGMA quick_check").fetchone()[0]
            counters = dict(db.execute("SELECT name, value FROM counter"))
    except sqlite3.Error as error:
        advice = "the agent sets a damaged spool aside at its next start"
        return Finding(check="spool", ok=False, text=f"{path}: {error}", advice=advice)
    depth, dropped = int(counters.get("depth", 0)), int(counters.get("dropped", 0))
    is_stuck = config.broker is not None and depth > MANY_MESSAGES
    return Finding(
        check="spool",
        ok=verdict == "ok" and not is_stuck,
        text=f"{depth} messages wait, {dropped} were dropped so far" + ("" if verdict == "ok" else f"; {verdict}"),
        advice="the broker takes none: see the check of the broker" if is_stuck else "restart the agent",
    )


def check_certificates(
    root: Path, config: AgentConfig, *, end_of: Callable[[Path], float], clock: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """How long the broker's authority and this board's certificate are valid.

    Args:
        root: where relative paths start.
        config: names the files.
        end_of: when the certificate in a file expires, in Unix seconds; raises DeviceError.
        clock: wall-clock seconds.
    """
    for name in ("ca_file", "cert_file"):
        value = getattr(config.broker, name, None)
        if not value:
            continue
        path = root / value
        try:
            days = (end_of(path) - clock()) / DAY_S
        except DeviceError as error:
            yield Finding(check="certificate", ok=False, text=str(error), advice=f"see broker.{name} in agent.toml")
            continue
        text = f"{path}: valid for {days:.0f} more days" if days > 0 else f"{path}: expired {-days:.0f} days ago"
        advice = (
            "the agent renews it where the enrolment service answers; else enrol again: fieldvit-device setup --token"
        )
        yield Finding(check="certificate", ok=days >= CERTIFICATE_DAYS, text=text, advice=advice)


def check_secrets(root: Path, config: AgentConfig) -> Finding:
    """Whether others on this board can read what proves who it is, or change what it runs."""
    names = [getattr(config.broker, name, None) for name in ("password_file", "key_file", "cert_file")]
    paths = {root / name for name in names if name}
    paths |= {
        path for path in (root / "identity").glob("*") if path.suffix in (".key", ".pem") and path.name != "ca.pem"
    }
    open_ones = [path for path in sorted(paths) if path.exists() and path.stat().st_mode & 0o077]
    if open_ones:
        listed = ", ".join(str(path) for path in open_ones)
        return Finding(
            check="secrets",
            ok=False,
            text=f"others can read {listed}",
            advice=f"chmod 600 {' '.join(map(str, open_ones))}",
        )
    if root.stat().st_mode & stat.S_IWOTH:
        return Finding(check="secrets", ok=False, text=f"everybody may write {root}", advice=f"chmod o-w {root}")
    return Finding(
        check="secrets", ok=True, text=f"{len(paths)} secrets, for their owner alone" if paths else "none here"
    )


def check_owner(root: Path) -> Finding:
    """Files of another owner, which the agent could not replace."""
    owner = root.stat().st_uid
    foreign = [path for path in root.rglob("*") if path.lstat().st_uid != owner]
    text = (
        f"all files belong to user {owner}"
        if not foreign
        else f"{foreign[0]} and {len(foreign) - 1} more have another owner"
    )
    advice = f"chown -R --reference={root} {root}: the agent cannot replace them"
    return Finding(check="owner", ok=not foreign, text=text, advice=advice)


def check_temperature(board: Board) -> Finding:
    celsius, limit = soc_temp_celsius(), board.budget.soc_temp_celsius
    if celsius is None:
        return Finding(check="temperature", ok=True, text="this board reports none")
    text = f"{celsius:.0f} °C, the limit is {limit:.0f} °C"
    return Finding(check="temperature", ok=celsius <= limit, text=text, advice="cool it, or lower source.max_fps")


def check_runtime() -> Finding:
    """Which TFLite runtime runs the models, and what it is known not to run."""
    try:
        runtime = tflite_runtime()
    except DeviceError as error:
        return Finding(check="runtime", ok=False, text=str(error), advice="no model runs until then")
    refused = ", ".join(runtime.refused_precisions)
    text = f"{runtime}; {refused} artifacts are refused" if refused else str(runtime)
    advice = "install ai-edge-litert where it has a wheel for this system" if refused else ""
    return Finding(check="runtime", ok=True, text=text, advice=advice)


def check_delegate(runtime: Runtime) -> Finding:
    """Whether what models are to run on is there; the processor takes its place, so the board is not unwell without."""
    text = f"{runtime.delegate}, {os.cpu_count()} processors"
    if not is_library(runtime.delegate):
        return Finding(check="delegate", ok=True, text=text)
    try:
        return Finding(check="delegate", ok=True, text=f"{find_library(runtime.delegate)}, {os.cpu_count()} processors")
    except DeviceError as error:
        return Finding(
            check="delegate",
            ok=True,
            text=f"models run on the processor: {error}",
            advice="or set runtime.delegate in agent.toml to xnnpack",
        )
