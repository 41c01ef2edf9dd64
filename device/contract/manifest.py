"""The manifest of a bundle: what was built, from what, for which boards, how exact it is, and how to check it.

JSON. Nothing in it is a measured time, so the same recipe on the same machine gives the same bytes. Schema 2 has
`projectors`; a bundle without any is still written as schema 1, which older agents read too.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import field
from pathlib import PurePosixPath
from typing import Any

from device.contract.errors import ArtifactError, SchemaError
from device.contract.record import record
from device.contract.records import from_table, to_table

SCHEMA_VERSION, PROJECTOR_SCHEMA = 1, 2
MANIFEST_NAME = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SEMVER = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}", re.ASCII)
MAX_RELEASE = 2**53 - 1
"""Beyond it JavaScript counts wrongly."""
MAX_GOLDEN_TOLERANCE = 0.5
"""A model that may be off by half its largest feature would prove nothing."""
MAX_PATH_BYTES = 240
_UNSAFE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@record(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """The image a model takes, after decoding: float32 NHWC, `(value / 255 - mean) / std`."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    color_order: str = "gray"
    layout: str = "NHWC"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.channels) < 1:
            raise ArtifactError(f"input: size must be positive, got {self.height}x{self.width}x{self.channels}")
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ArtifactError(f"input: mean and std need {self.channels} values each, std above 0")
        if self.interpolation != "bilinear" or self.layout != "NHWC" or self.dtype != "float32":
            raise ArtifactError("input: this version knows bilinear interpolation, layout NHWC and dtype float32 only")


@record(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    sha256: str
    bytes: int


@record(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One TFLite candidate. `precision` names its keys in `golden.npz` and `head.npz`.

    `accuracy` is the share of the host's test images of the base classes that it answers right in LiteRT;
    `golden_tolerance` is the largest allowed difference of a golden feature, relative to the largest golden value.
    """

    precision: str
    path: str
    backbone: str
    accuracy: float
    argmax_agreement: float
    min_cosine: float
    max_abs_difference: float
    golden_tolerance: float

    def __post_init__(self) -> None:
        if not 0 < self.golden_tolerance <= MAX_GOLDEN_TOLERANCE:
            raise ArtifactError(
                f"manifest.golden_tolerance of {self.precision!r} must be above 0 and at most {MAX_GOLDEN_TOLERANCE}, "
                f"got {self.golden_tolerance}"
            )


@record(frozen=True, slots=True, kw_only=True)
class CoreMLArtifact:
    """The Core ML package: a directory inside the bundle, and its parity as evaluated from the saved program.

    `form` says what it holds: float16, w8 (int8 weights), w8a8 (activations too) or palette6 (6-bit indices).
    """

    path: str
    argmax_agreement: float
    min_cosine: float
    max_abs_difference: float
    form: str = "float16"


@record(frozen=True, slots=True, kw_only=True)
class LearningSpec:
    """What the board may learn, and how. `max_drop` is the share of old-class accuracy that an update may cost."""

    method: str
    feature_dim: int
    max_classes: int
    max_drop: float
    shrinkage: float


@record(frozen=True, slots=True, kw_only=True)
class ProjectorEntry:
    """A file that takes what was learned on another backbone to one of this bundle's (`device.learning.projector`).

    Measured on held-out images: `r2` is the share of the new features' variance that the mapped old ones explain,
    `mean_cosine` the mean cosine of an image's mapped and real features, both from the mean of the real ones, `head_agreement` the share of
    images whose mapped features get the answer of the real ones from a head of class means.
    """

    path: str
    from_backbone: str
    to_backbone: str
    r2: float
    mean_cosine: float
    head_agreement: float


@record(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a board must know before it loads a model."""

    name: str
    version: str
    release: int
    task: str
    labels: tuple[str, ...]
    boards: tuple[str, ...]
    input: InputSpec
    artifacts: tuple[Artifact, ...]
    learning: LearningSpec
    float_accuracy: float
    licence: str
    provenance: dict[str, Any]
    files: dict[str, FileEntry]
    coreml: CoreMLArtifact | None = None
    projectors: tuple[ProjectorEntry, ...] = ()
    schema: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ArtifactError(f"manifest.name {self.name!r} must match {_NAME.pattern}")
        if not _SEMVER.fullmatch(self.version):
            raise ArtifactError(f"manifest.version {self.version!r} must be like 1.2.3")
        if not 1 <= self.release <= MAX_RELEASE:
            raise ArtifactError(f"manifest.release must be 1 or more, up to {MAX_RELEASE}, got {self.release}")
        if not self.artifacts or not self.labels or not self.boards:
            raise ArtifactError("manifest: artifacts, labels and boards must not be empty")
        if len({artifact.precision for artifact in self.artifacts}) != len(self.artifacts):
            raise ArtifactError("manifest: two artifacts have the same precision")
        if len(set(self.labels)) != len(self.labels) or not all(label.isprintable() and label for label in self.labels):
            raise ArtifactError("manifest.labels: must be printable, and no two the same")
        require_safe_paths([MANIFEST_NAME, *self.files])
        for artifact in self.artifacts:
            if artifact.path not in self.files:
                raise ArtifactError(f"manifest: artifact {artifact.path} is not among its files")
        self._require_projectors()

    def _require_projectors(self) -> None:
        if bool(self.projectors) != (self.schema == PROJECTOR_SCHEMA):
            raise ArtifactError(
                f"manifest: {len(self.projectors)} projectors in schema {self.schema}; they belong to {PROJECTOR_SCHEMA}"
            )
        ways = [(entry.from_backbone, entry.to_backbone) for entry in self.projectors]
        if len(set(ways)) != len(ways):
            raise ArtifactError("manifest.projectors: two lead from the same backbone to the same")
        for entry in self.projectors:
            if entry.path not in self.files:
                raise ArtifactError(f"manifest: projector {entry.path} is not among its files")
            if entry.to_backbone not in {artifact.backbone for artifact in self.artifacts}:
                raise ArtifactError(f"manifest: projector {entry.path} leads to a backbone that is not in this bundle")

    def projector(self, from_backbone: str, to_backbone: str) -> ProjectorEntry | None:
        """The way from one backbone to another, if the bundle has it."""
        ways = (e for e in self.projectors if (e.from_backbone, e.to_backbone) == (from_backbone, to_backbone))
        return next(ways, None)

    def artifact(self, precision: str) -> Artifact:
        """The candidate of that precision; ArtifactError names the ones there are."""
        for artifact in self.artifacts:
            if artifact.precision == precision:
                return artifact
        known = ", ".join(artifact.precision for artifact in self.artifacts)
        raise ArtifactError(f"{self.name} {self.version} has no {precision} artifact; it has {known}")

    def to_json(self) -> str:
        table = to_table(self)
        if self.schema == SCHEMA_VERSION:
            del table["projectors"]  # an older agent refuses a key that it does not know
        return json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Parse and check a manifest.

        Raises:
            ArtifactError: not JSON, another schema version, unknown or missing keys, or a value out of range.
        """
        try:
            table = json.loads(text, parse_constant=_refuse_constant)
            json.dumps(table, ensure_ascii=False).encode()  # half of a surrogate pair is a text that nobody can write
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{MANIFEST_NAME}: not JSON ({error}); build the bundle again") from error
        schema = table.get("schema") if isinstance(table, dict) else None
        if type(schema) is not int or schema not in (SCHEMA_VERSION, PROJECTOR_SCHEMA):
            raise SchemaError(
                f"{MANIFEST_NAME}: schema {schema!r} is not {SCHEMA_VERSION} or {PROJECTOR_SCHEMA}, those this version reads; "
                "update the agent, or build the bundle with a matching host"
            )
        return from_table(cls, table, where=MANIFEST_NAME, error=ArtifactError)


def require_safe_path(path: str) -> None:
    """Refuse what would be written outside its slot, or is no name of a file on every system that reads bundles."""
    parts = PurePosixPath(path).parts
    is_plain = path == "/".join(parts) and ".." not in parts and not path.startswith("/") and bool(path)
    has_name = not any(_DEVICE_NAME.fullmatch(part) or part.endswith((".", " ")) for part in parts)
    if not is_plain or not has_name or _UNSAFE.search(path) or len(path.encode(errors="replace")) > MAX_PATH_BYTES:
        raise ArtifactError(f"bundle: unsafe path {path[:80]!r}")


def require_safe_paths(paths: Iterable[str]) -> None:
    """`require_safe_path` for each, and none that is the directory of another, or the same but for its case."""
    seen: set[str] = set()
    for path in paths:
        require_safe_path(path)
        if path.casefold() in seen:
            raise ArtifactError(f"bundle: two files are named {path!r}")
        seen.add(path.casefold())
    for path in seen:
        if any(str(parent) in seen for parent in PurePosixPath(path).parents):
            raise ArtifactError(f"bundle: {path!r} lies in a file")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
