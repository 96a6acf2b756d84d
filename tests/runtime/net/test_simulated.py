"""The protocol under a simulated network; see ``simnet``."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from simnet import simulate


def seeds(first, last):
    happened = Counter()
    for seed in range(first, last):
        happened.update(simulate(seed).happened)
    return happened


def test_a_few_hundred_seeds():
    happened = seeds(0, 200)
    assert min(happened.values()) > 20, happened  # every kind of fault happened


@pytest.mark.parametrize("seed", [2674, 6682])
def test_seeds_of_which_a_worker_once_called_for_ever(seed):
    assert simulate(seed).run.step > 0


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_ten_thousand_seeds(block):
    happened = seeds(1000 + 500 * block, 1500 + 500 * block)
    assert min(happened.values()) > 20, happened
