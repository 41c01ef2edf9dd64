"""Resident memory: the peak of this process, and of this process with all it started."""

import os
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_PROC = Path("/proc")
INTERVAL_S = 0.25


def own_peak_bytes() -> int:
    """Peak resident memory of this process. On Linux not `ru_maxrss`, which starts at the parent's size."""
    try:
        for line in (_PROC / "self" / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TreeMemory:
    """Sample the summed resident memory of this process and its descendants; `peak_bytes` stays 0 where there is no /proc.

    Pages that processes share are counted for each of them, so the true figure is lower.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_bytes(os.getpid()))
            if self._stop.wait(INTERVAL_S):
                return


def tree_bytes(root: int) -> int:
    """Resident bytes of a process and its descendants now."""
    parents, resident = {}, {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21])
    return sum(pages for pid, pages in resident.items() if _descends(pid, root, parents)) * os.sysconf("SC_PAGE_SIZE")


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root
