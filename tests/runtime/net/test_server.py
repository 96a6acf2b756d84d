"""What a server does beside moving bytes."""

import errno
import json
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest
from processes import checkpoints, start, wait_for
from sites import LIMIT_S, finish, free_port

import offbeat
from offbeat.runtime.base.errors import ComputeError, Fenced
from offbeat.runtime.base.logs import FIRST_S
from offbeat.runtime.on_zeromq.server import ZmqBackend
from offbeat.runtime.on_zeromq.worker import Worker
from offbeat.runtime.run.checkpoint import Attempts, write_whole
from offbeat.runtime.run.claim import Claim


def test_a_server_that_was_replaced_while_it_slept_saves_nothing(tmp_path, monkeypatch):
    """It wakes in the midst of a step, and a checkpoint is due before it has looked around."""
    folder = tmp_path / "run"
    steps = []

    def take_over(backend):
        """From where locks do not reach, after the run's first checkpoint."""
        steps.append(True)
        if len(steps) == 2:
            mine = json.loads((folder / "server.json").read_text())
            taken = json.dumps(mine | {"incarnation": mine["incarnation"] + 1})
            write_whole(folder / "server.json", taken.encode())
        saving(backend)

    saving = ZmqBackend.saving
    monkeypatch.setattr(ZmqBackend, "saving", take_over)
    with pytest.raises(Fenced, match="another server has taken this run over"):
        offbeat.run(
            "quadratic(5, noise=0.1)", "pure(lr=0.01)", "2 0.01", engine="zmq", folder=folder,
            stop={"steps": 100_000}, record={"save_every_s": 0.05},
        )  # fmt: skip
    assert len(steps) == 2
    assert len(list((folder / "checkpoint").iterdir())) == 1


def test_who_waits_says_soon_for_what(caplog):
    """Well before the first half minute is over."""
    with pytest.raises(ComputeError, match=r"no server at tcp://127\.0\.0\.1:9 for"):
        Worker("tcp://127.0.0.1:9", most_wait_s=FIRST_S + 0.5).run()
    assert "waiting for the server at tcp://127.0.0.1:9: nobody answers there" in caplog.text
    with pytest.raises(ComputeError, match="no worker has been here"):
        offbeat.run(
            "quadratic", "pure", "2 real", stop={"steps": 10},
            engine=f"zmq(processes=0, most_idle_s={FIRST_S + 0.5})",
        )  # fmt: skip
    assert "waiting for workers; let some join with: offbeat join tcp://127" in caplog.text


def test_too_many_open_files_are_no_lost_storage(tmp_path, monkeypatch):
    claim = Claim(tmp_path)
    read = type(tmp_path).read_bytes

    def short(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(type(tmp_path), "read_bytes", short)
    claim.check(surely=False)  # the next look tells
    saves = Attempts(2, 1.0)
    for _ in range(5):
        with saves.bear():
            claim.check()  # nothing is saved before it is known whose the folder is
    assert saves.failed == 0
    monkeypatch.setattr(type(tmp_path), "read_bytes", read)
    mine = json.loads((tmp_path / "server.json").read_text())
    write_whole(tmp_path / "server.json", json.dumps(mine | {"incarnation": 7}).encode())
    with pytest.raises(Fenced):
        claim.check(surely=False)
    claim.close()


FEW = """
import resource, sys
import offbeat
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 160))
result = offbeat.run(
    "quadratic(5)", "pure(lr=0.1)", "1 0.005", folder=sys.argv[1], stop={"steps": 200},
    engine={"name": "zmq", "bind": sys.argv[2], "processes": 0}, record={"save_every_s": 0.2},
)
print(result.reason, len(result.notes), flush=True)
"""


def test_strangers_that_say_nothing_do_not_end_a_server_with_few_descriptors(tmp_path):
    """Before and after an honest worker joins."""
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", FEW, str(tmp_path / "run"), endpoint],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.callback(finish, server)

        def knock(count):
            made = []

            def knocked():
                with suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", port), LIMIT_S)
                    made.append(stack.enter_context(one))
                return len(made) == count

            wait_for(knocked, server)

        wait_for(lambda: (tmp_path / "run" / "server.json").exists(), server)
        knock(250)
        worker = start("join", endpoint)
        stack.callback(finish, worker)
        wait_for(lambda: checkpoints(tmp_path / "run"), server)
        knock(250)
        out, err = server.communicate(timeout=LIMIT_S)
    assert out == "steps 0\n", err
