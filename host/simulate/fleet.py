"""The boards of one process, on one event loop."""

import asyncio
import logging
import resource
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from paho.mqtt.enums import MQTTProtocolVersion

from device.contract.board import load_board
from host.monitor.broker import BrokerAddress
from host.simulate.config import SimulationConfig
from host.simulate.device import SimulatedDevice, World
from host.simulate.ledger import add_totals
from host.simulate.models import Sources, require_precision
from host.simulate.release import Release, first_release

LOGINS_AT_ONCE = 50
"""So many boards of a process wait for their first login at a time, so that the start floods no broker."""
LAUNCH_CHECK_S = 0.02
BEAT_S = 5.0
BEATS_AT_ONCE = 200
ENDS_AT_ONCE = 200
DRAIN_S = 15.0
"""How long boards go on sending, at the end, what still waits."""

log = logging.getLogger(__name__)


def find_release(config: SimulationConfig) -> Release:
    """What the boards serve at the start: what their channel offers, or a release that is only a name.

    Raises:
        ConfigError: there is no such board.
        UpdateRefusedError: the channel cannot be read, or offers nothing for this board.
    """
    board = load_board(config.board)
    if config.updates is None:
        return first_release(board.name, board.support.precisions[0])
    release = Sources(config.updates, config.channel).offer()
    require_precision(release, board)
    return release


class Fleet:
    """Some boards of a simulation, by their numbers."""

    def __init__(
        self,
        config: SimulationConfig,
        numbers: Sequence[int],
        *,
        broker: BrokerAddress,
        protocol: MQTTProtocolVersion,
        release: Release,
    ) -> None:
        self._config, self._numbers = config, numbers
        self._broker, self._protocol, self._release = broker, protocol, release
        self._troubles: set[str] = set()
        self._devices: list[SimulatedDevice] = []
        self._launched: list[SimulatedDevice] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def run(
        self, stop: asyncio.Event, *, on_progress: Callable[[dict[str, Any]], None], progress_s: float
    ) -> dict[str, Any]:
        """Run the boards until `stop` is set or the duration is over.

        Args:
            stop: ends the simulation in good order.
            on_progress: told the totals so far, every `progress_s` seconds.
            progress_s: see there.

        Returns:
            The totals, `boards` with the numbers of each, and `cpu_s` that this process took.
        """
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(lambda _, context: _fail(failed, context.get("exception"), context["message"]))
        world = self._world(started=loop.time(), failed=failed)
        self._devices = [SimulatedDevice(world, number) for number in self._numbers]
        self._begin(self._beat(), world)
        self._begin(self._tell(on_progress, progress_s), world)
        launch = self._begin(self._launch(world), world)
        try:
            await _first_of(stop, failed, self._config.duration_s)
            launch.cancel()
            await self._end()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if failed.done():
            failed.result()
        used = resource.getrusage(resource.RUSAGE_SELF)
        boards = {device.id.device: device.ledger.table() for device in self._devices}
        return {"totals": self.totals(), "boards": boards, "cpu_s": used.ru_utime + used.ru_stime}

    def _world(self, *, started: float, failed: asyncio.Future[None]) -> World:
        return World(
            config=self._config,
            board=load_board(self._config.board),
            broker=self._broker,
            protocol=self._protocol,
            sources=Sources(self._config.updates, self._config.channel),
            release=self._release,
            started=started,
            on_trouble=self._report,
            on_end=lambda task: _check(failed, task),
        )

    def _begin(self, work: Coroutine[Any, Any, None], world: World) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(world.on_end)
        self._tasks.append(task)
        return task

    async def _end(self) -> None:
        """End the boards in good order, so many at a time that their last messages pass quickly."""
        turns = asyncio.Semaphore(ENDS_AT_ONCE)

        async def end(device: SimulatedDevice) -> None:
            async with turns:
                await device.stop(drain_s=DRAIN_S)

        await asyncio.gather(*map(end, self._launched))

    def totals(self) -> dict[str, int]:
        """What was counted so far, and how many boards are connected now."""
        counted = add_totals([device.ledger.totals() for device in self._devices])
        return counted | {"connected": sum(device.is_connected for device in self._devices)}

    async def _launch(self, world: World) -> None:
        """Begin the life of one board after the other, a few ahead of those that have logged in."""
        waiting: list[SimulatedDevice] = []
        for device in self._devices:
            while len(waiting) >= LOGINS_AT_ONCE:
                waiting = [other for other in waiting if not other.ledger.connections]
                await asyncio.sleep(LAUNCH_CHECK_S)
            waiting.append(device)
            self._launched.append(device)
            self._begin(device.run(), world)

    async def _beat(self) -> None:
        """Keep idle connections alive, a few at a time: the others must not wait for all."""
        while True:
            await asyncio.sleep(BEAT_S)
            for place, device in enumerate(self._devices):
                device.beat()
                if place % BEATS_AT_ONCE == 0:
                    await asyncio.sleep(0)

    async def _tell(self, on_progress: Callable[[dict[str, Any]], None], progress_s: float) -> None:
        while True:
            await asyncio.sleep(progress_s)
            on_progress(self.totals())

    def _report(self, trouble: str) -> None:
        """Say once why boards have no connection."""
        if trouble not in self._troubles:
            log.warning("broker %s: %s; boards try again, messages wait in their spools", self._broker, trouble)
        self._troubles.add(trouble)


async def _first_of(stop: asyncio.Event, failed: asyncio.Future[None], duration_s: float | None) -> None:
    """Return when the simulation is to end; raise what went wrong in it."""
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait((asked, failed), timeout=duration_s, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if failed.done():
        failed.result()


def _check(failed: asyncio.Future[None], task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _fail(failed, error, "")


def _fail(failed: asyncio.Future[None], error: BaseException | None, message: str) -> None:
    """A mistake of ours ends the simulation, with its traceback: figures after it could not be trusted."""
    if not failed.done():
        failed.set_exception(error or RuntimeError(message))
