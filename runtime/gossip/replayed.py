"""Runs again, from their traces: jobs end when they ended, and what gossip heard is heard.

Every node's inputs in a gossip run under a real clock are in its trace in their order: messages by
sender and serial number, jobs that were done, links that went down and up.  A message is what its
sender, replayed, has sent.  So the nodes compute what they computed, bit for bit, in one process
and at any speed.

Of a node whose process died, the last inputs are not known.  A synchronous one is given all mail
there is, since the order does not matter to it; what it did in vain, nobody has heard.
"""

import json
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.errors import ConfigError, PeerError, StorageError
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.gossip.loop import COUNTS, measure
from offbeat.runtime.node.effects import Effect, Send
from offbeat.runtime.node.make import gossip_node
from offbeat.runtime.node.node import HELLO, GossipNode
from offbeat.runtime.run import checkpoint
from offbeat.runtime.run.folders import check_trace
from offbeat.runtime.run.loop import Loop
from offbeat.runtime.run.records import Records, column
from offbeat.workers.fleet import Timing
from offbeat.workers.speeds import Clock

Key = tuple[int, int, int]  # from, incarnation, serial
PEER = "peer.json"  # of a peer's own folder


def _times(trace: NDArray) -> dict[tuple[int, int], tuple[float, float, float]]:
    """(worker, job) -> start, end, arrival."""
    whole = (column(trace, name).astype(int).tolist() for name in ("worker", "job"))
    times = (column(trace, name).tolist() for name in ("start_s", "end_s", "time_s"))
    return dict(zip(zip(*whole, strict=True), zip(*times, strict=True), strict=True))


class RecordedClock(Clock):
    """Jobs end when a trace says so; a job it does not have never does."""

    def __init__(self, trace: NDArray) -> None:
        self._times = _times(trace)

    def finish(self, worker: int, number: int, start_s: float, steps: int = 1) -> float:
        return self._times.get((worker, number), (0.0, np.inf, 0.0))[1]


class RecordedTiming(Timing):
    """Times of jobs as a trace has them; a job it does not have never ends."""

    def __init__(self, trace: NDArray) -> None:
        self._times = _times(trace)
        self.finish = None

    def plan(
        self, worker: int, number: int, assigned_s: float, free_s: float, steps: int = 1
    ) -> tuple[float, float, float]:
        never = max(assigned_s, free_s), np.inf, np.inf
        return self._times.get((worker, number), never)


def read_inputs(path: Path, length: int) -> dict[int, deque[list[Any]]]:
    """Node -> what it was given, from the first ``length`` bytes of a trace.jsonl."""
    inputs: dict[int, deque[list[Any]]] = {}
    try:
        with path.open("rb") as file:
            for line in file.read(length).splitlines():
                if line.startswith(b'{"inputs"'):
                    for node, given in json.loads(line)["inputs"].items():
                        inputs.setdefault(int(node), deque()).extend(given)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read ({error})") from None
    return inputs


def peers(folder: Path) -> list[Path]:
    """The folders of single peers in ``folder``, where those are what it holds.

    Raises:
        ConfigError: it is such a folder itself, which alone says too little.
    """
    if (folder / PEER).exists():
        raise ConfigError(
            f"{folder}: is the folder of one peer; its trace says which messages came, and not "
            "what was in them: put the folders of all peers into one folder, and replay that"
        )
    if (folder / "experiment.toml").exists():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{PEER}"))


def of_peers(folders: Sequence[Path], n: int) -> tuple[dict[int, deque[list[Any]]], NDArray]:
    """What all ``n`` nodes were given (see ``read_inputs``), and the models ``[n, d]`` they had.

    Raises:
        ConfigError: that is not all there, or not from the beginning to the end.
    """
    inputs: dict[int, deque[list[Any]]] = {}
    models: dict[int, NDArray] = {}
    for folder in folders:
        state = checkpoint.read(folder / "checkpoint")[0]
        check_trace(folder, state)
        given = read_inputs(folder / "trace.jsonl", state["records"]["lengths"]["trace.jsonl"])
        said = json.loads((folder / "summary.json").read_text())
        (began,) = [
            [one for one in its if one[0] in ("start", "restore")] for its in given.values()
        ]
        fresh = len(began) == 1 and began[0][0] == "start" and not began[0][2]  # it joined nobody
        if said["reason"] != "steps" or not fresh:
            raise ConfigError(
                f"{folder}: was stopped or started again, and what it was given last is not known; "
                "peers are replayed where all did their rounds without that"
            )
        models |= dict.fromkeys(given, state["x"])
        inputs |= given
    if len(inputs) != n:
        raise ConfigError(f"{folders[0].parent}: has the folders of {len(inputs)} of {n} peers")
    return inputs, np.stack([models[i] for i in sorted(models)])


class Replayed(Loop):
    """The run again.

    Args:
        experiment: what was run.
        inputs: see ``read_inputs``.
        records: where what is measured at the end is written.
        around: see ``Loop``.
    """

    def __init__(
        self,
        experiment: Experiment,
        inputs: dict[int, deque[list[Any]]],
        records: Records,
        **around: Any,
    ) -> None:
        super().__init__(experiment.task, records, **around)
        assert isinstance(experiment.algorithm, Gossip)
        self.experiment, self._inputs = experiment, inputs
        self.nodes: dict[int, GossipNode] = {}
        self._dead: list[GossipNode] = []
        self._had: dict[int, int] = {}  # of which, how many messages it was given
        self._sent: dict[int, dict[Key, Send]] = {}  # to whom
        self._serials: dict[tuple[int, int, int], int] = {}  # from, incarnation, to
        self._done = 0

    @property
    def step(self) -> int:
        """Rounds done by all."""
        return min((node.round for node in self.nodes.values()), default=0)

    @property
    def time_s(self) -> float:
        """No time passes."""
        return 0.0

    @property
    def gradients(self) -> int:
        """Gradients of all nodes."""
        return self._done * self.experiment.work.steps

    @property
    def x(self) -> NDArray:
        """The nodes' mean ``[d]``."""
        return self._models().mean(axis=0)

    def _models(self) -> NDArray:
        return np.stack([self.nodes[i].model for i in sorted(self.nodes)])

    def facts(self) -> dict[str, Any]:
        return {key: sum(node.counts[key] for node in self.nodes.values()) for key in COUNTS}

    def _start(self) -> None:
        """The first of what every node was given makes it."""
        for i in list(self._inputs):
            self._give(i, self._inputs[i].popleft())

    def _loop(self) -> str:
        going = True
        while going:
            going = False
            for i, given in self._inputs.items():
                while given and self._can(i, given[0]):
                    self._give(i, given.popleft())
                    going = True
            if not going:
                going = any([self._give_dead(node) for node in self._dead])
        if left := {i: given[0] for i, given in self._inputs.items() if given}:
            raise StorageError(
                "a process died, and the trace does not have all that its nodes were given last: "
                f"the run cannot be replayed beyond {left}"
            )
        return "steps"

    def _can(self, i: int, given: list[Any]) -> bool:
        return given[0] != "mail" or tuple(given[1:]) in self._sent.get(i, {})

    def _give(self, i: int, given: list[Any]) -> None:
        what, *args = given
        if what == "start":
            incarnation, joining, limit = args
            if i in self.nodes:
                self._dead.append(self.nodes[i])
                self._had[id(self.nodes[i])] = 0
            self.nodes[i] = gossip_node(
                self.experiment, i, incarnation=incarnation, joining=joining
            )
            self.nodes[i].limit = limit
            self._do(self.nodes[i], self.nodes[i].start())
            return
        node = self.nodes[i]
        if what == "mail":
            frm, incarnation, serial = args
            send = self._sent[i][frm, incarnation, serial]
            effects = node.receive(frm, send.kind, send.number, send.items, incarnation)
        elif what == "done":
            assert node.job is not None
            self._done += 1
            effects = node.computed(args[0], *node.answer(node.job))
        elif what == "restore":
            node.limit = args[0]
            effects = node.restore(node.state())
        else:
            effects = getattr(node, what)(*args)
        self._do(node, effects)

    def _give_dead(self, node: GossipNode) -> bool:
        """What a node may have done after its last input that is known; whether it did more."""
        if self.experiment.asynchronous:
            return False
        mail = list(islice(self._sent.get(node.i, {}).items(), self._had[id(node)], None))
        self._had[id(node)] += len(mail)
        for (frm, incarnation, _), send in mail:
            if send.kind != HELLO:
                with suppress(PeerError):  # it was for the node that came after
                    effects = node.receive(frm, send.kind, send.number, send.items, incarnation)
                    self._do(node, effects)
        if mail:
            return True
        if node.job is None:
            return False
        self._do(node, node.computed(node.job.number, *node.answer(node.job)))
        return True

    def _do(self, node: GossipNode, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                line = node.i, node.incarnation, effect.to
                serial = self._serials.get(line, 0)
                self._serials[line] = serial + 1
                self._sent.setdefault(effect.to, {})[node.i, node.incarnation, serial] = effect

    def _measured(self) -> dict[str, float]:
        row = {"time_s": self.time_s, "step": self.step, "gradients": self.gradients}
        return row | measure(self._models(), self._evaluated)

    def _sound(self) -> bool:
        return True

    # A replay has no folder, so nothing asks for these; whoever does learns why at once.

    def state(self) -> dict[str, Any]:
        """See ``Loop``; there is none."""
        raise TypeError("a replay is made from a run's trace, and is not saved itself")

    def restore(self, state: dict[str, Any]) -> None:
        """See ``Loop``; there is none."""
        raise TypeError("a replay begins at the beginning of its trace, and is not resumed")
