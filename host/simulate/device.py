"""One simulated board: its boots, its windows, what it answers, and what befalls it.

A boot begins everything anew but what a disk would hold: spool, slots, lessons, sampling, and the ids of commands.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from paho.mqtt.enums import MQTTProtocolVersion

from device.contract.board import Board
from device.contract.commands import NoArguments, SamplingChange
from device.contract.errors import ConfigError
from device.contract.messages import Reply, Result, encode_reply, encode_result
from device.contract.topics import DeviceId
from host.monitor.broker import BrokerAddress
from host.simulate.about import diagnose, status_table
from host.simulate.commands import Commands, Quick
from host.simulate.config import SimulationConfig
from host.simulate.connection import Connection
from host.simulate.faults import OUTAGE_WINDOWS, FaultPlan
from host.simulate.frames import FrameCount
from host.simulate.ledger import Ledger
from host.simulate.models import Models, Sources
from host.simulate.release import Release
from host.simulate.reporter import Reporter
from host.simulate.sampling import Sampling
from host.simulate.spool import URGENT, Spool
from host.simulate.window import Condition, Windows

DRIFT_ALARM = 1.0
SMALL_SPOOL_BYTES = 4096
"""Of a board whose spool overflows: a few telemetry messages."""
MEMORY_SHARE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the boards of one process share.

    `started` is when the simulation began, by the event loop's clock. `on_trouble` is told why a board has no connection,
    `on_end` gets each task that has ended: one that failed is our mistake.
    """

    config: SimulationConfig
    board: Board
    broker: BrokerAddress
    protocol: MQTTProtocolVersion
    sources: Sources
    release: Release
    started: float
    on_trouble: Callable[[str], None]
    on_end: Callable[[asyncio.Task[None]], None]


class SimulatedDevice:
    """A board, by its number; made and used in a running event loop."""

    def __init__(self, world: World, number: int) -> None:
        self._world, config, board = world, world.config, world.board
        self.id = DeviceId(config.site, config.device_name(number))
        self.ledger = Ledger()
        self._loop = asyncio.get_running_loop()
        self._rng = _rng(config, number, "board")
        self._plan = FaultPlan(config.faults, seed=config.seed, number=number)
        self._windows = Windows(
            _rng(config, number, "windows"),
            latency_s=config.timing.latency_s,
            memory_bytes=int(MEMORY_SHARE * board.budget.peak_memory_mb * 1e6),
        )
        self._configured = Sampling(max_fps=0.0, telemetry_interval_s=config.interval_s, results=False)
        self._sampling = self._configured
        self._is_sampling_new = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._suffering: set[asyncio.Task[None]] = set()
        self._has_link = self._has_power = True
        self._spool = Spool(
            max_bytes=board.runtime.spool_bytes if self._plan.loses_link_at_s is None else SMALL_SPOOL_BYTES,
            max_age_s=board.runtime.spool_age_s,
            clock=self._loop.time,
        )
        self._reporter = Reporter(
            self.id,
            board,
            spool=self._spool,
            ledger=self.ledger,
            cuts_next=self._plan.cuts_next,
            clock=self._clock,
            send=lambda: self._connection.pump(),
        )
        self._connection = Connection(
            self.id,
            world.broker,
            world.protocol,
            spool=self._spool,
            ledger=self.ledger,
            birth=lambda: self._reporter.birth(self._models),
            offline=self._reporter.offline,
            on_command=self._receive,
            on_trouble=world.on_trouble,
            backoff_s=config.timing.backoff_s,
            rng=_rng(config, number, "connection"),
        )
        self._models = Models(
            world.release,
            board,
            sources=world.sources,
            timing=config.timing,
            bad_releases=self._plan.bad_releases,
            event=self._reporter.event,
            announce=self._connection.announce,
            start=self._start,
            clock=self._clock,
            frames_per_s=lambda: self._frames.frames_per_s,
            has_frame=lambda frame_id: self._frames.has(frame_id),
        )
        self._commands = Commands(
            quick=self._quick_verbs(),
            long={"update": self._models.update, "rollback": self._models.rollback},
            answer=self._answer,
            clock=self._clock,
            start=self._start,
        )
        self._begin_boot()

    @property
    def is_connected(self) -> bool:
        return self._connection.is_connected

    def beat(self) -> None:
        """Keep the connection alive."""
        self._connection.beat()

    async def run(self) -> None:
        """Live until cancelled: connect, speak, and suffer what is planned."""
        self._speak_from(self._rng.uniform(0, self._sampling.telemetry_interval_s))
        if self._plan.loses_link_at_s is not None:
            self._run_in(self._suffering, self._suffer_outage(self._plan.loses_link_at_s))
        self._run_in(self._suffering, self._suffer_reboots())
        await self._connection.run()

    async def stop(self, *, drain_s: float) -> None:
        """End in good order: the last window, what waits, and a goodbye; what is still waiting then stays counted so."""
        for task in self._suffering:
            task.cancel()
        self._end_boot()
        if not self._has_power:
            self._reporter.begin_boot()
            self._begin_boot()
        self._commands.interrupt()
        self._report_window()
        self._set_link(has_link=True, has_power=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._connection.settle(or_unheard=True)
        await self._connection.leave()

    def _begin_boot(self) -> None:
        self._window_since, self._is_drifting = self._loop.time(), False
        self._last_window: dict[str, float] = {}
        self._frames = FrameCount(
            self._sampling.frames_per_s(self._world.config.timing.frames_per_s),
            prefix=f"frame-{self._reporter.boot[:6]}",
            kept=self._world.board.runtime.feature_ring,
            clock=self._loop.time,
        )

    def _end_boot(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _suffer_reboots(self) -> None:
        for moment_s in sorted(self._plan.reboots_at_s):
            await self._until(moment_s)
            await self._reboot()

    async def _reboot(self) -> None:
        """Lose power, without a word to anybody, and boot."""
        self._end_boot()
        self._set_link(has_power=False)
        await asyncio.sleep(self._world.config.timing.boot_s * self._rng.uniform(0.5, 1.5))
        self._reporter.begin_boot()
        self._begin_boot()
        self._commands.interrupt()
        self._models.resume()
        self._speak_from(self._sampling.telemetry_interval_s)
        self._set_link(has_power=True)

    async def _suffer_outage(self, moment_s: float) -> None:
        """Lose the link at a moment when all was acknowledged, so that what is dropped was never sent."""
        await self._until(moment_s)
        await self._connection.settle(or_unheard=False)
        self._set_link(has_link=False)
        await asyncio.sleep(OUTAGE_WINDOWS * self._sampling.telemetry_interval_s)
        self._set_link(has_link=True)

    def _set_link(self, *, has_link: bool | None = None, has_power: bool | None = None) -> None:
        self._has_link = self._has_link if has_link is None else has_link
        self._has_power = self._has_power if has_power is None else has_power
        if self._has_link and self._has_power:
            self._connection.find()
        else:
            self._connection.lose()

    async def _until(self, moment_s: float) -> None:
        await asyncio.sleep(max(0.0, self._world.started + moment_s - self._loop.time()))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine for as long as this boot lasts."""
        self._run_in(self._tasks, work)

    def _run_in(self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(self._world.on_end)

    def _clock(self) -> float:
        """The board's wall clock, Unix seconds; one that was never set begins in 1970."""
        offset_s = self._plan.clock_offset_s
        return self._frames.uptime_s if offset_s is None else time.time() + offset_s

    def _speak_from(self, first_s: float) -> None:
        """Send the first window in so many seconds, and then one after the other."""
        self._start(self._speak(first_s))
        if self._sampling.results:
            self._start(self._show_results())

    async def _speak(self, first_s: float) -> None:
        """Report window after window. One that nobody disturbed has its planned length: a busy machine changes no figures."""
        due, planned_s = self._loop.time() + first_s, first_s
        while True:
            self._is_sampling_new.clear()
            interval_s = self._sampling.telemetry_interval_s
            try:
                async with asyncio.timeout_at(due):
                    await self._is_sampling_new.wait()
                due, planned_s = min(due, self._loop.time() + self._sampling.telemetry_interval_s), 0.0
            except TimeoutError:
                due = self._loop.time() + interval_s
                self._report_window(planned_s)
                planned_s = interval_s

    async def _show_results(self) -> None:
        """One inference result for each frame, while that is asked for."""
        while self._sampling.results:
            await asyncio.sleep(1 / self._frames.frames_per_s)
            result = Result(
                frame_id=self._frames.newest_id(),
                label=self._rng.choice(self._models.head.labels),
                confidence=round(self._rng.uniform(0.5, 1.0), 4),
                time=self._clock(),
            )
            self._connection.publish_result(encode_result(result))

    def _report_window(self, planned_s: float = 0.0) -> None:
        """Send the telemetry of a window of the planned length (0: as long as it was), and the events that follow from it."""
        now, drifts_at_s = self._loop.time(), self._plan.drifts_at_s
        is_elsewhere = drifts_at_s is not None and now >= self._world.started + drifts_at_s
        condition = Condition(
            frames_per_s=self._frames.frames_per_s,
            elapsed_s=planned_s or max(now - self._window_since, 1e-3),
            shift=1.0 if is_elsewhere else 0.0,
            effect=self._models.effect,
        )
        head = self._models.head
        values = self._windows.measure(len(head.labels), condition) | {"learned/version": float(head.version)}
        self._window_since, self._last_window = now, values
        self._reporter.telemetry(values)
        if values["errors"]:
            self._reporter.event("error", reason="engine", detail="the interpreter failed on a frame")
        drift = values.get("drift")
        if drift is not None:
            if drift > DRIFT_ALARM and not self._is_drifting:
                self._reporter.event("drift", drift=drift, limit=DRIFT_ALARM)
            self._is_drifting = drift > DRIFT_ALARM

    def _receive(self, payload: bytes) -> None:
        self.ledger.commands += self._commands.receive(payload)

    def _answer(self, reply: Reply) -> None:
        self.ledger.replies += 1
        self._spool.put("reply", encode_reply(reply), priority=URGENT)
        self._connection.pump()

    def _quick_verbs(self) -> dict[str, Quick]:
        return {
            "learn": self._models.learn,
            "undo": self._models.undo,
            "set-sampling": self._set_sampling,
            "snapshot": self._snapshot,
            "rebirth": self._rebirth,
            "diagnostics": self._diagnose,
            "status": self._status,
        }

    def _set_sampling(self, change: SamplingChange, _: str) -> dict[str, Any]:
        if not change.is_empty:
            had_results = self._sampling.results
            self._sampling = self._sampling.changed(change, configured=self._configured)
            self._frames.change_rate(self._sampling.frames_per_s(self._world.config.timing.frames_per_s))
            self._is_sampling_new.set()
            if self._sampling.results and not had_results:
                self._start(self._show_results())
        return {"sampling": asdict(self._sampling)}

    def _snapshot(self, _: NoArguments, __: str) -> dict[str, Any]:
        raise ConfigError("snapshot is off on this board; its operator may set snapshot = true in agent.toml")

    def _rebirth(self, _: NoArguments, __: str) -> dict[str, Any]:
        self._connection.announce()
        return {"boot": self._reporter.boot}

    def _status(self, _: NoArguments, __: str) -> dict[str, Any]:
        return status_table(
            self._models,
            device=self.id,
            boot=self._reporter.boot,
            time=self._clock(),
            spool=self._spool,
            delegate=self._world.board.runtime.delegate,
        ) | {
            "frames": self._frames.total,
            "connected": self.is_connected,
            "window": self._last_window,
            "sampling": asdict(self._sampling),
        }

    def _diagnose(self, _: NoArguments, __: str) -> dict[str, Any]:
        is_newest = self._world.protocol is MQTTProtocolVersion.MQTTv5
        about = {
            "boot": self._reporter.boot,
            "board": self._world.board.name,
            "protocol": "MQTT 5" if is_newest else "MQTT 3.1.1",
        }
        return about | diagnose(self._spool, self._last_window, time=self._clock(), uptime_s=self._frames.uptime_s)


def _rng(config: SimulationConfig, number: int, purpose: str) -> random.Random:
    return random.Random(f"{config.seed}/{number}/{purpose}")
