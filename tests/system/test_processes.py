"""Real processes: killed, interrupted, out of disk; each test proves that its fault happened."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import time

import numpy as np
import pytest
from processes import checkpoints, command, start, wait_for

import offbeat
from offbeat.runtime.api import api

RUN = {
    "task": "logistic(digits, batch=8, partition=sorted)",
    "algorithm": "shuffled(lr=0.3)",
    "fleet": "12 lognormal(1.0)",
    "stop": {"steps": 80_000},
    "evaluate": {"steps": 2000},
    "seed": 5,
}
FILE = """
task = "logistic(digits, batch=8, partition=sorted)"
algorithm = "shuffled(lr=0.3)"
fleet = "12 lognormal(1.0)"
seed = 5
[stop]
steps = 80000
[evaluate]
steps = 2000
[record]
save_every_s = 0.02
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return offbeat.run(**RUN, folder=folder)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.toml").write_text(FILE)
    return tmp_path / "run.toml"


def same(folder, undisturbed):
    np.testing.assert_array_equal(api.checkpointed(folder)["x"], undisturbed.x)
    for name in ("metrics.jsonl", "trace.jsonl"):
        assert (folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


def kill(process):
    """SIGKILL; answers whether it was that which ended the process."""
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def test_kill_9_at_any_moment_then_resume_ends_with_the_same_bits(file, tmp_path, undisturbed):
    folder, moments, kills = tmp_path / "run", random.Random(1), 0
    words = ("run", str(file), "--out", str(folder))
    for _ in range(6):
        newest = checkpoints(folder)[-1:]
        process = start(*words)
        wait_for(lambda: checkpoints(folder)[-1:] > newest, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.1))
        kills += kill(process)
        words = ("resume", str(folder))
    assert kills == 6
    done = subprocess.run(command("resume", str(folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(folder, undisturbed)


def test_kill_9_before_the_first_checkpoint(file, tmp_path, undisturbed):
    folder = tmp_path / "run"
    process = start("run", str(file), "--out", str(folder))
    wait_for(lambda: (folder / "experiment.toml").exists(), process)
    assert kill(process)
    for path in folder.glob("checkpoint/*"):  # killed while it wrote the first one
        path.rename(folder / "checkpoint" / "000000000000.safetensors.partial")
    (folder / "checkpoint").mkdir(exist_ok=True)
    done = subprocess.run(command("resume", str(folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(folder, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint(file, tmp_path, undisturbed, number):
    folder = tmp_path / "run"
    process = start("run", str(file), "--out", str(folder), "--set", "record.save_every_s=1000")
    wait_for(lambda: len(checkpoints(folder)) == 1, process)
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert f"offbeat resume {folder}" in out.replace("\n", "")
    assert "Traceback" not in err
    reached = json.loads((folder / "summary.json").read_text())
    assert reached["reason"] == "interrupted"
    assert 0 < reached["step"] < 80_000
    assert len(checkpoints(folder)) == 2
    done = subprocess.run(command("resume", str(folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(folder, undisturbed)


def test_a_full_disk_ends_the_run_with_one_sentence(file, tmp_path, undisturbed):
    """A limit on file size stands in for a full disk; the last good checkpoint survives it."""
    folder = tmp_path / "run"

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write answers EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = start("run", str(file), "--out", str(folder), preexec_fn=limited)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 6
    assert len(re.findall(r"failed\s+save\s+\d\s+of\s+10", out)) == 9  # and the tenth ended it
    assert "cannot be written (File too large)" in err
    assert "the last checkpoint is intact" in err
    assert "Traceback" not in err
    assert not list(folder.glob("checkpoint/*.partial"))
    done = subprocess.run(command("resume", str(folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(folder, undisturbed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(file, tmp_path):
    tmp_path.chmod(0o500)
    done = subprocess.run(
        command("run", str(file), "--out", str(tmp_path / "run")), capture_output=True, text=True
    )
    tmp_path.chmod(0o700)
    assert done.returncode == 6
    assert "cannot be written (Permission denied)" in done.stderr
