"""The agent's configuration, `ROOT/agent.toml`; what it leaves out comes from the board profile.

site = "greenhouse"             # fieldvit/v1/SITE/DEVICE/...
device = "cam-1"
board = "raspberry-pi-5"        # a profile of firmware_configs/
channel = "stable"              # which bundle the update source offers this board
precision = ""                  # "" = the fastest that passes its self-test; else "int8", "dynamic", ...
results = false                 # publish every inference result
snapshot = false                # answer the command snapshot with the last frame; without it no image leaves the board
refused_commands = []           # verbs that are not obeyed over MQTT, for example ["learn", "undo"]

[broker]                        # optional: without it the agent works offline and keeps its messages
hostname = "broker.local"
port = 1883
username = "cam-1"
password_file = "broker.secret" # a path relative to ROOT, like every path here
ca_file = "ca.pem"              # TLS, with these authorities alone
cert_file = "device.pem"        # this board's certificate; its key may be in the same file
key_file = "device.key"

[source]
kind = "directory"              # or "video", "camera" (V4L2), "picamera" (CSI), "mqtt"
path = "frames"                 # the directory, or the video file
poll_s = 0.2
max_fps = 0                     # 0 = as fast as possible
# of a video: realtime = true   # at its own rate, and what the model is too slow for is dropped; else every frame
#             loop = true       # begin again at its end
# of cameras: device = "/dev/video0"    # better a name that stays: "/dev/v4l/by-id/..."; of a picamera its number: "0"
#             width = 1280, height = 720, fps = 15      # what to ask for; 0 = what the driver gives
# of mqtt:    queue = 4         # frames on fieldvit/v1/SITE/DEVICE/frame that may wait; the oldest are dropped

[update]
source = "dir:updates"          # or "https://updates.example.org/fieldvit"
check_interval_s = 3600         # 0 = on command, and at start when there is no model
max_bytes_per_s = 0             # of what is read from the source; 0 = no limit
window = "02:00-05:00"          # local time in which the agent looks by itself; "" = always. A command is obeyed at once
days = ["sat", "sun"]           # on which that window opens; [] = every day
ca_file = "updates-ca.pem"      # certificates for https: in place of the system's
on_learned_loss = "refuse"      # an update that would drop a class taught here; "drop" = take it all the same

[runtime]                       # overrides of the board profile
threads = 2
weight_cache = true             # packed weights in ROOT/cache: less memory, as much disk as the model in float32
delegate = "edgetpu"            # or "gpu", "vx", or a delegate's library; without it the processor does the work

[log]
format = "text"                 # or "json": one object a line

[watchdog]                      # seconds without a sign of life until the agent is restarted
frames_s = 30

[metrics]                       # optional: figures for Prometheus on http://127.0.0.1:PORT/metrics
port = 9477

[home_assistant]                # optional: the board shows up there by itself
enabled = true
"""

import os
import sys
import tomllib
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

from device.contract.board import Board, Runtime
from device.contract.errors import ConfigError
from device.contract.messages import VERBS
from device.contract.record import record
from device.contract.records import from_table
from device.contract.topics import DeviceId, is_id
from device.window import Window, parse_window

CONFIG_NAME = "agent.toml"
LOG_FORMATS = ("text", "json")
REFUSE, DROP = "refuse", "drop"
SOURCE_PREFIX = "dir:"
WEB_SCHEMES = ("http", "https")
SOURCE_KINDS = {
    "directory": ("path",),
    "video": ("path", "realtime", "loop"),
    "camera": ("device", "width", "height", "fps"),
    "picamera": ("device", "width", "height", "fps"),
    "mqtt": ("queue",),
}
"""The kinds of frame sources, and the settings that each has beside `poll_s` and `max_fps`."""
MAX_SIDE, MAX_FPS, MAX_QUEUE = 16384, 1000, 64


@record(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where the MQTT broker is, and how to log in."""

    hostname: str
    port: int = 1883
    keepalive_s: int = 60
    username: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        if not self.hostname:
            raise ConfigError("broker.hostname must not be empty; name the broker, or remove [broker] to work offline")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"broker.port must be 1..65535, got {self.port}")
        if not 5 <= self.keepalive_s <= 3600:
            raise ConfigError(f"broker.keepalive_s must be 5..3600, got {self.keepalive_s}")
        if self.cert_file is not None and self.ca_file is None:
            raise ConfigError("broker.cert_file needs broker.ca_file: who shows a certificate must know to whom")
        if self.key_file is not None and self.cert_file is None:
            raise ConfigError("broker.key_file needs broker.cert_file; name both, or neither")


@record(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where frames come from; a setting of another kind of source than this is a mistake, and refused."""

    kind: str = "directory"
    path: str = "frames"
    poll_s: float = 0.2
    max_fps: float = 0.0
    realtime: bool = False
    loop: bool = False
    device: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    queue: int = 4

    def __post_init__(self) -> None:
        if self.kind not in SOURCE_KINDS:
            raise ConfigError(f"source.kind must be one of {', '.join(SOURCE_KINDS)}, got {self.kind!r}")
        of_others = {name for names in SOURCE_KINDS.values() for name in names} - {*SOURCE_KINDS[self.kind]}
        for field_ in fields(self):
            if field_.name in of_others and getattr(self, field_.name) != field_.default:
                raise ConfigError(f"source.{field_.name} means nothing where source.kind is {self.kind!r}; remove it")
        self._require_device()
        if self.kind == "video" and self.path == "frames":
            raise ConfigError("source.path must name the video file where source.kind is 'video'")
        if min(self.width, self.height, self.fps) < 0 or max(self.width, self.height) > MAX_SIDE or self.fps > MAX_FPS:
            raise ConfigError(
                f"source.width and height must be 0..{MAX_SIDE}, fps 0..{MAX_FPS}, "
                f"got {self.width}x{self.height} at {self.fps}"
            )
        if bool(self.width) != bool(self.height):
            raise ConfigError("source.width and source.height belong together; give both, or neither")
        if not 1 <= self.queue <= MAX_QUEUE:
            raise ConfigError(f"source.queue must be 1..{MAX_QUEUE}, got {self.queue}")
        if self.poll_s <= 0 or self.max_fps < 0:
            raise ConfigError(
                f"source.poll_s must be above 0 and max_fps 0 or more, got {self.poll_s} and {self.max_fps}"
            )

    def _require_device(self) -> None:
        is_number = self.device.isascii() and self.device.isdecimal()
        is_path = self.device.startswith("/dev/") and self.device.isprintable() and ".." not in self.device
        if self.kind == "camera" and not (is_path or (sys.platform == "darwin" and is_number)):
            raise ConfigError(f"source.device must be the camera's file, like /dev/video0, got {self.device!r}")
        if self.kind == "picamera" and self.device and not is_number:
            raise ConfigError(f"source.device must be the CSI camera's number, like '0', got {self.device!r}")


@record(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """Where updates come from, how often and when to look, and how fast to read."""

    source: str = "dir:updates"
    check_interval_s: float = 0.0
    max_bytes_per_s: float = 0.0
    window: str = ""
    days: tuple[str, ...] = ()
    ca_file: str | None = None
    on_learned_loss: str = REFUSE

    def __post_init__(self) -> None:
        require_source(self.source)
        if self.on_learned_loss not in (REFUSE, DROP):
            raise ConfigError(f"update.on_learned_loss must be {REFUSE} or {DROP}, got {self.on_learned_loss!r}")
        if self.check_interval_s < 0 or self.max_bytes_per_s < 0:
            raise ConfigError(
                "update.check_interval_s and max_bytes_per_s must be 0 or more, "
                f"got {self.check_interval_s} and {self.max_bytes_per_s}"
            )
        window = self.open_window()
        if window and self.check_interval_s > window.length_s:
            raise ConfigError(
                f"update.check_interval_s must be at most {window.length_s:.0f}, the length of update.window, "
                f"got {self.check_interval_s}; else no look may fall into it"
            )

    def open_window(self) -> Window | None:
        """When the agent may look by itself; None: always."""
        return parse_window(self.window, self.days)


@record(frozen=True, slots=True, kw_only=True)
class RuntimeOverrides:
    """Values that replace the board profile's runtime defaults; see `device.contract.board.Runtime`."""

    threads: int | None = None
    delegate: str | None = None
    weight_cache: bool | None = None
    feature_ring: int | None = None
    spool_bytes: int | None = None
    spool_age_s: int | None = None
    telemetry_interval_s: float | None = None
    soak_frames: int | None = None
    soak_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"runtime.{name} must be above 0, got {value}")


@record(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How log lines look; see `device.logs`."""

    format: str = "text"

    def __post_init__(self) -> None:
        if self.format not in LOG_FORMATS:
            raise ConfigError(f"log.format must be {' or '.join(LOG_FORMATS)}, got {self.format!r}")


@record(frozen=True, slots=True, kw_only=True)
class WatchdogConfig:
    """Seconds that the frame loop may be silent, and that a command, or an update beside its transfer, may take."""

    frames_s: float = 30.0
    commands_s: float = 300.0
    updates_s: float = 7200.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ConfigError(f"watchdog.{name} must be above 0, got {value}")


@record(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Where Prometheus reads figures. Who can reach the port can read them, so other machines only when said so."""

    port: int
    address: str = "127.0.0.1"
    allow_remote: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"metrics.port must be 1..65535, got {self.port}")
        import ipaddress  # here: few boards have a metrics port

        try:
            is_local = ipaddress.ip_address(self.address).is_loopback
        except ValueError as error:
            raise ConfigError(f"metrics.address must be an IP address of this board, got {self.address!r}") from error
        if not is_local and not self.allow_remote:
            raise ConfigError(
                f"metrics.address {self.address} can be reached from other machines, without a password; "
                "set metrics.allow_remote = true if that is meant"
            )


@record(frozen=True, slots=True, kw_only=True)
class HomeAssistantConfig:
    """Discovery by Home Assistant; see `device.home_assistant`."""

    enabled: bool = False
    prefix: str = "homeassistant"

    def __post_init__(self) -> None:
        if not is_id(self.prefix):
            raise ConfigError(f"home_assistant.prefix {self.prefix!r}: use 1 to 64 letters, digits, '_' and '-' only")


@record(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything in `agent.toml`."""

    site: str
    device: str
    board: str
    channel: str = "stable"
    precision: str = ""
    results: bool = False
    snapshot: bool = False
    refused_commands: tuple[str, ...] = ()
    broker: BrokerConfig | None = None
    source: SourceConfig = field(default_factory=SourceConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    runtime: RuntimeOverrides = field(default_factory=RuntimeOverrides)
    log: LogConfig = field(default_factory=LogConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    metrics: MetricsConfig | None = None
    home_assistant: HomeAssistantConfig = field(default_factory=HomeAssistantConfig)

    def __post_init__(self) -> None:
        for name in ("site", "device", "channel"):
            if not is_id(getattr(self, name)):
                raise ConfigError(f"{name} {getattr(self, name)!r}: use 1 to 64 letters, digits, '_' and '-' only")
        unknown = [verb for verb in self.refused_commands if verb not in VERBS]
        if unknown:
            raise ConfigError(f"refused_commands: {unknown[0]!r} is no command; commands are {', '.join(VERBS)}")
        if self.source.kind == "mqtt" and self.broker is None:
            raise ConfigError("source.kind 'mqtt' needs [broker]: frames come from there")

    @property
    def id(self) -> DeviceId:
        return DeviceId(self.site, self.device)


def load_config(root: Path) -> AgentConfig:
    """Read `ROOT/agent.toml`.

    Raises:
        ConfigError: the file is missing or no TOML, or a value in it is missing, unknown or out of range.
    """
    path = root / CONFIG_NAME
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; write it ('fieldvit flash' does), or pass --root DIR") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path}: not TOML ({error})") from error
    return from_table(AgentConfig, table, where=str(path))


def resolve_runtime(board: Board, overrides: RuntimeOverrides) -> Runtime:
    """The board profile's runtime values with the overrides applied."""
    return replace(board.runtime, **{name: value for name, value in asdict(overrides).items() if value is not None})


def beside_agent(overrides: RuntimeOverrides) -> RuntimeOverrides:
    """For a tool that loads the model beside the agent: the caches are the agent's, and root's files would lock it out."""
    return replace(overrides, weight_cache=False)


def require_source(source: str, *, name: str = "update.source") -> None:
    """Refuse what is neither a directory nor a web address; ConfigError says how to write one, and where: `name`."""
    if source.startswith(SOURCE_PREFIX) and source != SOURCE_PREFIX and "\0" not in source:
        return
    try:
        parts = urlsplit(source)
        is_address = parts.scheme in WEB_SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or not source.isprintable() or " " in source:
        raise ConfigError(f"{name} must be {SOURCE_PREFIX}PATH, or http(s)://HOST[:PORT]/PATH, got {source!r}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"{name} must hold no user, password, '?' or '#'; what is signed needs no secret")


def resolve_source(source: str, base: Path, *, name: str = "update.source") -> Path | str:
    """The directory of a `dir:PATH` update source, where a relative path starts at `base`, or the URL of another.

    Raises:
        ConfigError: another kind of source.
    """
    require_source(source, name=name)
    if source.startswith(SOURCE_PREFIX):
        return Path(os.path.normpath(base / source.removeprefix(SOURCE_PREFIX)))
    return source
