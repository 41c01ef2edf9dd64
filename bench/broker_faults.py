"""What reaches the monitor's store when broker, network, agent and monitor fail.

A board's own spool and connection send through a proxy to a real mosquitto, with TLS, certificates and rules as `fieldvit
fleet init` makes them; the monitor's own ingest and store receive. For each kind of fault: the messages that were in the
board's spool, those that never arrived (beyond what the spool counted as dropped), copies after the store dropped
duplicates, and messages that arrived after a later one of their boot. The agent is killed and started again after every
second fault.
"""

import getpass
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import broker_faults_device
from bench.broker_faults_device import DEVICE
from bench.flaky_network import Network, network
from bench.jobs import Job, Table, digest, main_of
from bench.record import Row
from device.identity import enrol
from host.errors import MonitorError
from host.fleet.enrolment import serve_enrolment
from host.fleet.site import SiteSettings, create_site
from host.monitor.broker import bind_port, find_mosquitto, site_broker
from host.monitor.ingest import Ingest
from host.monitor.store import open_store

MESSAGES = 100_000
FAULTS_OF_A_KIND = 7
RATE = 150.0
QUIET_S = 60.0
ROOT = Path(__file__).parents[1]


class Setting:
    """Board, broker, networks and monitor, all of them real and all of them running."""

    def __init__(self, directory: Path, stack: ExitStack, *, rate: float, limit: int) -> None:
        self._directory, self._rate, self._limit = directory, rate, limit
        self.root = directory / "board"
        port = free_port()
        settings = SiteSettings(site=DEVICE.site, broker_hostname="localhost", broker_port=port, enrol_port=free_port())
        self._site = create_site(directory / "site", settings)
        with (self._site.directory / "broker" / "mosquitto.conf").open("a") as config:
            config.write(f"user {getpass.getuser()}\n")  # root would become another user, who may not read this
        with serve_enrolment(self._site, "127.0.0.1", settings.enrol_port):
            enrol(self.root, DEVICE, self._site.make_token(DEVICE.device))
        self.broker = self._start_broker()
        stack.callback(lambda: end(self.broker))
        self.board_network: Network = stack.enter_context(network(port))
        self.monitor_network: Network = stack.enter_context(network(port))
        self.store = open_store(directory / "monitor.sqlite")
        stack.callback(self.store.close)
        self.ingest = self._start_ingest()
        stack.callback(lambda: self.ingest.stop())
        self.agent = self._start_agent()
        stack.callback(lambda: end(self.agent))

    def restart_broker(self, number: int, pause_s: float) -> None:
        self.broker.send_signal(number)
        self.broker.wait(timeout=20)
        time.sleep(pause_s)
        self.broker = self._start_broker()

    def restart_agent(self, number: int, pause_s: float) -> None:
        self.agent.send_signal(number)
        self.agent.wait(timeout=20)
        time.sleep(pause_s)
        self.agent = self._start_agent()

    def restart_monitor(self, pause_s: float) -> None:
        self.ingest.stop()
        time.sleep(pause_s)
        self.ingest = self._start_ingest()

    def put(self) -> dict[str, int]:
        """The messages that each boot has put into its spool."""
        return {path.name: path.read_bytes().count(b"\n") for path in (self.root / "put").glob("*")}

    def arrived(self) -> dict[str, list[int]]:
        """The sequence numbers of each boot in the order in which the store took them."""
        query = "SELECT boot.boot, sequence FROM message JOIN boot ON boot.id = boot_id ORDER BY message.rowid"
        numbers: dict[str, list[int]] = {}
        with sqlite3.connect(f"file:{self._directory / 'monitor.sqlite'}?mode=ro", uri=True) as db:
            for boot, sequence in db.execute(query):
                numbers.setdefault(boot, []).append(sequence)
        db.close()
        return numbers

    def dropped(self) -> int:
        """What the spool counted as dropped; the agent must not run."""
        with sqlite3.connect(self.root / "spool.db") as db:
            (value,) = db.execute("SELECT value FROM counter WHERE name = 'dropped'").fetchone()
        db.close()
        return int(value)

    def _start_broker(self) -> subprocess.Popen[bytes]:
        program = find_mosquitto()
        if program is None:
            raise MonitorError("mosquitto is not installed; install it (apt install mosquitto)")
        config = self._site.directory / "broker" / "mosquitto.conf"
        return subprocess.Popen([program, "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _start_agent(self) -> subprocess.Popen[bytes]:
        left = self._limit - sum(self.put().values())
        words = [self.root, self.board_network.port, self._rate, max(left, 0)]
        with (self._directory / "agent.log").open("ab") as log:
            command = [sys.executable, "-m", broker_faults_device.__name__, *map(str, words)]
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def _start_ingest(self) -> Ingest:
        address = site_broker(self._site.directory, "monitor")
        ingest = Ingest(
            self.store, type(address)(hostname="localhost", port=self.monitor_network.port, tls=address.tls)
        )
        ingest._client.reconnect_delay_set(1, 2)  # half a minute's pause after each fault would only take longer
        ingest.start(timeout_s=60)
        return ingest


Fault = Callable[[Setting, random.Random], None]


def killed(setting: Setting, rng: random.Random) -> None:
    setting.restart_broker(signal.SIGKILL, rng.uniform(0, 3))


def restarted(setting: Setting, rng: random.Random) -> None:
    setting.restart_broker(signal.SIGTERM, rng.uniform(0, 3))


def frozen(setting: Setting, rng: random.Random) -> None:
    setting.broker.send_signal(signal.SIGSTOP)
    time.sleep(rng.uniform(1, 12))  # beyond the board's keepalive, or not
    setting.broker.send_signal(signal.SIGCONT)


def partitioned(setting: Setting, rng: random.Random) -> None:
    side = rng.choice([setting.board_network, setting.monitor_network])
    side.partition()
    time.sleep(rng.uniform(1, 12))
    if rng.random() < 0.5:
        side.cut()
    side.heal()


def cut(setting: Setting, rng: random.Random) -> None:
    for _ in range(5):
        rng.choice([setting.board_network, setting.monitor_network]).cut()
        time.sleep(rng.uniform(0.05, 1))


def slow(setting: Setting, rng: random.Random) -> None:
    for side in (setting.board_network, setting.monitor_network):
        side.slow_down(rng.uniform(5e3, 5e4), rng.uniform(0, 0.2))
    time.sleep(rng.uniform(2, 8))
    for side in (setting.board_network, setting.monitor_network):
        side.heal()


def agent_killed(setting: Setting, rng: random.Random) -> None:
    setting.restart_agent(rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.uniform(0, 1))


def monitor_away_and_broker_killed(setting: Setting, rng: random.Random) -> None:
    setting.ingest.stop()
    time.sleep(rng.uniform(0, 5))
    setting.restart_broker(signal.SIGKILL, rng.uniform(0, 1))
    setting.ingest = setting._start_ingest()


FAULTS: dict[str, Fault] = {
    "broker killed": killed,
    "broker restarted": restarted,
    "broker frozen": frozen,
    "network partitioned": partitioned,
    "connections cut": cut,
    "network slow": slow,
    "agent killed": agent_killed,
    "monitor away, broker killed": monitor_away_and_broker_killed,
}


def measure(job: Job) -> Row:
    """One kind of fault, several times over."""
    fault = FAULTS[str(job.key["fault"])]
    messages, count, rate = (job.settings[name] for name in ("messages", "faults", "rate"))
    rng = random.Random(str(job.key["fault"]))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        setting = Setting(Path(directory), stack, rate=rate, limit=messages)
        for number in range(count):
            wait_for_messages(setting, messages * (number + rng.uniform(0.2, 0.8)) / count)
            fault(setting, rng)
            if number % 2:
                setting.restart_agent(signal.SIGKILL, rng.uniform(0, 1))
        wait_for_messages(setting, messages)
        wait_until_quiet(setting)
        end(setting.agent)
        row = count_row(setting.put(), setting.arrived(), dropped=setting.dropped())
        received = setting.store.device(DEVICE)
        copies = received.duplicates if received else 0
    return {"faults": count} | row | {"copies_on_the_wire": copies, "seconds": round(time.monotonic() - started)}


def count_row(put: dict[str, int], arrived: dict[str, list[int]], *, dropped: int) -> dict[str, Any]:
    """Compare what was put with what arrived. A kill may hide the last number of a boot from us: more may arrive."""
    missing = reordered = duplicates = 0
    for boot, last in put.items():
        numbers = arrived.get(boot, [])
        missing += len(set(range(1, last + 1)) - set(numbers))
        duplicates += len(numbers) - len(set(numbers))
        highest = 0
        for number in numbers:
            reordered += number < highest
            highest = max(highest, number)
    lost = max(0, missing - dropped)
    return {
        "messages": sum(put.values()),
        "boots": len(put),
        "dropped_and_counted": dropped,
        "lost": lost,
        "duplicates": duplicates,
        "reordered": reordered,
    }


def wait_for_messages(setting: Setting, count: float) -> None:
    """Until so many messages were put into the spool."""
    while sum(setting.put().values()) < int(count):
        if setting.agent.poll() is not None:
            raise MonitorError(f"the board's process ended with {setting.agent.returncode}; look at its log")
        time.sleep(0.05)


def wait_until_quiet(setting: Setting) -> None:
    """Until everything has arrived, or nothing has for a minute."""
    expected, last, since = sum(setting.put().values()), -1, time.monotonic()
    while time.monotonic() - since < QUIET_S:
        found = sum(map(len, setting.arrived().values()))
        if found >= expected:
            time.sleep(1.0)  # and what comes twice, too
            return
        if found != last:
            last, since = found, time.monotonic()
        time.sleep(0.5)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process of ours, whatever state it is in."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with bind_port("bench", "127.0.0.1", 0) as bound:
        port: int = bound.getsockname()[1]
        return port


def list_jobs(*, messages: int = MESSAGES, faults: int = FAULTS_OF_A_KIND, rate: float = RATE) -> list[Job]:
    """One job for each kind; together `messages` messages."""
    share = -(-messages // len(FAULTS))
    settings = {"messages": share, "faults": faults, "rate": rate}
    return [Job(key={"fault": name}, settings=settings, defined_by=digest("broker faults 1")) for name in FAULTS]


def notes(rows: Sequence[Row]) -> str:
    total = {
        name: sum(int(row[name]) for row in rows) for name in ("faults", "messages", "lost", "duplicates", "reordered")
    }
    return (
        f"Together {total['messages']} messages through {total['faults']} faults and as many restarts of the agent as boots "
        f"are listed: {total['lost']} lost, {total['duplicates']} duplicates after de-duplication, {total['reordered']} "
        "reordered. Copies on the wire are those that the store dropped. The agent's pause before it connects again was "
        f"{broker_faults_device.BACKOFF_S[0]:g} to {broker_faults_device.BACKOFF_S[1]:g} s instead of 1 to 60 s, its "
        f"keepalive {broker_faults_device.KEEPALIVE_S} s."
    )


TABLE = Table(
    name="broker_faults",
    command="python -m bench.broker_faults",
    data="generated telemetry and events, over mosquitto with TLS and the access rules of a site",
    title="Messages through faults of broker, network, agent and monitor",
    notes=notes,
)


def main(argv: Sequence[str] | None = None) -> int:
    return main_of(TABLE, list_jobs, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
