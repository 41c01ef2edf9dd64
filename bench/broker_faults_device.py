"""A board that only talks: the agent's own spool and connection, without a model, as a process that can be killed.

Run by `bench.broker_faults`: python -m bench.broker_faults_device ROOT PORT RATE LIMIT. It appends the number of each
message, once that is in the spool, to `ROOT/put/BOOT`: those must arrive.
"""

import random
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import device.mqtt
from device.config import BrokerConfig
from device.contract.messages import Event, State, Telemetry, encode_event, encode_state, encode_telemetry
from device.contract.topics import DeviceId
from device.mqtt import Connection
from device.spool import LOW, Spool

DEVICE = DeviceId("lab", "cam-1")
BACKOFF_S = (0.2, 2.0)
KEEPALIVE_S = 5
MAX_SPOOL_BYTES = 64 << 20


def run(root: Path, port: int, rate: float, limit: int) -> None:
    """Put up to `limit` messages, `rate` a second, and send them; then go on sending until SIGTERM."""
    device.mqtt.BACKOFF_S = BACKOFF_S  # a minute's pause after each fault would only make the run longer
    stop, boot = threading.Event(), uuid.uuid4().hex[:16]
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    spool = Spool(root / "spool.db", max_bytes=MAX_SPOOL_BYTES, max_age_s=7 * 86400)
    link = Connection(
        BrokerConfig(
            hostname="localhost",
            port=port,
            keepalive_s=KEEPALIVE_S,
            ca_file="identity/ca.pem",
            cert_file="identity/device.pem",
        ),
        base=root,
        device=DEVICE,
        spool=spool,
        birth=lambda: encode_state(State(status="online", boot=boot, time=time.time())),
        offline=encode_state(State(status="offline", boot=boot)),
        on_command=lambda payload: None,
        rng=random.Random(boot),
    )
    link.start()
    (root / "put").mkdir(exist_ok=True)
    with (root / "put" / boot).open("ab", buffering=0) as put:
        for number in range(1, limit + 1):
            if stop.is_set():
                break
            put_message(spool, boot, number)
            put.write(b"%d\n" % number)
            stop.wait(1 / rate)
    stop.wait()
    link.stop(2.0)
    spool.close()


def put_message(spool: Spool, boot: str, number: int) -> None:
    """Nine in ten are telemetry, one is an event."""
    now = time.time()
    if number % 10:
        values = {"frames": float(number), "latency/p50": 0.01, "memory": 1e8}
        spool.put_numbered(
            "telemetry",
            lambda sequence: encode_telemetry(DEVICE, Telemetry(boot=boot, sequence=sequence, time=now, values=values)),
            priority=LOW,
        )
    else:
        spool.put_numbered(
            "event",
            lambda sequence: encode_event(
                DEVICE, Event(kind="drift", boot=boot, sequence=sequence, time=now, data={"number": number})
            ),
        )


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
