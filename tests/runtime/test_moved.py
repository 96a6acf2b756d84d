"""Imports of before work, and warn; what users extend with is public."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

import offbeat
from offbeat.runtime import moved


@pytest.fixture(autouse=True)
def forgotten():
    """Tests that look through all modules do not find the old ones."""
    yield
    for name in {moved.HERE + old for old in moved.MODULES} & sys.modules.keys():
        if isinstance(sys.modules[name].__loader__, moved.Moved):
            del sys.modules[name]


@pytest.mark.parametrize("old", moved.MODULES)
def test_every_old_module_leads_to_what_is_there(old):
    new = importlib.import_module(moved.HERE + moved.MODULES[old])
    former = importlib.import_module(moved.HERE + old)
    public = next(name for name in vars(new) if name[0].isalpha() and not hasattr(np, name))
    if not isinstance(vars(new)[public], type(moved)):
        with pytest.warns(DeprecationWarning, match=rf"{old}\.{public} is private, and moved"):
            assert getattr(former, public) is vars(new)[public]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = former.nothing


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((f"runtime.{new}", now) for new, names in moved.NAMES.items() for now in names.values()),
        ("workers.work", "MomentumSGD"),
        ("algorithms.compression.coding", "BitReader"),
    ],
)
def test_every_new_name_is_there(module, name):
    assert isinstance(getattr(importlib.import_module(f"offbeat.{module}"), name), object)


def test_old_names_give_the_new_things():
    with pytest.warns(DeprecationWarning, match=r"compute\.backend\.JobRequest; see offbeat.ext"):
        from offbeat.runtime.crew import Order
    with pytest.warns(DeprecationWarning, match="Momentum is called MomentumSGD now"):
        from offbeat.workers.work import Momentum
    assert (Order.__name__, Momentum.__name__) == ("JobRequest", "MomentumSGD")


@pytest.mark.parametrize("first", ["experiment.checks", "experiment.metrics", "experiment.files"])
def test_any_module_can_be_imported_first(first):
    assert subprocess.call([sys.executable, "-c", f"import offbeat.runtime.{first}"]) == 0


def test_errors_are_called_as_users_know_them():
    with pytest.raises(offbeat.ConfigError) as error:
        offbeat.run("quadratic", "shufled")
    assert f"{error.type.__module__}.{error.type.__name__}" == "offbeat.ConfigError"


def test_what_users_extend_with_is_public():
    import offbeat.extend as extend

    assert all(hasattr(extend, name) for name in extend.__all__)
