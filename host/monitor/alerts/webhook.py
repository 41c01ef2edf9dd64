"""Tells somebody else: one HTTP POST of a CloudEvent 1.0 (structured JSON) for each notice.

The event's id is made of what it tells, so whoever gets one twice, because the answer was lost, knows it.
"""

import hashlib
import json
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host.errors import MonitorError
from host.monitor.alerts.tracker import Notice

TIMEOUT_S = 10.0
MAX_BOARDS = 100
"""Named in one notice; the count is always whole."""
SOURCE = "fieldvit/monitor"
TYPE = "io.fieldvit.alert."


def cloud_event(notice: Notice) -> dict[str, Any]:
    """The event of a notice."""
    told = [notice.rule.name, notice.kind, notice.time, notice.boards]
    return {
        "specversion": "1.0",
        "id": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32],
        "source": SOURCE,
        "type": TYPE + notice.kind,
        "time": datetime.fromtimestamp(notice.time, UTC).isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": {
            "rule": notice.rule.name,
            "severity": notice.rule.severity,
            "boards": list(notice.boards[:MAX_BOARDS]),
            "count": len(notice.boards),
            "text": notice.text,
            "repeated": notice.is_repeated,
        },
    }


def post(url: str, notice: Notice, *, token_file: Path | None = None) -> None:
    """Send it. MonitorError, without address or token in it, where it was not taken."""
    headers = {"Content-Type": "application/cloudevents+json; charset=utf-8", "User-Agent": "fieldvit"}
    if token_file is not None:
        headers["Authorization"] = f"Bearer {_token(token_file)}"
    body = json.dumps(cloud_event(notice)).encode()
    try:
        with _OPENER.open(urllib.request.Request(url, data=body, headers=headers), timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        raise MonitorError(f"alerts: the webhook answered {error.code}; it is tried again") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MonitorError(f"alerts: the webhook cannot be reached ({reason}); it is tried again") from None


def _token(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, ValueError, IndexError) as error:
        raise MonitorError(
            f"alerts: token_file {path} cannot be read ({error}); its first line is the token"
        ) from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """A webhook that points elsewhere is refused: the token is for this address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)
