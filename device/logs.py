"""How log lines look: for people, for the journal, or as JSON for programs. Always on standard error,
where LiteRT's native code may write lines of its own.

text   2026-11-29 01:20:38,123 WARNING updates no update: ...     without the time, and with `<4>`, under the journal
json   {"time": "2026-11-29T01:20:38.123Z", "level": "warning", "thread": "updates", "logger": "device.verbs", "message": "..."}
"""

import json
import logging
import sys
import time
from typing import TextIO

_TEXT = "%(asctime)s %(levelname)s %(threadName)s %(message)s"
_JOURNAL = "%(threadName)s %(message)s"
_SEVERITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        table = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "thread": record.threadName,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            table["traceback"] = self.formatException(record.exc_info)
        return json.dumps(table, ensure_ascii=True)


class JournalFormatter(logging.Formatter):
    """Text with the severity in front of every line, as journald reads it (sd-daemon(3)); journald knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        severity = _SEVERITIES.get(record.levelno, 6)
        return "\n".join(f"<{severity}>{line}" for line in super().format(record).split("\n"))


def set_up_logging(log_format: str = "text", *, is_journal: bool = False, stream: TextIO | None = None) -> None:
    """Log to standard error as `text` or `json`; `is_journal`: what is written there goes to journald."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(JournalFormatter(_JOURNAL) if is_journal else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("tuf").setLevel(logging.WARNING)  # it reports every key it did not need
