"""A link: whatever is lost, doubled or overtaken, everything is passed on once and in order."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbeat.runtime.protocol.channel import WINDOW, Full, ReliableChannel


def exchange(seed, drop, double, count=300):
    """Two ends send ``count`` numbers each; answers what each passed on, and the links."""
    g = random.Random(seed)
    ends = [ReliableChannel(resend_s=0.2) for _ in range(2)]
    got = [[], []]
    for number in range(count):
        for end in ends:
            end.send(number)
    wire, now_s, tie = [], 0.0, 0
    while any(len(passed) < count for passed in got):
        now_s += 0.01
        assert now_s < 1000
        for i, end in enumerate(ends):
            posts = [(s, item, end.acknowledged) for s, item in end.out(now_s)]
            if end.owes(now_s):
                posts.append((0, None, end.acknowledged))
            for post in posts:
                for _ in range((g.random() >= drop) * (1 + (g.random() < double))):
                    tie += 1
                    heapq.heappush(wire, (now_s + g.expovariate(20), tie, 1 - i, post))
        while wire and wire[0][0] <= now_s:
            _, _, to, (sequence, item, acknowledged) = heapq.heappop(wire)
            ends[to].acknowledge(acknowledged, now_s)
            if sequence:
                got[to] += ends[to].receive(sequence, item, now_s)
            assert ends[to].held <= WINDOW
    return got, ends


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([0, 0.02, 0.2, 0.5]), st.sampled_from([0, 0.05, 0.5]))
def test_everything_arrives_once_and_in_order(seed, drop, double):
    got, ends = exchange(seed, drop, double, count=100)
    assert got == [list(range(100))] * 2
    if drop >= 0.2:
        assert sum(end.resends for end in ends) > 0
    if double == 0.5:
        assert sum(end.duplicates for end in ends) > 0


def test_nothing_is_sent_again_where_nothing_is_lost():
    link, other, now_s = ReliableChannel(resend_s=0.2), ReliableChannel(resend_s=0.2), 0.0
    for number in range(1000):
        link.send(number)
    passed = []
    while link.pending:
        now_s += 0.01
        for sequence, item in link.out(now_s):
            passed += other.receive(sequence, item, now_s)
        if other.owes(now_s):
            link.acknowledge(other.acknowledged, now_s)
    assert passed == list(range(1000))
    assert (link.resends, other.duplicates) == (0, 0)


def test_the_window_and_the_queue_have_limits():
    link = ReliableChannel(resend_s=1.0, most=100)
    for number in range(100):
        link.send(number)
    assert len(link.out(0.0)) == WINDOW
    for number in range(WINDOW):
        link.send(number)
    with pytest.raises(Full):
        link.send(0)
    assert link.out(0.5) == []  # nothing more, until something is acknowledged
    link.acknowledge(3, 0.5)
    assert [sequence for sequence, _ in link.out(0.5)] == [65, 66, 67]


def test_waiting_doubles_and_starts_afresh():
    link = ReliableChannel(resend_s=1.0)
    link.send("x")
    times = [t / 10 for t in range(800) if link.out(t / 10)]
    assert times == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 47.0, 63.0, 79.0]  # at most 16 times the first
    link.acknowledge(1, 80.0)
    link.send("y")
    assert len(link.out(80.0)) == 1
    assert len(link.out(81.0)) == 1


def test_words_of_a_liar_change_nothing():
    link = ReliableChannel(resend_s=1.0)
    link.send("x")
    link.out(0.0)
    link.acknowledge(2**52, 0.1)  # never sent
    assert link.pending == 1
    assert link.receive(1 + WINDOW, "far", 0.1) == []
    assert (link.held, link.beyond) == (0, 1)
    assert link.receive(1, "near", 0.1) == ["near"]
