"""Devices of workers that are elsewhere.

"cpu:0" has torch do what it would on a GPU.  AdamW shows that it was so: torch's square roots are
not numpy's to the last bit.
"""

import socket

import numpy as np
import pytest
from peering import Ring
from processes import start

import offbeat
from offbeat.runtime.base.errors import ConfigError

TASK = {"name": "lm", "length": 16, "batch": 2, "evaluated": 4}
RUN = {
    "task": TASK,
    "algorithm": "delayed-nesterov",
    "work": "local-steps(adamw, steps=2)",
    "fleet": "2 1..2",
    "stop": {"gradients": 12},
}
LIMIT_S = 180.0  # of a process
FILE = """
task = {task}
algorithm = "delayed-nesterov"
work = "local-steps(adamw, steps=2)"
fleet = "2 1..2"
clock = "virtual"
engine = {{ name = "zmq", processes = 0, bind = "{address}" }}
[stop]
gradients = 12
"""


def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def on_the_device(x):
    """Whether the run that ended in ``x`` was computed there."""
    there = offbeat.run(**(RUN | {"task": {**TASK, "device": "cpu:0"}})).x
    assert not np.array_equal(there, offbeat.run(**RUN).x)
    return np.array_equal(x, there)


def test_workers_that_join_with_a_device(tmp_path):
    address = free()
    text = '{ name = "lm", length = 16, batch = 2, evaluated = 4 }'
    (tmp_path / "a.toml").write_text(FILE.format(task=text, address=address))
    server = start("serve", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run"))
    workers = [start("join", address, "--device", "cpu:0") for _ in range(2)]
    try:
        for process in (server, *workers):
            _, said = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, said
    finally:
        for process in (server, *workers):
            process.kill()
            process.communicate()
    assert on_the_device(offbeat.resume(tmp_path / "run").x)


def test_a_device_that_no_worker_can_have(tmp_path):
    address = free()
    (tmp_path / "a.toml").write_text(FILE.format(task='"quadratic(5)"', address=address))
    server = start("serve", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run"))
    processes = [server]
    try:
        for device, why in (
            ("cpu:0", "quadratic is computed by numpy, on the CPU"),
            ("gpu", '"gpu" is no device; give cpu, cuda or cuda:0'),
        ):
            worker = start("join", address, "--device", device)
            processes.append(worker)
            _, said = worker.communicate(timeout=LIMIT_S)
            assert worker.returncode == ConfigError.exit_code
            assert why in said
            assert "Traceback" not in said
        assert server.poll() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_peers_with_a_device(tmp_path):
    of = {
        "task": {**TASK, "workers": 3},
        "algorithm": "dsgt(lr=0.05)",
        "topology": "ring",
        "fleet": "3 1.0",
        "stop": {"steps": 4},
    }
    with Ring(
        {**of, "engine": "zmq"}, tmp_path / "lm", 3, device="cpu:0", suspect_after_s=20.0
    ) as ring:
        assert ring.start().join() == [0] * 3
        x = np.mean([ring.state(i)["x"] for i in range(3)], axis=0)
    np.testing.assert_allclose(x, offbeat.run(**of).x, rtol=0, atol=1e-6)
    of["task"] = "quadratic(5)"
    with Ring({**of, "engine": "zmq"}, tmp_path / "q", 3, device="cpu:0") as ring:
        (tmp_path / "q" / "n0").mkdir(parents=True)
        ring.start(0)
        ring.processes[0].join(60)
    said = (tmp_path / "q" / "n0" / "error.txt").read_text()
    assert said.startswith("quadratic is computed by numpy")


def test_actors_with_a_device():
    pytest.importorskip("ray")
    engine = {"name": "ray", "workers_per_actor": 2, "device": "cpu:0"}
    assert on_the_device(offbeat.run(**RUN, engine=engine, clock="virtual").x)
    of = {"algorithm": "dsgt(lr=0.05)", "topology": "ring", "fleet": "3 1.0", "stop": {"steps": 4}}
    task = {**TASK, "workers": 3}
    found = offbeat.run(task, **of, engine={**engine, "workers_per_actor": 3}, clock="real")
    np.testing.assert_allclose(found.x, offbeat.run(task, **of).x, rtol=0, atol=1e-6)
