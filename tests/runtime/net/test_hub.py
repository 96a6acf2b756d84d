"""A server and its workers, message by message, without a network between them."""

import json

import numpy as np
import pytest
from rich.console import Console

from offbeat.algorithms.compression import COMPRESSORS
from offbeat.runtime.base.errors import ConfigError, Fenced, PeerError, Refused
from offbeat.runtime.commands.network import shown
from offbeat.runtime.compute.backend import Back, Failed, Gone, JobRequest, JobResult
from offbeat.runtime.experiment.engines import Liveness
from offbeat.runtime.protocol import messages as say
from offbeat.runtime.protocol import wire
from offbeat.runtime.protocol.channel import WINDOW
from offbeat.runtime.protocol.roster import GRAVE, MOST_OFFENCES, MOST_STRIKES
from offbeat.runtime.protocol.server import ServerProtocol
from offbeat.runtime.protocol.worker import WorkerProtocol
from offbeat.workers.compressed import SENT

D = 4
X = np.arange(float(D))
X.flags.writeable = False
KINDS = say.kinds(X, {})


(AGAIN,) = wire.parcels("again", say.Again())


class Site:
    """A hub, spokes by name, and messages that all arrive."""

    def __init__(self, names="ab", slots=2, kinds=KINDS, incarnation=1, package="1"):
        self.kinds, self.now_s, self.events = kinds, 0.0, []
        self.hub = ServerProtocol("r", "text", kinds, slots, incarnation, Liveness(1.0), package)
        self.spokes = {}
        for number, name in enumerate(names, 1):
            self.spokes[name] = WorkerProtocol(name, number, "1", f"{name}:1", 0.0)
        self.settle()

    def settle(self):
        """Until nobody has anything to say."""
        for _ in range(50):
            self.hub.tick(self.now_s)
            for name, spoke in self.spokes.items():
                spoke.tick(self.now_s)
                if spoke.welcome is not None:
                    spoke.ready(self.kinds, self.now_s)
                sent, spoke.outbox = spoke.outbox, []
                for frames in sent:
                    self.receive(name, frames)
            posts, self.hub.outbox = self.hub.outbox, []
            for address, frames in posts:
                if (spoke := self.spokes.get(address.decode())) is not None:
                    spoke.receive([bytes(frame) for frame in frames], self.now_s)
            self.events += self.hub.events
            self.hub.events = []
            self.now_s += 0.01

    def receive(self, name, frames):
        self.hub.receive(name.encode(), name, [bytes(frame) for frame in frames], self.now_s)

    def order(self, serial, worker, step=0, x=X):
        self.hub.submit(JobRequest(serial, worker, worker, serial, 1, step, x, None), self.now_s)
        self.settle()

    def answer(self, name, payload=None, loss=1.0):
        spoke = self.spokes[name]
        order = spoke.take()
        made = order.x * 2 if payload is None else payload
        spoke.answer(order, JobResult(order.serial, loss, made, {}, 0.1), self.now_s)
        self.settle()

    def heard(self, kind):
        found = [event for event in self.events if isinstance(event, kind)]
        self.events = [event for event in self.events if not isinstance(event, kind)]
        return found


def slot(site, name):
    return site.hub.seats[name].member.slot


def test_an_order_is_answered():
    site = Site()
    assert [gone.worker for gone in site.heard(Gone)] == [0, 1]
    assert {back.worker for back in site.heard(Back)} == {0, 1}
    site.order(7, slot(site, "a"))
    site.answer("a")
    (answer,) = site.heard(JobResult)
    assert (answer.serial, answer.loss) == (7, 1.0)
    np.testing.assert_array_equal(answer.payload, 2 * X)


def test_a_model_travels_once(monkeypatch):
    monkeypatch.setattr(wire, "INLINE_BYTES", 0)
    site = Site("a", 1)
    sent = []
    flush = site.hub._flush
    site.hub._flush = lambda seat, now_s: (flush(seat, now_s), sent.extend(site.hub.outbox))[0]
    for serial in range(3):
        site.order(serial, 0)
    works = [frames for _, frames in sent if len(frames) > 1]
    assert len({id(frames[0]) for frames in works}) == 1
    for _ in range(3):
        site.answer("a")
    for answer in site.heard(JobResult):
        np.testing.assert_array_equal(answer.payload, 2 * X)


def test_a_large_result_is_out_before_the_next_job_is_begun(monkeypatch):
    """The window is full: what waits for it would wait for the next job's end, too."""
    monkeypatch.setattr(wire, "PIECE_BYTES", 8)
    x = np.arange(2.0 * WINDOW)
    site = Site("a", 1, kinds=say.kinds(x, {}))
    site.order(0, 0, x=x)
    site.order(1, 0, x=x)
    spoke = site.spokes["a"]
    assert not spoke.clogged
    order = spoke.take()
    spoke.answer(order, JobResult(order.serial, 1.0, 2 * x, {}, 0.1), site.now_s)
    assert spoke.clogged
    assert len(spoke.outbox) == WINDOW
    site.settle()
    assert not spoke.clogged
    np.testing.assert_array_equal(site.heard(JobResult)[0].payload, 2 * x)
    assert spoke.take().serial == 2  # which came meanwhile


def test_large_models_reuse_their_buffers(monkeypatch):
    monkeypatch.setattr(wire, "PIECE_BYTES", 16)
    site, seen = Site("a", 1), set()
    for serial in range(20):
        x = X + serial
        x.flags.writeable = False
        site.order(serial, 0, serial, x)
        spoke = site.spokes["a"]
        order = spoke.take()
        np.testing.assert_array_equal(order.x, x)
        seen.add(order.x.__array_interface__["data"][0])
        spoke.answer(order, JobResult(order.serial, 1.0, order.x + 1, {}, 0.1), site.now_s)
        site.settle()
    assert [answer.payload[0] for answer in site.heard(JobResult)] == list(range(1, 21))
    assert len(seen) == 2


def test_code_that_raises_is_told():
    site = Site()
    site.order(7, slot(site, "a"))
    spoke = site.spokes["a"]
    spoke.failed(spoke.take(), "Traceback: here", site.now_s)
    site.settle()
    assert site.heard(Failed) == [Failed(7, "Traceback: here")]


def test_who_leaves_hands_back():
    site = Site()
    site.heard(Gone)
    mine = slot(site, "a")
    site.order(7, mine)
    site.spokes["a"].leave("its machine is wanted", site.now_s)
    left = site.spokes.pop("a")
    for frames in left.outbox:
        site.receive("a", frames)
    site.settle()
    assert site.heard(Gone) == [Gone(mine, "its machine is wanted")]
    assert site.hub.jobs.outstanding == {}


def test_a_cancelled_job_is_not_computed():
    site = Site("a", 1)
    site.order(1, 0)
    site.order(2, 0)
    site.hub.cancel(2, site.now_s)
    site.settle()
    assert len(site.spokes["a"].orders) == 1
    site.answer("a")
    assert [answer.serial for answer in site.heard(JobResult)] == [1]


# -- Results that are not finite -----------------------------------------------------------------


def test_what_two_nodes_find_not_finite_is_the_runs_fault():
    site = Site()
    site.order(7, slot(site, "a"))
    site.answer("a", X * np.nan)
    assert site.heard(JobResult) == []  # b is asked
    site.answer("b", np.full(D, np.inf))
    (answer,) = site.heard(JobResult)
    assert answer.serial == 7
    assert np.isnan(answer.loss)
    assert site.hub.counts["not_finite"] == 2
    assert site.hub.roster.quarantined == {}


def test_what_is_not_finite_is_computed_again_where_the_second_node_is_gone():
    """It may have been the first one's own fault: the run does not end for it yet."""
    site = Site("abc", 3)
    site.order(7, slot(site, "a"))
    site.answer("a", X * np.nan)
    asked = "b" if site.spokes["b"].orders else "c"
    site.spokes[asked].leave("its machine is wanted", site.now_s)
    left = site.spokes.pop(asked)
    for frames in left.outbox:
        site.receive(asked, frames)
    site.settle()
    assert site.heard(JobResult) == []
    (failed,) = site.heard(Failed)
    assert failed.serial == 7
    assert "not finite at a" in failed.why
    site.order(7, slot(site, "a"))
    site.answer("a", X * np.nan)
    (other,) = {"b", "c"} - {asked}
    site.answer(other)
    (answer,) = site.heard(JobResult)
    np.testing.assert_array_equal(answer.payload, 2 * X)


def test_one_node_twice_is_no_second_opinion():
    site = Site()
    for _ in range(2):
        site.order(7, slot(site, "a"))
        site.answer("a", X * np.nan)
        assert site.heard(JobResult) == []
        spoke = site.spokes["b"]
        spoke.failed(spoke.take(), "Traceback: here", site.now_s)
        site.settle()
        assert site.heard(Failed) == [Failed(7, "Traceback: here")]


def test_a_node_whose_results_alone_are_not_finite_is_shut_out():
    site = Site()
    for serial in range(MOST_STRIKES):
        assert "a" in site.hub.seats
        site.order(serial, slot(site, "a"))
        site.answer("a", X * np.nan)
        site.answer("b")
        (answer,) = site.heard(JobResult)
        np.testing.assert_array_equal(answer.payload, 2 * X)
    assert "results in a row were not finite" in site.hub.roster.quarantined["a"]
    assert isinstance(site.spokes["a"].fate, Refused)
    assert "b" in site.hub.seats


def test_large_but_finite_is_finite():
    site = Site("a", 1)
    site.order(7, 0)
    site.answer("a", np.full(D, 1e200))
    assert site.heard(JobResult)[0].loss == 1.0


def test_a_lonely_nodes_nan_is_told_at_once():
    site = Site("a", 1)
    site.order(7, 0)
    site.answer("a", X * np.nan)
    assert np.isnan(site.heard(JobResult)[0].loss)


# -- Peers that do wrong -------------------------------------------------------------------------


def forged(site, name, kind, body, arrays=None, **changes):
    """A message in place of ``name``'s next one."""
    spoke = site.spokes[name]
    (parcel,) = wire.parcels(kind, body, arrays)
    said = {
        "run": "r", "node": name, "incarnation": spoke.incarnation, "to": 1,
        "sequence": spoke._link._base + len(spoke._link._flight) + 1, "acknowledged": 0,
    }  # fmt: skip
    site.receive(name, wire.pack(parcel, **(said | changes)))
    site.settle()


RESULT = {"payload": X}


@pytest.mark.parametrize(
    ("name", "changes", "job"),
    [
        ("unknown_job", {}, 99),
        ("wrong_node", {"node": "b"}, 1),
        ("wrong_run", {"run": "another"}, 1),
        ("old_incarnation", {"incarnation": 17}, 1),
        ("old_incarnation", {"to": 17}, 1),
        ("stale_job", {}, 1),
    ],
)
def test_a_result_that_does_not_count_has_a_name(name, changes, job):
    site = Site()
    site.order(7, slot(site, "a"))
    if name == "stale_job":
        site.hub.cancel(7, site.now_s)
    site.heard(Gone)
    forged(site, "a", "result", say.ResultMessage(job, 1.0, 0.1), RESULT, **changes)
    assert site.hub.counts[name] == 1
    assert site.heard(JobResult) == []


@pytest.mark.parametrize("payload", [X.astype(np.float32), np.ones(D + 1), np.ones((1, D))])
def test_wrong_arrays_are_counted_and_at_last_cost_the_connection(payload):
    site = Site()
    site.order(7, slot(site, "a"))
    for count in range(1, MOST_OFFENCES + 1):
        assert "a" in site.hub.seats
        forged(site, "a", "result", say.ResultMessage(1, 1.0, 0.1), {"payload": payload})
        assert site.hub.counts["bad_array"] == count
    assert "a" not in site.hub.seats
    assert site.hub.cuts[-1][0] == b"a"
    assert site.heard(JobResult) == []
    assert "b" in site.hub.seats


# -- Compressed updates ----------------------------------------------------------------------------

CODED = say.kinds(X, {SENT: np.zeros((1, D)), "momentum": np.zeros((1, D))})
(FRAME,) = COMPRESSORS.parse("topk(1)").compress(X).encode()


def test_of_a_compressed_update_the_frame_travels_and_not_what_was_sent():
    site, momentum = Site("a", 1, CODED), np.ones((1, D))
    site.order(7, 0)
    spoke = site.spokes["a"]
    order = spoke.take()
    spoke.answer(
        order, JobResult(order.serial, 1.0, FRAME, {"momentum": momentum}, 0.1), site.now_s
    )
    (frames,) = spoke.outbox
    head = wire.Reader("r", CODED).read(frames).head
    assert [one.data for one in head.arrays] == [FRAME, momentum.tobytes()]
    site.settle()
    (answer,) = site.heard(JobResult)
    np.testing.assert_array_equal(answer.payload, [0, 0, 0, 3])
    assert (answer.nbytes, list(answer.kept)) == (len(FRAME), ["momentum"])


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("peer_error", {"payload": b"garbage"}),
        ("peer_error", {"payload": FRAME[:-1]}),
        ("peer_error", {"payload": FRAME + b"0"}),
        ("peer_error", {"payload": COMPRESSORS["topk"](1).compress(np.ones(D + 1)).encode()[0]}),
        ("bad_array", {"payload": COMPRESSORS["topk"](1).compress(np.ones(D, "f4")).encode()[0]}),
        ("bad_array", {"payload": FRAME, "kept.sent": np.ones((1, D))}),
        ("too_large", {"payload": bytes(2**16 + 60)}),
    ],
)
def test_wrong_frames_cost_the_connection(name, arrays):
    site, momentum = Site(kinds=CODED), {"kept.momentum": np.ones((1, D))}
    site.order(7, slot(site, "a"))
    for count in range(1, MOST_OFFENCES + 1):
        assert "a" in site.hub.seats
        forged(site, "a", "result", say.ResultMessage(1, 1.0, 0.1), arrays | momentum)
        assert site.hub.counts[name] == count
    assert "a" not in site.hub.seats
    assert site.hub.cuts[-1][0] == b"a"
    assert site.heard(JobResult) == []
    assert "b" in site.hub.seats


def test_nobody_else_is_asked_about_what_follows_from_what_a_worker_keeps():
    site = Site(kinds=say.kinds(X, {SENT: np.zeros((1, D))}))
    site.order(7, slot(site, "a"))
    site.answer("a", FRAME, loss=np.nan)
    (answer,) = site.heard(JobResult)
    assert np.isnan(answer.loss)
    assert not site.spokes["b"].orders


def test_another_nodes_job():
    site = Site()
    site.order(7, slot(site, "b"))
    forged(site, "a", "result", say.ResultMessage(1, 1.0, 0.1), RESULT)
    assert site.hub.counts["wrong_node"] == 1
    assert "a" in site.hub.roster.quarantined
    site.answer("b")
    assert [answer.serial for answer in site.heard(JobResult)] == [7]


def test_what_a_worker_may_not_say():
    site = Site()
    for kind, body in (("cancel", say.Cancel(1)), ("over", say.Over("", True))):
        forged(site, "a", kind, body, sequence=site.hub.seats["a"].link.acknowledged + 1)
    assert site.hub.counts["bad_header"] == 2
    assert site.spokes["b"].state == "working"


def test_a_replayed_message_changes_nothing():
    site = Site("a", 1)
    site.order(7, 0)
    spoke = site.spokes["a"]
    order = spoke.take()
    spoke.answer(order, JobResult(order.serial, 1.0, 2 * X, {}, 0.1), site.now_s)
    recorded = [[bytes(frame) for frame in frames] for frames in spoke.outbox]
    site.settle()
    assert len(site.heard(JobResult)) == 1
    for _ in range(5):
        for frames in recorded:
            site.receive("a", frames)
    site.settle()
    assert site.heard(JobResult) == []
    assert site.hub.seats["a"].link.duplicates == 5


def test_another_version_is_refused_with_both_named():
    site = Site("a", 1, package="2")
    fate = site.spokes["a"].fate
    assert isinstance(fate, Refused)
    assert "it runs offbeat 1, the server 2" in str(fate)
    assert site.hub.seats == {}


def test_another_task_is_refused_with_the_difference():
    site = Site("", 1)
    spoke = site.spokes["a"] = WorkerProtocol("a", 1, "1", "a:1", site.now_s)
    for _ in range(5):
        spoke.tick(site.now_s)
        for frames in spoke.outbox:
            site.receive("a", frames)
        spoke.outbox.clear()
        for _, frames in site.hub.outbox:
            spoke.receive([bytes(frame) for frame in frames], site.now_s)
        site.hub.outbox.clear()
        if spoke.welcome is not None:
            break
        site.now_s += 1
    other = say.kinds(np.zeros(D + 1), {})
    with pytest.raises(ConfigError, match=r"work\.x <f8\[5\].* here, work\.x <f8\[4\].* there"):
        spoke.ready(other, site.now_s)
    for frames in spoke.outbox:
        site.receive("a", frames)
    assert "a" not in site.hub.seats


# -- Servers that are replaced -------------------------------------------------------------------


def test_words_of_a_server_that_was_replaced_are_not_heard():
    old, new = Site("a", 1), Site("", 1, incarnation=2)
    spoke = new.spokes["a"] = old.spokes["a"]
    new.now_s = old.now_s
    new.order(3, 0)
    spoke.outbox.append(spoke._unordered("pulse", say.Pulse(), 0))
    new.settle()
    assert (spoke.server, spoke.state) == (2, "working")
    old.hub.submit(JobRequest(9, 0, 0, 0, 1, 0, X, None), old.now_s)
    for _, frames in old.hub.outbox:
        spoke.receive([bytes(frame) for frame in frames], old.now_s)
    assert not spoke.orders
    assert (spoke.server, spoke.state) == (2, "working")  # nor is it led astray by them


def test_a_process_whose_place_was_taken_ends():
    site = Site("a", 1)
    first = site.spokes.pop("a")
    for _ in range(40):
        site.now_s += 0.1
        site.hub.tick(site.now_s)
    site.spokes["a"] = WorkerProtocol("a", 2, "1", "a:2", site.now_s)
    site.settle()
    assert site.spokes["a"].state == "working"
    first.tick(site.now_s)
    for frames in first.outbox:
        site.hub.receive(b"elsewhere", "a", [bytes(frame) for frame in frames], site.now_s)
    for address, frames in site.hub.outbox:
        if address == b"elsewhere":
            first.receive([bytes(frame) for frame in frames], site.now_s)
    assert isinstance(first.fate, Fenced)


def test_a_server_that_talks_nonsense_is_left():
    site = Site("a", 1)
    for _ in range(MOST_OFFENCES):
        site.spokes["a"].receive([b"nonsense"], site.now_s)
    assert isinstance(site.spokes["a"].fate, PeerError)


def test_status():
    site = Site()
    site.order(7, slot(site, "a"), step=3)
    site.answer("a", loss=0.25)
    status = site.hub.status(site.now_s)
    assert (status["jobs"], status["slots"], status["step"]) == (1, 2, 3)
    rows = {row["node"]: row for row in status["workers"]}
    assert (rows["a"]["jobs"], rows["a"]["loss"], rows["a"]["state"]) == (1, 0.25, "here")
    assert rows["b"]["jobs"] == 0


@pytest.mark.parametrize("before", [1, 5])
def test_a_worker_goes_on_with_another_run_at_the_same_address(before):
    site = Site("a", 1, incarnation=before)
    spoke = site.spokes["a"]
    site.order(1, 0)
    assert (spoke.state, spoke.incarnation, spoke.server) == ("working", 1, before)
    site.hub = ServerProtocol("another", "text", KINDS, 1, 1, Liveness(1.0), "1")
    spoke.receive(site.hub._packed(AGAIN, 0, 0), site.now_s)
    site.now_s += 10
    site.settle()
    assert (spoke.state, spoke.run, spoke.incarnation) == ("working", "another", 1)
    assert spoke.take() is None  # what it was to do is forgotten
    site.order(7, 0)
    site.answer("a")
    assert [answer.serial for answer in site.heard(JobResult)] == [7]


def test_an_idle_worker_is_found_where_it_connected_anew():
    site = Site("a", 1)
    site.order(1, 0)
    site.answer("a")  # and now it waits
    site.spokes["elsewhere"] = site.spokes.pop("a")  # its connection broke, and is made again

    def receive(name, frames):
        site.hub.receive(name.encode(), "a", [bytes(frame) for frame in frames], site.now_s)

    site.receive = receive
    site.order(2, 0)
    for _ in range(5):
        site.settle()
    assert [order.serial for order in site.spokes["elsewhere"].orders] == [2]


def test_who_was_welcomed_meanwhile_does_not_ask_again():
    """What a server says of a message to the one before it may come after its welcome."""
    spoke = Site("a", 1, incarnation=2).spokes["a"]
    for server, state in ((1, "working"), (2, "calling")):
        (parcel,) = wire.parcels("again", say.Again(server))
        frames = wire.pack(parcel, run="r", node="server", incarnation=2, to=spoke.incarnation)
        spoke.receive([bytes(frame) for frame in frames], 0.0)
        assert spoke.state == state


def test_what_is_no_offence_does_not_count_as_one():
    spoke = Site("a", 1).spokes["a"]
    spoke.counts.update(rejoins=5, in_vain=5, unsent=50)
    spoke.receive([b"x"], 0.0)
    assert spoke.fate is None


def test_in_a_run_without_loops_nobody_says_what_a_model_is():
    site = Site("", 2)
    site.spokes = {n: WorkerProtocol(n, i, "1", n, 0.0) for i, n in enumerate("ab", 1)}
    liar = site.spokes["a"]
    ready = liar.ready
    liar.ready = lambda kinds, now_s: ready(kinds, now_s, '[["w",[7]]]')
    site.settle()
    assert site.spokes["b"].state == "working"
    assert "here is none" in str(liar.fate)


def test_the_shapes_of_a_loop_make_its_model():
    for text in ("", '[["w",[7]]]', '[["w",[2]],["w",[2]]]', '[["w",[4]],'):
        site = Site("", 1)
        site.hub.dim = D
        spoke = site.spokes["a"] = WorkerProtocol("a", 1, "1", "a", 0.0)
        ready = spoke.ready
        spoke.ready = lambda kinds, now_s, ready=ready, text=text: ready(kinds, now_s, text)
        site.settle()
        assert (site.hub.shapes, site.heard(Back)) == ("", [])


@pytest.mark.parametrize("spent_s", [float("nan"), float("inf"), -1.0])
def test_time_that_nobody_can_have_spent(spent_s):
    site = Site("a", 1)
    site.order(1, 0)
    order = site.spokes["a"].take()
    site.spokes["a"].answer(order, JobResult(order.serial, 1.0, X, {}, spent_s), site.now_s)
    site.settle()
    assert not site.heard(JobResult)


def test_a_status_is_json_and_says_nothing_to_a_terminal():
    site = Site(["a[/x]\x1b[2J"], 1)
    text = json.dumps(site.hub.status(site.now_s))
    (row,) = json.loads(text, parse_constant=pytest.fail)["workers"]
    assert row["loss"] is None
    table = shown(json.loads(text))
    console = Console(width=200)
    with console.capture() as said:
        console.print(table)
    assert "a[/x]?[2J" in said.get()


def test_who_was_shut_out_is_told_nothing():
    site = Site("a", 1)
    site.hub._shut_out(site.hub.seats["a"], "it misbehaves")
    site.hub.outbox.clear()
    forged(site, "a", "ask", say.Ask(), run="", sequence=0)
    assert site.hub.counts["wrong_node"] == 1
    assert (b"a", "wrong_node") in site.hub.cuts


def test_whose_key_is_listed_under_another_name_is_told_and_may_come_back_under_it():
    site = Site("b", 2)
    spoke = WorkerProtocol("a", 7, "1", "there", site.now_s)
    spoke.tick(site.now_s)
    ((hello,), site.hub.cuts) = spoke.outbox, []
    site.hub.receive(b"there", "ann", [bytes(frame) for frame in hello], site.now_s)
    assert (site.hub.counts["wrong_node"], site.hub.cuts) == (1, [])  # it is to read the answer
    for address, frames in site.hub.outbox:
        if address == b"there":
            spoke.receive([bytes(frame) for frame in frames], site.now_s)
    assert isinstance(spoke.fate, Refused)
    assert "its key is listed as ann, and it says that it is a" in str(spoke.fate)
    assert site.hub.roster.quarantined == {}
    assert list(site.hub.seats) == ["b"]


def test_who_is_not_listed_any_more_is_nobody_until_it_is_again():
    site = Site("ab", 2)
    site.hub.revoke("a")
    assert list(site.hub.seats) == ["b"]
    (parcel,) = wire.parcels("hello", say.Hello(7, "1", "there"))
    hello = [bytes(frame) for frame in wire.pack(parcel, run="", node="a", incarnation=0)]
    site.hub.cuts.clear()
    site.hub.receive(b"anew", "", hello, site.now_s)  # its key is not in the list
    assert list(site.hub.seats) == ["b"]
    assert site.hub.cuts == [(b"anew", "wrong_node")]
    site.hub.receive(b"anew", "a", hello, site.now_s)  # it is again
    assert sorted(site.hub.seats) == ["a", "b"]


def test_how_much_a_message_speaks_against_its_connection():
    """What an honest node may have on its way is borne longer than what only others say."""
    site = Site("a", 1)
    (parcel,) = wire.parcels("pulse", say.Pulse())
    late = wire.pack(parcel, run="r", node="a", incarnation=1, to=site.hub.incarnation + 1)
    other = wire.pack(parcel, run="another", node="a", incarnation=1)
    (parcel,) = wire.parcels("ask", say.Ask())
    ask = wire.pack(parcel, run="", node="z", incarnation=0)
    blames = [
        site.hub.receive(b"z", None, [bytes(frame) for frame in frames], site.now_s)
        for frames in (late, other, [b"no header"], ask)
    ]
    assert blames == [1, 1, GRAVE, 0]


def test_who_asks_all_the_time_is_not_looked_up_all_the_time(monkeypatch):
    site, looked = Site("a", 1), []
    status = site.hub.status
    monkeypatch.setattr(site.hub, "status", lambda now_s: looked.append(now_s) or status(now_s))
    (parcel,) = wire.parcels("ask", say.Ask())
    ask = [bytes(frame) for frame in wire.pack(parcel, run="", node="z", incarnation=0)]
    for _ in range(100):
        site.hub.receive(b"z", None, ask, site.now_s)
    assert len(looked) == 1
    assert len(site.hub.outbox) == 100
    site.hub.receive(b"z", None, ask, site.now_s + site.hub.liveness.tick_s)
    assert len(looked) == 2
