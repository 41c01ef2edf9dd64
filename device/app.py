"""The agent: wires frame source, model, learning, updates, spool and MQTT.

Threads: `MainThread` reads and classifies frames; `mqtt` owns the connection; `updates` installs and rolls back;
`commands` does the rest. Only the main thread touches the frame source; models and heads are replaced by one assignment.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device.ask import Asked
from device.commands import Commands, Handler
from device.config import AgentConfig, BrokerConfig, resolve_runtime
from device.contract.board import Board
from device.contract.commands import SamplingChange
from device.contract.errors import ConfigError, DeviceError, EngineError, FrameError, one_line
from device.contract.files import write_atomic
from device.contract.messages import Result, encode_result
from device.contract.records import to_table
from device.credentials import check_credentials
from device.diagnostics import ErrorLog, diagnose
from device.frames import Frame
from device.last_run import begin_run, end_run
from device.learned import remove_stale
from device.modules import forbidden_modules
from device.notify import Supervisor
from device.opening import START_S, Opening
from device.reporter import Reporter, agent_version
from device.sampling import Sampling, SamplingStore
from device.serving import Attempt, Model, attempt
from device.slots import NAMES
from device.snapshot import take_snapshot
from device.sources.messages import MessageSource
from device.spool import Spool
from device.updater import Updater
from device.verbs import Verbs, status_table, unknown_to
from device.watchdog import Heart, Pulse, Watchdog

if TYPE_CHECKING:
    from device.metrics import MetricsServer
    from device.mqtt import Companion, Connection

FLUSH_S = 2.0
DRIFT_ALARM = 1.0
"""Mean shift of the features, in standard deviations, that is reported as an event; not calibrated per model."""
MAX_FAILED_STEPS = 10
HANG_LOCK_S = 5.0
RELOAD_S = 30.0
"""How often a model that could not be loaded, though its files are whole, is tried again."""

ASKED_S = 0.2
"""How often the agent looks whether a shell on this board asks for something."""

RENEWAL_CHECK_S = 6 * 3600.0
"""How often the agent looks whether its certificate should be renewed; a failed attempt waits as long."""

log = logging.getLogger(__name__)


class Agent:
    """One device's agent. The caller holds the data directory's lock."""

    def __init__(
        self,
        root: Path,
        config: AgentConfig,
        board: Board,
        *,
        stop: threading.Event,
        supervisor: Supervisor | None = None,
        opening: Opening | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            root: the data directory.
            config: of this agent.
            board: its profile.
            stop: set by whoever wants the agent to stop.
            supervisor: who started the agent, if it wants to hear of it.
            opening: begun already, so that the model is loaded beside this module; None: it begins here.
        """
        found = forbidden_modules()
        if found:
            raise ConfigError(
                f"{', '.join(found)} is loaded in this process; run the agent where only fieldvit[device] is imported"
            )
        self._root, self._config, self._board, self._stop = root, config, board.name, stop
        self._profile = board
        self._supervisor = supervisor or Supervisor()
        self._notifier = self._supervisor.notifier
        self._pulse = Pulse()
        self._runtime = runtime = resolve_runtime(board, config.runtime)
        self._spool = Spool(root / "spool.db", max_bytes=runtime.spool_bytes, max_age_s=runtime.spool_age_s)
        self._reporter = Reporter(config.id, board.name, os.urandom(8).hex(), self._spool)
        self._opening = opening or Opening(root, config, board)
        self._slots, self._serving = self._opening.slots, self._opening.serving
        self._source = self._opening.source
        self._verbs = Verbs(
            root,
            config.update.source,
            slots=self._slots,
            serving=self._serving,
            updater=Updater(
                root,
                config,
                board,
                self._slots,
                learned=self._serving,
                stop=stop,
                report=self._reporter.event,
                alive=lambda: self._commands.updates.beat(),
            ),
            reporter=self._reporter,
            announce=self._announce,
        )
        self._sampling = SamplingStore(
            root,
            Sampling(
                max_fps=config.source.max_fps,
                telemetry_interval_s=runtime.telemetry_interval_s,
                results=config.results,
            ),
        )
        self._log = ErrorLog()
        self._last_frame: Frame | None = None  # held only where snapshots are allowed
        self._commands = Commands(
            self._spool,
            self._verbs.handlers(self.status) | self._own_handlers(),
            refused=config.refused_commands,
            was_done=self._verbs.was_done,
        )
        self._asked = Asked(root, self._commands.ask)
        self._connection: Connection | None = None
        if config.broker:
            check_credentials(config.broker, root)
        self._metrics = self._make_metrics()
        self._status_lock = threading.Lock()
        self._is_reload_asked = False
        self._reported_model: Model | None = None
        self._reported_entry = -1
        self._reported_problem = self._reported_source_problem = ""
        self._last_window: dict[str, float] = {}
        self._frames = self._errors = self._window_errors = self._delegate_fallbacks = (
            0  # errors: those that are no bad frames
        )
        self._is_bad_frame_reported = False
        self._is_drifting = self._is_hot = self._is_renewal_reported = False
        self._max_celsius = board.budget.soc_temp_celsius
        now = time.monotonic()
        self._next_frame, self._next_telemetry = now, now + self._sampling.current.telemetry_interval_s
        self._next_check = now + config.update.check_interval_s
        self._next_load = now + RELOAD_S
        self._next_renewal = self._next_asked = now

    def run(self) -> int:
        """Serve until `stop` is set; 0 after a clean stop, 1 when something stays broken and a restart may help."""
        logging.getLogger().addHandler(self._log)
        try:
            return self._serve()
        finally:
            logging.getLogger().removeHandler(self._log)

    def _serve(self) -> int:
        self._report_recovery()
        watchdog = self._make_watchdog()
        self._pulse.beat(grace_s=START_S)
        watchdog.start()
        self._opening.finish()
        self._commands.start()
        if self._metrics:
            self._metrics.start()
        self._pulse.beat()
        self._notifier.ready(self._status_line())
        log.info("%s serves %s; frames: %s", self._config.id, self._model_line(), self._config.source.kind)
        if (
            self._serving.model is None or self._slots.last_number != self._opening.last_number
        ):  # a slot was damaged: get it again
            self._check_for_update()
        code = self._loop()
        self._notifier.stopping()
        watchdog.stop()
        self._source.stop()
        if self._metrics:
            self._metrics.stop()
        self._report_window(self._serving.model)
        self._verbs.wait(FLUSH_S)
        if self._connection:
            self._connection.stop(FLUSH_S)
        self._spool.close()
        if code == 0:
            self._slots.stop()
            end_run(self._root)
        return code

    def _report_recovery(self) -> None:
        for line in self._opening.recovered:
            log.warning("recovered: %s", line)
        if error := self._opening.disk_error:
            log.error("the slots cannot be put in order (%s); make room, or check the disk", error)
            self._reporter.event("error", reason="disk", detail=f"the journal cannot be written: {one_line(error)}")

    def reload(self) -> None:
        """Look for an update soon, as after SIGHUP. May be called from a signal handler."""
        self._is_reload_asked = True

    def status(self) -> dict[str, Any]:
        """What `fieldvit-device status` and the command `status` show of a running agent."""
        return status_table(self._slots, self._serving, self._reporter.boot) | {
            "device": str(self._config.id),
            "frames": self._frames,
            "errors": self._error_count,
            "source": self._config.source.kind,
            "source_problem": self._source.problem,
            "bad_frames": self._source.tally.bad,
            "frames_dropped": self._source.tally.dropped,
            "spool_depth": self._spool.depth,
            "spool_dropped": self._spool.dropped,
            "results_dropped": self._connection.results_dropped if self._connection else 0,
            "connected": self._connection is not None and self._connection.is_connected,
            "problem": self._serving.problem,
            "delegate_fallbacks": self._delegate_fallbacks,
            "last_check": self._verbs.last_check,
            "window": self._last_window,
            "sampling": to_table(self._sampling.current),
        }

    def _own_handlers(self) -> dict[str, Handler]:
        return {
            "set-sampling": self._set_sampling,
            "snapshot": self._snapshot,
            "rebirth": self._rebirth,
            "diagnostics": self._diagnose,
        }

    def _set_sampling(self, change: SamplingChange, _: str) -> dict[str, Any]:
        if not change.is_empty:
            self._sampling.change(change)
            interval_s = self._sampling.current.telemetry_interval_s
            self._next_telemetry = min(self._next_telemetry, time.monotonic() + interval_s)
            self._write_status()
        return {"sampling": to_table(self._sampling.current)}

    def _snapshot(self, *_: object) -> dict[str, Any]:
        if not self._config.snapshot:
            raise ConfigError("snapshot is off on this board; its operator may set snapshot = true in agent.toml")
        if self._last_frame is None:
            raise FrameError("snapshot: no frame has come since the agent started")
        return take_snapshot(self._last_frame)

    def _rebirth(self, *_: object) -> dict[str, Any]:
        self._announce()
        return {"boot": self._reporter.boot}

    def _diagnose(self, *_: object) -> dict[str, Any]:
        protocol = self._connection.protocol if self._connection else None
        spool = {"depth": self._spool.depth, "bytes": self._spool.payload_bytes, "dropped": self._spool.dropped}
        about = {"boot": self._reporter.boot, "board": self._board, "protocol": protocol, "spool": spool}
        return about | diagnose(self._root, self._log)

    def _loop(self) -> int:
        failed = 0
        while not self._stop.is_set():
            try:
                self._step()
                failed = 0
            except Exception:  # the outer loop: what a part did not foresee must neither silence nor end the device
                log.exception("unexpected error; going on")
                failed += 1
                self._errors += 1
                self._reporter.event(
                    "error", reason="internal", detail="unexpected error in the frame loop; see the agent's log"
                )
                if failed >= MAX_FAILED_STEPS or self._dead_threads():
                    return 1
                self._stop.wait(1.0)
        return 0

    def _step(self) -> None:
        """One look at the frame source."""
        try:
            has_new, model = self._account_first(), self._serving.model
            has_new |= model is not None and self._classify_new_frames(model)
            if not has_new:
                self._tick()
        finally:  # also when that fails: an agent that nobody can reach cannot be helped
            self._connect()
        if model is None:
            self._stop.wait(self._config.source.poll_s)
        elif not has_new:
            self._source.wait(self._config.source.poll_s, self._stop)

    def _classify_new_frames(self, model: Model) -> bool:
        """Classify until the source has no more, the model is replaced, or the agent stops; False if nothing was new."""
        has_new = False
        for frame in self._source.poll(model.manifest.input.channels):
            has_new = True
            self._account(attempt(model, frame))
            if self._stop.is_set() or self._serving.model is not model:
                break
        return has_new

    def _account_first(self) -> bool:
        """Count what was answered before the agent was there, if anything was."""
        first = self._opening.take_first()
        if first:
            self._account(first)
        return first is not None

    def _account(self, done: Attempt) -> None:
        """Count a frame, and do what is due before the next one's turn."""
        self._count(done)
        self._connect()
        self._tick()
        self._pace()

    def _count(self, done: Attempt) -> None:
        model, frame, outcome, latency_s = done.model, done.frame, done.outcome, done.latency_s
        if isinstance(outcome, FrameError):
            detail = f"{frame.frame_id}: {one_line(outcome)}"
            self._count_bad_frame(outcome.reason, detail)
            self._serving.count_bad_frame(model, detail)
            return
        if isinstance(outcome, EngineError):
            self._count_error("engine", one_line(outcome))
            self._serving.revert(model, "engine", one_line(outcome))
            before = self._serving.model
            if before and before is not model:
                self._count(attempt(before, frame))
            return
        features, answer = outcome
        self._last_frame = frame if self._config.snapshot else None
        self._frames += 1
        self._serving.count_good_frame(model, latency_s=latency_s)
        model.ring.add(frame.frame_id, features)
        model.window.add(latency_s=latency_s, class_index=answer.index, confidence=answer.confidence, features=features)
        if self._sampling.current.results and self._connection:
            result = Result(frame_id=frame.frame_id, label=answer.label, confidence=answer.confidence, time=time.time())
            self._connection.publish_result(encode_result(result))

    def _pace(self) -> None:
        """Wait until the next frame's turn; what is due meanwhile is done, so that a frame a minute is no hang."""
        started = time.monotonic()
        while (max_fps := self._sampling.current.max_fps) and not self._stop.is_set():  # it may be set anew meanwhile
            due = max(self._next_frame + 1 / max_fps, started)
            if (rest_s := due - time.monotonic()) <= 0:
                self._next_frame = due
                return
            self._stop.wait(min(rest_s, ASKED_S))
            self._tick()

    def _count_error(self, reason: str, detail: str) -> None:
        self._errors += 1
        self._window_errors += 1
        log.warning("%s", detail)
        if self._window_errors == 1:  # one event in a window; telemetry has the count
            self._reporter.event("error", reason=reason, detail=detail)

    def _count_bad_frame(self, reason: str, detail: str) -> None:
        self._source.tally.count_bad(reason)
        log.warning("%s", detail)
        if not self._is_bad_frame_reported:
            self._reporter.event("error", reason="frame", detail=detail)
        self._is_bad_frame_reported = True

    def _tick(self) -> None:
        """Do what is due between two frames."""
        self._pulse.beat()
        self._serving.watch()
        self._report_problem()
        self._report_source()
        if self._serving.model is not self._reported_model:
            self._report_new_model()
        if self._slots.last_number != self._reported_entry:
            self._reported_entry = self._slots.last_number
            self._reporter.journal(self._slots)
            if self._connection:
                self._connection.tell_companion()
        now = time.monotonic()
        if now >= self._next_telemetry:
            self._next_telemetry = now + self._sampling.current.telemetry_interval_s
            self._report_window(self._serving.model)
        if self._config.update.check_interval_s and now >= self._next_check:
            self._next_check = now + self._config.update.check_interval_s
            self._check_for_update()
        if now >= self._next_asked:
            self._next_asked = now + ASKED_S
            self._asked.poll()
        if now >= self._next_renewal:
            self._next_renewal = now + RENEWAL_CHECK_S
            self._commands.updates.submit(self._renew_certificate)
        if self._serving.model is None and now >= self._next_load:
            self._next_load = now + RELOAD_S
            self._serving.start()
        if self._is_reload_asked:
            self._is_reload_asked = False
            self._notifier.reloading("looking for an update")
            self._check_for_update()
            self._notifier.ready(self._status_line())
        if dead := self._dead_threads():
            raise RuntimeError(f"thread {', '.join(dead)} ended")

    def _check_for_update(self) -> None:
        self._verbs.request_check(self._commands.updates.submit)

    def _renew_certificate(self) -> None:
        """In a worker: the connection takes the new certificate when it connects next."""
        from device.identity import renew_if_due  # here: the first frame need not wait for it

        try:
            renew_if_due(self._root)
        except DeviceError as error:
            log.error("the certificate is due for renewal: %s", error)
            if not self._is_renewal_reported:
                self._reporter.event("error", reason="certificate", detail=one_line(error))
            self._is_renewal_reported = True
        else:
            self._is_renewal_reported = False

    def _dead_threads(self) -> list[str]:
        threads = [*self._commands.threads, *([self._connection.thread] if self._connection else [])]
        return [thread.name for thread in threads if not thread.is_alive()]

    def _report_new_model(self) -> None:
        if self._reported_model:
            self._report_window(self._reported_model)
        before, model = self._reported_model, self._serving.model
        self._reported_model = model
        if not self._serving.is_testing and (lost := unknown_to(model, before)):
            self._reporter.event("unlearned", reason="went-back", labels=lost)
        remove_stale(self._root / "state", [self._slots.directory(slot) for slot in NAMES])
        if model is None:
            self._check_for_update()
        if model and model.engine.delegate_problem:
            self._delegate_fallbacks += 1
            log.error("the processor runs the model: %s", model.engine.delegate_problem)
            self._reporter.event("error", reason="delegate", detail=model.engine.delegate_problem)
        for problem in model.classifier.problems if model else []:
            log.error("%s", problem)
            self._reporter.event("unlearned", reason="state", detail=problem)
        self._announce()

    def _report_window(self, model: Model | None) -> None:
        """Send the telemetry of a model's window, and a drift event when the measure passes its limit."""
        drift = model.window.drift() if model else None
        lost = self._source.tally.window()
        errors = self._window_errors + sum(count for name, count in lost.items() if name.startswith("errors/"))
        self._last_window = self._reporter.telemetry(model, errors=errors, lost=lost)
        self._report_heat(self._last_window.get("temperature", 0.0))
        self._window_errors, self._is_bad_frame_reported = 0, False
        if drift is not None:
            if drift > DRIFT_ALARM and not self._is_drifting:
                self._reporter.event("drift", drift=drift, limit=DRIFT_ALARM)
            self._is_drifting = drift > DRIFT_ALARM
        self._write_status()

    def _report_heat(self, celsius: float) -> None:
        if celsius > self._max_celsius and not self._is_hot:
            detail = f"the processor has {celsius:.0f} °C, its limit is {self._max_celsius:.0f} °C; cool it, or lower max_fps"
            self._reporter.event("error", reason="temperature", detail=detail)
        self._is_hot = celsius > self._max_celsius

    def _report_problem(self) -> None:
        problem = self._serving.problem
        if problem and problem != self._reported_problem:
            self._errors += 1
            self._reporter.event("error", reason="canary", detail=problem)
        self._reported_problem = problem

    def _report_source(self) -> None:
        """One event for each time that frames stop coming; telemetry counts for how long."""
        problem = self._source.problem
        if problem != self._reported_source_problem:
            if problem and not self._reported_source_problem:
                self._reporter.event("error", reason="source", detail=problem)
            self._reported_source_problem = problem
            self._write_status()

    @property
    def _error_count(self) -> int:
        return self._errors + sum(self._source.tally.bad.values())

    def _make_watchdog(self) -> Watchdog:
        limits = self._config.watchdog
        hearts = {"the frame loop": Heart(silence_s=self._pulse.silence_s, limit_s=limits.frames_s)}
        for worker in self._commands.threads:
            limit_s = limits.updates_s if worker is self._commands.updates else limits.commands_s
            hearts[f"the worker for {worker.name}"] = Heart(silence_s=worker.busy_s, limit_s=limit_s)
        return Watchdog(
            hearts, notifier=self._notifier, supervisor_s=self._supervisor.watchdog_s, on_hang=self._record_hang
        )

    def _record_hang(self, name: str, silence_s: float) -> None:
        """Leave word for the next start; a model on probation under which the frame loop hangs is rejected here and now."""
        detail = f"{name} gave no sign of life for {silence_s:.0f} s"
        begin_run(self._root, detail=detail)
        model = self._serving.model
        if (
            name == "the frame loop"
            and model
            and not self._slots.reject_hanging(model.slot, detail, timeout_s=HANG_LOCK_S)
        ):
            log.error("slot %s could not be rejected, its journal is in use", model.slot)

    def _status_line(self) -> str:
        """What `systemctl status` shows."""
        return f"{self._model_line()}; {self._frames} frames, {self._error_count} errors"

    def _model_line(self) -> str:
        entry = self._slots.serving()
        return f"{entry.name} {entry.version} {entry.precision}, {entry.state}" if entry else "no model"

    def _announce(self) -> None:
        if self._connection:
            self._connection.announce()
        self._write_status()

    def _write_status(self) -> None:
        self._notifier.status(self._status_line())
        with self._status_lock:
            try:
                write_atomic(self._root / "agent.json", json.dumps(self.status()).encode())
            except OSError as error:  # a full disk must not stop inference
                log.warning("agent.json cannot be written: %s", error)

    def _connect(self) -> None:
        """Begin to talk, once: after the first frame, or where none is there; an answer does not wait for the network."""
        if self._connection is None and self._config.broker:
            self._connection = self._make_connection(self._config.broker)
            self._connection.start()

    def _make_connection(self, broker: BrokerConfig) -> "Connection":
        from device.mqtt import Connection  # here: it takes as long to load as a frame

        return Connection(
            broker,
            base=self._root,
            device=self._config.id,
            spool=self._spool,
            birth=lambda: self._reporter.birth(self._serving.model),
            offline=self._reporter.offline(),
            on_command=self._commands.receive,
            companion=self._make_companion(),
            on_frame=self._source.receive if isinstance(self._source, MessageSource) else None,
        )

    def _make_metrics(self) -> "MetricsServer | None":
        if self._config.metrics is None:
            return None
        from device.metrics import MetricsServer  # here: a web server is much to load for a board that wants none

        return MetricsServer(self._config.metrics, self.status)

    def _make_companion(self) -> "Companion | None":
        """Home Assistant, where it is configured."""
        wanted, device = self._config.home_assistant, self._config.id
        if not wanted.enabled:
            return None
        from device.home_assistant import INSTALL, discovery, install_topic, state_topic
        from device.mqtt import Companion

        found = list(
            discovery(device, prefix=wanted.prefix, board=self._profile.description, agent_version=agent_version())
        )
        return Companion(
            messages=lambda: [*found, (state_topic(device, wanted.prefix), self._update_state())],
            topic=install_topic(device, wanted.prefix),
            on_message=lambda payload: self.reload() if payload == INSTALL else None,
        )

    def _update_state(self) -> bytes:
        from device.home_assistant import update_state

        serving, confirmed = self._slots.serving(), self._slots.fallback()
        return update_state(
            confirmed.version if confirmed else "",
            serving.version if serving else "",
            is_busy=serving is not None and serving.state == "testing",
        )
