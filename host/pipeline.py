"""Stages of a recipe, each cached under the hash of everything that goes into it.

A stage writes into `runs/NAME/STAGE.partial/`, which is renamed to `STAGE/` when its `stamp.json` is written: an
interrupted stage leaves nothing that looks finished, and the next run starts it again after the finished ones. It finds
there what the very same stage left, such as a checkpoint to go on from.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

STAMP = "stamp.json"
WANTED = "wanted"
"""In an unfinished stage's directory: the hash of what it is to become."""
_SOURCES = (
    "converters",
    "device/contract",
    "device/learning",
    "host/continual",
    "host/data",
    "host/distill",
    "host/models",
    "host/quantize",
)
_SOURCES += (
    "host/stages",
    "host/training",
    "host/files.py",
    "device/engine.py",
    "device/preprocess.py",
    "device/pictures.py",
    "device/runtime.py",
)
_PACKAGES = (
    "torch",
    "timm",
    "numpy",
    "pillow",
    "torchvision",
    "lightning-fabric",
    "scikit-learn",
    "litert-torch",
    "ai-edge-quantizer",
    "ai-edge-litert",
    "coremltools",
)

Report = Callable[[str, int, int, str], None]
"""Called with stage, done, total and a short text while a stage works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step: `inputs` is what its result depends on, beside the code and the stages before it."""

    name: str
    inputs: Mapping[str, Any]
    work: Callable[[Path], Mapping[str, Any]]


def run_stage(stage: Stage, directory: Path, *, upstream: str = "") -> str:
    """Do the stage's work unless its result is there already; returns the stage's hash, for the stages after it.

    Args:
        stage: what to do; `work` gets the directory to write into and returns metrics for the stamp.
        directory: `runs/NAME`.
        upstream: the hash of the stage before it.
    """
    digest = stage_digest(stage, upstream)
    final = directory / stage.name
    if _stamp(final).get("digest") == digest:
        return digest
    partial = _unfinished(directory / f"{stage.name}.partial", digest)
    metrics = dict(stage.work(partial))
    stamp = {"digest": digest, "inputs": stage.inputs, "packages": package_versions(), "metrics": metrics}
    (partial / STAMP).write_text(json.dumps(stamp, indent=1, sort_keys=True, default=str) + "\n")
    (partial / WANTED).unlink()
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return digest


def is_finished(stage: Stage, directory: Path, *, upstream: str = "") -> bool:
    """Whether `run_stage` would find the result there."""
    return bool(_stamp(directory / stage.name).get("digest") == stage_digest(stage, upstream))


def _unfinished(partial: Path, digest: str) -> Path:
    """The directory that the stage works in: what an interrupted run of the very same stage left, else an empty one."""
    wanted = partial / WANTED
    if not wanted.is_file() or wanted.read_text() != digest:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        wanted.write_text(digest)
    return partial


def stage_metrics(directory: Path, name: str) -> dict[str, Any]:
    """The metrics that a finished stage stored; empty if it is not finished."""
    metrics: dict[str, Any] = _stamp(directory / name).get("metrics", {})
    return metrics


def stage_digest(stage: Stage, upstream: str) -> str:
    """Hash of a stage's inputs, the stages before it, our code and the package versions."""
    record = [stage.name, stage.inputs, upstream, source_digest(), package_versions(), platform.machine()]
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_digest() -> str:
    """Hash of the code that a stage's result depends on."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = root / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {name: metadata.version(name) for name in _PACKAGES}


def _stamp(directory: Path) -> dict[str, Any]:
    try:
        stamp: dict[str, Any] = json.loads((directory / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp
