"""The agent's systemd unit: restarted whatever happens, watched, within the board's limits, and allowed as little as it needs.

Checked with `systemd-analyze verify` and `security --offline=true` by the tests. What is allowed, and why:

- network: IPv4, IPv6 and Unix sockets; without a broker and with updates from a directory, loopback only
- devices: none, unless frames come from a camera. Then all of its class, and the group `video`: one that was unplugged
  comes back under another number. A CSI camera also needs the media controllers and the heaps that its frames lie in.
  A delegate needs its accelerator's, and the Edge TPU netlink, by which libusb hears of it (from the drivers' sources, not
  tried on such boards); what a library of the operator's own needs is not known, so no device is kept from that. Who may
  open them is the system's matter: name a group, where there is one, with `systemctl edit`
- writing: the data directory; everything else is read-only or not there
- memory: two models, because during a probation the one before stays, and the agent; at most three quarters of the board's
- processors: the interpreter's threads and one more, for the rest
- `OOMPolicy=continue`: a self-test that takes too much memory dies alone; it must not take the agent with it
- `StartLimitIntervalSec=0`: a board nobody can walk to never gives up; a model that keeps crashing is taken back by the agent
"""

import os
from collections.abc import Iterator
from pathlib import Path

from device.config import SOURCE_PREFIX, AgentConfig, resolve_runtime
from device.contract.board import Board
from device.contract.record import record
from device.delegates import is_library

UNIT_NAME = "fieldvit-agent.service"
STATE = Path("/var/lib")
WATCHDOG_S = 60
AGENT_MB = 128
"""Python, LiteRT, the spool's cache and the messages under way, above two models."""
DEVICE_CLASSES = {"camera": ("video4linux",), "picamera": ("video4linux", "media", "dma_heap")}
"""As `/proc/devices` names them, by `source.kind`."""
DELEGATE_CLASSES = {"edgetpu": ("apex", "usb_device"), "gpu": ("drm",), "vx": ("galcore",)}
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))


@record(frozen=True, slots=True, kw_only=True)
class Service:
    """What a unit is made from: data directory, interpreter, and the user to run as ("" lets systemd choose one)."""

    root: Path
    python: Path
    user: str = ""


def unit_text(service: Service, config: AgentConfig, board: Board) -> str:
    """The unit file."""
    sections = {"Unit": _unit(config), "Service": _service(service, config, board), "Install": _install()}
    lines = ["# Written by 'fieldvit-device setup'; add your own settings with 'systemctl edit', not here."]
    for name, settings in sections.items():
        lines += ["", f"[{name}]", *(f"{key}={value}" for key, value in settings)]
    return "\n".join(lines) + "\n"


def _unit(config: AgentConfig) -> Iterator[tuple[str, object]]:
    yield "Description", f"FieldViT agent {config.id}".replace("%", "%%")
    yield "Documentation", "man:systemd.service(5)"
    yield "After", "local-fs.target network.target time-sync.target"  # the network may be away: it is never waited for
    yield "StartLimitIntervalSec", 0


def _service(service: Service, config: AgentConfig, board: Board) -> Iterator[tuple[str, object]]:
    yield "Type", "notify"
    yield "NotifyAccess", "main"
    yield "ExecStart", f"{_word(service.python)} -m device.cli run --root {_word(service.root)}"
    yield "ExecReload", "/bin/kill -HUP $MAINPID"
    yield "Restart", "always"
    yield "RestartSec", 2
    yield "WatchdogSec", WATCHDOG_S
    yield "TimeoutStartSec", 180
    yield "TimeoutStopSec", 30
    yield "OOMPolicy", "continue"
    yield "Environment", "MALLOC_MMAP_THRESHOLD_=131072"  # swapped models give their memory back
    yield from _identity(service)
    yield from _limits(config, board)
    yield from _hardening(service, config, resolve_runtime(board, config.runtime).delegate)


def _identity(service: Service) -> Iterator[tuple[str, object]]:
    if service.user:
        yield "User", service.user
    else:
        yield "DynamicUser", "yes"
        yield "User", "fieldvit"
    if service.root.parent == STATE:
        yield "StateDirectory", service.root.name
        yield "StateDirectoryMode", "0700"
    else:
        yield "ReadWritePaths", _quote(service.root)
    yield "UMask", "0077"


def _limits(config: AgentConfig, board: Board) -> Iterator[tuple[str, object]]:
    most_mb = min(2 * board.budget.peak_memory_mb + AGENT_MB, board.hardware.memory_mb * 3 // 4)
    threads = resolve_runtime(board, config.runtime).threads
    yield "MemoryHigh", f"{most_mb * 9 // 10}M"
    yield "MemoryMax", f"{most_mb}M"
    yield "CPUQuota", f"{100 * min(threads + 1, board.hardware.cores)}%"
    yield "TasksMax", 64
    yield "LimitCORE", 0  # a core would hold what the camera saw
    yield "LimitNOFILE", 1024


def _hardening(service: Service, config: AgentConfig, delegate: str) -> Iterator[tuple[str, object]]:
    frames = service.root / config.source.path
    uses_home = any(_is_below(path, HOMES) for path in (service.root, service.python, frames, _source_path(config)))
    yield "NoNewPrivileges", "yes"
    yield "CapabilityBoundingSet", ""
    yield "AmbientCapabilities", ""
    yield "ProtectSystem", "strict"
    yield "ProtectHome", "read-only" if uses_home else "yes"
    for name in ("PrivateTmp", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectClock"):
        yield name, "yes"
    for name in ("ProtectControlGroups", "ProtectHostname", "RestrictNamespaces", "RestrictRealtime"):
        yield name, "yes"
    for name in ("RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute", "RemoveIPC"):
        yield name, "yes"
    yield "ProtectProc", "invisible"
    yield "RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6" + " AF_NETLINK" * (delegate == "edgetpu")
    if config.broker is None and config.update.source.startswith(SOURCE_PREFIX):
        yield "IPAddressDeny", "any"
        yield "IPAddressAllow", "localhost"
    yield "SystemCallArchitectures", "native"
    yield "SystemCallFilter", "@system-service"
    yield "SystemCallFilter", "~@privileged @resources"
    yield "SystemCallErrorNumber", "EPERM"
    yield from _devices(config.source.kind, delegate)


def _devices(source_kind: str, delegate: str) -> Iterator[tuple[str, object]]:
    camera = DEVICE_CLASSES.get(source_kind, ())
    classes = (*camera, *DELEGATE_CLASSES.get(delegate, ()))
    is_unknown = is_library(delegate) and delegate not in DELEGATE_CLASSES
    if not (classes or is_unknown):
        yield "PrivateDevices", "yes"
        yield "PrivateUsers", "yes"
    if not is_unknown:
        yield "DevicePolicy", "closed"
        for name in classes:
            yield "DeviceAllow", f"char-{name} rw"
    if camera:
        yield "SupplementaryGroups", "video"


def _install() -> Iterator[tuple[str, object]]:
    yield "WantedBy", "multi-user.target"


def _source_path(config: AgentConfig) -> Path:
    return Path(config.update.source.removeprefix(SOURCE_PREFIX))


def _is_below(path: Path, directories: tuple[Path, ...]) -> bool:
    return any(Path(os.path.normpath(path)).is_relative_to(directory) for directory in directories)


def _word(path: Path) -> str:
    """A path as one word of a command line, where variables are expanded."""
    return _quote(path).replace("$", "$$")


def _quote(path: Path) -> str:
    """A path as one word: its specifiers and quotes are meant literally."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if any(character in text for character in " ;'\"\\") else text
