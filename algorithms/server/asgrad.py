"""AsGrad: A Sharp Unified Analysis of Asynchronous-SGD Algorithms.

Islamov, Safaryan, Alistarh, AISTATS 2024 (arXiv:2310.20452).  Every member is

    x_{t+1} = x_t - gamma g_{i_t}(x_{pi_t})

and differs only in who gets the job that replaces the one just applied.  A job carries the
model of the moment it is *assigned*; a busy worker queues it.  With ``wait`` = b, the b results
are applied one by one as they come, and only then are b jobs handed out, with one model.

The authors' released simulator computes a re-assigned job on the wrong worker's data and never
starts a job that was queued on a busy worker; this one does neither.  The paper's full text was
not at hand: which of the waiting and shuffle-once variants it runs asynchronously is UNVERIFIED.
"""

from offbeat.algorithms.server.contract import ALGORITHMS
from offbeat.algorithms.server.method import Finisher, Method, Permuted, Schedule, StepSize, Uniform
from offbeat.runtime.base.registry import Count, Positive


@ALGORITHMS.register("pure")
def pure(*, lr: Positive = 0.1, wait: Count = 1) -> Method:
    """Pure asynchronous SGD: whoever finishes gets the next job (AsGrad, k_{t+1} = i_t).

    Fast workers weigh more: it minimises sum_i p_i f_i with p_i proportional to speed.
    ``wait`` = n is mini-batch SGD.
    """
    return Method(Schedule(Finisher(), wait), [StepSize(lr)])


@ALGORITHMS.register("random")
def random(*, lr: Positive = 0.1, wait: Count = 1) -> Method:
    """Random asynchronous SGD: the next job goes to a uniformly random worker (AsGrad).

    Inside a batch of ``wait`` picks are made with replacement (UNVERIFIED against the paper).
    """
    return Method(Schedule(Uniform(), wait), [StepSize(lr)])


@ALGORITHMS.register("shuffled")
def shuffled(*, lr: Positive = 0.1, wait: Count = 1) -> Method:
    """Shuffled asynchronous SGD: jobs follow a permutation redrawn every n assignments (AsGrad)."""
    return Method(Schedule(Permuted(), wait), [StepSize(lr)])


@ALGORITHMS.register("shuffle-once")
def shuffle_once(*, lr: Positive = 0.1, wait: Count = 1) -> Method:
    """Shuffled asynchronous SGD whose permutation is drawn once (UNVERIFIED as in the paper)."""
    return Method(Schedule(Permuted(once=True), wait), [StepSize(lr)])


@ALGORITHMS.register("minibatch")
def minibatch(*, lr: Positive = 0.1, batch: Count | None = None) -> Method:
    """Synchronous mini-batch SGD: ``batch`` distinct workers (None: all) at one model.

    Each gradient is a step of lr, so a round moves by lr times their sum.
    """
    return Method(Schedule(Permuted(period=batch), batch, synchronous=True), [StepSize(lr)])


@ALGORITHMS.register("random-reshuffling")
def random_reshuffling(*, lr: Positive = 0.1, batch: Count = 1) -> Method:
    """SGD with random reshuffling over workers: one pass, one permutation; ``batch`` at a time."""
    return Method(Schedule(Permuted(), batch, synchronous=True), [StepSize(lr)])


@ALGORITHMS.register("shuffle-once-sgd")
def shuffle_once_sgd(*, lr: Positive = 0.1, batch: Count = 1) -> Method:
    """Synchronous shuffle-once SGD: the same permutation of workers in every pass."""
    return Method(Schedule(Permuted(once=True), batch, synchronous=True), [StepSize(lr)])


@ALGORITHMS.register("sgd")
def sgd(*, lr: Positive = 0.1) -> Method:
    """Sequential SGD: one uniformly random worker at a time, staleness zero."""
    return Method(Schedule(Uniform(), synchronous=True), [StepSize(lr)])
