"""Window statistics: right figures, names and units of the contract, fixed memory."""

import numpy as np
import pytest

from device.contract.messages import Telemetry, decode_telemetry, encode_telemetry
from device.contract.topics import DeviceId
from device.telemetry import LATENCIES_KEPT, MIN_DRIFT_FRAMES, Window, memory_bytes, peak_memory_bytes, soc_temp_celsius


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def window() -> Window:
    return Window(np.zeros(4), np.array([1.0, 1.0, 2.0, 0.0]), clock=Clock())


def add(window: Window, count: int, *, feature: float = 0.0) -> None:
    for number in range(count):
        window.add(
            latency_s=(number + 1) / 1000,
            class_index=number % 2,
            confidence=0.5,
            features=np.array([feature, -feature, feature, 0.0]),
        )


def test_figures_of_a_window(window: Window):
    add(window, 100)
    window._clock.now = 10.0
    values = window.close()
    assert values["frames"] == 100
    assert values["throughput"] == pytest.approx(10)
    assert values["latency/p50"] == pytest.approx(0.0505)
    assert values["latency/p99"] == pytest.approx(0.09901)
    assert (values["confidence"], values["class/0"], values["class/1"]) == (0.5, 50, 50)
    assert window.close()["frames"] == 0


def test_drift_is_the_mean_shift_in_standard_deviations(window: Window):
    add(window, MIN_DRIFT_FRAMES, feature=2.0)
    assert window.drift() == pytest.approx((2 + 2 + 1 + 0) / 4)
    assert window.close()["drift"] == pytest.approx(1.25)


def test_few_frames_give_no_drift(window: Window):
    add(window, MIN_DRIFT_FRAMES - 1, feature=5.0)
    assert "drift" not in window.close()


def test_every_value_is_in_the_contract(window: Window):
    add(window, 50, feature=1.0)
    values = window.close()
    telemetry = Telemetry(boot="b", sequence=1, time=0.0, values=values)
    assert decode_telemetry(encode_telemetry(DeviceId("s", "d"), telemetry)).values == values


def test_memory_is_bounded(window: Window):
    add(window, LATENCIES_KEPT + 100)
    assert len(window._latencies) == LATENCIES_KEPT


def test_readings_of_this_machine_are_plausible():
    assert 1 << 20 < memory_bytes() <= peak_memory_bytes() < 1 << 40
    temperature = soc_temp_celsius()
    assert temperature is None or -50 < temperature < 150
