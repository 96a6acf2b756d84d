"""Cells as Ray tasks: the same lines as from processes, and the same patience with bad ones."""

import cells
import pytest
from cells import work
from ray.cloudpickle import register_pickle_by_value

from offbeat.runtime.studies import pool, study
from offbeat.runtime.studies.study import Study

pytestmark = pytest.mark.xdist_group("ray")  # one Ray at a time
register_pickle_by_value(cells)  # tasks cannot import from here

SMALL = {
    "seeds": 3,
    "experiment": {"task": "quadratic(3)", "stop": {"steps": 60}},
    "grid": {"algorithm": ["pure", "shuffled"]},
}


def test_tasks_give_what_processes_give(tmp_path):
    made = Study(SMALL)
    runs = {
        engine: study.run(made, tmp_path / engine, engine=engine) for engine in ("processes", "ray")
    }
    finals = [[line["final"] for _, line in cells] for cells in runs.values()]
    assert finals[0] == finals[1]
    assert len(finals[0]) == 6


def test_a_task_that_dies_or_raises_costs_its_cell_only():
    items = [("fine", 0), ("raise", 1), ("die", 2), ("fine", 3)]
    found = dict(pool.ray_tasks(work, items, 2))
    assert (found[0], found[3]) == ((0, None), (9, None))
    assert found[1] == (None, "ValueError: cannot do 1")
    assert found[2][0] is None
    assert "WorkerCrashedError" in found[2][1]
