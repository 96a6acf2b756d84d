"""Identities between gossip methods, and their reference convergence."""

import copy

import numpy as np
import pytest
from canonical import METHODS, L, canonical, ctad, mixed, rounds

from offbeat.algorithms.gossip import (
    beer,
    cedas,
    choco,
    deepsqueeze,
    dsgd,
    dsgt,
    exact_diffusion,
    momentum_tracking,
    motef,
    motef_vr,
    noloco,
)
from offbeat.algorithms.gossip.motef import MoTEF
from offbeat.algorithms.gossip.tracking import DSGT
from offbeat.workers.tasks import Quadratic

NOISY = canonical(noise=0.1)
EXACT = canonical()
STEPS = 200


def asked(method, task=NOISY, steps=STEPS, **more):
    """``[steps, n, d]``: where a run wants its gradients."""
    spied, found = copy.copy(method), []

    def ask(node):
        found.append(method.ask(node))
        return found[-1]

    spied.ask = ask
    made = rounds(task, spied, **more)
    for _ in range(steps):
        made._advance()
    return np.array([f[0] if isinstance(f, tuple) else f for f in found])


def test_the_canonical_problem_is_the_published_one():
    np.testing.assert_allclose(EXACT.optimum[:3], [2.10731424, 1.11980615, 0.31580142], atol=5e-9)
    assert EXACT.optimum.sum() == pytest.approx(11.34666636, abs=1e-8)
    assert EXACT.smoothness == pytest.approx(L, abs=1e-7)
    assert np.linalg.norm(EXACT.hessian, 2) == pytest.approx(1.4671099, abs=1e-7)
    assert np.linalg.eigvalsh(EXACT.hessian)[0] == pytest.approx(0.5255758, abs=1e-7)
    at = np.repeat(EXACT.optimum[None], 8, axis=0)
    g = EXACT.gradient(at, np.arange(8), np.zeros(8, int))[1]
    assert (g**2).sum(axis=1).mean() == pytest.approx(16.10224599, abs=1e-7)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (choco(lr=0.03, gamma=1.0, compressor="identity"), dsgd(lr=0.03)),
        (choco(lr=0.03, gamma=1.0, compressor="identity", order="overlapped"), ctad(0.03)),
        (deepsqueeze(lr=0.03, gamma=1.0, compressor="identity"), dsgd(lr=0.03)),
        (motef(lr=0.02, lam=1.0), beer(lr=0.02)),
        (noloco(lr=0.03, momentum=0.0, gamma=1.0), dsgd(lr=0.03)),
        (motef_vr(lr=0.02, lam=1.0), beer(lr=0.02)),
        (momentum_tracking(lr=0.02, beta=0.0), dsgt(lr=0.02, order="combine-then-adapt")),
        (cedas(lr=0.03, gamma=1.0, damping=1.0, compressor="identity"), exact_diffusion(lr=0.03)),
    ],
    ids=lambda method: str(method.spec),
)
def test_one_method_is_another_in_the_corner(one, other):
    assert np.abs(asked(one) - asked(other)).max() < 1e-12


def test_tracking_with_everything_sent_is_dsgt():
    """MoTEF with lam = gamma = 1, identity, and G_0 = V_0 sent, is DSGT, combine first."""

    class Warm(MoTEF):
        def begin(self, node, gradient):
            super().begin(node, gradient)
            node.publish("v", node.v)

    warm = asked(Warm(lr=0.02, gamma=1.0, lam=1.0, compressor="identity"))
    assert np.abs(warm - asked(dsgt(lr=0.02, order="combine-then-adapt"))).max() < 1e-12
    cold = asked(MoTEF(lr=0.02, gamma=1.0, lam=1.0, compressor="identity"))
    assert np.abs(warm - cold).max() > 1e-6


@pytest.mark.parametrize("topology", ["ring", "one-peer-exponential", "matching"])
@pytest.mark.parametrize(
    "method",
    [METHODS["dsgt"], METHODS["dsgt, combine first"], METHODS["momentum-tracking"],
     METHODS["beer"], METHODS["motef"], METHODS["motef-vr"]],
    ids=lambda method: str(method.spec),
)  # fmt: skip
def test_means_of_what_is_tracked(method, topology):
    """mean(V) = mean(M) always, and mean(X) moves by -lr mean(V)."""
    made = rounds(NOISY, method, topology)
    node = made.node
    for _ in range(STEPS):
        x, v = node.x.mean(axis=0), node.v.mean(axis=0)
        made._advance()
        tracked = node.u if isinstance(method, DSGT) else node.m
        np.testing.assert_allclose(node.v.mean(axis=0), tracked.mean(axis=0), atol=1e-12)
        if not getattr(method, "adapt_first", False):
            np.testing.assert_allclose(node.x.mean(axis=0), x - method.lr * v, atol=1e-13)


def test_motef_from_zero_momentum_never_recovers():
    """The published code's M_0 = 0: mean(V) - mean(M) stays mean(grad F(x_0)), the end is wrong."""

    class Released(MoTEF):
        def begin(self, node, gradient):
            node.v, node.m = gradient, 0 * gradient

    made = rounds(EXACT, Released(lr=0.1 / L, gamma=0.2, lam=0.2, compressor="topk(4)"))
    first = made.node.v.mean(axis=0)
    for _ in range(3000):
        made._advance()
        gap = made.node.v.mean(axis=0) - made.node.m.mean(axis=0)
        np.testing.assert_allclose(gap, first, atol=1e-12)
    away = np.linalg.norm(made.node.x.mean(axis=0) - EXACT.optimum)
    assert away == pytest.approx(np.linalg.norm(EXACT.optimum), abs=0.01)


def test_momentum_tracking_is_its_papers_recursion():
    """U <- beta U + G ; X <- X W - lr (U - c) ; c <- (c - U) W + U, from U = c = 0."""
    lr, beta = 0.005, 0.9
    w = rounds(NOISY, METHODS["momentum-tracking"]).network.whole(0).matrix.toarray()
    x = np.zeros((8, 20))
    u, c, found = 0 * x, 0 * x, []
    for k in range(STEPS + 1):
        u = beta * u + NOISY.gradient(x, np.arange(8), np.full(8, k))[1]
        x, c = w @ x - lr * (u - c), w @ (c - u) + u
        found.append(x)
    ours = asked(momentum_tracking(lr=lr, beta=beta))
    assert np.abs(ours - np.array(found[:STEPS])).max() < 1e-13


@pytest.mark.parametrize(("method", "limit"), [(dsgd, 2.0), (ctad, 2 / 3)])
def test_steps_up_to_which_dsgd_is_stable(method, limit):
    """lr L < 2 where adapting comes first, else lr L < 1 + lambda_n(W) = 2/3: L = 1, a ring."""
    start = np.random.default_rng(0).standard_normal((8, 20))
    for share, stays in ((0.95, True), (1.05, False)):
        made = rounds(Quadratic(np.zeros((8, 20))), method(lr=share * limit), initial=start)
        for _ in range(300):
            made._advance()
        assert (np.abs(made.node.x).max() < 1) == stays


def test_duals_of_cedas_sum_to_zero():
    made = rounds(NOISY, cedas(lr=0.03, compressor="qsgd(4)"))
    for _ in range(STEPS):
        made._advance()
        assert np.abs(made.node.d.sum(axis=0)).max() < 1e-12
    assert np.abs(made.node.d).max() > 0.01


REFERENCE = [  # method, topology, more, {round: distance}
    (dsgd(lr=0.1 / L), "ring", {}, {100: 4.3723e-1, 500: 2.6648e-1, 2000: 2.6648e-1}),
    (dsgt(lr=0.1 / L, order="combine-then-adapt"), "ring", {},
     {100: 3.1166e-1, 500: 4.6181e-5, 1000: 4.3647e-9, 2000: 0.0}),
    (choco(lr=0.1 / L, gamma=0.1, compressor="topk(4)"), "ring", {}, {100: 1.6699, 500: 1.4784}),
    (choco(lr=0.1 / L, gamma=0.2, compressor="topk(4)"), "ring", {}, {100: 1.1722, 500: 1.0216}),
    (choco(lr=0.1 / L, gamma=0.3, compressor="topk(4)"), "ring", {}, {100: 0.91975, 500: 0.78145}),
    (beer(lr=0.05 / L, gamma=0.1, compressor="topk(4)"), "ring", {},
     {100: 1.3700, 500: 2.7164e-2, 1000: 7.6386e-4, 2000: 7.0046e-7}),
    (motef(lr=0.05 / L, gamma=0.1, lam=0.2, compressor="topk(4)"), "ring", {},
     {100: 1.2717, 500: 2.7220e-2, 1000: 7.7584e-4, 2000: 7.9571e-7}),
    (beer(lr=0.1 / L, gamma=0.2, compressor="topk(4)"), "ring", {},
     {100: 3.7722e-1, 500: 6.9664e-4, 1000: 5.8463e-7, 2000: 0.0}),
    (motef(lr=0.1 / L, gamma=0.2, lam=0.2, compressor="topk(4)"), "ring", {},
     {100: 3.0090e-1, 500: 7.1579e-4, 1000: 7.5874e-7, 2000: 0.0}),
    (motef(lr=0.1 / L, gamma=0.3, lam=0.2, compressor="topk(4)"), "ring", {},
     {100: 2.3109e-1, 500: 1.4666e-5, 2000: 0.0}),
    (beer(lr=0.02 / L, gamma=0.05, compressor="topk(4)"), "ring", {},
     {100: 3.0643, 500: 3.4166e-1, 1000: 3.0418e-2, 2000: 6.6915e-4}),
    (deepsqueeze(lr=0.1 / L, gamma=0.1, compressor="topk(4)"), "ring", {},
     {100: 1.7755, 500: 1.5905, 1000: 1.5725, 2000: 1.5728}),
    (dsgt(lr=0.1 / L, order="combine-then-adapt"), "one-peer-exponential", {},
     {100: 3.1313e-1, 500: 4.7750e-5, 1000: 4.7514e-9, 2000: 0.0}),
    (beer(lr=0.1 / L, gamma=0.2, compressor="topk(4)"), "one-peer-exponential",
     {"replicas": "global"}, {100: 3.0161e-1, 500: 3.8774e-5, 2000: 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "topology", "more", "reference"),
    REFERENCE,
    ids=[f"{method.spec} {topology}" for method, topology, _, _ in REFERENCE],
)
def test_reference_convergence(method, topology, more, reference):
    """Exact gradients; distances from another program, to the digits it gives."""
    made = rounds(EXACT, method, topology, **more)
    for _ in range(max(reference)):
        made._advance()
        if made.round in reference:
            found = np.linalg.norm(mixed(made) - EXACT.optimum) / 8**0.5
            assert found == pytest.approx(reference[made.round], rel=6e-4, abs=3e-12)
