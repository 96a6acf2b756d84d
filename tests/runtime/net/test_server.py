"""What a server does beside moving bytes."""

import json

import pytest

import offbeat
from offbeat.runtime.checkpoint import write_whole
from offbeat.runtime.errors import CrewError, Fenced
from offbeat.runtime.logs import FIRST_S
from offbeat.runtime.net.server import ZmqCrew
from offbeat.runtime.net.worker import Worker


def test_a_server_that_was_replaced_while_it_slept_saves_nothing(tmp_path, monkeypatch):
    """It wakes in the midst of a step, and a checkpoint is due before it has looked around."""
    folder = tmp_path / "run"
    steps = []

    def take_over(crew):
        """From where locks do not reach, after the run's first checkpoint."""
        steps.append(True)
        if len(steps) == 2:
            mine = json.loads((folder / "server.json").read_text())
            taken = json.dumps(mine | {"incarnation": mine["incarnation"] + 1})
            write_whole(folder / "server.json", taken.encode())
        saving(crew)

    saving = ZmqCrew.saving
    monkeypatch.setattr(ZmqCrew, "saving", take_over)
    with pytest.raises(Fenced, match="another server has taken this run over"):
        offbeat.run(
            "quadratic(5, noise=0.1)", "pure(lr=0.01)", "2 0.01", engine="zmq", folder=folder,
            stop={"steps": 100_000}, record={"save_every_s": 0.05},
        )  # fmt: skip
    assert len(steps) == 2
    assert len(list((folder / "checkpoint").iterdir())) == 1


def test_who_waits_says_soon_for_what(caplog):
    """Well before the first half minute is over."""
    with pytest.raises(CrewError, match=r"no server at tcp://127\.0\.0\.1:9 for"):
        Worker("tcp://127.0.0.1:9", most_wait_s=FIRST_S + 0.5).run()
    assert "waiting for the server at tcp://127.0.0.1:9: nobody answers there" in caplog.text
    with pytest.raises(CrewError, match="no worker has been here"):
        offbeat.run(
            "quadratic", "pure", "2 real", stop={"steps": 10},
            engine=f"zmq(processes=0, most_idle_s={FIRST_S + 0.5})",
        )  # fmt: skip
    assert "waiting for workers; let some join with: offbeat join tcp://127" in caplog.text
