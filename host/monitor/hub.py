"""Tells open pages what changed: threads report devices, each page's stream gets them merged, a few times a second."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

from device.contract.topics import DeviceId

MERGE_S = 0.3
RETRY_MS = 2000


class Hub:
    """Memory is bounded by pages times devices: a slow page gets fewer, larger messages, never a backlog."""

    def __init__(self, is_connected: Callable[[], bool] = lambda: True) -> None:
        self._is_connected = is_connected
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pages: set[_Page] = set()
        self._is_closed = False

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Say which loop runs the streams; what is reported before has no page to go to."""
        self._loop = loop

    def notify(self, device: DeviceId | None) -> None:
        """Report a change, from any thread; None means something that is no device's."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: no page is open any more
                self._loop.call_soon_threadsafe(self._mark, device)

    def close(self) -> None:
        """End every stream, from any thread, so that the server can stop."""
        self._is_closed = True
        self.notify(None)

    async def stream(self) -> AsyncIterator[dict[str, str | int]]:
        """Yield server-sent events: `hello` once, then `change` with the devices and the state of the broker."""
        page = _Page()
        self._pages.add(page)
        try:
            yield {"event": "hello", "data": self._message(set()), "retry": RETRY_MS}
            while True:
                await page.has_changed.wait()
                if self._is_closed:
                    return
                await asyncio.sleep(MERGE_S)
                yield {"event": "change", "data": self._message(page.take())}
        finally:
            self._pages.discard(page)

    def _mark(self, device: DeviceId | None) -> None:
        for page in self._pages:
            if device is not None:
                page.devices.add(device)
            page.has_changed.set()

    def _message(self, devices: set[DeviceId]) -> str:
        return json.dumps({"connected": self._is_connected(), "devices": sorted(map(str, devices))})


class _Page:
    def __init__(self) -> None:
        self.devices: set[DeviceId] = set()
        self.has_changed = asyncio.Event()

    def take(self) -> set[DeviceId]:
        devices, self.devices = self.devices, set()
        self.has_changed.clear()
        return devices
