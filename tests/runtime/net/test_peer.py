"""Peers in threads of one process, where a test can hold up what they do."""

import json
import socket
import threading
import time

import pytest
import zmq
from loops import together
from peering import LIMIT_S, Ring, made, table

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.network import asking, shown
from offbeat.runtime.on_zeromq.alike import PeerAddress
from offbeat.runtime.on_zeromq.peer import PeerProcess
from offbeat.runtime.on_zeromq.policies import Keeping
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol.messages import DONE
from offbeat.runtime.protocol.wire import pack, parcels

STEPS = 8


class Late(Keeping):
    """Evaluations take until all rounds are done, and the last until nobody needs this peer."""

    def _evaluate(self, k, time_s, x):
        until_s = time.monotonic() + LIMIT_S
        while self.peer.mesh.standing < DONE or (
            k == STEPS and not self.peer.mesh.finished(time.monotonic())
        ):
            assert time.monotonic() < until_s, "it did not happen in time"
            time.sleep(0.01)
        return super()._evaluate(k, time_s, x)


def test_a_peer_stays_until_its_last_model_was_evaluated(tmp_path):
    of = {**table(STEPS, "dsgd(lr=0.1)", evaluate={"steps": 1}), "fleet": "2 0.2"}
    seats = [PeerAddress(*seat) for seat in Ring(of, tmp_path, n=2).seats]
    peers = [
        PeerProcess(made(of), seats, i, tmp_path / seats[i].name, suspect_after_s=3.0, policy=Late)
        for i in range(2)
    ]
    try:
        assert together(*[peer._work for peer in peers]) == ["steps"] * 2
    finally:
        for peer in peers:
            peer.close()
    for seat in seats:
        rows = (tmp_path / seat.name / "metrics.jsonl").read_text().splitlines()
        seen = [json.loads(row)["step"] for row in rows]
        assert len(seen) == 2  # an early one; those between were too many for this machine
        assert seen[0] < seen[1] == STEPS
        assert json.loads((tmp_path / seat.name / "summary.json").read_text())["step"] == STEPS


def test_a_peer_goes_on_with_its_own_run_alone(tmp_path):
    of = {**table(STEPS, "dsgd(lr=0.1)"), "fleet": "2 0.2"}
    seats = [PeerAddress(*seat) for seat in Ring(of, tmp_path, n=2).seats]
    peers = [PeerProcess(made(of), seats, i, tmp_path / seats[i].name) for i in range(2)]
    try:
        assert together(*[peer._work for peer in peers]) == ["steps"] * 2
    finally:
        for peer in peers:
            peer.close()
    folder = tmp_path / seats[0].name
    with pytest.raises(ConfigError, match=r"algorithm.lr is 0.2, and was 0.1; .*another folder"):
        PeerProcess(made({**of, "algorithm": "dsgd(lr=0.2)"}), seats, 0, folder)
    before = (folder / "trace.jsonl").read_bytes()
    (folder / "checkpoint").rename(tmp_path / "gone")
    peer = PeerProcess(made(of), seats, 0, folder)  # another life of it
    peer.close()
    assert (folder / "trace-1.jsonl").read_bytes() == before


ASKED = 10_000  # answers that no buffers between two processes hold


@pytest.fixture
def waiting(tmp_path):
    """A peer whose neighbour does not come; it ends with the test."""
    of = {**table(STEPS, "dsgd(lr=0.1)"), "fleet": "2 0.2"}
    seats = [PeerAddress(*seat) for seat in Ring(of, tmp_path, n=2).seats]
    peer = PeerProcess(made(of), seats, 0, tmp_path / seats[0].name)
    thread = threading.Thread(target=peer._work)
    thread.start()
    yield peer
    peer.leaving = True
    thread.join(LIMIT_S)
    peer.close()
    assert not thread.is_alive()


def test_who_asks_and_does_not_read_is_in_nobodys_way(waiting):
    ask = pack(parcels("ask", say.Ask())[0], run="", node="deaf", incarnation=0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.linger, deaf.rcvhwm = 0, 1
        deaf.connect(waiting.sockets.endpoint)
        for _ in range(ASKED):
            deaf.send_multipart(ask)
        until_s = time.monotonic() + LIMIT_S
        while waiting.sockets.bytes_in < ASKED * len(ask[0]):
            assert time.monotonic() < until_s, "it does not hear all that is asked"
            time.sleep(0.01)
        with asking(waiting.sockets.endpoint, None, "test") as status:
            assert status()["state"] == "gathering"
        assert not waiting.parts


def test_a_status_is_json_before_there_is_a_loss(waiting):
    told = json.dumps(waiting.status())
    row = json.loads(told, parse_constant=pytest.fail)
    assert row["loss"] is None
    assert str(shown(row).title) == "n0: gathering, round 0, 0 MB sent, incarnation 1"


def test_who_says_what_cannot_be_read_is_cut_and_others_are_heard(waiting):
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(waiting.sockets.endpoint)
        stranger.send(b"no header")
        with asking(waiting.sockets.endpoint, None, "test") as status:
            until_s = time.monotonic() + LIMIT_S
            while not (counts := status()["counts"]).get("cut"):
                assert time.monotonic() < until_s, "it did not happen in time"
                time.sleep(0.01)
    assert (counts["cut"], counts["bad_header"]) == (1, 1)


def test_where_there_are_no_keys_none_is_asked_about(tmp_path, caplog):
    of = {**table(STEPS, "dsgd(lr=0.1)"), "fleet": "2 0.2"}
    seats = [PeerAddress(*seat) for seat in Ring(of, tmp_path, n=2).seats]
    port = int(seats[1].endpoint.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)) as other:
        other.settimeout(LIMIT_S)
        peer = PeerProcess(made(of), seats, 0, tmp_path / seats[0].name)
        thread = threading.Thread(target=peer._work)
        thread.start()
        try:
            until_s = time.monotonic() + LIMIT_S
            while "the handshake with" not in caplog.text:
                assert time.monotonic() < until_s, "it did not happen in time"
                other.accept()[0].close()
        finally:
            peer.leaving = True
            thread.join(LIMIT_S)
            peer.close()
    name = seats[1].name
    assert f"handshake with {name} fails; does it run with keys? Here are none" in caplog.text
    assert "is its key right" not in caplog.text
