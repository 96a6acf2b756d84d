"""Which compressors gossip methods can bear: those that make differences smaller."""

import numpy as np
import pytest
from canonical import rounds

import offbeat
from offbeat.algorithms.compression.contract import error_of, made
from offbeat.algorithms.gossip import beer, cedas, choco, deepsqueeze, motef
from offbeat.runtime.base.errors import ConfigError
from offbeat.workers.tasks import Quadratic

METHODS = (choco, deepsqueeze, beer, motef)
D = 100
TASK = Quadratic(np.random.default_rng(0).standard_normal((8, D)))


def largest(method, compressor):
    """Entry of a model after 150 rounds of a run that nobody refuses."""
    run = rounds(TASK, method(lr=0.02, gamma=0.05, compressor=compressor))
    for _ in range(150):
        run._advance()
    return np.abs(run.node.x).max()


@pytest.mark.parametrize(
    ("method", "compressor", "contracts"),
    [(method, "qsgd(7)", True) for method in METHODS]
    + [(method, "qsgd(3)", False) for method in METHODS]
    + [(motef, "natural-dithering(4)", True), (motef, "natural-dithering(2)", False),
       (motef, "randk(0.3, unbiased=true)", False)],
)  # fmt: skip
def test_the_error_of_a_gaussian_tells_who_diverges(method, compressor, contracts):
    one = made(compressor)
    assert one.alpha(D) is None
    assert one.omega(D) >= 1  # the bound alone would refuse them all
    assert (error_of(one, D) < 1) == contracts
    assert (largest(method, compressor) < 10) == contracts
    if contracts:
        method(compressor=compressor).suits(D)
    else:
        with pytest.raises(ConfigError, match=r"would diverge .* take contractive\("):
            method(compressor=compressor).suits(D)
        assert largest(method, f"contractive({compressor})") < 10


@pytest.mark.parametrize("d", [1, 10, 3 * 2**20])
def test_what_contracts_for_sure_is_not_measured(d, monkeypatch):
    measured = []
    monkeypatch.setattr("offbeat.algorithms.gossip.contract.error_of", measured.append)
    for one in ("identity", "topk(0.1)", "scaled-sign", "bf16", "natural", "contractive(qsgd)"):
        choco(compressor=one).suits(d)
    cedas(compressor="qsgd(1)").suits(d)
    assert measured == []


def test_an_error_that_has_a_size_of_its_own():
    """A threshold leaves out no more than there is; signs put in what is not there."""
    choco(compressor="threshold(0.1)").suits(D)
    with pytest.raises(ConfigError, match=r"diverge with sign at .* take scaled-sign or"):
        choco(compressor="sign").suits(D)


def test_a_run_says_so_at_its_start():
    run = {"task": f"quadratic({D})", "topology": "ring:8", "stop": {"steps": 5}}
    with pytest.raises(ConfigError, match=r"motef would diverge with qsgd.* at d = 100") as told:
        offbeat.run(algorithm="motef(compressor=qsgd(3))", **run)
    instead = str(told.value).rpartition("take ")[2]
    assert offbeat.run(algorithm=f"motef(compressor={instead})", **run).reason == "steps"
