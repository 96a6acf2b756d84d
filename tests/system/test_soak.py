"""Long tests, run by hand with `make soak`."""

import random

import numpy as np
import pytest
from servers import METHODS

import offbeat
from offbeat.algorithms.server import ALGORITHMS
from offbeat.workers.tasks import quadratic

pytestmark = pytest.mark.soak
LAWS = [
    "lognormal(1.0)",
    "1..7",
    "poisson(2.0)",
    "markov(5.0, fast_s=9.0, slow_s=4.0)",
    "gamma(0.4)",
]


def fleet(g, n):
    """A random fleet, with links and outages of every kind."""
    outages, at = [], 0.0
    for _ in range(g.randrange(4)):
        begin = at + g.uniform(0.5, 20)
        at = begin + g.uniform(0.5, 20)
        outages.append(offbeat.Outage(worker=g.randrange(n), from_s=begin, to_s=at))
    return offbeat.Fleet(
        workers=n,
        speeds=g.choice(LAWS),
        latency_s=g.choice([0.0, 0.3]),
        jitter_s=g.choice([0.0, 0.0, 1.0]),
        outages=outages,
        on_outage=g.choice(["pause", "lose", "reassign"]),
    )


@pytest.mark.parametrize("seed", range(300))
def test_cut_anywhere_replay_anything(seed, tmp_path):
    """Random method, fleet and cuts: resumed and replayed runs end with the same bits."""
    g = random.Random(seed)
    n = g.randrange(2, 9)
    task = quadratic(6, workers=n, noise=0.3, seed=seed)
    method = ALGORITHMS[g.choice(list(METHODS))](lr=0.01)
    options = {"fleet": fleet(g, n), "seed": seed, "evaluate": {"seconds": g.uniform(0.3, 9)}}
    ends = sorted({g.randrange(1, 400) for _ in range(4)})
    whole = offbeat.run(
        task, method, stop={"gradients": ends[-1]}, folder=tmp_path / "whole", **options
    )
    offbeat.run(task, method, stop={"gradients": ends[0]}, folder=tmp_path / "cut", **options)
    for end in ends[1:]:
        offbeat.resume(
            tmp_path / "cut", task=task, algorithm=method, overrides=[f"stop.gradients={end}"]
        )
    cut = offbeat.resume(tmp_path / "cut", task=task, algorithm=method)
    np.testing.assert_array_equal(whole.x, cut.x)
    assert whole.final == cut.final
    for file in ("metrics.jsonl", "trace.jsonl"):
        whole_bytes = (tmp_path / "whole" / file).read_bytes()
        assert whole_bytes == (tmp_path / "cut" / file).read_bytes()
    replayed = offbeat.replay(tmp_path / "cut", task=task, algorithm=method)
    np.testing.assert_array_equal(whole.x, replayed.x)
    assert whole.final["gradients"] <= ends[-1]
