"""One live gossip node: messages and gradients in, messages and work out; no clock, no socket.

A driver carries what ``start``, ``receive``, ``computed``, ``down``, ``up`` and ``extend`` answer:
``Send`` to where it says, ``Compute`` to whoever computes, whose answer goes to ``computed``.
Messages may be late, doubled or in another order; while both ends live and their link is up, each
must arrive in the end, for which ``again`` repeats whatever may not have.

Links.  A link is open at both ends from the start.  ``down(j)`` says that neighbour j is not heard
of: the link is closed, from the round at hand on, its weight goes to the own diagonal, and what is
kept for it is forgotten (``runtime.node.channels``).  ``up(j)`` says that j is heard of again, and
the ends open the link: each sends what it promises, and the link is open to who has heard that the
other knows his promise:

    open(promise, (mine, theirs, how far, round), model)

``mine`` numbers this end's openings and ``theirs`` is the last heard of the other end's, so nothing
late can be taken for an answer; the promise is the first round this end has not begun, and in which
it waits for the other (between asynchronous nodes, the number of an exchange that never was).  The
link is used from the later of the two on.  A node that has lost
its state (``joining``) asks all neighbours that are up, which answer with their models; it begins
with the mean of these, at the latest of their rounds, as nodes begin a run.

A driver must say ``down`` at both ends sooner or later: also to a node that hears one which does
not hear it (so heartbeats say whom their sender hears).  Greetings of who is down are not answered.

What that guarantees.  Rows of weights sum to 1 at every node, always.  The two ends may close a
link one of its rounds apart, since no message can settle which was the last; then the mean of the
models moves by at most that one exchange.  Sums of ``conserved`` channels stay exact, since each
end gives back all it took over the link.  Copies are equal at both ends whenever a link is open.

A method whose weights may not change, and any on a directed graph but push, does not bear ``down``:
its nodes wait (``bears``).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.gossip import Gossip, Points
from offbeat.runtime.base import trees
from offbeat.runtime.base.errors import ConfigError, Diverged, PeerError
from offbeat.runtime.base.tensors import finite
from offbeat.runtime.node.channels import Item, LocalView
from offbeat.runtime.node.effects import Compute, Effect, Send
from offbeat.runtime.node.network import Network
from offbeat.workers.tasks.contract import Task, guarded
from offbeat.workers.work import Work, updated

MOST_OPENINGS = 2**32  # of one link by one incarnation of a node
KEPT_VIEWS = 64  # rounds of which a node keeps who hears whom
HELLO = "open"


class EdgeState(Enum):
    """Whether a link is in use, as one end knows it."""

    OPEN = "open"
    OPENING = "opening"
    CLOSED = "closed"


OPEN, OPENING, CLOSED = EdgeState  # read often


class Edge:
    """One end of a link.

    Its openings are numbered; ``since`` is the first round in which it is used.
    """

    def __init__(self, state: EdgeState) -> None:
        self.state = state
        self.mine = self.theirs = 0
        self.since = 0
        self.blank = False  # whether the other end has lost its state
        self.anew = False  # whether the next message says the whole copy


@dataclass(frozen=True)
class Setting:
    """What all nodes of a run share: what they are, and what they are in.

    Args:
        task, work: whose gradients, and what takes a gradient's place.
        method, network, seed: the algorithm, its links, its randomness.
        closes: whether links may close and open again, as between processes.
    """

    task: Task
    work: Work
    method: Gossip
    network: Network
    seed: int
    closes: bool = True

    @cached_property
    def start(self) -> NDArray:
        """``[d]``: where all nodes begin."""
        return self.task.initial(self.seed)


class GossipNode(ABC):
    """What synchronous and asynchronous nodes share: links, the method, gradients.

    Args:
        setting: of which it is one node.
        i: its number.
        incarnation: how often it was started before; what an older one sent is not heard.
        joining: whether it has lost its state and takes its neighbours'.
    """

    def __init__(
        self, setting: Setting, i: int, *, incarnation: int = 0, joining: bool = False
    ) -> None:
        self.setting, self.method, self.network = setting, setting.method, setting.network
        topology = self.network.topology
        self.i, self.n = i, topology.n
        bears = self.method.pushes or (self.method.varying and not topology.directed)
        self.bears = setting.closes and bears
        self.incarnation, self.joining = incarnation, joining
        self.limit: float = np.inf  # rounds it may begin
        self.round = 0  # at hand, or next
        self.jobs = 0  # number of the next
        self.job: Compute | None = None  # that is computed
        self.links: dict[int, Edge] = {}
        self.newcomer = joining  # its links are closed until they are known
        self.heard: dict[int, int] = {}  # node -> its highest incarnation
        # Of neighbours, while joining.
        self.models: dict[int, NDArray] = {}
        self.ages: dict[int, int] = {}
        self.counts: Counter[str] = Counter()
        self._views: dict[int, LocalView] = {}

    # -- What a driver calls -------------------------------------------------------------------

    def start(self, x: NDArray | None = None) -> list[Effect]:
        """The run begins, where all nodes start, or at ``x [d]``, where this one does."""
        if self.joining:
            return []
        self._make(self._initial() if x is None else x, common=x is None)
        return self._starting()

    def receive(
        self, frm: int, kind: str, number: int, items: Sequence[Item], incarnation: int = 0
    ) -> list[Effect]:
        """A message has come.

        Raises:
            PeerError: no node of this run sends that; nothing of it was used.
        """
        if not 0 <= frm < self.n or frm == self.i:
            raise PeerError(f"there is no node {frm} beside this one; they are 0..{self.n - 1}")
        if incarnation < self.heard.get(frm, 0):
            return self._dropped("former")
        if incarnation > self.heard.get(frm, 0):
            if kind != HELLO:
                return self._dropped("unknown")
            self._hello_fits(number, items)
            self.heard[frm] = incarnation
            self._link(frm).theirs = 0
            if not self.joining:
                self._forgotten(frm)
            return self._greeted(frm, number, items)
        if kind == HELLO:
            self._hello_fits(number, items)
            return self._greeted(frm, number, items)
        if self.joining:
            return self._dropped("closed")
        return self._received(frm, kind, number, items)

    def computed(self, number: int, losses: Sequence[float], answers: Points) -> list[Effect]:
        """Job ``number`` is done; ``answers`` is shaped as its points were.

        Raises:
            Diverged: it is not finite.
        """
        if self.job is None or number != self.job.number:
            return self._dropped("jobs")
        gradients = answers if isinstance(answers, tuple) else (answers,)
        if not all(np.isfinite(losses)) or not all(finite(g) for g in gradients):
            raise Diverged(
                f"the gradient or loss of node {self.i} is not finite in round {self.round}; take "
                "a smaller step size"
            )
        try:
            return self.accept(gradients)
        except ConfigError:
            if np.isfinite(self.node.x).all():
                raise
            raise Diverged(
                f"the model of node {self.i} is not finite after round {self.round}; take a "
                "smaller step size"
            ) from None

    def accept(self, gradients: tuple[NDArray, ...]) -> list[Effect]:
        """The job at hand is done, and what came of it is finite: a gradient a point."""
        self.job = None
        return self._computed(gradients if len(gradients) > 1 else gradients[0])

    def repeat(self) -> list[Effect]:
        """The job at hand is lost, and done again on another sample."""
        assert self.job is not None
        return [self._compute(self.job.points)]

    def down(self, j: int) -> list[Effect]:
        """Nothing is heard of ``j``."""
        if self._link(j).state is CLOSED or not self.bears:
            return []
        self._shut(j)
        return self._try_join() if self.joining else self._step()

    def up(self, j: int) -> list[Effect]:
        """Something is heard of ``j`` again, or first."""
        if self._link(j).state is CLOSED:
            self._opening(j)
        return [self._hello(j)] if self._link(j).state is OPENING else []

    def meet(self, j: int, incarnation: int) -> list[Effect]:
        """The run begins, or goes on, with ``j`` as this incarnation: it has lost nothing."""
        self.heard[j] = max(incarnation, self.heard.get(j, 0))
        return []

    def forget(self, j: int) -> list[Effect]:
        """What is known of the link to ``j``, which is down, is older than what j knows."""
        self._forgotten(j)
        return []

    def extend(self, limit: float) -> list[Effect]:
        """From now on the node may begin rounds below ``limit``."""
        self.limit = limit
        return [] if self.joining else self._step()

    def again(self) -> Sequence[Effect]:
        """Messages that were answered before, and may not have arrived."""
        hellos = [self._hello(j) for j, link in self.links.items() if link.state is OPENING]
        return [*hellos, *([] if self.joining else self._unheard())]

    def answer(self, job: Compute) -> tuple[list[float], Points]:
        """Losses and gradients of ``job``: what a driver computes for ``computed``."""
        work, task = self.setting.work, guarded(self.setting.task)
        steps = np.array([work.steps])
        rows, draws = np.array([self.i]), steps * job.number
        updates = [updated(work, task, x[None], rows, draws, steps, {}) for x in job.points]
        losses = [float(loss[0]) for loss, _ in updates]
        gradients = tuple(gradient[0] for _, gradient in updates)
        return losses, gradients if len(gradients) > 1 else gradients[0]

    @cached_property
    def neighbours(self) -> frozenset[int]:
        """With whom it ever has a link."""
        period = self.network.topology.period
        if period is None:
            return frozenset(range(self.n)) - {self.i}
        views = (LocalView.of(self.network.whole(k), self.i) for k in range(period))
        return frozenset(j for view in views for j in (*view.hears, *view.takes))

    @property
    def model(self) -> NDArray:
        """``[d]``."""
        return self.method.models(self.node)

    @property
    def reached(self) -> int:
        """Rounds it has begun."""
        return self.round

    @property
    @abstractmethod
    def quiet(self) -> bool:
        """Whether it stands at its limit and nothing of its own is under way."""

    # -- What the two kinds do -----------------------------------------------------------------

    node: Any
    """What the method sees."""

    @abstractmethod
    def _make(self, x: NDArray, *, common: bool) -> None:
        """Make ``node``, beginning at ``x [d]``, at which all begin if it is ``common``."""

    @abstractmethod
    def _begun(self) -> list[Effect]:
        """The method's beginning is done."""

    @abstractmethod
    def _received(self, frm: int, kind: str, number: int, items: Sequence[Item]) -> list[Effect]:
        """Any other message."""

    @abstractmethod
    def _computed(self, gradient: Any) -> list[Effect]:
        """The job at hand is done."""

    @abstractmethod
    def _step(self) -> list[Effect]:
        """Go on as far as can be."""

    @abstractmethod
    def _close(self, j: int) -> None:
        """The link to ``j`` is out of use."""

    @abstractmethod
    def _opened(self, j: int) -> None:
        """The link to ``j`` is in use from round ``since`` on."""

    @abstractmethod
    def _forgotten(self, j: int) -> None:
        """The node ``j`` has lost what stood on its link to this one."""

    @abstractmethod
    def _next(self, j: int) -> int:
        """What it promises ``j``."""

    @abstractmethod
    def _age(self, link: Edge) -> int:
        """The round at which who joins would begin."""

    @abstractmethod
    def _unheard(self) -> Sequence[Send]:
        """Messages that may not have arrived."""

    # -- The method ----------------------------------------------------------------------------

    def _initial(self) -> NDArray:
        return self.setting.start.copy()

    def _starting(self) -> list[Effect]:
        wanted = self.method.init(self.node)
        return self._begun() if wanted is None else [self._compute(wanted)]

    def _compute(self, points: Points) -> Compute:
        self.job = Compute(self.jobs, points if isinstance(points, tuple) else (points,))
        self.jobs += 1
        return self.job

    def _dropped(self, why: str) -> list[Effect]:
        self.counts[f"dropped, {why}"] += 1
        return []

    # -- Links ---------------------------------------------------------------------------------

    def _view(self, k: int) -> LocalView:
        """Who hears whom in round ``k``, if all links are open."""
        place = self.network.place(k)
        if place not in self._views:
            if len(self._views) >= KEPT_VIEWS:
                del self._views[next(iter(self._views))]
            self._views[place] = LocalView.of(self.network.seen(place), self.i)
        return self._views[place]

    def _link(self, j: int) -> Edge:
        if j not in self.links:
            self.links[j] = Edge(CLOSED if self.newcomer else OPEN)
        return self.links[j]

    def _shut(self, j: int) -> None:
        link = self._link(j)
        self.counts["closed"] += link.state is OPEN
        link.state, link.anew = CLOSED, False
        self.models.pop(j, None)
        if not self.joining:
            self._close(j)

    def _opening(self, j: int) -> None:
        link = self._link(j)
        link.state = OPENING
        link.mine = max(link.mine, self.incarnation * MOST_OPENINGS) + 1
        link.since = -1 if self.joining else self._next(j)

    def _hello(self, j: int) -> Send:
        link = self._link(j)
        far = 0 if self.joining else 1 + (link.state is OPEN)
        model = self.model if link.blank and not self.joining else None
        age = 0 if self.joining else self._age(link)
        return Send(j, HELLO, link.since, (np.array([link.mine, link.theirs, far, age]), model))

    def _hello_fits(self, number: int, items: Sequence[Item]) -> None:
        """Raise PeerError where it is no greeting."""
        says, x = items if len(items) == 2 else (None, None)
        if not isinstance(says, np.ndarray) or says.dtype != np.int64 or says.shape != (4,):
            raise PeerError("a greeting has no promise")
        if x is not None and not (
            isinstance(x, np.ndarray)
            and x.shape == (self.setting.task.dim,)
            and x.dtype.kind == "f"
            and finite(x)
        ):
            raise PeerError("a greeting's model is no finite vector of the right size")
        if number < -1 + (says[2] > 0) or not 0 <= says[2] <= 2 or says[3] < 0:
            raise PeerError(f"a greeting promises {number} in round {says[3]}")

    def _greeted(self, j: int, promised: int, items: Sequence[Item]) -> list[Effect]:
        """``j`` says what it promises; see the module."""
        mine, theirs, far, age = np.asarray(items[0]).tolist()
        link = self._link(j)
        if mine < link.theirs or not self.bears:
            return self._dropped("stale")
        new = mine > link.theirs
        link.theirs, link.blank = mine, far == 0
        if link.state is CLOSED:  # until the driver says that it is up
            return self._dropped("closed")
        if new and link.state is OPEN:
            self._shut(j)
            self._opening(j)
        if self.joining:
            if isinstance(items[1], np.ndarray):
                self.models[j], self.ages[j] = items[1], age
            hello: list[Effect] = [self._hello(j)] if new else []
            return hello + self._try_join()
        was_open = link.state is OPEN
        if link.state is OPENING and theirs == link.mine and far > 0:
            link.state, link.since = OPEN, max(link.since, promised)
            self.counts["opened"] += 1
            self._opened(j)
        hello = [self._hello(j)] if far < 2 and (new or theirs != link.mine or was_open) else []
        return hello + self._step()

    def _try_join(self) -> list[Effect]:
        """Begin with the neighbours' models, once all that are up have answered."""
        asked = {j: link for j, link in self.links.items() if link.state is OPENING}
        if not self.models or any(not (j in self.models or k.blank) for j, k in asked.items()):
            return []
        x = np.mean(list(self.models.values()), axis=0)
        self.round = max(self.ages[j] for j in self.models)
        self.joining = False
        self.models.clear()
        self.counts["joined"] += 1
        self._make(x, common=False)
        for j in asked:
            self._opening(j)
        return [*self._starting(), *(self._hello(j) for j in asked)]

    # -- Checkpoints ---------------------------------------------------------------------------

    _STATE: Sequence[str] = ("joining", "round", "jobs", "heard", "newcomer")

    def state(self) -> dict[str, Any]:
        """Everything, as a tree of plain values and arrays."""
        return {
            "node": None if self.joining else self._node_state(),
            "links": [[j, vars(k) | {"state": k.state.value}] for j, k in self.links.items()],
            "job": None if self.job is None else [self.job.number, list(self.job.points)],
            "counts": dict(self.counts),
            "fields": {key: trees.dump(getattr(self, key)) for key in self._STATE},
        }

    def restore(self, state: dict[str, Any]) -> list[Effect]:
        """Continue from what ``state`` answered, in place of ``start``."""
        for key, tree in state["fields"].items():
            setattr(self, key, trees.load(None, tree))
        for j, fields in state["links"]:
            link = self.links[j] = Edge(OPEN)
            vars(link).update(fields | {"state": EdgeState(fields["state"])})
        self.counts = Counter(state["counts"])
        self.job = (
            None if state["job"] is None else Compute(state["job"][0], tuple(state["job"][1]))
        )
        if state["node"] is not None:
            self._make(self._initial(), common=True)
            self._restore_node(state["node"])
        job: list[Effect] = [] if self.job is None else [self.job]
        return [*job, *self.again(), *([] if self.joining else self._step())]

    @abstractmethod
    def _node_state(self) -> dict[str, Any]:
        """What stands behind ``node``."""

    @abstractmethod
    def _restore_node(self, state: dict[str, Any]) -> None:
        """Put it back."""
