"""The quickstart verb in a process of its own."""

import subprocess
import sys
from pathlib import Path

NAME = "quickstart-short"


def run_quickstart_verb(runs: Path, *options: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """Run `fieldvit quickstart --short` into `runs`."""
    command = [sys.executable, "-m", "host.cli", "quickstart", "--short", "--runs", str(runs), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
