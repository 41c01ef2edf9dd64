"""When each frame began and ended, written by the measured process and read by the measuring one while both run.

A file of fixed size that both map: a counter, then a ring of pairs. Times are the system's monotonic clock, which all
processes share. Standard library only: the measured process is a board's.
"""

import mmap
import struct
from pathlib import Path

FRAMES_KEPT = 1 << 15
_COUNT, _PAIR = struct.Struct("<q"), struct.Struct("<dd")
_HEADER_BYTES = 16


class Moments:
    """The ring in a file that `create` made."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path) -> "Moments":
        """Make the file, empty."""
        path.write_bytes(bytes(_HEADER_BYTES + FRAMES_KEPT * _PAIR.size))
        return cls(path)

    @property
    def count(self) -> int:
        """Frames since the file was made."""
        return int(_COUNT.unpack_from(self._memory)[0])

    def add(self, began: float, ended: float) -> None:
        """One more frame, seconds."""
        count = self.count
        _PAIR.pack_into(self._memory, _HEADER_BYTES + count % FRAMES_KEPT * _PAIR.size, began, ended)
        _COUNT.pack_into(self._memory, 0, count + 1)

    def since(self, number: int) -> list[tuple[float, float]]:
        """The frames from `number` on.

        Raises:
            ValueError: some of them were overwritten; read more often.
        """
        count = self.count
        if count - number >= FRAMES_KEPT:
            raise ValueError(f"frames {number} to {count - FRAMES_KEPT} are gone; read the moments more often")
        return [
            _PAIR.unpack_from(self._memory, _HEADER_BYTES + index % FRAMES_KEPT * _PAIR.size)
            for index in range(number, count)
        ]
