"""Memory figures are of the process they name."""

import subprocess
import sys

import pytest

from host.memory import TreeMemory, own_peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MB = 1 << 20
CHILD = "from host.memory import own_peak_bytes; print(own_peak_bytes())"


def test_a_large_parent_does_not_change_a_childs_peak():
    small = int(subprocess.check_output([sys.executable, "-c", CHILD]))
    ballast = bytearray(300 * MB)
    beside_ballast = int(subprocess.check_output([sys.executable, "-c", CHILD]))
    assert own_peak_bytes() > len(ballast)
    assert abs(beside_ballast - small) < 20 * MB


def test_the_tree_holds_the_children():
    command = [sys.executable, "-c", "x = bytearray(200 << 20); x[::4096] = bytes(len(x[::4096])); input()"]
    with TreeMemory() as memory:
        child = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            child.communicate(b"\n")
    assert memory.peak_bytes > 200 * MB
