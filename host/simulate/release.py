"""What a simulated board knows of a bundle: its manifest's facts, and the hash that was signed."""

from dataclasses import dataclass
from typing import Self

from device.contract.manifest import Artifact, Manifest

HEAD_NAME = "head.npz"
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One bundle. `head` is its head's SHA-256, `artifacts` are (precision, backbone), `ways` its projectors' (old, new) backbones."""

    name: str
    version: str
    release: int
    sha256: str
    bytes: int
    labels: tuple[str, ...]
    boards: tuple[str, ...]
    max_classes: int
    feature_dim: int
    head: str
    artifacts: tuple[tuple[str, str], ...]
    ways: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def from_manifest(cls, manifest: Manifest, *, sha256: str, size: int) -> Self:
        return cls(
            name=manifest.name,
            version=manifest.version,
            release=manifest.release,
            sha256=sha256,
            bytes=size,
            labels=manifest.labels,
            boards=manifest.boards,
            max_classes=manifest.learning.max_classes,
            feature_dim=manifest.learning.feature_dim,
            head=manifest.files[HEAD_NAME].sha256 if HEAD_NAME in manifest.files else "",
            artifacts=tuple(map(_named, manifest.artifacts)),
            ways=frozenset((way.from_backbone, way.to_backbone) for way in manifest.projectors),
        )

    def backbone(self, precision: str) -> str:
        return dict(self.artifacts)[precision]

    def chosen(self, precisions: tuple[str, ...]) -> str | None:
        """The first precision, in a board profile's order, that this bundle has; None: it has none of them."""
        return next((precision for precision in precisions if precision in dict(self.artifacts)), None)


def _named(artifact: Artifact) -> tuple[str, str]:
    return artifact.precision, artifact.backbone


def first_release(board: str, precision: str) -> Release:
    """What boards serve that follow no repository: no file, only a name."""
    return Release(
        name="simulated",
        version="1.0.0",
        release=1,
        sha256="0" * 64,
        bytes=1_000_000,
        labels=DIGITS,
        boards=(board,),
        max_classes=2 * len(DIGITS),
        feature_dim=64,
        head="",
        artifacts=((precision, "0" * 64),),
    )
