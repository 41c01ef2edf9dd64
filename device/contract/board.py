"""Board profiles: what a board is, what it may run, its budgets, and the agent's defaults on it.

The profiles are data, one TOML per board in `firmware_configs/`. Each figure in them has its source beside it.
"""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from device.contract.errors import ConfigError
from device.contract.record import record
from device.contract.records import from_table

PROFILES = "firmware_configs"

PROCESSOR, COREML = "xnnpack", "coreml"
LIBRARIES = {
    "edgetpu": "libedgetpu.so.1",
    "gpu": "libtensorflowlite_gpu_delegate.so",
    "vx": "libvx_delegate.so",  # the NPU of i.MX 8M Plus
}
"""The shared library behind each delegate that is no part of the runtime; in its place a delegate may be a library's name."""
_LIBRARY = re.compile(r"[^\0]+\.(so(\.\d+)*|dylib)")


@record(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the board is, from the vendor's public specification."""

    cpu: str
    arch: str
    cores: int
    memory_mb: int
    storage: str
    accelerators: tuple[str, ...]
    os: str


@record(frozen=True, slots=True, kw_only=True)
class Support:
    """What it may run: formats (tflite, coreml), precisions in order of preference among those that are as fast, largest tensor rank.

    `minimum_ios` is the oldest iOS on the boards of this profile: it decides which forms of a Core ML package they take.
    """

    formats: tuple[str, ...]
    precisions: tuple[str, ...]
    max_tensor_rank: int
    minimum_ios: int | None = None

    def __post_init__(self) -> None:
        unknown = set(self.formats) - {"tflite", "coreml"}
        if unknown or not self.formats:
            raise ConfigError(f"support.formats must name tflite or coreml, got {list(self.formats)}")
        if ("coreml" in self.formats) != (self.minimum_ios is not None):
            raise ConfigError(
                f"support.minimum_ios goes with the format coreml: formats are {list(self.formats)}, minimum_ios is "
                f"{self.minimum_ios}; set both or neither"
            )


@record(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits for one model on this board; the exporter refuses what is over, the agent checks what it measures."""

    artifact_bytes: int
    peak_memory_mb: int
    latency_ms: float
    soc_temp_celsius: float


@record(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The agent's defaults: interpreter threads, delegate, frames kept for learning, spool bounds, telemetry interval, soak.

    `delegate` is what runs the backbone: xnnpack (the processor), coreml (on macOS), a key of `LIBRARIES`, or the name or
    path of a shared library that is a TFLite delegate. `weight_cache` keeps the processor's packed weights in a file.
    """

    threads: int
    delegate: str
    feature_ring: int
    spool_bytes: int
    spool_age_s: int
    telemetry_interval_s: float
    soak_frames: int
    soak_s: float
    weight_cache: bool = False

    def __post_init__(self) -> None:
        known = (PROCESSOR, COREML, *LIBRARIES)
        if self.delegate not in known and not _LIBRARY.fullmatch(self.delegate):
            raise ConfigError(
                f"runtime.delegate must be {', '.join(known)}, or a shared library's name, got {self.delegate!r}"
            )


@record(frozen=True, slots=True, kw_only=True)
class Board:
    """One board profile. `sources` says for each group of figures where it is from."""

    name: str
    description: str
    hardware: Hardware
    support: Support
    budget: Budget
    runtime: Runtime
    sources: dict[str, str]


def board_names() -> list[str]:
    """The names of the profiles that are installed."""
    return sorted(entry.name.removesuffix(".toml") for entry in _profiles().iterdir() if entry.name.endswith(".toml"))


def load_board(name: str) -> Board:
    """Read one profile.

    Raises:
        ConfigError: no such board (the message lists them), or the profile is wrong.
    """
    if name not in board_names():
        raise ConfigError(f"board {name!r} is unknown; choose one of {', '.join(board_names())}")
    return parse_board_text(name, _profiles().joinpath(f"{name}.toml").read_bytes())


def parse_board_text(name: str, content: bytes) -> Board:
    """Build a profile from a file's content; ConfigError where it is no TOML or no profile."""
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{PROFILES}/{name}.toml: not TOML ({error})") from error
    return parse_board(name, table)


def parse_board(name: str, table: dict[str, Any]) -> Board:
    """Build a profile from parsed TOML; its `name` must be the file's."""
    board = from_table(Board, table, where=f"{PROFILES}/{name}.toml")
    if board.name != name:
        raise ConfigError(f"{PROFILES}/{name}.toml: name is {board.name!r}, expected {name!r}")
    return board


def _profiles() -> Path:
    spec = find_spec(PROFILES)
    (directory, *_) = (spec and spec.submodule_search_locations) or ["firmware_configs"]
    return Path(directory)
