"""Set a board up: who it is, its certificate, the service that runs the agent. May be repeated; nothing is left half-written.

Written, each whole or not at all, in this order: `ROOT/identity/` (with a token: key, certificate, authority), `ROOT/agent.toml`,
`ROOT/frames/` (without a camera), and the unit. What is there and says the same is left alone. An `agent.toml` that says something else about
site, device, board, channel, broker or camera is never overwritten: a board is not turned into another one by an option.
"""

import json
import os
import pwd
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from device.config import CONFIG_NAME, AgentConfig, load_config
from device.contract.board import load_board
from device.contract.errors import ConfigError, DeviceError
from device.contract.files import write_atomic
from device.contract.record import record
from device.contract.records import from_table
from device.contract.topics import DeviceId
from device.unit import STATE, UNIT_NAME, Service, unit_text

SYSTEM_UNITS = Path("/etc/systemd/system")
MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}

Enrol = Callable[[Path, DeviceId, str], dict[str, Any]]
"""Gets a board its certificate for a token; returns the `[broker]` table that uses it."""


@record(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What was asked for. `broker` is `mqtt://HOST[:PORT]` or `mqtts://…`; a token brings its own.

    `camera` is a V4L2 device's file, or `csi`, or `csi:NUMBER`; "" where frames come as files.
    """

    site: str
    device: str
    board: str
    channel: str = "stable"
    broker: str = ""
    token: str = ""
    unit_directory: Path = SYSTEM_UNITS
    user: str = ""
    camera: str = ""


@record(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was done, was there already, or would be done; `todo` is what is left to whoever reads it."""

    what: str
    done: str  # written | unchanged | would write
    todo: str = ""


def set_up(root: Path, wishes: Wishes, *, enrol: Enrol | None, is_dry_run: bool = False) -> list[Step]:
    """Do what is missing.

    Args:
        root: the data directory; made if it is missing.
        wishes: checked before anything is written.
        enrol: needed where there is a token.
        is_dry_run: only say what would be done; nothing is written or asked of anyone.

    Raises:
        ConfigError: a wish is wrong, another board lives in this directory, or something cannot be written.
        EnrolmentError: the token got no certificate; agent.toml and unit are not written then.
    """
    identity, board = _identity(wishes), load_board(wishes.board)
    broker = _broker_table(wishes.broker) if wishes.broker else {}
    source = _source_table(wishes.camera)
    path = root / CONFIG_NAME
    present = load_config(root) if path.exists() else None
    if present:
        _require_same(path, present, identity, broker, source)
    else:
        _config(identity, broker, source)  # says what is wrong before anything is done
    user, steps = _user(root, wishes), []
    try:
        if not is_dry_run:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if wishes.token:
            steps.append(_enrolled(root, wishes, broker, enrol, is_dry_run=is_dry_run))
        config = present or _config(identity, broker, source)
        steps.append(_write_config(path, present, identity, broker, source, is_dry_run=is_dry_run))
        if config.source.kind == "directory":
            steps.append(_make_frames(root / config.source.path, is_dry_run=is_dry_run))
        service = Service(root=root, python=_python(), user=user)
        text = unit_text(service, config, board)
        steps.append(_write_unit(root, wishes.unit_directory, text, is_dry_run=is_dry_run))
        if not is_dry_run:
            _give_to(root, service.user)
    except DeviceError:  # some are OSErrors too
        raise
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root}: cannot be written ({error.strerror}); run it with sudo?"
        ) from error
    return [*steps, _trust(root)]


def _identity(wishes: Wishes) -> dict[str, str]:
    return {"site": wishes.site, "device": wishes.device, "board": wishes.board, "channel": wishes.channel}


def _broker_table(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    try:
        port = parts.port or MQTT_PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise ConfigError(f"--broker {url!r}: {error}") from error
    if parts.scheme not in MQTT_PORTS or not parts.hostname or parts.password or parts.path.strip("/"):
        raise ConfigError(
            f"--broker must be mqtt://HOST[:PORT] or mqtts://HOST[:PORT], got {url!r}; a password belongs into a file, "
            "see broker.password_file in agent.toml"
        )
    table: dict[str, Any] = {"hostname": parts.hostname, "port": port}
    table |= {"username": parts.username} if parts.username else {}
    return table | ({"ca_file": "ca.pem"} if parts.scheme == "mqtts" else {})


def _source_table(camera: str) -> dict[str, str]:
    if not camera:
        return {}
    if camera.partition(":")[0] == "csi":
        return {"kind": "picamera", "device": camera.removeprefix("csi").removeprefix(":") or "0"}
    return {"kind": "camera", "device": camera}


def _config(identity: dict[str, str], broker: dict[str, Any], source: dict[str, str]) -> AgentConfig:
    table: dict[str, Any] = dict(identity) | ({"broker": broker} if broker else {})
    table |= {"source": source} if source else {}
    return from_table(AgentConfig, table, where=CONFIG_NAME)


def _require_same(
    path: Path, present: AgentConfig, identity: dict[str, str], broker: dict[str, Any], source: dict[str, str]
) -> None:
    asked: dict[str, Any] = dict(identity)
    found: dict[str, Any] = {name: getattr(present, name) for name in identity}
    if broker:
        asked["broker"] = f"{broker['hostname']}:{broker['port']}"
        found["broker"] = f"{present.broker.hostname}:{present.broker.port}" if present.broker else "none"
    for name, value in source.items():
        asked[f"source.{name}"], found[f"source.{name}"] = value, getattr(present.source, name)
    for name, value in asked.items():
        if found[name] != value:
            raise ConfigError(
                f"{path}: says {name} {found[name]!r}, not {value!r}; edit the file, or choose another --root"
            )


def _enrolled(root: Path, wishes: Wishes, broker: dict[str, Any], enrol: Enrol | None, *, is_dry_run: bool) -> Step:
    """Trade the token for a certificate, and take over the broker that comes with it."""
    what = f"{root / 'identity'}: private key, certificate request, certificate"
    if is_dry_run:
        return Step(what=what, done="would write")
    if enrol is None:
        raise ConfigError("--token: this installation cannot enrol; install fieldvit[device]")
    path = root / "identity" / "device.pem"
    before = path.read_bytes() if path.exists() else b""
    given = enrol(root, DeviceId(wishes.site, wishes.device), wishes.token)
    if not wishes.broker:
        broker |= given
    else:
        broker |= {name: value for name, value in given.items() if name.endswith("_file")}
    return Step(what=what, done="unchanged" if before and path.read_bytes() == before else "written")


def _write_config(
    path: Path,
    present: AgentConfig | None,
    identity: dict[str, str],
    broker: dict[str, Any],
    source: dict[str, str],
    *,
    is_dry_run: bool,
) -> Step:
    if present:
        lacks = broker and (
            present.broker is None or getattr(present.broker, "cert_file", None) != broker.get("cert_file")
        )
        todo = f"add to its [broker]: {', '.join(f'{k} = {json.dumps(v)}' for k, v in broker.items())}" if lacks else ""
        return Step(what=str(path), done="unchanged", todo=todo)
    if is_dry_run:
        return Step(what=str(path), done="would write")
    text = config_text(identity, broker, source)
    from_table(AgentConfig, tomllib.loads(text), where=CONFIG_NAME)  # what is written is what the agent will take
    write_atomic(path, text.encode())
    return Step(what=str(path), done="written")


def config_text(identity: dict[str, str], broker: dict[str, Any], source: dict[str, str]) -> str:
    """`agent.toml`, with its command on top."""
    lines = ["# Used by: fieldvit-device run --root THIS_DIRECTORY", ""]
    lines += [f"{key} = {json.dumps(value)}" for key, value in identity.items()]
    for name, table in (("broker", broker), ("source", source)):
        if table:
            lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _make_frames(path: Path, *, is_dry_run: bool) -> Step:
    if path.is_dir():
        return Step(what=f"{path}/", done="unchanged")
    if not is_dry_run:
        path.mkdir(parents=True, exist_ok=True)
    return Step(
        what=f"{path}/", done="would write" if is_dry_run else "written", todo="put frames there, see source.path"
    )


def _write_unit(root: Path, directory: Path, text: str, *, is_dry_run: bool) -> Step:
    """Into systemd's directory where that is possible, else beside the data, with the commands that put it there."""
    is_allowed = directory.is_dir() and os.access(directory, os.W_OK)
    path = (directory if is_allowed else root) / UNIT_NAME
    start = f"systemctl daemon-reload && systemctl enable --now {UNIT_NAME}"
    todo = start if is_allowed else f"sudo install -m 644 {path} {SYSTEM_UNITS}/ && sudo sh -c '{start}'"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return Step(what=str(path), done="unchanged")
    if is_dry_run:
        return Step(what=str(path), done="would write", todo=todo)
    write_atomic(path, text.encode())
    return Step(what=str(path), done="written", todo=todo)


def _python() -> Path:
    """The interpreter of this environment by the name it was called by: a link to it may be what an update moves."""
    return Path(os.path.abspath(sys.executable))


def _user(root: Path, wishes: Wishes) -> str:
    """Who the service runs as; never root, and whoever sets up a board without being root runs it himself."""
    if wishes.user:
        if wishes.user == "root" or _lookup(wishes.user) is None:
            raise ConfigError(f"--user {wishes.user!r}: name a user of this board that is not root, or leave it out")
        return wishes.user
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    if root.parent != STATE:
        raise ConfigError(
            f"--root {root}: outside of {STATE} it must belong to the user that the service runs as; name it with --user"
        )
    return ""


def _lookup(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def _give_to(root: Path, user: str) -> None:
    """What root wrote belongs to the service's user; systemd does the same for a user of its own choice."""
    entry = _lookup(user) if user and os.geteuid() == 0 else None
    if entry is None:
        return
    for path in [root, *root.rglob("*")]:
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def _trust(root: Path) -> Step:
    path = root / "root.json"
    if path.exists():
        return Step(what=str(path), done="unchanged")
    return Step(
        what=str(path), done="missing", todo="copy 1.root.json of your update repository there, or run 'fieldvit flash'"
    )
