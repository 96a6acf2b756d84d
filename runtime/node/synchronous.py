"""A synchronous node: it goes on to the next round when it has heard all it must hear in this one.

Mail is keyed by its round.  A neighbour with which messages go both ways cannot be more than one of
their common rounds ahead, since it needs this node's message to go on; one that only sends can be
as far ahead as the way back to it is long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from offbeat.runtime.base.errors import PeerError
from offbeat.runtime.node.channels import Item, LocalView, NodeChannels, Read
from offbeat.runtime.node.effects import Effect, RoundDone, Send
from offbeat.runtime.node.node import CLOSED, OPENING, Edge, GossipNode

MOST_EARLY = 2  # messages held of one neighbour: of the round at hand, and of the next
MOST_EARLY_ONE_WAY = 1024  # the same of one that does not hear this node
MAIL, GOT = "mail", "got"


class RoundNode(GossipNode):
    """See the module and ``GossipNode``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.now: LocalView | None = None  # of the round at hand, once it is begun
        self.full = False  # whether its messages are mixed in
        self.begun = False  # whether the method's beginning is done
        self.gradient: Any = None  # the gradient, if it is there before the messages
        self.mail: dict[int, dict[int, list[Read]]] = {}  # round -> node -> what it sent
        self.kept: dict[int, dict[int, tuple[Item, ...]]] = {}  # node -> round -> may not be there
        # Whether whoever is heard hears this node, in the same rounds.
        self._paired = not self.network.topology.directed
        self._paired &= not (self.method.pushes and self.network.loss)

    # -- Rounds --------------------------------------------------------------------------------

    def _make(self, x: NDArray, *, common: bool) -> None:
        self.node = NodeChannels(
            self.i,
            self.n,
            self.method,
            x,
            fixed=self.network.fixed,
            common=common,
            seed=self.setting.seed,
        )

    def _starting(self) -> list[Effect]:
        self.jobs = self.round
        return super()._starting()

    def _begun(self) -> list[Effect]:
        self.node.begun()
        self.begun, self.jobs = True, self.round + 1
        return self._step()

    def _computed(self, gradient: Any) -> list[Effect]:
        if not self.begun:
            self.node.begun()
            self.method.begin(self.node, gradient)
            return self._begun()
        self.gradient = (gradient,)
        return self._step()

    def _step(self) -> list[Effect]:
        effects: list[Effect] = []
        while self.begun:
            if self.now is None:
                if not self._may_begin():
                    break
                effects += self._begin()
            elif not self.full:
                mail = self.mail.get(self.round, {})
                if not self.now.takes.keys() <= mail.keys():
                    break
                effects += self._mixed(self.now, mail)
            elif self.gradient is not None:
                effects.append(self._finish())
            else:
                break
        return effects

    def _may_begin(self) -> bool:
        waits = (link.state is OPENING and link.since <= self.round for link in self.links.values())
        return self.round < self.limit and not any(waits)

    def _begin(self) -> list[Effect]:
        """Send this round's messages."""
        k = self.round
        self.now = used = self._used(k)
        self.full = False
        anew = [j for j in used.hears if self._link(j).anew]
        effects: list[Effect] = []
        for j, items in self.node.outbox(used, anew).items():
            mail = Send(j, MAIL, k, items)
            self.counts["messages"] += 1
            self.counts["bytes"] += mail.nbytes
            if j in used.gives:
                self.kept.setdefault(j, {})[k] = mail.items
                effects.append(mail)
            else:
                self.counts["messages_lost"] += 1
        if self.method.overlap:
            effects.append(self._compute(self.method.ask(self.node)))
        return effects

    def _mixed(self, now: LocalView, mail: Mapping[int, list[Read]]) -> list[Effect]:
        """All this round's messages are there."""
        self.node.inbox(now, mail)
        self.mail.pop(self.round, None)
        self.full = True
        for j in now.gives:
            self._link(j).anew = False
        return [] if self.method.overlap else [self._compute(self.method.ask(self.node))]

    def _finish(self) -> RoundDone:
        (gradient,), self.gradient, self.now = self.gradient, None, None
        self.method.tell(self.node, gradient)
        self.round += 1
        return RoundDone(self.round, self.model)

    def _used(self, k: int) -> LocalView:
        """Who hears whom in round ``k``, over links that are in use."""
        view = self._view(k)
        links = {j: self._link(j) for j in (*view.hears, *view.takes)}
        out = [j for j, link in links.items() if link.state is CLOSED or k < link.since]
        return view.without(out, self.method.pushes) if out else view

    # -- Messages ------------------------------------------------------------------------------

    def _received(self, frm: int, kind: str, number: int, items: Sequence[Item]) -> list[Effect]:
        if kind == GOT:
            self.kept.get(frm, {}).pop(number, None)
            return []
        if kind != MAIL:
            raise PeerError(f'node {frm} sent "{kind}", which no synchronous node sends')
        if number < 0 or frm not in self._view(number).takes:
            raise PeerError(f"node {frm} has nothing to say in round {number}")
        link = self._link(frm)
        if link.state is CLOSED or number < link.since:
            return self._dropped("closed")
        receipt: list[Effect] = [] if self._paired else [Send(frm, GOT, number)]
        if number < self.round or (number == self.round and self.full and self.now is not None):
            return receipt + self._dropped("stale")
        if frm in self.mail.get(number, {}):
            return receipt + self._dropped("doubled")
        held = sum(frm in mail for mail in self.mail.values())
        if held >= (MOST_EARLY if self._paired else MOST_EARLY_ONE_WAY):
            raise PeerError(f"node {frm} is in round {number} and this one in {self.round}")
        self.mail.setdefault(number, {})[frm] = self.node.read(items)
        kept = self.kept.get(frm, {})
        for k in [k for k in kept if k < number]:  # it has those, or had not gone on
            del kept[k]
        return receipt + self._step()

    def _unheard(self) -> list[Send]:
        return [
            Send(j, MAIL, k, items) for j, kept in self.kept.items() for k, items in kept.items()
        ]

    # -- Links ---------------------------------------------------------------------------------

    @property
    def reached(self) -> int:
        return self.round + (self.now is not None)

    def _next(self, j: int) -> int:
        return self.reached

    def _age(self, link: Edge) -> int:
        return link.since

    def _close(self, j: int) -> None:
        self.node.close(j)
        self.kept.pop(j, None)
        for mail in self.mail.values():
            mail.pop(j, None)
        if self.now is not None:
            own = self.now.own  # of what is pushed, the share of j is given already
            self.now = self.now.without([j], self.method.pushes)
            self.now.own = own if self.method.pushes else self.now.own

    def _opened(self, j: int) -> None:
        link = self._link(j)
        link.anew = True
        for k, mail in self.mail.items():
            if k < link.since:
                mail.pop(j, None)

    def _forgotten(self, j: int) -> None:
        self.node.fresh(j)
        for mail in self.mail.values():  # j may do those rounds again, and say something else
            mail.pop(j, None)

    @property
    def quiet(self) -> bool:
        return self.begun and self.now is None and self.round >= self.limit

    # -- Checkpoints ---------------------------------------------------------------------------

    _STATE = (*GossipNode._STATE, "full", "begun", "gradient", "mail", "kept")

    def _node_state(self) -> dict[str, Any]:
        own = None if self.now is None else self.now.own
        return {"peer": self.node.state(), "own": own}

    def _restore_node(self, state: dict[str, Any]) -> None:
        self.node.restore(state["peer"])
        self.mail = {
            k: {j: [Read(*read) for read in reads] for j, reads in mail.items()}
            for k, mail in self.mail.items()
        }
        if state["own"] is not None:
            self.now = self._used(self.round).without([], self.method.pushes)
            self.now.own = state["own"]
