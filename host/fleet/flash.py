"""Put a published bundle onto a board: write its configuration, trusted root and update files into a directory.

The directory is a board's data directory, on an SD card, a mounted disk or this machine. The bundle is not unpacked
here: the agent installs it itself at its next start, through the same checks as any later update.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from device.contract.board import load_board
from device.contract.bundle import read_manifest
from device.contract.errors import BoardMismatchError
from device.contract.files import write_atomic
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.files import sha256_of
from host.fleet.repository import published_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSettings:
    """What one board is told: who it is, its channel, its broker (none: it keeps to itself) and its frames."""

    id: DeviceId
    board: str
    channel: str = "stable"
    broker: tuple[str, int] | None = None
    frames: str = "frames"
    results: bool = False


def flash_directory(bundle: Path, root: Path, *, repository: Path, settings: BoardSettings) -> None:
    """Prepare a board's data directory; an existing `agent.toml` is kept, only the update files are renewed.

    Args:
        bundle: must be the one that the repository's channel points at.
        root: the board's data directory.
        repository: a directory that `fieldvit publish` wrote.
        settings: used when the directory has no `agent.toml` yet.

    Raises:
        FleetError: the bundle is not published there, or the directory trusts another repository.
        BoardMismatchError: the bundle was not built for this board.
    """
    manifest = read_manifest(bundle)
    load_board(settings.board)
    if settings.board not in manifest.boards:
        raise BoardMismatchError(
            f"{bundle.name} was built for {', '.join(manifest.boards)}, not for {settings.board}; "
            f"add {settings.board!r} to export.boards in the recipe and export again"
        )
    _require_published(bundle, repository, f"{manifest.name}-{manifest.version}.fieldvit")
    trusted = (repository / "metadata" / "1.root.json").read_bytes()
    _require_same_root(root / "root.json", trusted)
    root.mkdir(parents=True, exist_ok=True)
    _copy_tree(repository, root / "updates")
    if not (root / "agent.toml").exists():
        write_atomic(root / "agent.toml", agent_toml(settings).encode())
    write_atomic(root / "root.json", trusted)


def agent_toml(settings: BoardSettings) -> str:
    """The agent's configuration file."""
    lines = [
        "# Used by: fieldvit-device run --root THIS_DIRECTORY",
        f"site = {json.dumps(settings.id.site)}",
        f"device = {json.dumps(settings.id.device)}",
        f"board = {json.dumps(settings.board)}",
        f"channel = {json.dumps(settings.channel)}",
        f"results = {json.dumps(settings.results)}",
        "",
        "[source]",
        f"path = {json.dumps(settings.frames)}",
        "",
        "[update]",
        'source = "dir:updates"',
    ]
    if settings.broker:
        lines += ["", "[broker]", f"hostname = {json.dumps(settings.broker[0])}", f"port = {settings.broker[1]}"]
    return "\n".join(lines) + "\n"


def _require_published(bundle: Path, repository: Path, name: str) -> None:
    if published_digest(repository, name) != sha256_of(bundle):
        raise FleetError(
            f"{bundle.name} is not in the repository {repository}; run 'fieldvit publish {bundle} --repo {repository}' first"
        )


def _require_same_root(path: Path, trusted: bytes) -> None:
    if path.exists() and path.read_bytes() != trusted:
        raise FleetError(
            f"{path}: this board trusts another repository; publish with its keys, or flash an empty directory"
        )


def _copy_tree(source: Path, target: Path) -> None:
    """Replace `target` by a copy of `source`, keeping the old one until the new one is whole."""
    partial, old = target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)
