"""How much the agent looks and tells: frames per second, telemetry interval, results. Set by command, kept over restarts.

`ROOT/sampling.json` holds what was set; what it leaves out is as configured.
"""

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from device.contract.commands import SamplingChange
from device.contract.errors import ConfigError, DeviceError
from device.contract.files import write_atomic
from device.contract.record import record
from device.contract.records import from_table, to_table

FILE_NAME = "sampling.json"

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is in force: frames per second (0: as fast as possible), seconds between telemetry, whether results are sent."""

    max_fps: float
    telemetry_interval_s: float
    results: bool


class SamplingStore:
    """What is in force now; read by the frame loop, changed by the command thread, each by one assignment."""

    def __init__(self, root: Path, configured: Sampling) -> None:
        self._path, self._configured = root / FILE_NAME, configured
        self._change = self._load()
        self.current = self._apply(self._change)

    def change(self, wanted: SamplingChange) -> Sampling:
        """Put a change into force, once it is on the disk.

        Raises:
            ConfigError: the disk does not take it; nothing changed.
        """
        before = SamplingChange() if wanted.reset else self._change
        merged = replace(before, **_given(wanted))
        try:
            write_atomic(self._path, json.dumps(to_table(merged)).encode())
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written ({error}); make room on the disk") from error
        self._change, self.current = merged, self._apply(merged)
        return self.current

    def _apply(self, change: SamplingChange) -> Sampling:
        return replace(self._configured, **_given(change))

    def _load(self) -> SamplingChange:
        try:
            table = json.loads(self._path.read_bytes())
            return from_table(SamplingChange, table, where=self._path.name)
        except FileNotFoundError:
            return SamplingChange()
        except (OSError, ValueError, RecursionError, DeviceError) as error:
            log.error("%s: not used (%s); sampling is as configured, set it again", self._path, error)
            return SamplingChange()


def _given(change: SamplingChange) -> dict[str, Any]:
    names = [field.name for field in fields(Sampling)]
    return {name: value for name in names if (value := getattr(change, name)) is not None}
