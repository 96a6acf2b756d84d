"""How a run of training loops begins, where its first one is not what was hoped for."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from offbeat.runtime.base import shapes
from offbeat.runtime.compute.backend import Back, Gone, JobResult
from offbeat.runtime.on_zeromq.server import FIRST, ZmqBackend
from offbeat.runtime.run import checkpoint
from offbeat.workers.tasks.external import External

TEXT = '[["w",[2]]]'


def meeting(events, shapes_told=TEXT):
    """A server that hears ``events``, a list a time; and whom it asks."""
    backend = object.__new__(ZmqBackend)
    backend._hub = SimpleNamespace(shapes=shapes_told, events=[], dim=None)
    backend.asked, left = [], deque(events)
    backend.submit = lambda order: backend.asked.append((order.serial, order.worker, order.steps))
    backend.collect = lambda timeout_s: left.popleft()
    return backend


def begun(backend, folder=None):
    task = External((), 2, "float64", 2)
    backend._meet(SimpleNamespace(task=task, seed=0), folder)
    return task.start


def model(x):
    return JobResult(FIRST, None, -np.array(x, float), {}, 0.0)


def test_one_loop_is_asked_and_another_where_it_goes():
    backend = meeting([[Back(0)], [Back(1)], [Gone(0, "")], [model([1, 2])]])
    np.testing.assert_array_equal(begun(backend), [1, 2])
    assert backend.asked == [(FIRST, 0, 0), (FIRST, 1, 0)]
    assert backend._hub.dim == 2


def test_a_model_that_is_not_finite_is_not_begun_with(caplog):
    backend = meeting([[Back(0)], [model([1, np.nan])], [Gone(0, ""), Back(1)], [model([3, 4])]])
    np.testing.assert_array_equal(begun(backend), [3, 4])
    assert "the model of worker 0 is not finite" in caplog.text


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_stopped_before_it_saved_asks_again(tmp_path, saved):
    (tmp_path / shapes.FILE).write_text(TEXT)
    if saved:
        (tmp_path / "checkpoint").mkdir()
        checkpoint.write(tmp_path / "checkpoint", 1, {"x": np.ones(2)})
    backend = meeting([[Back(0)], [model([1, 2])]])
    start = begun(backend, tmp_path)
    assert (start is None) == saved
    assert len(backend.asked) == (not saved)
