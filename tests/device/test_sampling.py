"""Sampling is set by command within bounds, kept over restarts, and never stops the agent."""

import pytest

from device.contract.commands import SamplingChange
from device.contract.errors import ConfigError, MessageError
from device.sampling import Sampling, SamplingStore

CONFIGURED = Sampling(max_fps=0.0, telemetry_interval_s=60.0, results=False)


def test_changes_add_up_survive_and_can_be_forgotten(tmp_path):
    store = SamplingStore(tmp_path, CONFIGURED)
    store.change(SamplingChange(max_fps=5.0))
    store.change(SamplingChange(results=True))
    assert store.current == Sampling(max_fps=5.0, telemetry_interval_s=60.0, results=True)
    again = SamplingStore(tmp_path, Sampling(max_fps=1.0, telemetry_interval_s=30.0, results=False))
    assert again.current == Sampling(max_fps=5.0, telemetry_interval_s=30.0, results=True)
    assert again.change(SamplingChange(reset=True, max_fps=2.0)).results is False
    assert SamplingStore(tmp_path, CONFIGURED).current.max_fps == 2.0


@pytest.mark.parametrize(
    "values", [{"max_fps": -1.0}, {"max_fps": 1e9}, {"telemetry_interval_s": 0.0}, {"telemetry_interval_s": 1e9}]
)
def test_values_out_of_bounds_are_refused(values):
    with pytest.raises(MessageError, match=f"set-sampling: {next(iter(values))} must be"):
        SamplingChange(**values)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"max_fps": 1e9}', b'{"wings": 2}', b"\xff", b"[" * 10**5])
def test_a_damaged_file_is_told_and_left(tmp_path, caplog, content):
    (tmp_path / "sampling.json").write_bytes(content)
    assert SamplingStore(tmp_path, CONFIGURED).current == CONFIGURED
    assert "sampling is as configured, set it again" in caplog.text


def test_a_disk_that_takes_nothing_changes_nothing(tmp_path):
    store = SamplingStore(tmp_path / "sub", CONFIGURED)
    (tmp_path / "sub").write_text("a file where a directory should be")
    with pytest.raises(ConfigError, match="cannot be written"):
        store.change(SamplingChange(max_fps=1.0))
    assert store.current == CONFIGURED
