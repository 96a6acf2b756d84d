"""Two machines, both of them here."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.cloudpickle import register_pickle_by_value
from ray.cluster_utils import Cluster

import offbeat
from offbeat.runtime.experiment.engines import ENGINES
from offbeat.runtime.on_ray.server import RayBackend
from offbeat.runtime.on_ray.start import start
from offbeat.workers.tasks import quadratic
from offbeat.workers.work import gradient

pytestmark = pytest.mark.xdist_group("ray")
N = 8
FAR = {"num_cpus": 1, "resources": {"far": 4}}
register_pickle_by_value(sys.modules[__name__])  # actors cannot import from here


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU, and another machine with one and something of its own."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.far = made.add_node(**FAR)
    session = start(made.address)
    yield made
    session.stop()
    made.shutdown()


def where(host):
    """The machine an actor is on, and the package it runs."""
    return ray.get_runtime_context().get_node_id(), sys.modules["offbeat"].__file__


def whereabouts(engine):
    task = quadratic(5, workers=N)
    parts = SimpleNamespace(task=task, work=gradient(), fleet=SimpleNamespace(workers=N))
    backend = RayBackend(parts, ENGINES.parse(engine))
    try:
        return ray.get([seat.actor.__ray_call__.remote(where) for seat in backend._seats])
    finally:
        backend.close()


def test_actors_go_where_they_are_sent_and_find_the_package_there(cluster):
    here, far = ray.get_runtime_context().get_node_id(), cluster.far.node_id
    spread = whereabouts("ray(4)")
    assert {node for node, _ in spread} == {here, far}
    assert all("py_modules" in file for _, file in spread)
    assert {node for node, _ in whereabouts("ray(4, placement=pack)")} == {here}
    assert {node for node, _ in whereabouts('ray(4, resources={"far": 2})')} == {far}
    packed = whereabouts("ray(4, num_cpus=1, placement=pack)")
    assert sorted(node for node, _ in packed) == sorted([here, far])
    with pytest.raises(offbeat.ConfigError, match=r"3 actors with 2 far each do not fit.* for 2"):
        whereabouts('ray(3, resources={"far": 2})')


def test_a_machine_is_lost(cluster, monkeypatch):
    lost, collect = [], RayBackend.collect

    def collected(self, timeout_s):
        events = collect(self, timeout_s)
        if events and not lost:
            lost.append(cluster.far.node_id)
            cluster.remove_node(cluster.far, allow_graceful=False)
        return events

    monkeypatch.setattr(RayBackend, "collect", collected)
    parts = quadratic(5, workers=N, noise=0.3), "pure(lr=0.05)", f"{N} lognormal(1.0)"
    result = offbeat.run(*parts, stop={"steps": 6000}, engine="ray(4)", clock="virtual")
    assert len(lost) == 1
    assert result.facts["restarts"] == N // 2
    whole = offbeat.run(*parts, stop={"steps": 6000})
    np.testing.assert_array_equal(result.x, whole.x)
    np.testing.assert_array_equal(result.trace, whole.trace)
    cluster.far = cluster.add_node(**FAR)  # for others
    cluster.wait_for_nodes()


def test_no_such_cluster(cluster):
    ray.shutdown()
    try:
        with pytest.raises(offbeat.ConfigError, match=r'cannot join a cluster at "127.0.0.1:9"'):
            offbeat.run("quadratic", "pure", "4 1.0", engine='ray(4, address="127.0.0.1:9")')
    finally:
        start(cluster.address)  # for others
