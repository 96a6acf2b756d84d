"""What papers claim of gossip methods, with its magnitude: small forms of what
benchmarks/gossip_claims.py measures."""

import networkx as nx
import numpy as np
import pytest
from canonical import rounds

import offbeat
from offbeat.algorithms.compression.contract import made
from offbeat.algorithms.gossip import beer, choco, dsgt, motef, noloco
from offbeat.algorithms.gossip.choco import safe_gamma
from offbeat.runtime.experiment.settings import Evaluate, Stop
from offbeat.runtime.gossip.rounds import Rounds
from offbeat.runtime.gossip.stacked import Broadcast
from offbeat.runtime.run.records import Records
from offbeat.topologies import TOPOLOGIES
from offbeat.topologies.graphs import from_networkx
from offbeat.workers.tasks import LeastSquares, Quadratic, logistic
from offbeat.workers.tasks.least_squares import least_squares

APART = least_squares()  # 8 nodes that disagree, exact gradients
LR = 0.1 / APART.smoothness


class Synthetic(LeastSquares):
    """MoTEF's: f_i = 1/2 ||(i+1)/sqrt(n) x - b_i||^2, b_i of variance zeta/(i+1)^2."""

    def __init__(self, n, zeta, sigma, offset):
        scale = np.arange(1, n + 1)
        a = scale[:, None, None] / np.sqrt(n) * np.eye(20)
        b = np.random.default_rng(0).standard_normal((n, 20)) * np.sqrt(zeta) / scale[:, None]
        super().__init__(a, b, sigma / np.sqrt(20))
        self.offset = offset

    def initial(self, seed):
        return self.optimum + self.offset


def centres(n, d=20, variance=10.0):
    """f_i = 1/2 ||x - b_i||^2, mean b = 0, noise of variance 100 in all."""
    b = np.random.default_rng(0).standard_normal((n, d)) * np.sqrt(variance)
    return Quadratic(b - b.mean(axis=0), None, 10 / np.sqrt(d))


def errors(task, method, rounds, burn, every=10):
    """||xbar - x*||^2 and mean_i ||x_i - xbar||^2, mean of the rounds after ``burn``."""
    result = offbeat.run(
        task, method, topology="ring", stop={"steps": rounds}, evaluate={"steps": every}
    )
    late = result.column("step") > burn
    return np.mean([result.column("distance2")[late], result.column("consensus")[late] ** 2], 1)


def test_momentum_lowers_the_noise_floor():
    task = Synthetic(n=16, zeta=10, sigma=10, offset=1 / 20)
    floor = {
        lam: errors(task, f"motef(lr=0.0005, lam={lam}, compressor=topk(2))", 3000, 2500).sum()
        for lam in (1.0, 0.05)
    }
    assert floor[1.0] >= 5 * floor[0.05]


@pytest.mark.parametrize("n", [2, 8, 32])
def test_the_mean_model_speeds_up_linearly(n):
    """E ||xbar||^2 = lr sigma^2 / (2 n); many coordinates, so that one run tells."""
    lr = 0.01
    method = f"motef(lr={lr}, lam=0.2, gamma=0.2, compressor=topk(40))"
    (mean, _) = errors(centres(n, d=400), method, 1500, 500)
    assert mean == pytest.approx(lr * 100 / (2 * n), rel=0.15)


def test_consensus_separates_methods():
    rest = "lr=0.002, compressor=topk(2))"
    methods = {"motef": f"motef(lam=0.05, {rest}", "beer": f"beer({rest}", "choco": f"choco({rest}"}
    apart = {name: errors(centres(16), method, 3000, 2000)[1] for name, method in methods.items()}
    assert apart["motef"] < apart["beer"] / 10 < apart["choco"] / 100


@pytest.mark.parametrize(
    ("method", "grows"), [("choco(", True), ("beer(", False), ("motef(lam=0.1, ", False)]
)
def test_heterogeneity_matters_without_tracking(method, grows):
    """The nodes' minimisers are spread from zeta 20 to 100."""
    near, far = (
        errors(Synthetic(4, zeta, 5, 0.0), f"{method}lr=0.0005, compressor=topk(2))", 3000, 2000)
        for zeta in (20, 100)
    )
    ratio = far.sum() / near.sum()
    assert ratio > 1.5 if grows else ratio < 1.15


# -- CHOCO's theorem ---------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["ring", "star", "hypercube", "complete"])
@pytest.mark.parametrize("compressor", ["topk(1)", "topk(5)", "scaled-sign", "identity"])
def test_choco_contracts_with_the_gamma_of_its_theorem(graph, compressor):
    """Its Lyapunov function in pure gossip, in every round."""
    w = TOPOLOGIES.parse(graph, n=8).matrix().toarray()
    (*_, second, _), beta = np.sort(abs(np.linalg.eigvalsh(w))), np.linalg.norm(np.eye(8) - w, 2)
    gap, alpha = 1 - second, made(compressor).alpha(10)
    gamma = safe_gamma(gap, beta, alpha)
    bound = 16 * gap + gap**2 + 4 * beta**2 + 2 * gap * beta**2 - 8 * gap * alpha
    assert gamma * bound == pytest.approx(gap**2 * alpha)
    start = np.random.default_rng(0).standard_normal((8, 10))
    method = choco(lr=1e-300, gamma=gamma, compressor=compressor)
    run = rounds(Quadratic(np.zeros((8, 10))), method, graph, initial=start)
    before = None
    for _ in range(300):
        run._advance()
        # The method's order: X' of the round is what is published, and its copy is H.
        x, h = run.node.x, run.node._wires["x"].value
        now = ((x - x.mean(axis=0)) ** 2).sum() + ((x - h) ** 2).sum()
        if before is not None and before > 1e-24:
            assert now <= (1 - gap**2 * alpha / 82) * before
        before = now


def test_choco_converges_with_the_gamma_of_its_theorem():
    """To the fixed point of D-SGD with W' = I + gamma (W - I): X' = (1 - lr) W' X' + lr C."""
    gamma, lr = safe_gamma(gap=0.5, beta=1.5, alpha=0.5), 0.01
    centers = np.random.default_rng(0).standard_normal((8, 10))
    method = choco(lr=lr, gamma=gamma, compressor="topk(5)")
    run = rounds(Quadratic(centers), method, "hypercube")
    for _ in range(3500):
        run._advance()
    w = run.network.topology.matrix().toarray()
    slowed = np.eye(8) + gamma * (w - np.eye(8))
    ends = np.linalg.solve(np.eye(8) - (1 - lr) * slowed, lr * centers)
    assert np.abs(run.node.x - ends).max() < 1e-10
    assert np.abs(ends - centers.mean(axis=0)).max() > 0.1


# -- Directed graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "gamma", "lr", "grows"),
    [(beer, 0.1, 0.05, True), (beer, 0.1, 0.01, False), (dsgt, 1.0, 0.2, True),
     (dsgt, 1.0, 0.05, False)],
)  # fmt: skip
def test_tracking_on_a_directed_ring_goes_as_its_eigenvalues_say(method, gamma, lr, grows):
    ring = from_networkx(nx.cycle_graph(8, create_using=nx.DiGraph), "uniform")
    more = {"order": "combine-then-adapt"}
    if method is beer:
        more = {"gamma": gamma, "compressor": "identity"}
    start = np.random.default_rng(0).standard_normal((8, 1))
    run = rounds(Quadratic(np.zeros((8, 1))), method(lr=lr, **more), ring, initial=start)
    apart = []
    for _ in range(1000):
        run._advance()
        apart.append(np.linalg.norm(run.node.x - run.node.x.mean(axis=0)))
    kept = [1 - gamma * (1 - value) for value in (1 + np.exp(0.25j * np.pi * np.arange(1, 8))) / 2]
    growth = max(abs(np.roots([1, lr - 2 * m, m * m - lr])).max() for m in kept)
    slope = np.polyfit(np.arange(500), np.log(apart[500:]), 1)[0]
    assert slope == pytest.approx(np.log(growth), abs=3e-4)
    assert (growth > 1) == grows


# -- Changing graphs ---------------------------------------------------------------------------


class PlainSum(Broadcast):
    """s <- s + W_k q: the sum of copies as nodes keep it where the weights never change."""

    total = known = 0.0

    def start(self, value):
        super().start(value)
        self.total, self.known = value, value.copy()

    def exchange(self, now):
        if self.value is not None:
            self.total = self.total + now.matrix @ (self.value - self.known)
            self.known = self.value.copy()
        return super().exchange(now)

    def mix(self):
        return self.total - self.known


class Plain(Rounds):
    def _wire(self, name, seed):
        channel = self.method.channels[name]
        return PlainSum(self.method.compressor, channel, False, self.n, seed, name)


METHODS = {
    "beer": beer(lr=LR, gamma=0.2, compressor="topk(4)"),
    "motef": motef(lr=LR, gamma=0.2, lam=0.2, compressor="topk(4)"),
}


def ended(method, graph, kind=Rounds, replicas="links"):
    """The engine after its rounds, and the root of mean_i ||x_i - x*||^2."""
    fleet = offbeat.Fleet(workers=8)
    engine = kind(
        APART, METHODS[method], TOPOLOGIES.parse(graph, n=8), fleet, fleet.timing(0, 0),
        Records(fleet, None), seed=0, replicas=replicas, stop=Stop(steps=2000),
        evaluate=Evaluate(steps=2000),
    )  # fmt: skip
    final = engine.run()[1]
    return engine, np.sqrt(final["distance2"] + final["consensus"] ** 2)


@pytest.mark.parametrize("replicas", ["links", "global"])
@pytest.mark.parametrize("graph", ["matching", "one-peer-exponential"])
@pytest.mark.parametrize("method", METHODS)
def test_changing_graphs_leave_no_error(method, graph, replicas):
    assert ended(method, graph, replicas=replicas)[1] < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_plain_sums_are_right_on_a_fixed_graph_only(method):
    assert ended(method, "ring", Plain)[1] < 1e-11
    for graph in ("matching", "one-peer-exponential"):
        engine, error = ended(method, graph, Plain)
        assert error > 0.1
        # The gradient is tracked all the same: this invariant does not see the mistake.
        node = engine.node
        np.testing.assert_allclose(node.v.mean(axis=0), node.m.mean(axis=0), atol=1e-10)


# -- Unequal speeds ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dsgd", "ad-psgd", "dsgt"])
def test_fast_nodes_count_more_without_tracking(name):
    """Asynchronous, a node counts as often as it answers; tracking ends at the optimum."""
    often = 1 / np.sqrt(np.arange(1, 9))
    biased = LeastSquares(APART.a * often[:, None, None], APART.b * often[:, None]).optimum
    result = offbeat.run(
        APART,
        f"{name}(lr={LR})",
        "8 1..8",
        topology="ring",
        mode="asynchronous",
        stop={"steps": 1000},
    )
    bias, error = (np.linalg.norm(biased - APART.optimum), np.sqrt(result.final["distance2"]))
    if name == "dsgt":
        assert error < 1e-6
    else:
        assert np.linalg.norm(result.x - biased) < bias / 4 < error


# -- Random pairs with momentum ----------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 1.0), (0.3, 0.7), (0.5, 1.4), (0.8, 0.8)])
def test_consensus_of_noloco_contracts_as_its_second_moments_say(alpha, gamma):
    """d' = d + m', m' = alpha m - gamma (d - d_j)/2 for a random j: a map of E d^2, E dm, E m^2."""
    m2 = np.array([gamma**2 / 2, -alpha * gamma, alpha**2])
    dm = np.array([-gamma / 2, alpha, 0.0]) + m2
    rate = np.abs(np.linalg.eigvals([np.array([1 - gamma, 2 * alpha, 0.0]) + m2, dm, m2])).max()
    assert (rate < 1) == (gamma < 2 * (1 - alpha**2))
    method = noloco(lr=1.0, momentum=alpha, gamma=gamma)
    made = rounds(
        Quadratic(np.zeros((256, 50))), method, "matching",
        initial=np.random.default_rng(0).standard_normal((256, 50)),
    )  # fmt: skip
    method.lr = 0.0  # nothing but mixing
    apart = []
    for _ in range(40):
        made._advance()
        apart.append(made.node.x.var(axis=0).mean())
    assert (apart[39] / apart[9]) ** (1 / 30) == pytest.approx(rate, rel=0.01)


def test_noloco_on_everybody_is_diloco_with_heavy_ball():
    """Each round's mean over all nodes in place of pairs: the synchronous method with a server."""
    task = logistic("digits", workers=4, batch="full")
    options = {"work": "local-steps(sgd(0.1), steps=5)", "stop": {"steps": 30}}
    gossip = offbeat.run(task, "noloco(lr=0.7, momentum=0.5)", "4", topology="complete", **options)
    options["stop"] = {"steps": 29}  # what was moved in the last round has not been mixed in yet
    server = offbeat.run(task, "diloco(lr=0.7, outer=momentum, momentum=0.5)", "4", **options)
    np.testing.assert_allclose(gossip.x, server.x, rtol=1e-3, atol=1e-5)
    assert gossip.final["consensus"] < 1e-5
