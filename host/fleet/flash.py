"""Put a published bundle onto a board: write its configuration, trusted root and update files into a directory.

The directory is a board's data directory, on an SD card, a mounted disk or this machine. The bundle is not unpacked
here: the agent installs it itself at its next start, through the same checks as any later update.
"""

import json
import os
import shutil
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from device.contract.board import load_board
from device.contract.bundle import read_manifest
from device.contract.errors import BoardMismatchError
from device.contract.files import write_atomic
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.files import sha256_of
from host.fleet.repository import ChannelOffer, channel_offer, published_digest, target_name

CONFIG = "agent.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """The board's broker; a password is put beside `agent.toml` by whoever owns it, never by this."""

    hostname: str
    port: int = 1883
    username: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSettings:
    """What one board is told: who it is, its channel, its broker (none: it keeps to itself) and its frames."""

    id: DeviceId
    board: str
    channel: str = "stable"
    broker: BrokerSettings | None = None
    frames: str = "frames"


def flash_directory(bundle: Path, root: Path, *, repository: Path, settings: BoardSettings) -> datetime:
    """Prepare a board's data directory; an `agent.toml` that is there is kept, only the update files are renewed.

    Args:
        bundle: must be the one that the repository's channel points at.
        root: the board's data directory.
        repository: a directory that `fieldvit publish` wrote.
        settings: an `agent.toml` that is there must say the same board, site, device and channel.

    Returns:
        Until when the board will install it.

    Raises:
        FleetError: the channel does not offer the bundle, or the directory belongs to another board or repository.
        BoardMismatchError: the bundle was not built for this board.
    """
    manifest = read_manifest(bundle)
    for path, option in ((root, "--to"), (root / settings.frames, "--frames")):
        if path.exists() and not path.is_dir():
            raise FleetError(f"{option}: {path} is a file; name a directory")
    if "coreml" in load_board(settings.board).support.formats:
        raise BoardMismatchError(
            f"{settings.board}: an app takes model.mlpackage or a .tflite file out of the bundle (a zip); "
            "flash prepares boards that run fieldvit-device"
        )
    if settings.board not in manifest.boards:
        raise BoardMismatchError(
            f"{bundle.name} was built for {', '.join(manifest.boards)}, not for {settings.board}; "
            f"add {settings.board!r} to export.boards in the recipe and export again"
        )
    offer = _require_offered(bundle, repository, target_name(manifest), settings.channel)
    trusted = (repository / "metadata" / "1.root.json").read_bytes()
    _require_same_root(root / "root.json", trusted)
    _require_same_settings(root / CONFIG, settings)
    _copy_repository(repository, root / "updates", offer)
    if not (root / CONFIG).exists():
        write_atomic(root / CONFIG, agent_toml(settings).encode())
    write_atomic(root / "root.json", trusted)
    (root / settings.frames).mkdir(parents=True, exist_ok=True)
    return offer.expires


def agent_toml(settings: BoardSettings) -> str:
    """The agent's configuration file."""
    tables: dict[str, dict[str, Any]] = {
        "": _identity(settings),
        "source": {"path": settings.frames},
        "update": {"source": "dir:updates"},
    }
    if settings.broker:
        tables["broker"] = {"hostname": settings.broker.hostname, "port": settings.broker.port}
        tables["broker"] |= {"username": settings.broker.username} if settings.broker.username else {}
    lines = ["# Used by: fieldvit-device run --root THIS_DIRECTORY"]
    for name, table in tables.items():
        lines += ["", f"[{name}]"] if name else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _identity(settings: BoardSettings) -> dict[str, str]:
    return {
        "site": settings.id.site,
        "device": settings.id.device,
        "board": settings.board,
        "channel": settings.channel,
    }


def _require_offered(bundle: Path, repository: Path, name: str, channel: str) -> ChannelOffer:
    offer = channel_offer(repository, channel)
    if offer is None or offer.bundle != name or published_digest(repository, name) != sha256_of(bundle):
        offered = f"offers {offer.bundle}, not this {name}" if offer else "does not exist"
        if offer and offer.bundle == name:
            offered = (
                f"offers other content under the name {name}: raise version and release in the recipe, export again"
            )
        raise FleetError(
            f"channel {channel} in {repository} {offered}; "
            f"run 'fieldvit publish {bundle} --repo {repository} --channel {channel}', with its --keys, first"
        )
    return offer


def _require_same_root(path: Path, trusted: bytes) -> None:
    if path.exists() and path.read_bytes() != trusted:
        raise FleetError(
            f"{path}: this board trusts another repository; publish with its keys, or flash an empty directory"
        )


def _require_same_settings(path: Path, settings: BoardSettings) -> None:
    """A directory that belongs to one board is not turned into another by an option."""
    if not path.exists():
        return
    try:
        present = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: not TOML ({error}); mend it, or flash an empty directory") from error
    asked: dict[str, Any] = {**_identity(settings), "frames": settings.frames}
    source = present.get("source", {})
    has_directory = source.get("kind", "directory") == "directory"  # a video's path, for one, is no business of this
    found = {**present, "frames": source.get("path", settings.frames) if has_directory else settings.frames}
    if settings.broker:
        asked["broker"] = f"{settings.broker.hostname}:{settings.broker.port}"
        broker = present.get("broker")
        found["broker"] = f"{broker.get('hostname')}:{broker.get('port', 1883)}" if broker else "none"
    for key, value in asked.items():
        if found.get(key, value) != value:
            raise FleetError(
                f"{path}: says {key} {found[key]!r}, not {value!r}; leave --{key} as it is there, or edit the file"
            )


def _copy_repository(source: Path, target: Path, offer: ChannelOffer) -> None:
    """Replace `target` by the metadata and the channel's files, keeping the old one until the new one is whole."""
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source / "metadata", partial / "metadata")
    for file in offer.files:
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, partial / file)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
