"""Whether the device extra installs on 64-bit ARM Linux from binary wheels alone: pip resolves it, nothing is run.

pip takes the wheels of the platform asked for, but judges markers (`python_version < "3.13"`) by the interpreter it runs on.
So what the target's markers ask for in addition is looked up in each wheel's metadata, and resolved too.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from host.errors import HostError

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
"""What a Raspberry Pi OS or Debian from 2020 on accepts; pip takes those that are named and no older ones by itself."""


class WheelsError(HostError):
    """pip finds no wheels, or no index."""


def device_requirements() -> list[str]:
    """What `pip install fieldvit[device]` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"]["device"])


def install_wheels(requirements: Iterable[str], python: str, target: Path, *, constraints: Path) -> None:
    """Unpack wheels, of the target's platform, into a folder; WheelsError says what pip says."""
    _pip([*requirements, "--target", str(target), "-c", str(constraints)], python)


def resolve_wheels(requirements: Sequence[str], python: str, *, constraints: Path) -> dict[str, str]:
    """The wheel's file name by package, of all that is needed; WheelsError where one has none."""
    wanted, wheels = list(requirements), dict[str, str]()
    while True:
        report = ["--dry-run", "--ignore-installed", "--report", "-", "--target", "not-written"]  # pip wants a target
        text = _pip([*wanted, *report, "-c", str(constraints)], python)
        installs = json.loads(text)["install"]
        wheels = {
            canonicalize_name(item["metadata"]["name"]): item["download_info"]["url"].rpartition("/")[2]
            for item in installs
        }
        missing = [need for item in installs for need in _needs(item["metadata"], python) if _name(need) not in wheels]
        if not missing:
            return dict(sorted(wheels.items()))
        wanted += missing


def _needs(metadata: dict[str, Any], python: str) -> list[str]:
    """What a package asks for on the target, without extras, and without its markers."""
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "aarch64",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    needs = [Requirement(text) for text in metadata.get("requires_dist", [])]
    return [f"{need.name}{need.specifier}" for need in needs if need.marker is None or need.marker.evaluate(target)]


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _pip(arguments: Sequence[str], python: str) -> str:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise WheelsError(f"Python {python}, aarch64: {'; '.join(errors) or done.stderr.strip()[-300:]}")
    return done.stdout
