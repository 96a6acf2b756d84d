"""What a run leaves behind: every arrival, the metrics, and the measured quantities of theory."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import StorageError
from offbeat.runtime.compute.jobs import Job, Joined, Left
from offbeat.workers.fleet import Fleet
from offbeat.workers.speeds import away

TRACE_COLUMNS = ("time_s", "worker", "job", "read_step", "step", "start_s", "end_s")
MOST_TRACED = 1024  # workers up to which the jobs of a round are recorded one by one
ROWS_HELD = 1024  # arrivals held before they are counted and written; more leave the cache
HASHED_BYTES = 2**20  # of a file, at once
HELD_BYTES = 2**13  # of a file, before they are handed to the system
MOST_HELD = 2**26  # while the disk is full, before the run ends


class Workers(Protocol):
    """What a row of metrics says of a run's workers."""

    n: int
    now_s: float
    coded: bool
    extra: int
    uploaded: int
    outstanding: int

    def running(self) -> Sequence[Job]:
        """The jobs that are being computed."""
        ...


class Growing:
    """A file that is only added to; what a full disk does not take waits here.

    Args:
        path: of the file, which is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = bytearray()
        self._written = hashed(path, 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None

    def check(self, length: int, digest: str | None) -> None:
        """Raise StorageError where its first bytes are not those of a checkpoint."""
        self._written = checked(self.path, length, digest)

    def cut(self, length: int) -> int:
        """Go on from there, where it was checked; answers how many results came after it."""
        self._held.clear()
        with self.path.open("rb") as file:
            file.seek(length)
            results = sum(line.startswith(b"[") for line in file)
        self._file.truncate(length)
        self._file.seek(length)
        return results

    def write(self, text: str) -> None:
        """Add ``text``; raises StorageError where too much waits for a disk that takes nothing."""
        data = text.encode()
        self._written.update(data)
        self._held += data
        if len(self._held) >= HELD_BYTES:
            try:
                self._flush()
            except OSError as error:  # told with the next checkpoint, if it lasts
                if len(self._held) >= MOST_HELD:
                    raise self._unwritable(error) from None

    def durable(self) -> int:
        """Have all of it on the disk; answers its length, or raises StorageError."""
        try:
            self._flush()
            os.fsync(self._file.fileno())
            return self._file.tell()
        except OSError as error:
            raise self._unwritable(error) from None

    @property
    def digest(self) -> str:
        """Of all that was written."""
        return self._written.hexdigest()

    def close(self) -> None:
        """Close it; what the last checkpoint counts on is on the disk already."""
        with suppress(OSError):  # a full disk has been reported where it was met
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        while self._held:
            del self._held[: self._file.write(self._held)]

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}: cannot be written ({error.strerror}); the last checkpoint is intact: "
            "make room or mend the rights, then resume the run"
        )


class Records:
    """Collects a run's records; with a folder the trace goes to a file and not to memory.

    Args:
        fleet: whose workers they are.
        folder: where metrics.jsonl and trace.jsonl are written, or None.
        trace: whether arrivals are kept.
        nodes: whether gossip measures every node's loss.
    """

    def __init__(
        self, fleet: Fleet, folder: Path | None, trace: bool = True, nodes: bool = False
    ) -> None:
        self.nodes = nodes
        self.done = np.zeros(fleet.workers, np.int64)  # results of each worker
        self.busy_s = np.zeros(fleet.workers)  # seconds it spent on them
        self._counted = 0  # rows that are in these two
        self._pauses = fleet.windows() if fleet.on_outage == "pause" else {}
        self.rows: list[tuple[float, ...]] = []  # arrivals since the last flush
        self.flushed = 0  # arrivals before them
        self.metrics: list[dict[str, float]] = []
        self.histogram = np.zeros(1, np.int64)  # staleness tau -> arrivals
        self.events: list[dict[str, Any]] = []  # outages
        self.lost = 0  # results after the checkpoint that was restored
        self._keep = trace
        self._chunks: list[NDArray] = []
        self._files: dict[str, Growing] = {}
        if folder is not None:
            names = ["metrics.jsonl"] + (["trace.jsonl"] if trace else [])
            self._files = {name: Growing(folder / name) for name in names}

    def begin(self) -> None:
        """Start empty files; see ``begun``."""
        for file in self._files.values():
            file.check(0, None)
            file.cut(0)
        self._write("trace.jsonl", json.dumps(TRACE_COLUMNS) + "\n")

    @property
    def arrivals(self) -> int:
        """Results that arrived."""
        return self.flushed + len(self.rows)

    def flush(self) -> None:
        """Count and store the arrivals held."""
        if not self.rows:
            return
        self._count()
        table = _table(self.rows)
        taus = np.bincount((column(table, "step") - column(table, "read_step")).astype(np.int64))
        if len(taus) > len(self.histogram):
            self.histogram, taus = taus, self.histogram
        self.histogram[: len(taus)] += taus
        if "trace.jsonl" in self._files:
            self._write("trace.jsonl", json.dumps(self.rows)[1:-1].replace("], [", "]\n[") + "\n")
        elif self._keep:
            self._chunks.append(table)
        self.flushed += len(self.rows)
        self.rows.clear()
        self._counted = 0

    def round(
        self, step: int, number: int, workers: NDArray | None, start: NDArray, end: NDArray
    ) -> None:
        """Job ``number`` of ``workers [m]`` (None: of all), from ``start`` to ``end``, ``[m]``.

        Of more than a thousand workers, jobs are counted and not recorded one by one.
        """
        if self._keep and len(self.done) <= MOST_TRACED:
            who = range(len(self.done)) if workers is None else workers.tolist()
            self.rows += [
                (to_s, w, number, step, step, from_s, to_s)
                for w, from_s, to_s in zip(who, start.tolist(), end.tolist(), strict=True)
            ]
            if len(self.rows) >= ROWS_HELD:
                self.flush()
            return
        if workers is None and not self._pauses:
            self.done += 1
            self.busy_s += end - start
        else:
            self._spend(np.arange(len(self.done)) if workers is None else workers, start, end)
        self.histogram[0] += len(start)
        self.flushed += len(start)

    def _count(self) -> None:
        """Add the rows that are new to the workers' counts."""
        table = _table(self.rows[self._counted :])
        self._counted = len(self.rows)
        worker = column(table, "worker").astype(np.int64)
        self._spend(worker, column(table, "start_s"), column(table, "end_s"))

    def _spend(self, worker: NDArray, start: NDArray, end: NDArray) -> None:
        spent = end - start
        for paused, windows in self._pauses.items():
            mine = worker == paused
            spent[mine] -= [
                away(windows, *span) for span in zip(start[mine], end[mine], strict=True)
            ]
        np.add.at(self.done, worker, 1)
        np.add.at(self.busy_s, worker, spent)

    def speed(self, worker: int) -> float:
        """Results a busy second; 0 before the first."""
        if len(self.rows) > self._counted:
            self._count()
        done = self.done.item(worker)
        return done / max(self.busy_s.item(worker), 1e-12) if done else 0.0

    def add(self, row: dict[str, float]) -> None:
        """Record one row of metrics."""
        self.metrics.append(row)
        self._write("metrics.jsonl", json.dumps(row) + "\n")

    def row(self, workers: Workers, step: int, facts: dict[str, float]) -> dict[str, float]:
        """One row of metrics, not recorded."""
        self.flush()
        gradients = self.flushed + workers.extra
        row = {"time_s": workers.now_s, "step": step, "gradients": gradients}
        if workers.coded:
            row["bytes"] = workers.uploaded
        busy, outstanding = self.busy(workers), workers.outstanding
        return row | facts | self.staleness() | {"busy": busy, "outstanding": outstanding}

    def staleness(self) -> dict[str, float]:
        """Mean and maximum of tau over all arrivals so far."""
        taus = np.arange(len(self.histogram))
        total = int(self.histogram.sum())
        mean = float((taus * self.histogram).sum() / total) if total else 0.0
        return {"staleness_mean": mean, "staleness_max": int(len(taus) - 1)}

    def busy(self, workers: Workers) -> float:
        """Fraction of the workers' time so far spent on results that arrived or are under way."""
        spent, now_s = float(self.busy_s.sum()), workers.now_s
        for job in workers.running():
            until_s = min(now_s, job.end_s)
            if job.start_s < until_s:
                still = away(self._pauses.get(job.worker, []), job.start_s, until_s)
                spent += until_s - job.start_s - still
        return spent / (workers.n * now_s) if now_s else 0.0

    def outage(self, workers: Workers, event: Left | Joined) -> None:
        """A worker left or came back."""
        row: dict[str, Any] = {"worker": event.worker, "event": "joined"}
        if isinstance(event, Left):
            row |= {"event": "left", "jobs": [job.number for job in event.jobs]}
        self.event(row, workers.now_s)

    def event(self, row: dict[str, Any], time_s: float) -> None:
        """Something happened that is no arrival; ``row`` says what under "event"."""
        self.flush()
        row = {"time_s": time_s} | row
        self.events.append(row)
        self._write("trace.jsonl", json.dumps(row) + "\n")

    def note(self, row: dict[str, Any]) -> None:
        """A line of the trace file that only a replay reads."""
        self.flush()
        self._write("trace.jsonl", json.dumps(row) + "\n")

    def trace(self) -> NDArray:
        """``[arrivals, 7]``, columns ``TRACE_COLUMNS``, of a run without a folder."""
        return np.concatenate([np.empty((0, len(TRACE_COLUMNS))), *self._chunks])

    # -- Files and checkpoints -----------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For a checkpoint; what is written so far is made durable first."""
        self.flush()
        lengths = {name: file.durable() for name, file in self._files.items()}
        return {
            "flushed": self.flushed,
            "histogram": self.histogram,
            "done": self.done,
            "busy_s": self.busy_s,
            "events": self.events,
            "lengths": lengths,
            "digests": {name: file.digest for name, file in self._files.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Cut the files back to where the checkpoint was written; raises StorageError first."""
        self.flushed, self.histogram = state["flushed"], state["histogram"]
        self.done, self.busy_s, self.events = state["done"], state["busy_s"], state["events"]
        lengths, digests = state["lengths"], state.get("digests", {})
        for name, file in self._files.items():
            file.check(lengths.get(name, 0), digests.get(name))
        cut = {name: file.cut(lengths.get(name, 0)) for name, file in self._files.items()}
        self.lost = cut.get("trace.jsonl", 0)
        if "metrics.jsonl" in self._files:
            self.metrics = read_lines(self._files["metrics.jsonl"].path)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, text: str) -> None:
        if name in self._files:
            self._files[name].write(text)


def hashed(path: Path, length: int) -> Any:
    """A hash of the first ``length`` bytes of a file, to go on with."""
    found = hashlib.blake2b(digest_size=16)
    if length:
        with path.open("rb") as file:
            while length > 0 and (data := file.read(min(length, HASHED_BYTES))):
                found.update(data)
                length -= len(data)
    return found


def checked(path: Path, length: int, digest: str | None) -> Any:
    """``hashed``; raises StorageError where the file is shorter, or its digest is another."""
    try:
        there = path.stat().st_size
        found = hashed(path, length)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    if there < length:
        raise StorageError(
            f"{path}: has {there} bytes, but the checkpoint was written at {length}; it was cut "
            "or replaced, so the run cannot go on from it"
        )
    if digest is not None and found.hexdigest() != digest:
        raise StorageError(
            f"{path}: its first {length} bytes are not those that were there at the checkpoint; "
            "it was changed or replaced, so the run cannot go on from it"
        )
    return found


def read_lines(path: Path) -> list[Any]:
    """The rows of a JSON-lines file."""
    try:
        with path.open() as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error})") from None


def read_trace(path: Path) -> NDArray:
    """``[arrivals, 7]`` from a trace.jsonl."""
    rows = [row for row in read_lines(path)[1:] if isinstance(row, list)]
    try:
        return np.array(rows, float).reshape(-1, len(TRACE_COLUMNS))
    except ValueError:
        raise StorageError(
            f"{path}: has rows that are no arrivals; it was cut or changed"
        ) from None


def read_timers(path: Path) -> list[dict[str, Any]]:
    """When timers of a run under a real clock rang, from its trace.jsonl."""
    rows = [row for row in read_lines(path) if isinstance(row, dict)]
    return [row for row in rows if row.get("event") == "timer"]


def _table(rows: list[tuple[float, ...]]) -> NDArray:
    return np.fromiter(chain.from_iterable(rows), float).reshape(-1, len(TRACE_COLUMNS))


def column(trace: NDArray, name: str) -> NDArray:
    """One column of a trace."""
    return trace[:, TRACE_COLUMNS.index(name)]
