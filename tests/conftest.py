"""For all tests: PyTorch on one thread, because two of its threads beside other work take ten times as long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is first imported, in children too
