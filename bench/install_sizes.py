"""Measure what the environments take on the disk and write the table `install_sizes`.

    python -m bench.install_sizes

Counts `site-packages` of `.venv` and `.venv-device` without pip, setuptools and compiled caches.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.record import write_results

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {".venv-device": "fieldvit[device]", ".venv": "fieldvit[host,dev]"}
TOOLS = ("pip", "setuptools", "pkg_resources", "_distutils_hack")


def main() -> int:
    rows = []
    for directory, extra in ENVIRONMENTS.items():
        (site_packages,) = (ROOT / directory).glob("lib/python*/site-packages")
        rows.append(
            {
                "environment": directory,
                "installs": extra,
                "megabytes": round(sum(path.stat().st_size for path in _files(site_packages)) / 1e6),
            }
        )
    write_results(
        "install_sizes",
        command="python -m bench.install_sizes",
        seed=None,
        data="the environments that 'make env device-env' made",
        rows=rows,
        title="Installed sizes",
    )
    for row in rows:
        print(f"{row['installs']:20} {row['megabytes']:6} MB")
    return 0


def device_packages() -> dict[str, int]:
    """Bytes of each package that the device environment holds, by the name of its folder."""
    (site_packages,) = (ROOT / ".venv-device").glob("lib/python*/site-packages")
    sizes: Counter[str] = Counter()
    for path in _files(site_packages):
        sizes[path.relative_to(site_packages).parts[0].split("-")[0].removesuffix(".py")] += path.stat().st_size
    return dict(sizes)


def _files(site_packages: Path) -> Iterator[Path]:
    return (
        path
        for path in site_packages.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not _is_tool(path.relative_to(site_packages).parts[0])
    )


def _is_tool(name: str) -> bool:
    return name.split("-")[0] in TOOLS


if __name__ == "__main__":
    sys.exit(main())
