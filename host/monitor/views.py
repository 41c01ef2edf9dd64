"""What the page and Prometheus read: rows of the store as JSON-ready tables and as metrics text."""

from collections import Counter
from typing import Any

from device.contract.messages import UNITS
from device.contract.records import to_table
from device.contract.topics import DeviceId
from host.monitor.rows import DeviceRow, EventRow, Gap, Quarantined
from host.monitor.store import Store

SILENT_AFTER_S = 300.0
CLOCK_SLACK_S = 300.0  # a device's clock may run ahead by this much before its telemetry is called future
SHOWN_PAYLOAD_BYTES = 400
TIMELINES = tuple(name for name in UNITS if name not in ("frames", "learned/version"))


def shown_status(row: DeviceRow, now: float) -> str:
    """What to tell a person: a device that claims to be online but has not spoken for minutes is `silent`."""
    if row.status == "online" and now - row.last_seen > SILENT_AFTER_S:
        return "silent"
    return row.status


def fleet_view(store: Store, *, now: float, is_connected: bool) -> dict[str, Any]:
    rows = store.devices()
    return {
        "now": now,
        "connected": is_connected,
        "quarantined": store.quarantined_total(),
        "devices": [_summary(row, now) for row in rows],
    }


def device_view(store: Store, device: DeviceId, *, now: float) -> dict[str, Any] | None:
    row = store.device(device)
    if row is None:
        return None
    state = row.state
    return _summary(row, now) | {
        "now": now,
        "boot": row.boot,
        "first_seen": row.first_seen,
        "backbone": state.model.backbone if state and state.model else None,
        "labels": list(state.labels) if state else [],
        "forbidden_modules": list(state.forbidden_modules) if state else [],
        "events": [_event(event) for event in store.events(device, limit=50)],
        "gaps": [_gap(gap) for gap in store.gaps(device, limit=20)],
        "quarantine": [quarantined_view(row) for row in store.quarantined(device, limit=20)],
    }


def series_view(store: Store, device: DeviceId, *, seconds: float, now: float) -> dict[str, Any] | None:
    """Timelines and class mix of the last `seconds` before the newest telemetry, so an offline device shows its end."""
    row = store.device(device)
    if row is None:
        return None
    until = min(row.latest_time or now, now + CLOCK_SLACK_S)
    series = store.telemetry(device, TIMELINES, since=until - seconds, until=until)
    labels = row.state.labels if row.state else ()
    mix = store.class_mix(device, since=until - seconds, until=until)
    return {
        "since": until - seconds,
        "until": until,
        "times": series.times,
        "values": series.values,
        "resolution_s": series.resolution_s,
        "shown_as": series.shown_as,
        "classes": [{"label": _label(labels, int(i)), "count": count} for i, count in mix.items() if count > 0],
    }


def quarantined_view(row: Quarantined) -> dict[str, Any]:
    shown = row.payload[:SHOWN_PAYLOAD_BYTES].decode("utf-8", "backslashreplace")
    return {
        "topic": row.topic,
        "reason": row.reason,
        "payload": shown + ("…" if row.payload_bytes > SHOWN_PAYLOAD_BYTES else ""),
        "payload_bytes": row.payload_bytes,
        "seen": row.seen,
        "last_seen": row.last_seen,
    }


def metrics_text(store: Store, *, now: float, is_connected: bool) -> str:
    """The Prometheus text format. Label values are site and device ids, which hold nothing to escape."""
    rows = store.devices()
    statuses = Counter(shown_status(row, now) for row in rows)
    lines = ["# TYPE fieldvit_devices gauge"]
    lines += [f'fieldvit_devices{{status="{s}"}} {statuses[s]}' for s in ("online", "silent", "offline", "unknown")]
    lines += _metric("fieldvit_device_online", "gauge", rows, lambda row: int(shown_status(row, now) == "online"))
    lines += _metric("fieldvit_device_last_seen_seconds", "gauge", rows, lambda row: row.last_seen)
    for metric, name in (
        ("fieldvit_device_latency_p50_seconds", "latency/p50"),
        ("fieldvit_device_latency_p99_seconds", "latency/p99"),
        ("fieldvit_device_drift", "drift"),
        ("fieldvit_device_spool_depth", "spool/depth"),
    ):
        lines += _metric(metric, "gauge", rows, lambda row, name=name: row.latest.get(name))
    lines += _metric("fieldvit_messages_received_total", "counter", rows, lambda row: row.received)
    lines += _metric("fieldvit_messages_duplicate_total", "counter", rows, lambda row: row.duplicates)
    lines += _metric("fieldvit_messages_missing", "gauge", rows, lambda row: row.missing)
    lines += ["# TYPE fieldvit_messages_quarantined_total counter"]
    lines += [f"fieldvit_messages_quarantined_total {store.quarantined_total()}"]
    lines += ["# TYPE fieldvit_broker_connected gauge", f"fieldvit_broker_connected {int(is_connected)}"]
    return "\n".join(lines) + "\n"


def alerts_text(firing: dict[str, int]) -> str:
    """How many boards each rule fires for; rule names hold nothing to escape."""
    lines = ["# TYPE fieldvit_alert_boards gauge"]
    lines += [f'fieldvit_alert_boards{{alertname="{name}"}} {count}' for name, count in firing.items()]
    return "\n".join(lines) + "\n"


def _metric(metric: str, kind: str, rows: list[DeviceRow], value: Any) -> list[str]:
    samples = [(row.device, value(row)) for row in rows]
    return [f"# TYPE {metric} {kind}"] + [
        f'{metric}{{site="{device.site}",device="{device.device}"}} {sample:.17g}'
        for device, sample in samples
        if sample is not None
    ]


def _summary(row: DeviceRow, now: float) -> dict[str, Any]:
    state = row.state
    return {
        "site": row.device.site,
        "device": row.device.device,
        "status": shown_status(row, now),
        "last_seen": row.last_seen,
        "board": state.board if state else None,
        "slot": state.slot if state else None,
        "agent_version": state.agent_version if state else None,
        "model": to_table(state.model) if state and state.model else None,
        "learned_version": int(row.latest.get("learned/version", state.learned_version if state else 0)),
        "latest": {name: value for name, value in row.latest.items() if name in UNITS},
        "latest_time": row.latest_time,
        "recent_latency_s": list(row.recent_latency_s),
        "received": row.received,
        "duplicates": row.duplicates,
        "missing": row.missing,
        "unwatched": row.unwatched,
        "quarantined": row.quarantined,
    }


def _event(row: EventRow) -> dict[str, Any]:
    event = row.event
    return {"kind": event.kind, "time": event.time, "boot": event.boot, "sequence": event.sequence, "data": event.data}


def _gap(gap: Gap) -> dict[str, Any]:
    table: dict[str, Any] = to_table(gap)
    return table


def _label(labels: tuple[str, ...], index: int) -> str:
    return labels[index] if index < len(labels) else f"class {index}"
