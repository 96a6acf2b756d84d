"""What pictures of a run are drawn from: who computed when, and who talked to whom."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.run.records import column
from offbeat.topologies import Topology
from offbeat.topologies.spectral import facts

COMPUTE, COMMUNICATE, QUEUE = range(3)
SPANS = 3000  # of one timeline
WORKERS = 64  # drawn
SLOWEST = 2.5  # the window, in slowest jobs
NODES, EDGES = 200, 12_000  # of a graph that is drawn, all its rounds together
FRAMES = 120
ARRIVALS = 200  # of an asynchronous run, a frame each
ROUNDS = 32  # of a sequence without period


def timeline(trace: NDArray, workers: int, gossip: bool) -> dict[str, Any]:
    """Spans of the first jobs, and the shares of the workers' time in all of them.

    A server's job is assigned when the model it starts from was made; until it starts, it is queued
    if its worker is busy, and on its way if not.  What a gossip node waits for is not recorded, so
    messages on their way count as waiting.

    Args:
        trace: ``[arrivals, 7]``.
        workers: n.
        gossip: whether there is no server.
    """
    time_s, worker = column(trace, "time_s"), column(trace, "worker").astype(int)
    start, end = column(trace, "start_s"), column(trace, "end_s")
    given = start if gossip else assigned(trace)
    until_s = min(SLOWEST * float((end - start).max()), float(end.max())) or 1.0
    if len(trace) > SPANS / 3:
        until_s = min(until_s, float(np.sort(start)[int(SPANS / 3)])) or until_s
    spans: list[tuple[int, int, float, float, int]] = []
    totals = np.zeros(3)
    for w in range(workers):
        mine = np.flatnonzero(worker == w)
        mine = mine[np.argsort(start[mine], kind="stable")]
        before = np.concatenate([[0.0], end[mine][:-1]])
        came = np.minimum(given[mine], start[mine])
        queued = before > came
        totals[COMPUTE] += (end[mine] - start[mine]).sum()
        totals[QUEUE] += (start[mine] - came)[queued].sum()
        totals[COMMUNICATE] += (start[mine] - came)[~queued].sum() + (time_s - end)[mine].sum()
        if w >= WORKERS:
            continue
        for at, (job, waits) in enumerate(zip(mine.tolist(), queued.tolist(), strict=True)):
            if came[at] > until_s:
                break
            more = [(QUEUE if waits else COMMUNICATE, came[at], start[job])]
            more += [(COMPUTE, start[job], end[job]), (COMMUNICATE, end[job], time_s[job])]
            spans += [
                (kind, w, float(f"{a:.7g}"), float(f"{min(b, until_s):.7g}"), at % 2)
                for kind, a, b in more
                if b > a < until_s
            ]
    whole = workers * float(time_s.max()) or 1.0
    shares = {"compute": totals[COMPUTE] / whole, "communicate": totals[COMMUNICATE] / whole}
    shares["wait"] = max(0.0, 1 - shares["compute"] - shares["communicate"])
    shares["queue"] = totals[QUEUE] / (whole / workers)
    return {
        "workers": min(workers, WORKERS),
        "until_s": until_s,
        "unit": "seconds",
        "spans": spans,
        "shares": {key: float(value) for key, value in shares.items()},
    }


def assigned(trace: NDArray) -> NDArray:
    """``[arrivals]``: when the model that each job of a server's trace started from was made."""
    order = np.argsort(column(trace, "time_s"), kind="stable")
    step, time_s = column(trace, "step")[order], column(trace, "time_s")[order]
    made = np.searchsorted(step, column(trace, "read_step"))  # the first arrival at such a step
    return np.concatenate([[0.0], time_s])[made]


def graphs(
    topology: Topology, metrics: Sequence[dict[str, Any]], trace: NDArray | None
) -> dict[str, Any] | None:
    """A graph and its frames; None if it is too large to be drawn.

    Args:
        topology: who talks to whom.
        metrics: rows with ``node_loss``, if they were recorded.
        trace: of an asynchronous run, by time: a frame for each of the first arrivals.
    """
    n = topology.n
    if n > NODES:
        return None
    length, names = topology.period or ROUNDS, topology.names or list(range(n))
    if trace is not None and len(trace):
        frames, used = _events(trace[:ARRIVALS], metrics, names), [0]
    elif metrics:
        rows = [
            metrics[at] for at in np.unique(np.linspace(0, len(metrics) - 1, FRAMES).astype(int))
        ]
        last = [max(0, int(row["step"]) - 1) for row in rows]  # the round before it was measured
        last = [k % topology.period if topology.period else k for k in last]
        used = sorted(set(last))
        frames = [
            {
                "edges": used.index(k),
                "loss": _short(row["node_loss"]),
                "said": f"after round {row['step']:,}, at {row['time_s']:,.6g} s",
            }
            for k, row in zip(last, rows, strict=True)
        ]
    else:
        used = list(range(min(length, FRAMES)))
        said = "every round" if length == 1 else "round {} of {}".format("{}", length)
        frames = [{"edges": k, "said": said.format(k)} for k in used]
    rounds = [[list(edge) for edge in topology.graph(k).edges] for k in used]
    if sum(map(len, rounds)) > EDGES:
        return None
    known = facts(topology)
    told = f"{n} nodes, {known['edges']} edges, gap {known['gap']:.4g}"
    if topology.period != 1:
        told += f", period {topology.period}" if topology.period else ", never the same"
    if known["exact_after"] and topology.period != 1:
        told += f", exact after {known['exact_after']} rounds"
    if not metrics:
        told += "; the nodes' losses were not recorded (record.nodes = true)"
    return {
        "n": n,
        "names": names,
        "at": _places(topology),
        "directed": topology.directed,
        "rounds": rounds,
        "frames": frames,
        "facts": told,
        "gap": known["gap"],
    }


def _events(
    trace: NDArray, metrics: Sequence[dict[str, Any]], names: Sequence[Any]
) -> list[dict[str, Any]]:
    """A frame for each job that ends: its node turns to its neighbours."""
    measured_s = [row["time_s"] for row in metrics]
    frames = []
    for time_s, worker, job in trace[:, :3].tolist():
        said = f"{time_s:,.6g} s: node {names[int(worker)]} ends its job {job:.0f}"
        frame: dict[str, Any] = {"edges": 0, "active": [int(worker)], "said": said}
        if metrics:
            at = max(0, int(np.searchsorted(measured_s, time_s, "right")) - 1)
            frame["loss"] = _short(metrics[at]["node_loss"])
        frames.append(frame)
    return frames


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _places(topology: Topology) -> list[list[float]]:
    """``[n, 2]`` in the unit square: where nodes are, else on a circle from the top."""
    from offbeat.runtime.api.plots import places

    at = places(topology)
    span = float(np.ptp(at, axis=0).max()) or 1.0
    middle = (at.max(axis=0) + at.min(axis=0)) / 2
    at = (at - middle) / span * [1, -1] + 0.5  # a page's y axis points down
    return [[float(f"{x:.4g}"), float(f"{y:.4g}")] for x, y in at]
