"""Methods, tasks and work of a user's own, with no more than what the contracts say."""

from dataclasses import dataclass

import cloudpickle
import numpy as np
import pytest

import offbeat
from offbeat import ConfigError
from offbeat.algorithms.base import completed
from offbeat.algorithms.gossip import Channel, Gossip
from offbeat.algorithms.gossip.contract import own_gossip
from offbeat.algorithms.server import Algorithm
from offbeat.algorithms.server.method import Finisher, Method, Schedule, StepSize
from offbeat.workers.compressed import compressed

STOP = {"steps": 200}
FLEETS = [
    "10 1..10",
    offbeat.Fleet(
        workers=10,
        speeds="1..10",
        on_outage="lose",
        outages=[offbeat.Outage(worker=0, from_s=7.5, to_s=20.0)],
    ),
]


class Own:
    """As the README says: ``start`` and ``arrive``."""

    def __init__(self, lr):
        self.lr = np.float32(lr)

    def start(self, server):
        for worker in range(server.n):
            server.assign(worker)

    def arrive(self, server, update):
        server.apply(self.lr * update.payload)
        server.assign(update.worker)


class OwnGossip:
    channels = {"x": Channel(gain=0.4)}  # noqa: RUF012 - as a user writes it

    def __init__(self, compressor="identity"):
        self.compressor = compressor

    def init(self, node):
        node.publish("x", node.x)

    def ask(self, node):
        node.x = node.x + 0.4 * node.mix("x")
        return node.x

    def tell(self, node, gradient):
        node.x = node.x - 0.1 * gradient
        node.publish("x", node.x)


class DerivedGossip(OwnGossip, Gossip):
    def __init__(self, compressor="identity"):
        Gossip.__init__(self, OwnGossip.channels, compressor)


class OwnTask:
    workers, dim = 10, 3

    def initial(self, seed):
        return np.ones(3)

    def gradient(self, x, worker, draw):
        return (x * x).sum(axis=1) / 2, x.copy()

    def evaluate(self, x):
        return {"loss": float(x @ x / 2)}


class OwnWork:
    steps = 1

    def keep(self, n, x):
        return {"sum": np.zeros((n, len(x)), x.dtype)}

    def update(self, task, x, worker, draw, steps, kept):
        losses, gradients = task.gradient(x, worker, draw)
        kept["sum"] += gradients
        return losses, gradients


@pytest.mark.parametrize("fleet", FLEETS)
def test_a_method_with_start_and_arrive(fleet, tmp_path):
    method = Own(0.0625)
    found = offbeat.run(
        "quadratic(5, noise=0.1)", method, fleet, stop=STOP, folder=tmp_path / "run"
    )
    expected = offbeat.run("quadratic(5, noise=0.1)", "pure(lr=0.0625)", fleet, stop=STOP)
    assert np.array_equal(found.x, expected.x)
    assert (found.name, type(method)) == ("Own", Own)
    longer = offbeat.resume(tmp_path / "run", algorithm=Own(0.0625), overrides=["stop.steps=300"])
    whole = offbeat.run("quadratic(5, noise=0.1)", "pure(lr=0.0625)", fleet, stop={"steps": 300})
    assert np.array_equal(longer.x, whole.x)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("compressor", ["identity", "topk(0.2)"])
def test_a_gossip_method_with_init_ask_and_tell(mode, compressor):
    runs = [
        offbeat.run(
            "quadratic(5, noise=0.1)", kind(compressor), "6 1..6", "ring:6", stop=STOP, mode=mode
        )
        for kind in (OwnGossip, DerivedGossip)
    ]
    assert np.array_equal(runs[0].x, runs[1].x)
    assert runs[0].final["loss"] < 1.0


def test_what_is_completed_can_be_sent():
    made = own_gossip(OwnGossip("topk(0.2)"))
    again = cloudpickle.loads(cloudpickle.dumps(made))
    assert again.channels == made.channels
    assert str(again.compressor) == "topk(k=0.2)"
    assert again.varying


def test_a_task_and_work_of_ones_own(tmp_path):
    own = {"task": OwnTask(), "work": OwnWork()}
    run = offbeat.run(
        own["task"], "shuffled(lr=0.1)", "10 1..10", work=own["work"], stop=STOP, folder=tmp_path
    )
    assert run.final["loss"] < 1e-4
    longer = offbeat.resume(tmp_path, **own, overrides=["stop.steps=300"])
    whole = offbeat.run(OwnTask(), "shuffled(lr=0.1)", "10 1..10", stop={"steps": 300})
    assert np.array_equal(longer.x, whole.x)


class OwnPlan:
    def start(self, server):
        Schedule(Finisher()).start(server)

    def arrived(self, server, update):
        server.assign(update.worker)


@pytest.mark.parametrize("fleet", FLEETS)
def test_a_plan_with_start_and_arrived(fleet):
    runs = [
        offbeat.run("quadratic(5, noise=0.1)", Method(plan, [StepSize(0.0625)]), fleet, stop=STOP)
        for plan in (OwnPlan(), Schedule(Finisher()))
    ]
    assert np.array_equal(runs[0].x, runs[1].x)


@dataclass(slots=True)
class Slotted:
    lr: float

    def arrive(self, server, update): ...


def without(kind, name):
    return type("Less", (), {k: v for k, v in vars(kind).items() if k not in (name, "__dict__")})()


def but(kind, **other):
    return type("Other", (kind,), other)()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"algorithm": without(OwnGossip, "tell")}, "Less has no tell; see .*Gossip"),
        ({"algorithm": without(OwnGossip, "channels")}, "Less has no channels"),
        ({"algorithm": but(OwnGossip, channels=["x"])}, "Other has no channels"),
        (
            {"algorithm": but(OwnGossip, channels={"y": Channel()}), "topology": "ring"},
            'no channel "x"; known: y',
        ),
        ({"task": but(OwnTask, initial=lambda self, seed: [1.0])}, r"point is list\[1\]; .* \[3\]"),
        ({"task": but(OwnTask, initial=lambda self, seed: np.ones(3, int))}, r"is int64\[3\]; an"),
        (
            {"task": but(OwnTask, gradient=lambda self, x, *job: ((x * x).sum(), x))},
            r"the loss of one job is float64\[\]; an array of floats \[1\]",
        ),
        (
            {"task": but(OwnTask, gradient=lambda self, x, *job: (x[:, 0], x[0]))},
            r"the gradient of one job is float64\[3\]; an array of floats \[1, 3\]",
        ),
        ({"task": but(OwnTask, evaluate=lambda self, x: 0.5)}, r"answered 0\.5; numbers by name"),
        ({"algorithm": Slotted(0.1)}, "Slotted cannot be completed .*derive it from .*Algorithm"),
        ({"task": without(OwnTask, "evaluate")}, "Less is no task: it has no evaluate"),
        ({"task": without(OwnTask, "dim")}, "Less is no task: it has no dim"),
        ({"work": without(OwnWork, "keep")}, "Less is no work: it has no keep"),
        ({"work": without(OwnWork, "steps")}, "Less is no work: it has no steps"),
    ],
)
def test_what_is_missing_is_one_sentence(parts, said):
    whole = {"task": "quadratic(5, noise=0.1)", "algorithm": "pure", "fleet": "10 1..10"} | parts
    with pytest.raises(ConfigError, match=said):
        offbeat.run(**whole, stop=STOP)
    if "work" in parts:
        with pytest.raises(ConfigError, match=said):
            compressed("topk(0.1)", parts["work"])


def test_what_is_derived_is_left_as_it_is():
    made = Method(Schedule(Finisher()), [])
    assert completed(made, Algorithm) is made
