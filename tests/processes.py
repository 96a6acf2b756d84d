"""The command line in a process of its own."""

import json
import subprocess
import sys
import threading
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from offbeat.runtime.base import logs

LIMIT_S = 90.0  # of anything that is waited for


def command(*words):
    return [sys.executable, "-m", "offbeat.runtime.commands.cli", *words]


def start(*words, **options):
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process, limit_s=60.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint/*.safetensors"))


class Told:
    """What a process logs with ``--log json``, as it comes; other lines are an error."""

    def __init__(self, process):
        self.process, self.rows = process, []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        for line in self.process.stderr:
            self.rows.append(json.loads(line))

    def of(self, event):
        return [row for row in self.rows if row["event"] == event]

    def until(self, event, count=1):
        end_s = time.monotonic() + LIMIT_S
        while len(self.of(event)) < count:
            assert self.process.poll() is None, self.rows
            assert time.monotonic() < end_s, f"no {event} in time: {self.rows}"
            time.sleep(0.02)
        return self.of(event)[-1]

    def end(self, code):
        """All that was told, once the process has ended."""
        with self.process:
            self.process.stdout.read()
            assert self.process.wait(LIMIT_S) == code, self.rows
            self.thread.join(LIMIT_S)
        for row in self.rows:
            assert row.keys() >= {"time", "level", "event", "run", "node", "incarnation", "message"}
            assert row["event"] in logs.EVENTS or row["event"] == "log"
        return self.rows


def metrics(endpoint):
    """Sample name -> labels -> value."""
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found
