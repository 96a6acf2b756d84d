"""A Ray of a run's own: quiet, gone with the run however that ends, found out when it dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import checkpoints, start, wait_for

import offbeat
from offbeat.runtime.api import api
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.on_ray.start import load, own_folder

pytestmark = pytest.mark.xdist_group("ray")
PARTS = {
    "task": "quadratic(5, noise=0.3)",
    "algorithm": "shuffled(lr=0.05)",
    "work": "local-steps(momentum(lr=0.2), steps=2)",
    "fleet": "8 uniform(0.5)",
}


OWNS = """
import sys
from offbeat.runtime.on_ray.start import own_folder
folder, owner = own_folder(sys.argv[1])
print(folder, flush=True)
sys.stdin.readline()
"""


def test_folders_of_processes_that_were_killed_are_removed(tmp_path):
    def owns():
        process = subprocess.Popen(
            [sys.executable, "-c", OWNS, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        folder = Path(process.stdout.readline().strip())
        (folder / "session").mkdir()
        return process, folder

    strange, elsewhere = tmp_path / "offbeat-ray-strange", tmp_path / "elsewhere"
    strange.mkdir()  # nobody has said whose it is
    elsewhere.mkdir()
    (elsewhere / "owner").touch()
    (tmp_path / "offbeat-ray-link").symlink_to(elsewhere)
    killed, left = owns()
    with owns()[0] as lives:
        killed.kill()
        killed.communicate()
        others = set(tmp_path.iterdir())
        folder, owner = own_folder(str(tmp_path))
        owner.close()
        assert set(tmp_path.iterdir()) == others - {left} | {Path(folder)}
        assert lives.poll() is None
    assert (elsewhere / "owner").exists()


class Run:
    """``offbeat run`` on two actors in a process that can be told by a mark, like its children."""

    def __init__(self, folder, *words, steps=100_000):
        self.folder, self.mark = folder, uuid.uuid4().hex
        options = [
            word for key, text in PARTS.items() if key != "fleet" for word in (f"--{key}", text)
        ]
        self.words = [
            *("run", *options, "--workers", "8", "--speeds", "uniform(0.5)"),
            *("--engine", "ray(4)", "--steps", str(steps), "--set", "record.save_every_s=0.1"),
            *("--out", str(folder), *words),
        ]

    def __enter__(self):
        return self.start(*self.words)

    def start(self, *words):
        environment = os.environ | {"OFFBEAT_MARK": self.mark, "RAY_ADDRESS": "203.0.113.1:6379"}
        self.process = start(*words, env=environment)
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        assert self.left() == []

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("OFFBEAT_MARK") == self.mark:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def left(self, limit_s=90.0):
        """Processes that are still there a while after the run.

        After a kill -9 Ray's own agent, if it was just beginning, was seen to stay for over 40 s.
        """
        until = time.monotonic() + limit_s
        while (found := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def wait(self, count=3):
        wait_for(lambda: len(checkpoints(self.folder)) >= count, self.process)

    def end(self):
        out, err = self.process.communicate(timeout=90)
        return self.process.returncode, out, err


def test_ctrl_c_then_another_engine(tmp_path):
    with Run(tmp_path / "run", "--clock", "virtual") as run:
        run.wait()
        for process in run.processes():  # as a terminal does
            process.send_signal(signal.SIGINT)
        code, out, err = run.end()
        assert code == 130, err
        assert f"offbeat resume {tmp_path / 'run'}" in out
        assert "Traceback" not in err
        assert run.left(limit_s=5.0) == []
    reached = json.loads((tmp_path / "run" / "summary.json").read_text())["step"]
    steps = f"stop.steps={reached + 100}"
    result = offbeat.resume(tmp_path / "run", engine="virtual", overrides=[steps])
    whole = offbeat.run(**PARTS, stop={"steps": reached + 100})
    np.testing.assert_array_equal(result.x, whole.x)
    np.testing.assert_array_equal(result.trace, whole.trace)


def test_ctrl_c_again_and_again_leaves_nothing_behind(tmp_path):
    with Run(tmp_path / "run", "--clock", "real", "--pace", "0.01") as run:
        run.wait()
        (raylet,) = [process for process in run.processes() if process.name() == "raylet"]
        folder = Path(re.search("/tmp/offbeat-ray-[a-z0-9_]+", " ".join(raylet.cmdline()))[0])
        sent = 0
        while run.process.poll() is None:
            run.process.send_signal(signal.SIGINT)
            sent += 1
            time.sleep(0.1)
        assert sent > 2
        assert run.left(limit_s=5.0) == []
        assert not folder.exists()


def test_kill_9_then_resume_under_a_real_clock(tmp_path):
    """The resumed run ends by itself: in silence, and with nothing left of Ray."""
    folder, kills = tmp_path / "run", 0
    with Run(folder, "--clock", "real", "--pace", "0.01") as run:
        run.wait()
        run.process.kill()
        run.process.communicate()
        kills += run.process.returncode == -signal.SIGKILL
        assert run.left() == []
        reached = api.checkpointed(folder)["step"]
        run.start("resume", str(folder), "--set", f"stop.steps={reached + 100}")
        code, out, err = run.end()
        assert (code, err) == (0, "")
        warning, head, row, picture = out.strip().split("\n")
        assert "RAY_ADDRESS is not followed" in warning
        assert [line.split()[0] for line in (head, row, picture)] == ["method", "run", "picture:"]
        assert run.left(limit_s=5.0) == []
    assert kills == 1
    recorded = api.checkpointed(folder)
    assert recorded["step"] == reached + 100
    np.testing.assert_array_equal(offbeat.replay(folder).x, recorded["x"])


@pytest.mark.parametrize("name", ["raylet", pytest.param("gcs_server", marks=pytest.mark.soak)])
def test_ray_itself_dies(name, tmp_path):
    with Run(tmp_path / "run", "--clock", "real", "--pace", "0.01") as run:
        run.wait()
        killed = [process for process in run.processes() if process.name() == name]
        for process in killed:
            process.kill()
        code, _, err = run.end()
        assert len(killed) == 1
        assert code == 5
        assert err == (
            f"offbeat: Ray is gone: process {killed[0].pid} of it died\n"
            f"the last checkpoint is intact: offbeat resume {tmp_path / 'run'}\n"
        )


# -- Mistakes --------------------------------------------------------------------------------------


def test_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'Ray is not installed; pip install "ray'):
        load()


def test_an_old_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(__version__="2.9.3"))
    with pytest.raises(ConfigError, match=r"needs Ray 2\.40 or newer, not 2\.9\.3"):
        load()


def test_a_broken_ray(monkeypatch, tmp_path):
    (tmp_path / "ray.py").write_text("raise RuntimeError('libray.so: wrong ELF class')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ConfigError, match=r"cannot be imported .*wrong ELF class.*install it again"
    ):
        load()
