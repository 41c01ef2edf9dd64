"""For all tests: PyTorch on one thread, because two of its threads beside other work take ten times as long."""

import os

import hypothesis

from tests.support.patience import PATIENCE

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is first imported, in children too

if PATIENCE > 1:  # a slow machine is no finding
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("patient")
