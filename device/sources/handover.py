"""Items on their way from a source's thread to the frame loop: few, and none that is stale."""

import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

LOOK_S = 0.1
"""How soon a waiting thread notices that it should stop."""


class Handover(Generic[T]):
    """At most `size` items, first in, first out."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()

    def put_newest(self, item: T) -> int:
        """Add an item now; the oldest gives way where there is no room. Returns how many did."""
        with self._changed:
            is_full = len(self._items) == self._size
            if is_full:
                self._items.popleft()
            self._items.append(item)
            self._changed.notify_all()
        return int(is_full)

    def put_when_there_is_room(self, item: T, stop: threading.Event) -> None:
        """Add an item as soon as another was taken; gives up when `stop` is set."""
        with self._changed:
            while len(self._items) == self._size and not stop.is_set():
                self._changed.wait(LOOK_S)
            self._items.append(item)
            self._changed.notify_all()

    def take(self) -> T | None:
        """The oldest item, or None."""
        with self._changed:
            self._changed.notify_all()
            return self._items.popleft() if self._items else None

    def wait(self, timeout_s: float, stop: threading.Event) -> None:
        """Until there is an item, `stop` is set, or that time is over."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._items and not stop.is_set() and (remaining_s := deadline - time.monotonic()) > 0:
                self._changed.wait(min(remaining_s, LOOK_S))
