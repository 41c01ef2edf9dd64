"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from device.memory import give_back
from device.telemetry import memory_bytes
blocks = [np.ones(60_000, np.uint8) for _ in range(1000)]  # 60 MB, too small each to be mapped by itself
pin = blocks[-1]
del blocks
kept = memory_bytes()
give_back()
print(kept - memory_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps it, and takes the call")
def test_what_was_freed_goes_back():
    given_back = int(subprocess.check_output([sys.executable, "-c", PROGRAM], text=True))
    assert given_back > 40e6
