"""Peers without sockets: what they compute, whatever the network does, and whom they believe."""

from collections import Counter

import numpy as np
import pytest
from canonical import METHODS, canonical, rounds
from meshes import LIVENESS, Net
from simulated import put_in

from offbeat.runtime.base.errors import ConfigError, Fenced
from offbeat.runtime.gossip.hosted import Envelope
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol.channel import MOST_QUEUED
from offbeat.runtime.protocol.messages import DONE, LEFT, RUNNING, Beat, Said
from offbeat.runtime.protocol.peer import LATE_S
from offbeat.runtime.protocol.roster import MOST_OFFENCES
from offbeat.runtime.protocol.wire import pack, parcels
from offbeat.workers.fleet import Fleet

NOISY = canonical(noise=0.1)
SEEDS = 16


@pytest.mark.parametrize(
    ("name", "graph"),
    [("dsgd", "ring"), ("motef", "ring"), ("motef", "matching"), ("gradient-push", "exponential")],
)
def test_without_faults_it_is_the_stacked_run(name, graph):
    """Lost, doubled, late and reordered frames change nothing."""
    whole = rounds(NOISY, METHODS[name], graph, Fleet(workers=8))
    for _ in range(15):
        whole._advance()
    live = Net(NOISY, METHODS[name], graph, seed=1, limit=15, drop=0.1, double=0.1).run()
    assert live.settled
    assert live.counts["lost"] > 50
    assert live.counts["doubled"] > 50
    assert live.counts["start"] == 8
    np.testing.assert_allclose(live.x, whole.method.models(whole.node), rtol=0, atol=1e-12)


FAULTY = [("dsgd", "ring"), ("dsgt", "ring"), ("motef", "matching"), ("choco", "random-regular")]


def faulty(seed):
    name, graph = FAULTY[seed % len(FAULTY)]
    live = Net(NOISY, METHODS[name], graph, seed=seed, limit=40, drop=0.02, double=0.02)
    live.faults(4, 50.0)
    live.run()
    assert live.settled, f"tests/runtime/net/test_mesh.py: faulty({seed})"
    nodes = [party.node for party in live.parties.values()]
    assert {node.round for node in nodes} == {40}
    if "v" in METHODS[name].channels:
        v = sum(node.node.v for node in nodes)
        np.testing.assert_allclose(v, sum(map(put_in, nodes)), atol=1e-9)
    return live


def test_with_faults_all_do_their_rounds_and_sums_are_kept():
    """A seed that fails is named, and does the same again."""
    counts = sum((faulty(seed).counts for seed in range(SEEDS)), Counter())
    for happened in ("killed", "frozen", "parted", "join"):
        assert counts[happened] > 10


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SEEDS, 2000, 20))
def test_with_faults_all_do_their_rounds_for_long(first):
    assert all(faulty(first + k).settled for k in range(20))


def test_all_die_and_go_on_from_their_checkpoints_of_different_moments():
    live = Net(NOISY, METHODS["dsgt"], "ring", seed=4, limit=60)
    states = {}
    for i in range(8):
        live.run(until_s=10.0 + 2 * i)
        states[i] = live.parties[i].node.state()
    rounds_ = {live.parties[i].node.round for i in range(8)}
    live.parties.clear()
    for i in range(8):
        live.later(live.rng.exponential(5.0), live.start, i, states[i])
    live.run()
    assert live.settled
    assert len(rounds_) > 1
    assert live.counts["restore"] == 8
    assert live.counts["join"] == 0
    nodes = [party.node for party in live.parties.values()]
    assert {node.round for node in nodes} == {60}
    v = sum(node.node.v for node in nodes)
    np.testing.assert_allclose(v, sum(map(put_in, nodes)), atol=1e-9)


def test_who_lost_its_disk_takes_the_next_incarnation_and_joins():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=60).run(until_s=20.0)
    live.kill(3)
    live.run(until_s=22.0)
    live.incarnations[3] = 0  # it does not remember that it was here
    live.start(3)
    live.run()
    assert live.settled
    assert live.counts["join"] == 1
    assert live.parties[3].mesh.incarnation == 2


def test_who_comes_after_the_run_and_cannot_join_learns_that_it_is_over():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=10).run(until_s=8.0)
    live.kill(3)
    live.run(until_s=60.0)
    assert all(live.parties[i].mesh.standing == DONE for i in (2, 4))
    live.start(3)
    live.parties[3].mesh._joins = False
    live.run(until_s=64.0)
    assert live.counts["over"] > 0
    assert live.parties[3].node is None


def test_who_is_done_waits_only_so_long_for_one_that_is_gone():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=10).run(until_s=8.0)
    live.kill(3)
    meshes = [party.mesh for party in live.parties.values()]
    while not all(m.standing == DONE for m in meshes):
        live.run(until_s=live.now + 1.0)
    neighbour, other = live.parties[2].mesh, live.parties[7].mesh
    assert other.finished(live.now + 1.0)
    assert not neighbour.finished(neighbour._left_s + LATE_S - 1.0)
    assert neighbour.finished(neighbour._left_s + LATE_S)


def test_a_younger_process_of_the_same_name_ends_the_older():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    old = live.parties.pop(3)
    live.start(3)
    live.run(until_s=30.0)
    young, live.parties[3] = live.parties[3], old
    live._tick(3, old)
    live.run(until_s=40.0)
    assert isinstance(old.mesh.fate, Fenced)
    assert young.mesh.fate is None


def test_who_is_away_again_and_again_finds_out_who_is_dead():
    """As on a machine with too much to do, where each turn takes longer than two heartbeats."""
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    for j, n in m.neighbours.items():
        n.heard_s = live.now if j == 2 else live.now - 1.0
    for _ in range(5):
        live.now += 2.5 * LIVENESS.heartbeat_s
        m.neighbours[2].heard_s, m.neighbours[2].excused = live.now, False
        m.tick(live.now)
    assert [m.neighbours[j].up for j in (0, 2)] == [False, True]


def test_another_experiment_is_told_with_its_difference():
    texts = ["seed = 0\nalgorithm.lr = 0.1"] * 8
    texts[3] = "seed = 0\nalgorithm.lr = 0.2"
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=5, texts=texts)
    live.runs[3] = "other"
    live.run(until_s=15.0)
    fate = live.parties[3].mesh.fate
    assert isinstance(fate, ConfigError)
    assert "here algorithm.lr = 0.2; there algorithm.lr = 0.1" in str(fate)
    for i in (2, 4):  # which hear others of their own run
        assert live.parties[i].mesh.fate is None
        assert live.parties[i].mesh.counts["wrong_run"] > 0


BAD = [
    (0, "said", Said("mail", 0, 0, 40), {}, "bad_header"),
    (0, "said", Said("mail", 0, 0, 1), {"1": np.zeros(20)}, "bad_array"),
    (0, "said", Said("mail", 0, 0, 1), {"0": np.zeros((2, 10))}, "bad_array"),
    (0, "said", Said("mail", 0, 0, 1), {"0": np.zeros(21)}, "bad_array"),
    (0, "said", Said("mail", 0, 0, 1), {"0": np.zeros(20, np.float32)}, "bad_array"),
    (0, "said", Said("mail", 0, 0, 1), {"0": b"x" * 10**6}, "too_large"),
    (0, "beat", say.Pulse(), {}, "bad_header"),
    (0, "work", say.Pulse(), {}, "unknown_kind"),
    (5, "said", Said("mail", 0, 0, 0), {}, "wrong_node"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[4])
def test_what_no_peer_says_is_counted_and_changes_nothing(bad):
    frm, kind, body, arrays, name = bad
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    n = m.neighbours.get(frm, m.neighbours[0])
    before = n.link.acknowledged, len(m.mail), n.up
    parcel = parcels(kind, body, arrays)[0]
    frames = pack(
        parcel, run="run", node=f"n{frm}", incarnation=n.theirs, to=n.mine,
        sequence=n.link.acknowledged + 1,
    )  # fmt: skip
    m.receive(b"x", None, frames, live.now)
    assert m.counts[name] == 1
    assert (n.link.acknowledged, len(m.mail), n.up)[1:] == before[1:]


@pytest.fixture
def heard():
    """A peer in the midst of a run, its neighbour 0, and what makes messages of that one."""
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    n = m.neighbours[0]
    n.link.acknowledge(n.link._base + len(n.link._flight), live.now)
    m.mail.clear()
    m.counts.clear()

    def says(body, sequence=0, **changes):
        kind = "said" if isinstance(body, Said) else "beat"
        head = {"run": "run", "node": "n0", "incarnation": n.theirs, "to": n.mine} | changes
        m.receive(b"x", "n0", pack(parcels(kind, body)[0], sequence=sequence, **head), live.now)

    return m, n, says


MAIL = Said("mail", 7, 0, 0)


def test_a_message_counts_in_the_session_of_both_ends(heard):
    m, n, says = heard
    first = n.link.acknowledged + 1
    says(MAIL, first, incarnation=n.theirs - 1)
    says(MAIL, first, to=n.mine - 1)
    assert m.counts["old_incarnation"] == 2
    assert (m.mail, n.link.acknowledged) == ([], first - 1)
    says(MAIL, first)
    assert ([p.number for p in m.mail], n.link.acknowledged) == ([7], first)


def test_what_came_over_a_link_is_forgotten_with_it(heard):
    m, n, says = heard
    says(MAIL, n.link.acknowledged + 1)
    assert len(m.mail) == 1
    before = n.mine
    says(Beat(n.beats + 1, before, 0, False, RUNNING, True, 3))  # it does not hear this peer
    assert not n.up
    assert m.events == [("down", 0)]
    assert m.mail == []
    assert (n.mine, n.link.acknowledged) == (before + 1, 0)


def test_who_has_left_is_not_heard(heard):
    m, n, says = heard
    says(Beat(n.beats + 1, n.mine, 0, True, LEFT, True, 3))
    assert not n.up
    says(MAIL, 1, to=n.mine)
    assert (m.counts["old_incarnation"], m.mail) == (1, [])


def test_a_link_that_takes_nothing_more_is_given_up(heard):
    m, n, _ = heard
    n.link._queue.extend([None] * MOST_QUEUED)
    m.send(Envelope(0, 1, 1, 0, "mail", 7, ()), 0.0)
    assert (n.up, m.events, n.link.pending) == (False, [("down", 0)], 0)


def test_what_a_neighbour_says_wrong_again_and_again_is_told_now_and_then(heard):
    m = heard[0]
    for _ in range(3 * MOST_OFFENCES):
        m.receive(b"x", "n0", [b"garbage"], 0.0)
    assert len([note for note in m.notes if note.event == "rejected"]) == 3


def test_a_peer_is_who_its_key_says():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    n = m.neighbours[0]
    before = n.heard_s, n.beats
    live.now += 0.1
    body = Beat(n.beats + 1, n.mine, 0, True, DONE, False, 7)
    frames = pack(parcels("beat", body)[0], run="run", node="n0", incarnation=n.theirs, to=n.mine)
    m.receive(b"x", "n2", frames, live.now)
    assert m.counts["wrong_node"] == 1
    assert (n.heard_s, n.beats) == before
    m.receive(b"x", "n0", frames, live.now)
    assert (n.heard_s, n.beats, n.standing) == (live.now, before[1] + 1, DONE)


def test_who_says_such_things_again_and_again_is_cut_off():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    for _ in range(MOST_OFFENCES):
        m.receive(b"x", "n0", [b"garbage"], live.now)
    assert m.counts["bad_header"] == MOST_OFFENCES
    assert m.cuts == [(b"x", "bad_header")]
    assert not m.neighbours[0].up


def test_a_neighbour_that_is_dead_is_not_here():
    live = Net(NOISY, METHODS["dsgd"], "ring", seed=4, limit=400).run(until_s=20.0)
    m = live.parties[1].mesh
    assert {n.number for n in m.here(live.now)} == {0, 2}
    m.neighbours[0].heard_s = live.now - 2 * LIVENESS.down_after_s
    assert m.neighbours[0].knows
    assert [n.number for n in m.here(live.now)] == [2]
