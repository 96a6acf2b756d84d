"""Whatever plan and rules are put together: what ``check`` accepts runs, and is replayed."""

import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

import offbeat
from offbeat.algorithms.compression import COMPRESSORS
from offbeat.algorithms.server.delay_adaptive import DelayAdaptive
from offbeat.algorithms.server.heloco import Align
from offbeat.algorithms.server.local_sgd import LocalUpdates, ShardSampling, Windows
from offbeat.algorithms.server.method import (
    Buffer,
    Clip,
    DiscardStale,
    Finisher,
    Method,
    Permuted,
    Round,
    Schedule,
    StalenessWeight,
    StepSize,
    Uniform,
)
from offbeat.algorithms.server.muloco import ErrorFeedback
from offbeat.algorithms.server.outer import Adam, Compensate, DelayedNesterov, Momentum
from offbeat.algorithms.server.rescaled import Rescale
from offbeat.workers.tasks import quadratic

N = 4
BARRIER = math.inf
ORDERS = st.one_of(
    st.builds(Finisher), st.builds(Uniform), st.builds(Permuted, st.just(3), st.booleans())
)
PLANS = st.one_of(
    st.builds(Schedule, ORDERS, st.sampled_from([1, 2, N, None]), st.booleans()),
    st.builds(
        Windows,
        st.sampled_from([0.0, 1.5, BARRIER]),
        st.booleans(),
        st.none() | st.builds(LocalUpdates),
        st.none() | st.builds(ShardSampling),
    ),
)
RULES = st.lists(
    st.one_of(
        *(st.builds(rule) for rule in (Round, Rescale, StalenessWeight, DelayedNesterov)),
        *(st.builds(rule) for rule in (DelayAdaptive, Momentum, Adam)),
        st.builds(Buffer, st.integers(2, 3)),
        st.builds(DiscardStale, st.integers(1, 5)),
        st.builds(StalenessWeight, slope=st.just(0.5), grace=st.just(1)),
        st.builds(Clip, st.just(1.0)),
        st.builds(Compensate, st.just(0.1)),
        st.builds(lambda: Align(Momentum())),
        st.builds(lambda: ErrorFeedback(COMPRESSORS.parse("topk(2)"))),
    ),
    max_size=3,
)
OUTAGES = st.lists(
    st.builds(
        lambda worker, from_s, long_s: offbeat.Outage(
            worker=worker, from_s=from_s, to_s=from_s + long_s
        ),
        st.integers(0, N - 1), st.floats(0, 15), st.floats(0.1, 10),
    ),
    max_size=2, unique_by=lambda outage: outage.worker,
)  # fmt: skip
FLEETS = st.builds(
    offbeat.Fleet,
    workers=st.just(N),
    speeds=st.sampled_from(["1.0", "1..4", "exponential"]),
    latency_s=st.sampled_from([0.0, 0.3]),
    outages=OUTAGES,
    on_outage=st.sampled_from(["pause", "lose", "reassign"]),
)
LOST = offbeat.Fleet(
    workers=N, on_outage="lose", outages=[offbeat.Outage(worker=3, from_s=2.5, to_s=7.5)]
)


@settings(max_examples=60)
@given(PLANS, RULES, FLEETS, st.sampled_from(["gradient", "local-steps(sgd(0.1), steps=2)"]))
@example(Windows(BARRIER), [Round(), StalenessWeight()], LOST, "gradient")
@example(Windows(BARRIER), [Round(), Compensate(0.1)], LOST, "gradient")
def test_no_composition_raises(plan, rules, fleet, work):
    method, task = Method(plan, [*rules, StepSize(0.05)]), quadratic(5, workers=N)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        result = offbeat.run(
            task, method, fleet, work=work, stop={"seconds": 20.0, "steps": 60}, folder=run
        )
        again = offbeat.replay(run, task=task, algorithm=method)
    np.testing.assert_array_equal(again.x, result.x)
    assert np.isfinite(result.x).all()


def test_a_round_whose_last_job_is_lost_weighs_its_last_update():
    """Three of four came, at tau = 0: the weight is 1, and the step their mean's."""
    task = quadratic(5, workers=N)
    ends = [
        offbeat.run(
            task, Method(Windows(BARRIER), [Round(), *rules, StepSize(0.05)]), LOST,
            stop={"seconds": 6.0},
        )
        for rules in ([], [StalenessWeight()])
    ]  # fmt: skip
    assert ends[0].facts["lost"] == 1
    np.testing.assert_array_equal(*(end.x for end in ends))
