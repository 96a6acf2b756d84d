"""What synchronous and asynchronous runs of gossip methods share."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.compute.farmed import FarmedWork
from offbeat.runtime.compute.private import private
from offbeat.runtime.node.network import Network
from offbeat.runtime.run.loop import Loop
from offbeat.runtime.run.records import Records
from offbeat.topologies import Topology
from offbeat.workers.fleet import Fleet, Timing
from offbeat.workers.tasks.contract import Task
from offbeat.workers.work import Kept, Work, gradient, updated

COUNTS = ("bytes", "messages", "messages_lost")  # of all nodes
CHUNK = 2**20  # numbers looked at together where all nodes' models are measured


class GossipLoop(Loop):
    """One run of a gossip method, an event or a round at a time.

    Args:
        task, method, topology, fleet, timing, records: the parts.
        seed: of the run.
        work: what takes a gradient's place.
        asynchronous: whether nodes exchange in pairs, at their own pace.
        around: see ``Loop``.

    Raises:
        ConfigError: the method does not suit the topology, or cannot bear the losses.
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
        work: Work | None,
        asynchronous: bool,
        **around: Any,
    ) -> None:
        super().__init__(task, records, **around)
        self.work = work or gradient()
        self.method, self.fleet, self.timing = private(method), fleet, timing
        self.n = fleet.workers
        self.network = Network(topology, fleet, method, seed, asynchronous)

    @property
    def gradients(self) -> int:
        """Gradients of all nodes: as many a job as it has local steps."""
        return self.records.arrivals * self.work.steps

    def facts(self) -> dict[str, Any]:
        return dict(self.counts())

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """What all nodes sent; a message is all channels' over one link."""

    def close(self) -> None:
        if isinstance(self.work, FarmedWork):
            self.work.backend.close()

    def _answers(
        self, points: tuple[NDArray, ...], node: NDArray, draw: NDArray, steps: NDArray, kept: Kept
    ) -> Iterator[tuple[NDArray, NDArray]]:
        """Losses and gradients at each of ``points``, of k nodes ``[k, d]``.

        All start from what the nodes keep; ``kept [k, ...]`` becomes what the first leaves.
        """
        first = [{name: held.copy() for name, held in kept.items()} for _ in points[1:]]
        for x, mine in zip(points, [kept, *first], strict=True):
            yield updated(self.work, self.task, x, node, draw, steps, mine)

    @abstractmethod
    def _advance(self) -> bool:
        """The next event or round; False if there is none."""

    def _loop(self) -> str:
        while True:
            if reason := self._reached():
                return reason
            moved = self.time_s, self.gradients
            while (self.time_s, self.gradients) == moved:  # nothing else is looked at below
                if not self._advance():
                    return "idle"
            self._check_time()
            if (
                self.step >= self._next_step
                or self.time_s >= self._next_s
                or self.gradients >= self._next_gradients
            ):
                self._look()
            if time.monotonic() >= self._alarm_s and (reason := self._alarm()):
                return reason


def measure(
    models: NDArray, evaluated: Callable[[NDArray], dict[str, float]], nodes: bool = False
) -> dict[str, Any]:
    """The task's facts at the mean of ``models [n, d]``, and how far the nodes are from it.

    ``consensus`` is the root of the mean squared distance to the mean; ``loss_worst`` the loss of
    the node that is farthest away; with ``nodes``, ``node_loss`` ``[n]`` has every node's.
    """
    mean = models.mean(axis=0)
    apart = distances2(models, mean)
    row = evaluated(mean)
    if "loss" in row:  # training loops may not have said any yet
        row["loss_worst"] = evaluated(models[apart.argmax()])["loss"]
    row["consensus"] = math.sqrt(float(apart.mean()))
    if nodes:
        return {**row, "node_loss": [evaluated(model)["loss"] for model in models]}
    return row


def distances2(models: NDArray, mean: NDArray) -> NDArray:
    """``[n]`` squared distances of ``models [n, d]`` from ``mean [d]``, in little memory."""
    rows = max(1, CHUNK // len(mean))
    pieces = (models[at : at + rows] - mean for at in range(0, len(models), rows))
    return np.concatenate([np.vecdot(piece, piece) for piece in pieces]).astype(float)
