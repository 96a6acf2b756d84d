"""Synchronous gossip under a virtual clock: all nodes do every round, as one stacked computation.

A node waits for its neighbours only.  It begins a round when it has done the last one and has the
messages of all whom it hears in this one:

    start_i(k) = max(end_i(k-1), max_j end_j(k-1) + delay_j) ;  end_i(k) = start_i(k) + work_i(k)

so a slow node slows its neighbours at once, and those at distance r after r rounds.  Methods whose
messages travel during the gradient wait for them at its end instead.  A message that is lost is
missed when it would have come.  A node's link sends to its neighbours one after the other:
delay_j = latency + all its bytes / bandwidth + jitter.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip, Points
from offbeat.runtime.base.errors import ConfigError, Diverged
from offbeat.runtime.base.tensors import keep_freed
from offbeat.runtime.gossip.loop import COUNTS, GossipLoop, measure
from offbeat.runtime.gossip.stacked import Broadcast, PerEdge, Shares, Stacked, Wire
from offbeat.runtime.node.network import RoundGraph
from offbeat.runtime.run.records import Records
from offbeat.topologies import Topology
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Work


class Rounds(GossipLoop):
    """One synchronous run of a gossip method.

    Args:
        task, method, topology, fleet, timing, records: the parts.
        seed: of the run.
        replicas: what stands behind compressed differences where the graph changes: copies kept by
            the two ends of every link, or "global": every message reaches all who are ever
            neighbours, in every round.
        initial: ``[n, d]``, where the nodes start; None: all at the task's initial point.
        work: what takes a gradient's place.
        around: see ``Loop``.
    """

    def __init__(
        self,
        task: Task,
        method: Gossip,
        topology: Topology,
        fleet: Fleet,
        timing: Timing,
        records: Records,
        *,
        seed: int,
        replicas: str = "links",
        initial: NDArray | None = None,
        work: Work | None = None,
        **around: Any,
    ) -> None:
        super().__init__(
            task,
            method,
            topology,
            fleet,
            timing,
            records,
            seed=seed,
            work=work,
            asynchronous=False,
            **around,
        )
        self.bytes = self.messages = self.messages_lost = 0
        self._windows = fleet.windows() if self.network.dropping else {}
        self._reach: NDArray | None = None  # [n], who must hear every message
        if replicas == "global" and not self.network.fixed and not method.exact:
            if self.network.loss or self.network.dropping:
                raise ConfigError(
                    'replicas = "global" needs every message to reach everybody; with lost '
                    'messages or nodes that are away, take "links"'
                )
            self._reach = _reach(topology)
        wires = {name: self._wire(name, seed) for name in method.channels}
        start = task.initial(seed)
        x = np.repeat(start[None], self.n, axis=0) if initial is None else np.array(initial)
        self.node = Stacked(x, wires, common=initial is None)
        self.round = 0
        self.end_s = np.zeros(self.n)  # of each node's last round
        self.free_s = np.zeros(self.n)  # when what it sent then has arrived, but for the bytes
        self._last: NDArray | None = None  # [n], bytes that each sent in the last round,
        self._bytes = 0  # their sum,
        self._sent = np.zeros(self.n)  # and the seconds they took
        self._steps = np.full(self.n, self.work.steps)
        self._kept = self.work.keep(self.n, start)  # by the nodes, between rounds
        self._all, self._draws = np.arange(self.n), np.zeros(self.n, np.int64)

    def _wire(self, name: str, seed: int) -> Wire:
        method, n = self.method, self.n
        channel = method.channels[name]
        if method.pushes:
            return Shares(n, lossy=self.network.loss > 0)
        still = self.network.fixed or self._reach is not None or not channel.memory
        if method.exact or still:
            return Broadcast(method.compressor, channel, method.exact, n, seed, name)
        return PerEdge(method.compressor, n, seed, name)

    @property
    def step(self) -> int:
        """Rounds done."""
        return self.round

    @property
    def time_s(self) -> float:
        """When the last node was done with the last round."""
        return float(self.end_s.max())

    @property
    def x(self) -> NDArray:
        """The nodes' mean ``[d]``."""
        return self.method.models(self.node).mean(axis=0)

    # -- Rounds --------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in COUNTS}

    def _start(self) -> None:
        wanted = self.method.init(self.node)
        if wanted is not None:
            self.node._starting = False
            self.method.begin(self.node, self._gradients(wanted, 0))
            self._spend(0, np.zeros(self.n), None)

    def _advance(self) -> bool:
        node, k = self.node, self.round
        present = self._present(k)
        if present is not None and not present.any():
            back_s = min(self._returns(self.time_s), default=math.inf)
            if back_s == math.inf:
                return False
            self.end_s = np.full(self.n, back_s)
            return True
        now = self.network.round(k, present)
        self._send(now)
        ready = self._ready(now)  # now: what it keeps must not take a piece of a freed [n, d]
        before = node.snapshot() if present is not None else None
        kept = {} if present is None else {name: held.copy() for name, held in self._kept.items()}
        try:
            # What is asked for is not held on to here: it may be the last to hold a whole [n, d].
            self.method.tell(node, self._gradients(self.method.ask(node), k + 1))
        except ConfigError:
            if self._sound():
                raise
            raise Diverged(
                f"a node's model is not finite after round {k}; take a smaller step size"
            ) from None
        self._spend(k + 1, ready, present)
        if before is not None and present is not None:
            node.keep(before, ~present)
            for name, held in kept.items():
                self._kept[name][~present] = held[~present]
        self.round += 1
        if self.round == 1:  # what is made once is there: nothing will take a piece of an [n, d]
            keep_freed()
        return True

    def _gradients(self, wanted: Points, draw: int) -> Any:
        draws = self._draws
        draws.fill(draw * self.work.steps)
        points = wanted if isinstance(wanted, tuple) else (wanted,)
        found = []
        for losses, gradients in self._answers(points, self._all, draws, self._steps, self._kept):
            if not math.isfinite(np.add.reduce(losses)):
                good = np.isfinite(losses) & np.isfinite(gradients).all(axis=1)
                if not good.all():
                    raise Diverged(
                        f"the gradient or loss of node {int(good.argmin())} is not finite in round "
                        f"{self.round} ({self.time_s:.6g} s); take a smaller step size"
                    )
            found.append(gradients)
        return tuple(found) if isinstance(wanted, tuple) else found[0]

    def _send(self, now: RoundGraph) -> None:
        """The messages of the last round travel."""
        if self._reach is not None:  # whoever may ever need it hears it
            now = replace(now, reach=self._reach)
        sent = self.node.exchange(now)
        if sent is not self._last:  # as it is where a round sends what the one before did
            self._last, self._bytes = sent, int(sent.sum())
            if self.fleet.bandwidth is not None:
                self._sent = sent / self.fleet.bandwidth
        self.bytes += self._bytes
        self.messages += now.messages
        if now.through is not None:
            self.messages_lost += len(now.src) - int(now.through.sum())

    def _ready(self, now: RoundGraph) -> NDArray:
        """``[n]``: when each node has what it needs for this round."""
        return now.latest(self.end_s, self.free_s + self._sent)

    def _spend(self, number: int, ready: NDArray, present: NDArray | None) -> None:
        """Job ``number`` of every node that is there takes its time."""
        start = self.end_s if self.method.overlap else ready
        end = self.timing.finish_all(number, start, self.work.steps)
        if present is None:
            self.records.round(self.round, number, None, start, end)
        else:
            there = np.flatnonzero(present)
            self.records.round(self.round, number, there, start[there], end[there])
            # Who is away follows the clock of whom it would hear, until that is when it is back.
            end = np.where(present, end, self._ready(self.network.whole(self.round)))
        if self.method.overlap:
            end = np.maximum(end, ready)
        self.end_s = end
        self.free_s = end + (self.fleet.latency_s + self.timing.jitters(number))

    def _present(self, k: int) -> NDArray | None:
        """Who takes part in round ``k``, ``[n]``; None for all."""
        if not self._windows:
            return None
        ready = self._ready(self.network.round(k))
        present = np.ones(self.n, bool)
        for node, windows in self._windows.items():
            present[node] = not any(begin <= ready[node] < end for begin, end in windows)
        return None if present.all() else present

    def _returns(self, now_s: float) -> list[float]:
        return [end for windows in self._windows.values() for _, end in windows if end > now_s]

    # -- Records -------------------------------------------------------------------------------

    def _measured(self) -> dict[str, float]:
        self.records.flush()
        row = {"time_s": self.time_s, "step": self.round, "gradients": self.gradients}
        row |= measure(self.method.models(self.node), self._evaluated, self.records.nodes)
        row["bytes"], row["bytes_edge"] = self.bytes, self.bytes / max(self.messages, 1)
        busy_s = float(self.records.busy_s.sum())
        row["busy"] = busy_s / (self.n * self.time_s) if self.time_s else 0.0
        return row

    def _sound(self) -> bool:
        return bool(np.isfinite(self.node.x).all())

    _COUNTERS = ("round", *COUNTS, "_next_step", "_next_s", "_next_gradients")

    def state(self) -> dict[str, Any]:
        return {
            "x": self.x,
            "gradients": self.gradients,
            "step": self.round,
            "node": self.node.state(),
            "kept": self._kept,
            "times": [self.end_s, self.free_s, self._sent],
            "counters": {key: getattr(self, key) for key in self._COUNTERS},
            "records": self.records.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._started = True
        self.node.restore(state["node"])
        self._kept = state["kept"]
        self.end_s, self.free_s, self._sent = state["times"]
        for key, value in state["counters"].items():
            setattr(self, key, value)
        self.records.restore(state["records"])


def _reach(topology: Topology) -> NDArray:
    """``[n]``: to how many others each node's messages must go, if they must reach all in time."""
    if topology.period is None:
        return np.full(topology.n, topology.n - 1)
    union = sum(abs(topology.matrix(k)) for k in range(topology.period))
    union.setdiag(0)
    union.eliminate_zeros()
    return np.bincount(union.nonzero()[1], minlength=topology.n)
