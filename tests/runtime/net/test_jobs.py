"""Membership and the job table, with time as an argument."""

import pytest
from deploying import SERVER

from offbeat.runtime.base.errors import ConfigError, OldIncarnation, StaleJob, UnknownJob, WrongNode
from offbeat.runtime.commands.network import serving
from offbeat.runtime.protocol.roster import (
    FREE_RESTARTS,
    MOST_RESTARTS,
    JobBook,
    Liveness,
    NotNow,
    Roster,
)


def roster(slots=3):
    return Roster(slots, Liveness(1.0))


def join(roster, node, nonce, now_s=0.0):
    member = roster.hello(node, nonce, now_s)
    roster.heard(member, now_s)
    member.ready = True
    return member


def test_one_setting_makes_every_time():
    times = Liveness(1.0)
    assert times.down_after_s == 1.5
    assert 4 * times.heartbeat_s <= times.suspect_after_s < times.down_after_s
    for bad in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(ConfigError, match=r"suspect_after_s must be from 0\.05 to 3600"):
            Liveness(bad)


def test_a_result_counts_once_and_from_who_has_the_job():
    r, jobs = roster(), JobBook()
    a, b = join(r, "a", 1), join(r, "b", 2)
    first, second = jobs.assign(70, a), jobs.assign(71, b)
    assert jobs.accept(a, first) == 70
    with pytest.raises(StaleJob):
        jobs.accept(a, first)
    with pytest.raises(WrongNode, match="a answers job 2, which b has"):
        jobs.accept(a, second)
    for never in (0, 3, 10**9):
        with pytest.raises(UnknownJob):
            jobs.accept(a, never)
    assert jobs.release(b) == [71]
    with pytest.raises(StaleJob):
        jobs.accept(b, second)
    again = jobs.assign(71, a)
    assert jobs.accept(a, again) == 71
    assert jobs.assigned == jobs.counts["accepted"] + jobs.counts["taken back"] == 3


def test_an_order_given_again_takes_the_first_back():
    r, jobs = roster(), JobBook()
    a, b = join(r, "a", 1), join(r, "b", 2)
    first = jobs.assign(5, a)
    second = jobs.assign(5, b)
    with pytest.raises(StaleJob):
        jobs.accept(a, first)
    assert jobs.accept(b, second) == 5
    assert not jobs.outstanding
    assert not a.jobs


def test_who_is_silent_is_down_and_comes_back_as_another_incarnation():
    r = roster()
    a = join(r, "a", 1)
    r.silent(0.5)
    assert r.silent(1.0) == []
    assert r.suspects(a, 1.1)
    assert r.silent(1.49) == []
    assert r.silent(1.51) == [a]
    r.drop(a)
    with pytest.raises(OldIncarnation):
        r.find("a", a.incarnation)
    again = join(r, "a", 1, 2.0)
    assert again.incarnation == a.incarnation + 1
    assert again.slot == a.slot


def test_what_was_not_heard_while_the_server_was_away_is_nobodys_fault():
    r = roster()
    a = join(r, "a", 1)
    r.silent(0.1)
    assert r.silent(600.0) == []  # a long evaluation
    assert r.silent(600.1) == []
    times = [600.1 + 0.1 * k for k in range(1, 20)]
    assert [r.silent(t) for t in times][-1] == [a]


def test_a_server_that_is_away_again_and_again_finds_out_who_is_dead():
    """Each event takes it longer than two heartbeats, and others keep it busy."""
    r = roster()
    a, b = join(r, "a", 1), join(r, "b", 2)
    for k in range(1, 5):
        r.heard(b, 0.6 * k)
        silent = r.silent(0.6 * k)
    assert silent == [a]


def test_a_second_process_waits_while_the_first_is_heard_and_then_fences_it():
    r = roster()
    a = join(r, "a", 1)
    with pytest.raises(NotNow, match="another process is here as a") as wait:
        r.hello("a", 2, 0.5)
    assert wait.value.retry_s > 0
    r.drop(a)
    b = join(r, "a", 2, 2.0)
    assert b.incarnation > a.incarnation
    assert r.replaced("a", a.incarnation)
    with pytest.raises(NotNow) as fenced:
        r.hello("a", 1, 2.1)
    assert fenced.value.replaced
    assert fenced.value.retry_s is None


def test_a_dead_ones_greeting_replaces_nobody():
    r = roster()
    ghost = r.hello("a", 1, 0.0)  # and never a word more
    r.drop(ghost)
    join(r, "a", 2, 2.0)
    r.drop(r.members["a"])
    late = r.hello("a", 3, 4.0)  # sent by a process that died before 2 joined
    r.drop(late)
    assert r.hello("a", 2, 6.0).incarnation == 4


def test_who_restarts_all_the_time_waits_longer_and_is_shut_out():
    r, now_s, waits = roster(), 0.0, []
    for nonce in range(1, MOST_RESTARTS + 1):
        try:
            member = join(r, "a", nonce, now_s)
        except NotNow as refusal:
            waits.append(refusal.retry_s)
            now_s += refusal.retry_s
            member = join(r, "a", nonce, now_s)
        r.drop(member)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0][: MOST_RESTARTS - FREE_RESTARTS - 1]
    with pytest.raises(NotNow, match="a is shut out: it restarted 9 times in 120 s") as shut:
        r.hello("a", 99, now_s + 40.0)
    assert shut.value.retry_s is None
    with pytest.raises(NotNow):
        r.hello("a", 100, now_s + 1e6)
    assert join(r, "b", 1, now_s).node == "b"  # nobody else is concerned


def test_slots_are_taken_kept_and_given_on():
    r = roster(2)
    a, b = join(r, "a", 1), join(r, "b", 2)
    assert {a.slot, b.slot} == {0, 1}
    with pytest.raises(NotNow, match="all 2 places are taken"):
        r.hello("c", 3, 0.0)
    r.drop(a)
    c = join(r, "c", 3)
    assert c.slot == a.slot
    r.drop(b)
    assert join(r, "a", 1, 1.0).slot == b.slot  # its own is taken


def test_nothing_is_kept_of_who_finds_no_place():
    r = roster(1)
    join(r, "a", 1)
    for nonce in range(2, 50):
        with pytest.raises(NotNow, match="all 1 places are taken"):
            r.hello(f"guest {nonce}", nonce, 1.0)
    tables = (r._nonces, r._joins, r._incarnations, r._slots, r.members)
    assert [list(table) for table in tables] == [["a"]] * len(tables)


def test_an_experiments_nonsense_is_not_passed_over(tmp_path):
    (tmp_path / "run.toml").write_text(f"engine = 'zmq(suspect_after_s=7200)'\n{SERVER}")
    with pytest.raises(ConfigError, match=r"run\.toml: suspect_after_s must be from 0\.05"):
        serving(tmp_path / "run.toml", {}, [])
