"""The canonical problem on which gossip methods are compared, and ways to run them on it."""

import numpy as np

from offbeat.algorithms.gossip import (
    beer,
    cedas,
    choco,
    deepsqueeze,
    dsgd,
    dsgt,
    exact_diffusion,
    gradient_push,
    momentum_tracking,
    motef,
    motef_vr,
    noloco,
)
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.gossip.pairs import Pairs
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.runtime.node.asynchronous import ANSWERED
from offbeat.runtime.node.channels import LocalView, NodeChannels
from offbeat.runtime.node.network import Network
from offbeat.runtime.run.records import Records
from offbeat.topologies import TOPOLOGIES
from offbeat.workers.fleet import Fleet
from offbeat.workers.tasks import LeastSquares

N, D = 8, 20


def canonical(n=N, d=D, m=30, seed=0, het=1.0, noise=0.0):
    r = np.random.RandomState(seed)
    xs = r.randn(d)
    a = r.randn(n, m, d) / np.sqrt(m)
    b = np.empty((n, m))
    for i in range(n):
        xi = xs + het * r.randn(d)
        b[i] = a[i] @ xi + 0.1 * r.randn(m)
    return LeastSquares(a, b, noise)


L = canonical().smoothness


def ctad(lr, **more):
    return dsgd(lr=lr, order="combine-then-adapt", **more)


# One of each, stable on the canonical problem with noise 0.1.
METHODS = {
    "dsgd": dsgd(lr=0.03),
    "dsgd, combine first": ctad(0.03, momentum=0.9),
    "dsgt": dsgt(lr=0.03),
    "dsgt, combine first": dsgt(lr=0.02, order="combine-then-adapt"),
    "momentum-tracking": momentum_tracking(lr=0.005),
    "exact-diffusion": exact_diffusion(lr=0.03),
    "cedas": cedas(lr=0.03),
    "choco": choco(lr=0.03, compressor="topk(4)"),
    "choco, overlapped": choco(lr=0.03, order="overlapped"),
    "deepsqueeze": deepsqueeze(lr=0.03, compressor="qsgd(8)"),
    "beer": beer(lr=0.02, compressor="topk(4)"),
    "motef": motef(lr=0.02, gamma=0.3, compressor="qsgd(8)"),
    "motef-vr": motef_vr(lr=0.02, compressor="randk(0.3)"),
    "gradient-push": gradient_push(lr=0.03),
    "noloco": noloco(lr=0.02, momentum=0.5),
}
GRAPHS = (
    *("ring", "star", "complete", "exponential", "random-regular", "one-peer-exponential"),
    *("base", "matching", "random-edge", "equidyn", "dropout(ring(8))", "mobile"),
)


def engine(kind, task, method, topology="ring", fleet="8", steps=10**6, every=None, **more):
    made = TOPOLOGIES.parse(topology, n=task.workers) if isinstance(topology, str) else topology
    fleet = Fleet.parse(fleet) if isinstance(fleet, str) else fleet
    return kind(
        task, method, made, fleet, fleet.timing(0, 0), Records(fleet, None),
        seed=0, stop=Stop(steps=steps), evaluate=Evaluate(steps=every), **more,
    )  # fmt: skip


def rounds(task, method, topology="ring", fleet=None, **more):
    """A synchronous engine, begun."""
    made = engine(Rounds, task, method, topology, fleet or f"{task.workers}", **more)
    made._start()
    return made


def pairs(task, method, topology="ring", fleet=None, **more):
    return engine(Pairs, task, method, topology, fleet or f"{task.workers}", **more)


def under_way(made, name):
    """What exchanges, or shares, that one end knows of will still move at the other."""
    total = np.zeros(1)
    for i, node in enumerate(made.nodes):
        if made.method.pushes:
            for j, given in node.node._out[name].items():
                total = total + given - made.nodes[j].node._back[name].get(i, 0.0)
            continue
        for j, at in node.exchanges.items():
            moved = at.phase is ANSWERED and made.nodes[j].exchanges[i].number > at.number
            if moved and name in at.mine.keys() & at.theirs.keys():
                total = total + at.weight * (at.theirs[name] - at.mine[name])
    return total


def mixed(made):
    """X of a run as papers count it: after the messages of the last round are mixed in."""
    node, (name, channel) = made.node, next(iter(made.method.channels.items()))
    late = made.method.spec.options.get("order") in ("adapt-then-combine", "paper")
    if not late and made.method.spec.name != "deepsqueeze":
        return node.x
    node.exchange(made.network.round(made.round))
    return node.x + channel.gain * node.mix(name)


class Peers:
    """All nodes of a run, each on its own, with messages carried between them."""

    def __init__(self, task, method, topology="ring", loss=0.0, initial=None):
        n = task.workers
        made = TOPOLOGIES.parse(topology, n=n) if isinstance(topology, str) else topology
        self.task, self.method, self.k = task, method, 0
        self.network = Network(made, Fleet(workers=n, loss=loss), method, 0)
        start = np.repeat(task.initial(0)[None], n, axis=0) if initial is None else initial
        self.nodes = [
            NodeChannels(
                i, n, method, start[i], fixed=self.network.fixed, common=initial is None, seed=0
            )
            for i in range(n)
        ]
        for i, node in enumerate(self.nodes):
            wanted = method.init(node)
            node.begun()
            if wanted is not None:
                method.begin(node, self.gradient(i, wanted))

    def gradient(self, i, points):
        def one(x):
            return self.task.gradient(x[None], np.array([i]), np.array([self.k]))[1][0]

        return tuple(map(one, points)) if isinstance(points, tuple) else one(points)

    def advance(self):
        now = self.network.round(self.k)
        self.k += 1  # of the draw
        links = [LocalView.of(now, i) for i in range(len(self.nodes))]
        sent = [node.outbox(mine) for node, mine in zip(self.nodes, links, strict=True)]
        for i, node in enumerate(self.nodes):
            node.inbox(links[i], {j: node.read(m[i]) for j, m in enumerate(sent) if i in m})
        for i, node in enumerate(self.nodes):
            self.method.tell(node, self.gradient(i, self.method.ask(node)))

    @property
    def x(self):
        return np.stack([self.method.models(node) for node in self.nodes])
