"""Metrics, and logs as JSON: where they are, what they say, and who cannot hold them up."""

import json
import logging
import os
import socket
import sys
from contextlib import closing
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from processes import metrics

from offbeat.runtime.base import logs
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.transport import metrics as served


@pytest.mark.parametrize("where", ["", "x", "9464/x", "1:2:3", "host:99999", "u@host:1", ":9464"])
def test_what_is_no_address_is_refused(where):
    with pytest.raises(ConfigError, match="is neither a port nor host:port"):
        served.address(where)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--metrics: {port}: cannot listen"):
            served.Exporter(str(port), "server")


def test_who_connects_and_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(served._Handler, "timeout", 0.1)
    with closing(served.Exporter("0", "server")) as exporter:
        exporter.show({"run": "r", "jobs": 7, "counts": {"stale_job": 2, "gone": 1}})
        port = urlsplit(exporter.endpoint).port
        with socket.create_connection(("127.0.0.1", port)):
            found = metrics(exporter.endpoint)
    assert found["offbeat_updates_total"] == {(): 7.0}
    assert found["offbeat_rejected_total"] == {("stale_job",): 2.0}
    assert found["offbeat_events_total"] == {("gone",): 1.0}


def test_a_line_is_one_object_whatever_was_logged():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "%s\n%d", ("a", 2), sys.exc_info())
    line = logs.Lines().format(record)
    assert "\n" not in line
    row = json.loads(line)
    assert (row["event"], row["level"], row["message"]) == ("log", "error", "a\n2")
    assert row["traceback"].endswith("ValueError: two\nlines")


def test_another_form_of_logs_is_refused():
    with pytest.raises(ConfigError, match='no "jason"; did you mean "json"'), logs.telling("jason"):
        pass


@pytest.fixture
def told(monkeypatch):
    """What is told, and a clock that a test sets."""
    said, clock = [], SimpleNamespace(monotonic=lambda: clock.now_s, now_s=100.0)
    monkeypatch.setattr(logs, "time", clock)
    monkeypatch.setattr(logs, "tell", lambda event, text, *_, **fields: said.append((text, fields)))
    return said, clock


def test_of_many_alike_the_first_is_told_and_then_a_count_a_second(told):
    (said, clock), seldom = told, logs.Seldom()
    for _ in range(1000):
        seldom.tell("rejected", "no header", reason="bad_header")
    seldom.tell("rejected", "no array", reason="bad_array")  # of another kind
    assert [text for text, _ in said] == ["no header", "no array"]
    seldom.remind()
    assert len(said) == 2
    clock.now_s += logs.EVERY_S
    seldom.tell("rejected", "no header", reason="bad_header")
    text, fields = said[-1]
    assert text == "no header (and 999 more like it)"
    assert fields == {"reason": "bad_header", "more": 999}
    seldom.tell("rejected", "no header", reason="bad_header")
    seldom.tell("rejected", "no header", reason="bad_header")
    clock.now_s += logs.EVERY_S
    seldom.remind()  # the last ones, too
    assert said[-1][0] == "no header (and 1 more like it)"
    clock.now_s += logs.EVERY_S
    seldom.remind()
    assert len(said) == 4


def test_what_is_not_for_others_to_cause_is_told_each_time(told):
    (said, _), seldom = told, logs.Seldom()
    for _ in range(5):
        seldom.tell("joined", "a is worker 0")
    assert len(said) == 5


@pytest.mark.parametrize("form", logs.FORMS)
def test_telling_leaves_loggers_as_they_were(form, monkeypatch):
    monkeypatch.delenv(logs.FORM, raising=False)
    ours, root = logging.getLogger("offbeat"), logging.getLogger()
    before = ours.level, root.handlers[:], root.level
    with logs.telling(form):
        assert ours.level == logging.INFO
    assert (ours.level, root.handlers, root.level) == before
    assert logs.FORM not in os.environ
