"""Log lines: JSON that always parses, severities for the journal, and the agent's choice by its configuration."""

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.logs import JsonFormatter, set_up_logging
from tests.support.agent import Field, wait_for


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@given(st.text(), st.sampled_from([logging.INFO, logging.WARNING, logging.ERROR]))
def test_json_is_one_object_on_one_line(message: str, level: int):
    record = logging.LogRecord("device.x", level, "x.py", 1, "%s", (message,), None)
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    table = json.loads(line)
    assert (table["message"], table["level"]) == (message, logging.getLevelName(level).lower())


def test_json_has_the_traceback():
    stream = io.StringIO()
    set_up_logging("json", stream=stream)
    try:
        raise ValueError("it broke")
    except ValueError:
        logging.getLogger("device.x").exception("unexpected")
    assert "ValueError: it broke" in json.loads(stream.getvalue())["traceback"]


def test_the_journal_gets_a_severity_on_every_line():
    stream = io.StringIO()
    set_up_logging(is_journal=True, stream=stream)
    logging.getLogger("device.x").warning("two\nlines")
    assert stream.getvalue() == "<4>MainThread two\n<4>lines\n"


def test_the_agent_logs_as_it_is_configured(field: Field):
    with (field.root / "agent.toml").open("a") as config:
        config.write('\n[log]\nformat = "json"\n')
    with field.agent():
        wait_for(lambda: "event confirmed" in field.log)
    assert all("message" in json.loads(line) for line in our_lines(field))


def test_the_agent_under_the_journal(field: Field):
    with field.agent(environment=os.environ | {"JOURNAL_STREAM": "8:1"}):
        wait_for(lambda: "event confirmed" in field.log)
    assert all(line.startswith("<") for line in our_lines(field))


def our_lines(field: Field) -> list[str]:
    """Without what LiteRT's native code writes by itself."""
    return [line for line in field.log.splitlines() if not line.startswith("INFO: Created TensorFlow Lite")]
