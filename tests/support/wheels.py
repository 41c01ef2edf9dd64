"""Wheels of what is installed here, packed again: an offline board can be installed without any index."""

import zipfile
from importlib import metadata
from pathlib import Path


def pack_wheel(distribution: metadata.Distribution, directory: Path) -> Path:
    """Pack one installed distribution; its own record says what belongs to it."""
    tags = [line[5:] for line in (distribution.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")]
    name = distribution.metadata["Name"].replace("-", "_")
    pythons, abis, platforms = zip(*(tag.split("-") for tag in tags), strict=True)
    joined = "-".join(".".join(dict.fromkeys(parts)) for parts in (pythons, abis, platforms))
    path = directory / f"{name}-{distribution.version}-{joined}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in distribution.files or []:
            inside = str(file).startswith("..") or "__pycache__" in str(file) or file.name in ("INSTALLER", "REQUESTED")
            if not inside:
                archive.write(file.locate(), str(file))
    return path
