"""What ``--metrics`` serves to Prometheus: what ``offbeat status`` shows, and nothing of its own.

The process shows its status now and then; who reads metrics is told of the last one.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from socket import AF_INET6
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from offbeat.runtime.base.errors import ConfigError, PeerError
from offbeat.runtime.base.logs import log, tell

LOOPBACK = "127.0.0.1"
SILENT_S = 5.0  # that one reader may take before the next has its turn
REJECTED = {kind.name for kind in PeerError.__subclasses__()}
# Of a status: key -> name and help of a number that goes up and down,
GAUGES = {
    "incarnation": ("incarnation", "How often it was started."),
    "slots": ("workers_most", "Places for workers."),
    "step": ("step", "Step of the newest job."),
    "round": ("round", "Rounds done, or asynchronously gradients told."),
    "out": ("jobs_outstanding", "Jobs that workers have."),
    "orders": ("jobs_waiting", "Jobs that this worker has yet to begin."),
    "loss": ("loss", "Last loss that was evaluated here."),
}
# and of those that only grow.
COUNTERS = {
    "jobs": ("updates", "Results that were applied; of a worker, that it sent."),
    "resends": ("resends", "Messages sent again, of those who are here."),
    "duplicates": ("duplicates", "Messages that came again, from those who are here."),
}


def address(where: str) -> tuple[str, int]:
    """Host and port of what ``--metrics`` was given.

    >>> address("9464"), address("0.0.0.0:9464"), address("[::1]:0")
    (('127.0.0.1', 9464), ('0.0.0.0', 9464), ('::1', 0))
    """
    try:
        found = urlsplit("//" + (where if ":" in where else f"{LOOPBACK}:{where}"))
        host, port = found.hostname, found.port
    except ValueError:
        host = port = None
    if not host or port is None or set(where) & {"/", "?", "#", "@"}:
        raise ConfigError(f'--metrics: "{where}" is neither a port nor host:port, as 0.0.0.0:9464')
    return host, port


class _Handler(WSGIRequestHandler):
    timeout = SILENT_S

    def log_message(self, *words: Any) -> None:
        """Nobody wants to know who reads."""


class _Server(WSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no fault of the run."""
        log.debug("a reader of metrics: %s", sys.exception())


class _Server6(_Server):
    address_family = AF_INET6


class Exporter(Collector):
    """Serves the status that it was shown last.

    Args:
        where: a port of this machine alone, or host:port.
        role: "server", "worker" or "peer".

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, where: str, role: str) -> None:
        self._role, self._status, self._shown_s = role, dict[str, Any](), 0.0
        host, port = address(where)
        made = _Server6 if ":" in host else _Server
        try:
            self._server = made((host, port), _Handler)
        except OSError as error:
            raise ConfigError(f"--metrics: {where}: cannot listen ({error.strerror})") from None
        registry = CollectorRegistry()
        registry.register(self)
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        host = f"[{host}]" if ":" in host else host
        self.endpoint = f"http://{host}:{self._server.server_address[1]}/metrics"
        tell("metrics", f"metrics are at {self.endpoint}", endpoint=self.endpoint)

    def show(self, status: Mapping[str, Any]) -> None:
        """Serve ``status``, which does not change any more, from now on."""
        self._status, self._shown_s = dict(status), time.time()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """See ``prometheus_client``; called by its reader's thread."""
        status = self._status
        info = {"version": version("offbeat"), "role": self._role}
        info |= {key: str(status[key]) for key in ("run", "node") if key in status}
        yield InfoMetricFamily("offbeat_run", "What runs.", info)
        yield _gauge("status_time_seconds", "When the rest was looked at.", self._shown_s)
        for key, (name, help_) in GAUGES.items():
            if status.get(key) is not None:
                yield _gauge(name, help_, status[key])
        for key, (name, help_) in COUNTERS.items():
            if key in status:
                yield CounterMetricFamily(f"offbeat_{name}", help_, status[key])
        yield from _counts(status.get("counts", {}))
        if "bytes_in" in status:
            there = {"in": status["bytes_in"], "out": status["bytes_out"]}
            yield _each(CounterMetricFamily, "bytes", "Bytes of messages.", "direction", there)
        for key, name, help_ in (
            ("spent_s", "job_seconds", "Seconds that jobs took."),
            ("staleness", "staleness", "Steps between a job's model and its result."),
        ):
            if key in status:
                total, count = status[key]
                yield SummaryMetricFamily(f"offbeat_{name}", help_, count, total)
        if "workers" in status:
            yield from _workers(status["workers"])
        if "neighbours" in status:
            yield from _neighbours(status["neighbours"])


def _counts(counts: Mapping[str, int]) -> Iterator[Metric]:
    rejected = {key: count for key, count in counts.items() if key in REJECTED}
    others = {key: count for key, count in counts.items() if key not in REJECTED}
    help_ = "Messages that were not used."
    yield _each(CounterMetricFamily, "rejected", help_, "reason", rejected)
    yield _each(CounterMetricFamily, "events", "Whatever else is counted.", "event", others)


def _workers(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    here = sum(row["state"] == "here" for row in rows)
    yield _gauge("workers_here", "Workers that are here, and not suspected.", here)
    told = (
        ("staleness", "worker_staleness", "Of a worker's last result."),
        ("loss", "worker_loss", "Of a worker's last result."),
        ("jobs_s", "worker_jobs_per_second", "Of the last second or so."),
        ("bytes_s", "worker_bytes_per_second", "Of arrays, in the last second or so."),
        ("waiting", "worker_messages_waiting", "Not acknowledged yet."),
    )
    yield from _members(rows, "worker", told)


def _neighbours(rows: list[dict[str, Any]]) -> Iterator[Metric]:
    up = sum(row["state"] == "up" for row in rows)
    yield _gauge("neighbours_up", "Neighbours that hear, and are heard.", up)
    told = (
        ("round", "neighbour_round", "That a neighbour told last."),
        ("silent_s", "neighbour_silent_seconds", "Since it was heard."),
        ("waiting", "neighbour_messages_waiting", "Not acknowledged yet."),
    )
    yield from _members(rows, "neighbour", told)


def _members(
    rows: list[dict[str, Any]], label: str, told: Iterable[tuple[str, str, str]]
) -> Iterator[Metric]:
    """Of each of ``told``, a key of ``rows`` with name and help, the rows that know it."""
    for key, name, help_ in told:
        there = {row["node"]: row[key] for row in rows if row[key] is not None}
        yield _each(GaugeMetricFamily, name, help_, label, there)


def _gauge(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(f"offbeat_{name}", help_, value)


def _each(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    help_: str,
    label: str,
    there: Mapping[str, float],
) -> Metric:
    family = kind(f"offbeat_{name}", help_, labels=[label])
    for value, number in there.items():
        family.add_metric([value], number)
    return family
