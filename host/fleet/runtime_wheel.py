"""The runtime as one wheel: `device` and the board profiles of this installation, nothing of the host.

Built here, without a build backend or an index, so that what a board gets is the code that was tested with this host, from a
checkout and from an installed package alike. The same code gives the same bytes.
"""

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from host.errors import FleetError

PACKAGES = ("device", "firmware_configs")
ENTRY_POINTS = "[console_scripts]\nfieldvit-device = device.cli:main\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: fieldvit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME = (1980, 1, 1, 0, 0, 0)


def build_runtime_wheel(directory: Path) -> Path:
    """Write `fieldvit-VERSION-py3-none-any.whl` into a directory.

    Raises:
        FleetError: this installation has no metadata, so that what the runtime needs is not known.
    """
    try:
        distribution = metadata.distribution("fieldvit")
    except metadata.PackageNotFoundError as error:
        raise FleetError("fieldvit runs from files that are not installed; 'pip install -e .' first") from error
    version, info = distribution.version, f"fieldvit-{distribution.version}.dist-info"
    files = dict(_package_files())
    files[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    files |= {f"{info}/WHEEL": _WHEEL.encode(), f"{info}/entry_points.txt": ENTRY_POINTS.encode()}
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD").encode()
    path = directory / f"fieldvit-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def _package_files() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        yield from _files_below(resources.files(package), package)


def _files_below(directory: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files_below(entry, f"{name}/{entry.name}")
        elif entry.name.endswith((".py", ".toml")):
            yield f"{name}/{entry.name}", entry.read_bytes()


def _record(files: dict[str, bytes], own_name: str) -> str:
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own_name},,"]) + "\n"
