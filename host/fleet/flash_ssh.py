"""Install or update runtime and bundle on a board over SSH, and hear what the board makes of it.

In order: look, send what is missing (hashes decide; a file that was cut goes on where it stopped), make and test the
runtime's environment beside the one in use and switch to it by one rename, put the update files in place as a whole, and
have the agent, restarted if its runtime is new, install the bundle through the same checks as any update. Each step that
finds its work done does nothing, so the whole may be repeated at any time; a cut leaves the board as it was, with files
waiting in `incoming`.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from host.errors import FleetError
from host.files import sha256_of
from host.fleet.flash import BoardSettings, flash_directory
from host.fleet.runtime_wheel import build_runtime_wheel
from host.fleet.ssh import Remote

OLDEST_PYTHON = (3, 11)
RUNTIME_BYTES = 400 << 20
"""An environment, and the wheels it is made from."""
SPARE_BYTES = 64 << 20
_AGENT_LINES = {
    "": "",
    "restarted": "the runtime is new: its agent was restarted",
    "stopped": "the runtime is new: its agent was stopped, and no service starts it; start it again on the board",
    "kept": "the runtime is new, but its agent runs with the one before ({reason}); restart it on the board",
    "elsewhere": "its agent runs from an environment of its own; have it use runtime/current: fieldvit-device setup",
}
"""What became of a running agent, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the board's environment is made from: our wheel, exact versions, and, offline, the wheels of all it needs."""

    wheel: Path
    constraints: Path
    wheels: tuple[Path, ...] = ()
    pip_arguments: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        digests = [sha256_of(path) for path in (self.wheel, self.constraints, *self.wheels)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a flash did. `model` is what the board serves now; `is_updated` says whether it is newly installed.

    `agent` is what became of a running agent when the runtime changed: see `board_side.restart`.
    """

    is_runtime_changed: bool
    are_files_changed: bool
    is_updated: bool
    model: Mapping[str, Any]
    agent: Mapping[str, str]
    expires: datetime

    @property
    def is_changed(self) -> bool:
        return self.is_runtime_changed or self.are_files_changed or self.is_updated


def prepare_runtime(directory: Path, *, wheels: Path | None = None, pip_arguments: Sequence[str] = ()) -> Runtime:
    """Build the wheel and the constraints in a directory.

    Args:
        directory: where to.
        wheels: a directory with wheels for the board, of everything the runtime needs; None: its pip asks its index.
        pip_arguments: further options of the board's pip.

    Raises:
        FleetError: `wheels` holds none.
    """
    constraints = directory / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(_versions("fieldvit", "device"))))
    found = tuple(sorted(wheels.glob("*.whl"))) if wheels else ()
    if wheels and not found:
        raise FleetError(f"{wheels}: holds no wheels; fill it with 'pip download -d {wheels} --platform …'")
    wheel = build_runtime_wheel(directory)
    return Runtime(wheel=wheel, constraints=constraints, wheels=found, pip_arguments=tuple(pip_arguments))


def flash_ssh(
    bundle: Path,
    remote: Remote,
    *,
    repository: Path,
    settings: BoardSettings,
    wheels: Path | None = None,
    pip_arguments: Sequence[str] = (),
) -> Outcome:
    """Flash one board.

    Args:
        bundle: must be the one that the repository's channel points at.
        remote: the board.
        repository: a directory that `fieldvit publish` wrote.
        settings: an `agent.toml` that is there must say the same.
        wheels: as for `prepare_runtime`.
        pip_arguments: as for `prepare_runtime`.

    Raises:
        FleetError: no connection, an unknown host key, another board or repository, no room, or the board's refusal.
        BoardMismatchError: the bundle was not built for this board.
    """
    with tempfile.TemporaryDirectory(prefix="flash-") as name:
        directory = Path(name)
        staged, root = directory / "board", remote.target.root
        found = remote.ask("look", {"root": root, "names": []})
        _require_able(remote, found)
        staged.mkdir()
        for text_name, text in found["texts"].items():
            (staged / text_name).write_text(text, encoding="utf-8")
        expires = flash_directory(bundle, staged, repository=repository, settings=settings)
        runtime = prepare_runtime(directory, wheels=wheels, pip_arguments=pip_arguments)
        files = {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
        return _flash(remote, runtime, files, frames=settings.frames, expires=expires)


def _flash(remote: Remote, runtime: Runtime, files: Mapping[str, Path], *, frames: str, expires: datetime) -> Outcome:
    root = remote.target.root
    found = remote.ask("look", {"root": root, "names": sorted(files)})
    hashes = {name: sha256_of(path) for name, path in files.items()}
    parts = [runtime.wheel, runtime.constraints, *runtime.wheels]
    sent = {sha256_of(path): path for path in parts} if found["runtime"] != runtime.identity else {}
    needs_runtime = bool(sent)
    sent |= {sha: files[name] for name, sha in hashes.items() if found["hashes"][name] != sha}
    _require_room(remote, found, sum(path.stat().st_size for path in sent.values()), needs_runtime=needs_runtime)
    remote.send_all(sent, found["incoming"])
    is_runtime_changed = needs_runtime and _install(remote, runtime)
    placed = remote.ask("place", {"root": root, "files": hashes, "expected": found["hashes"], "frames": frames})
    remote.ask("give", {"root": root})
    agent = remote.ask("restart", {"root": root})  # before the bundle: it is tested and served by the new runtime
    answer = remote.ask("update", {"root": root})
    remote.ask("give", {"root": root})
    if answer["code"]:
        raise FleetError(f"{remote.target.name}: the board did not take the bundle: {answer['error']}")
    return Outcome(
        is_runtime_changed=is_runtime_changed,
        are_files_changed=placed["is_changed"],
        is_updated=answer["model"]["updated"],
        model=answer["model"],
        agent=agent,
        expires=expires,
    )


def _install(remote: Remote, runtime: Runtime) -> bool:
    arguments = {
        "root": remote.target.root,
        "identity": runtime.identity,
        "wheel": [runtime.wheel.name, sha256_of(runtime.wheel)],
        "constraints": sha256_of(runtime.constraints),
        "wheels": {path.name: sha256_of(path) for path in runtime.wheels},
        "pip_arguments": list(runtime.pip_arguments),
    }
    return bool(remote.ask("install", arguments)["is_changed"])


def _require_able(remote: Remote, found: Mapping[str, Any]) -> None:
    name, python = remote.target.name, tuple(found["python"])
    if python < OLDEST_PYTHON:
        raise FleetError(
            f"{name}: {remote.python} is {'.'.join(map(str, python))}, the runtime needs 3.11 or later; "
            "install it there, and name it with --python"
        )
    if not found["is_writable"]:
        raise FleetError(
            f"{name}: {remote.target.user} may not write {remote.target.root}; make it on the board "
            f"(sudo install -d -o {remote.target.user} {remote.target.root}), or flash another PATH"
        )


def _require_room(remote: Remote, found: Mapping[str, Any], sent_bytes: int, *, needs_runtime: bool) -> None:
    needed = 2 * sent_bytes + SPARE_BYTES + (RUNTIME_BYTES if needs_runtime else 0)
    if found["free_bytes"] < needed:
        raise FleetError(
            f"{remote.target.name}: {found['free_bytes'] >> 20} MiB are free, {needed >> 20} may be needed; make room"
        )


def _versions(name: str, extra: str = "", seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """What a distribution needs, with the versions that are installed here: those that were tested together."""
    seen = set() if seen is None else seen
    for requirement in metadata.distribution(name).requires or []:
        text, _, marker = requirement.partition(";")
        if ("extra" in marker) != bool(extra) or (extra and not re.search(rf"extra == ['\"]{extra}['\"]", marker)):
            continue
        needed = re.match(r"[A-Za-z0-9._-]+", text.strip())
        assert needed
        key = re.sub(r"[-_.]+", "-", needed[0]).lower()
        if key in seen:
            continue
        seen.add(key)
        try:
            yield key, metadata.version(key)
            yield from _versions(key, seen=seen)
        except metadata.PackageNotFoundError:  # for another system or Python
            continue


def describe(outcome: Outcome, remote: Remote) -> list[str]:
    """What a flash did, for people."""
    model = outcome.model
    what = f"{model['name']} {model['version']} {model['precision']} in slot {model['slot']}"
    lines = [
        f"{remote.target.name}: {what}, {model['state']}" + ("" if outcome.is_changed else "; nothing had to change")
    ]
    return lines + [line for line in [_AGENT_LINES[outcome.agent["agent"]].format(**outcome.agent)] if line]
