"""HeLoCo: Efficient asynchronous low-communication training under data and device heterogeneity.

Al Asif, Diem, Munoz, Wolf, Jannesari, Mazaheri, 2026 (arXiv:2606.00271).  Asynchronous DiLoCo:
workers start where momentum would be next, and their updates g are turned, tensor by tensor,
towards the outer momentum m before the outer step.  With u = g/|g|, v = m/|m|, c = u.v and the
confidence w = |g| / (|g| + KAPPA |m|), g becomes

    g                                                      c >= KEEP
    g - b c |g| v,  b = min(-SHRINK c w, MOST)             c < 0: less of what points backwards
    |g| y/|y|,  y = (1 - l) u + l v,  l = TURN (1 - c) w   between: turned, of the same length

Formulas and constants after public summaries and a re-implementation of the paper's algorithm 1 and
table 3, whose text was not at hand; outer step and look-ahead are those of ``look-ahead``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offbeat.algorithms.server.contract import ALGORITHMS, Server, Update
from offbeat.algorithms.server.local_sgd import Grace, LookAhead, windows
from offbeat.algorithms.server.method import Method, Rule, StepSize
from offbeat.algorithms.server.outer import Momentum
from offbeat.runtime.base.registry import Fraction, Positive

KEEP = 0.2
SHRINK = 0.5
MOST = 0.5
TURN = 1.0
KAPPA = 3.0


@dataclass
class Align(Rule):
    """See the module."""

    outer: Momentum

    def __call__(self, server: Server, update: Update, g: NDArray) -> NDArray:
        m = self.outer.m
        if m is None:
            return g
        return np.concatenate([aligned(g[part], m[part]) for part in server.tensors])


def aligned(g: NDArray, m: NDArray) -> NDArray:
    """``g [k]``, one tensor of an update, turned towards ``m [k]``."""
    long, ahead = float(np.linalg.norm(g)), float(np.linalg.norm(m))
    if not long or not ahead:
        return g
    c = float(np.dot(g, m)) / (long * ahead)
    if c >= KEEP:
        return g
    sure = long / (long + KAPPA * ahead)
    if c < 0:
        return g - min(-SHRINK * c * sure, MOST) * (c * long / ahead) * m
    turn = TURN * (1 - c) * sure
    mixed = (1 - turn) / long * g + turn / ahead * m
    return long / float(np.linalg.norm(mixed)) * mixed


@ALGORITHMS.register("heloco")
def heloco(
    *,
    lr: Positive = 0.1,
    momentum: Fraction = 0.9,
    grace_s: Grace = 0.0,
    charged: bool = True,
    dylu: bool = False,
    seconds: list[Positive] | None = None,
    sample_shards: bool = False,
) -> Method:
    """HeLoCo: look-ahead, and updates turned towards the outer momentum, tensor by tensor.

    The other arguments are those of ``async-local-sgd``.
    """
    outer = Momentum(momentum)
    plan = windows(grace_s, charged, dylu, seconds, sample_shards)
    plan.ahead = LookAhead(lr, outer)
    return Method(plan, [Align(outer), outer, StepSize(lr)])
