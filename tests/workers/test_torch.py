"""A user's module, loss and data set: what is understood, what is refused, what they may change."""

import random

import numpy as np
import pytest
import torch
from modules import linear, made, table
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import offbeat
from offbeat.workers.tasks import TASKS
from offbeat.workers.tasks.samples import drawn


class Pairs(Dataset):
    """Samples of ``table``, as ``change`` makes them."""

    def __init__(self, change=lambda a, y: (a, y), n=60):
        self.data, self.change = table(n), change

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.change(*self.data[i])


def jobs(task, k=6):
    return np.tile(task.initial(0), (k, 1)), np.arange(k) % task.workers, np.arange(k)


def same(one, other, k=6, **room):
    pair = one.gradient(*jobs(one, k)), other.gradient(*jobs(other, k))
    for left, right in zip(*pair, strict=True):
        np.testing.assert_allclose(left, right, **{"rtol": 1e-6, "atol": 1e-7, **room})


# -- What is a classification ----------------------------------------------------------------------


def cancer():
    a, y = load_breast_cancer(return_X_y=True)
    a = (a - a.mean(0)) / a.std(0)
    return torch.tensor(a, dtype=torch.float32), torch.tensor(y)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(1), y.float()), lambda y: y),
        (nn.BCEWithLogitsLoss(), lambda y: y[:, None].float()),
        (lambda p, y: F.binary_cross_entropy(p.sigmoid().squeeze(1), y.float()), lambda y: y),
    ],
)
def test_one_logit_is_a_classifier_by_its_sign(loss, targets):
    """Of the untrained module and of one trained for a while; 0.970 was once said to be 0.683."""
    a, y = cancer()
    task = made(linear(30, 1), loss, TensorDataset(a, targets(y)))
    result = offbeat.run(task, "pure(lr=0.1)", "3", stop={"steps": 60}, evaluate={"steps": 60})
    x = torch.from_numpy(result.x.copy())
    right = ((a @ x[:30] + x[30] > 0) == (y == 1)).float().mean()
    assert right > 0.9
    if "accuracy" not in result.final:  # a loss that takes a sigmoid is nobody's that is known
        assert "sigmoid" in loss.__code__.co_names
    else:
        assert result.final["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("loss", "targets", "accuracy"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), None, True),
        (lambda z, y: F.cross_entropy(z, y), None, True),
        (lambda z, y: F.cross_entropy(z, y), lambda y: F.one_hot(y, 3).float(), True),
        (nn.CrossEntropyLoss(), lambda y: 0.9 * F.one_hot(y, 3) + 0.1 / 3, False),  # soft
        (lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()), None, False),
        (lambda z, y: F.mse_loss(z[:, 0], y.float()), None, False),  # whole numbers, no classes
        (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3).float(), False),  # three labels each
    ],
)
def test_accuracy_is_right_or_absent(loss, targets, accuracy):
    task = made(loss=loss, data=table(targets=targets))
    x = task.initial(0)
    a, y = table().tensors
    right = (a @ torch.from_numpy(x[:18]).view(3, 6).T + torch.from_numpy(x[18:])).argmax(1) == y
    facts = task.evaluate(x)
    assert facts.get("accuracy") == (int(right.sum()) / 60 if accuracy else None)


def test_accuracy_that_the_user_says():
    hits = lambda outputs, targets: outputs["z"].argmax(1) == targets  # noqa: E731

    class Named(nn.Linear):
        def forward(self, a):
            return {"z": super().forward(a)}

    torch.manual_seed(1)
    task = made(Named(6, 3), lambda out, y: F.cross_entropy(out["z"], y), accuracy=hits)
    assert task.evaluate(task.initial(0)) == made().evaluate(made().initial(0))
    with pytest.raises(offbeat.ConfigError, match=r"accuracy answered \[\] for 8 samples"):
        made(accuracy=lambda z, y: (z.argmax(1) == y).float().mean())


@pytest.mark.parametrize("targets", [lambda y: F.one_hot(y, 3), lambda y: F.one_hot(y, 3).float()])
@pytest.mark.parametrize("partition", ["sorted", "classes(1)", "dirichlet(0.1)"])
@pytest.mark.parametrize("direct", [True, False])
def test_one_hot_targets_divide_like_their_classes(partition, targets, direct):
    mse = lambda z, y: F.mse_loss(z, y.float())  # noqa: E731
    plain = made(partition=partition)
    data = table(targets=targets)
    hot = made(loss=mse, data=data if direct else [*data], partition=partition)
    np.testing.assert_array_equal(hot._order, plain._order)
    np.testing.assert_array_equal(hot.sizes, plain.sizes)


def test_targets_that_are_no_classes_need_labels():
    def soft(y):
        return torch.linspace(0, 1, len(y))[:, None]

    options = {"module": linear(6, 1), "loss": F.mse_loss, "partition": "sorted"}
    with pytest.raises(offbeat.ConfigError, match="neither whole numbers nor one-hot; give labels"):
        made(data=table(targets=soft), **options)
    labels = table().tensors[1].numpy()
    task = made(data=table(targets=soft), labels=labels, **options)
    np.testing.assert_array_equal(task._order, np.argsort(labels, kind="stable"))
    with pytest.raises(offbeat.ConfigError, match=r"labels are of shape \[59\]; one for each of"):
        made(data=table(targets=soft), labels=labels[:59], **options)
    made(data=table(targets=soft), **options | {"partition": "contiguous"})  # looks at none


def test_accuracy_is_measured_on_what_is_held_out():
    task = made(holdout=0.3, partition="sorted")
    assert (len(task._order), len(task._away)) == (42, 18)
    assert not set(task._order) & set(task._away)
    x, (a, y) = task.initial(0), table().tensors
    z = a @ torch.from_numpy(x[:18]).view(3, 6).T + torch.from_numpy(x[18:])
    facts = task.evaluate(x)
    assert facts["accuracy"] == pytest.approx(float((z.argmax(1) == y)[task._away].float().mean()))
    shares = np.split(task._order, np.cumsum(task.sizes)[:-1])
    losses = [F.cross_entropy(z[share], y[share]).item() for share in shares]
    assert facts["loss"] == pytest.approx(np.mean(losses))
    with pytest.raises(offbeat.ConfigError, match=r"holdout=0\.3, and what is right under"):
        made(linear(6, 1), F.mse_loss, table(targets=lambda y: y[:, None].float()), holdout=0.3)


# -- Shapes, before the run ------------------------------------------------------------------------


def penalised(net):
    return lambda z, y: F.cross_entropy(z, y) + 0.1 * net.weight.pow(2).sum()


def with_penalty():
    net = linear()
    return {"module": net, "loss": penalised(net)}


def regression(loss):
    return {
        "module": linear(6, 1), "loss": loss,
        "data": TensorDataset(table().tensors[0], torch.randn(60)),
    }  # fmt: skip


WRONG = {
    "broadcast": (lambda: regression(F.mse_loss), r"outputs \[8, 1\] and targets \[8\] differ in"),
    "broadcast by hand": (
        lambda: regression(lambda z, y: ((z - y) ** 2).mean()),
        r"compares each output to every target; give them one shape",
    ),
    "sum": (lambda: {"loss": nn.CrossEntropyLoss(reduction="sum")}, "a sum over the batch"),
    "none": (
        lambda: {"loss": nn.CrossEntropyLoss(reduction="none")},
        r"the loss of a batch of 8 is \[8\], not one number",
    ),
    "batch of one": (
        lambda: {
            "module": nn.Sequential(linear(), nn.BatchNorm1d(3, track_running_stats=False)),
            "batch": 1,
        },
        r"a job of 1 samples cannot be computed \(ValueError: Expected more than 1 value",
    ),
    "width": (lambda: {"module": linear(5)}, r"cannot compute a batch of inputs float32\[8, 6\]"),
    "penalty": (with_penalty, "the loss looks at the module's own parameters"),
    "bfloat16": (lambda: {"module": linear().bfloat16()}, "are torch.bfloat16; keep them in"),
    "parallel": (lambda: {"module": nn.DataParallel(linear())}, "give its .module: a job is comp"),
    "lazy": (lambda: {"module": nn.LazyLinear(3)}, "the module is lazy"),
    "iterable": (
        lambda: {"data": type("Stream", (IterableDataset,), {"__iter__": lambda self: iter(())})()},
        "Stream has no samples by number",
    ),
    "loader": (lambda: {"data": DataLoader(table())}, "a DataLoader is given; give its .dataset"),
    "dicts": (
        lambda: {"data": Pairs(lambda a, y: {"x": a, "labels": y})},
        "samples are dicts of x, labels, .* for example target='labels'",
    ),
    "triples": (lambda: {"data": Pairs(lambda a, y: (a, a, y))}, "of 3 parts, .* target=2;"),
    "no such part": (
        lambda: {"data": Pairs(lambda a, y: {"x": a, "labels": y}), "target": "label"},
        "target='label' is no part of a sample, .* did you mean \"labels\"",
    ),
    "ragged": (
        lambda: {"data": Pairs(lambda a, y: (a[: 1 + int(y)], y))},
        "8 samples make no batch",
    ),
}


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.mse_loss(z.squeeze(1), y),
        lambda z, y: F.mse_loss(z.squeeze(), y),
        lambda z, y: ((z - y[:, None]) ** 2).mean(),
        lambda z, y: F.mse_loss(z.reshape(-1), y.reshape(-1)),
        lambda z, y: (z.squeeze(1) - y).pow(2).mean() + z.var(),  # no mean of samples' losses
    ],
)
def test_losses_that_bring_shapes_together_are_taken(loss):
    task = made(**regression(loss))
    assert task.evaluate(task.initial(0)).keys() == {"loss", "grad_norm"}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_understood_is_refused_before_the_run(wrong):
    options, sentence = WRONG[wrong]
    with pytest.raises(offbeat.ConfigError, match=sentence) as caught:
        made(**options())
    assert "\n" not in str(caught.value)


class Two(nn.Module):
    """Of two inputs, by position or by name; answers a tuple."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, a, b):
        return self.layer(a) + b, a


KINDS = {
    "dicts": (lambda a, y: {"b": 0 * a[:3], "y": y, "a": a}, "y"),
    "triples": (lambda a, y: (a, 0 * a[:3], y), 2),
    "last": (lambda a, y: (a, 0 * a[:3], y), -1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dicts_triples_and_modules_that_answer_tuples(kind):
    change, target = KINDS[kind]
    task = made(Two(), lambda out, y: F.cross_entropy(out[0], y), Pairs(change), target=target)
    plain = made()
    same(task, plain)
    same(task, plain, k=20, rtol=1e-5, atol=1e-6)  # in one call
    assert task.evaluate(task.initial(0))["loss"] == pytest.approx(
        plain.evaluate(plain.initial(0))["loss"]
    )


def test_samples_of_unlike_lengths_with_a_collate_of_ones_own():
    def pad(samples):
        rows = [a for a, _ in samples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack(
            [y for _, y in samples]
        )

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(1, 3)

        def forward(self, a):
            return self.layer(a.sum(1, keepdim=True))

    padded = made(Pooled(), data=Pairs(lambda a, y: (a[: 1 + int(y)], y)), collate=pad)
    whole = made(Pooled(), data=Pairs(lambda a, y: (a * (torch.arange(6) <= y), y)))
    same(padded, whole, rtol=1e-4, atol=1e-6)


def test_a_collate_that_answers_what_it_keeps():
    """The module changes its copy; a loss of few bits is one, too."""

    class Halving(nn.Linear):
        def forward(self, a):
            return super().forward(a.mul_(0.5))

    def halving():
        torch.manual_seed(1)
        return Halving(6, 3)

    a, y = table().tensors
    coarse = lambda z, t: F.cross_entropy(z, t).bfloat16()  # noqa: E731
    kept = made(halving(), coarse, Pairs(), collate=lambda samples: (a, y), batch="full")
    losses, gradients = kept.gradient(*jobs(kept, 2))
    whole = F.cross_entropy(F.linear(a / 2, *linear().parameters()), y).item()
    np.testing.assert_allclose(losses, whole, rtol=1e-2)
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert torch.equal(a, table().tensors[0])


def test_channels_last_and_sparse_gradients_are_the_plain_ones():
    def images(memory):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 3))
        data = TensorDataset(torch.randn(30, 2, 5, 5), torch.randint(3, (30,)))
        return made(net.to(memory_format=memory), data=data)

    one, other = images(torch.channels_last), images(torch.contiguous_format)
    np.testing.assert_array_equal(one.initial(0), other.initial(0))
    same(one, other, rtol=1e-4, atol=1e-5)

    def words(sparse):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        return made(net, data=TensorDataset(torch.randint(7, (30, 2)), torch.randint(3, (30,))))

    one, other = words(True), words(False)
    same(one, other)


# -- What the user wrote is what is computed -------------------------------------------------------


class Scaled(TensorDataset):
    def __getitem__(self, i):
        a, y = super().__getitem__(i)
        return 10 * a, y


class Fetched(TensorDataset):
    def __getitems__(self, rows):
        return [(10 * self.tensors[0][i], self.tensors[1][i]) for i in rows]


class Halved(TensorDataset):
    def __len__(self):
        return 30


@pytest.mark.parametrize("kind", [Scaled, Fetched])
def test_a_data_sets_own_samples_are_asked_for(kind):
    a, y = table().tensors
    ten = made(data=TensorDataset(10 * a, y))
    same(made(data=kind(a, y)), ten)
    assert made(data=kind(a, y)).evaluate(ten.initial(0)) == ten.evaluate(ten.initial(0))
    same(made(data=Subset(kind(a, y), range(60))), ten)


def test_subsets_and_lengths_are_what_they_say():
    a, y = table().tensors
    some = [5, 3, 40, *range(10, 37)]
    inner = Subset(Subset(TensorDataset(a, y), range(59, -1, -1)), some)
    task = made(data=inner, partition="sorted")
    assert task._data.direct
    same(task, made(data=[inner[i] for i in range(len(inner))], partition="sorted"))
    mask = torch.arange(60) < 20  # is no list of rows: each sample has an axis more
    with pytest.raises(offbeat.ConfigError, match="samples make no batch"):
        made(data=Subset(TensorDataset(a, y), mask))
    same(made(data=Halved(a, y)), made(data=TensorDataset(a[:30], y[:30])))


# -- Nothing but seed, worker and job --------------------------------------------------------------

DRAWS = {
    "torch": lambda: torch.randn(6),
    "numpy": lambda: torch.from_numpy(np.random.randn(6).astype(np.float32)),
    "python": lambda: torch.tensor([random.gauss(0, 1) for _ in range(6)]),
}


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("where", ["data", "module"])
def test_draws_from_global_generators_are_addressed(source, where, tmp_path):
    """Evaluations, other draws and a restart change nothing; who draws besides draws on."""
    draw = DRAWS[source]

    class Noisy(nn.Linear):
        def forward(self, a):
            return super().forward(a + draw())

    def task():
        if where == "data":
            return made(data=Pairs(lambda a, y: (a + draw(), y)))
        torch.manual_seed(1)
        return made(Noisy(6, 3))

    def run(made, **options):
        return offbeat.run(made, "pure(lr=0.1)", "3 1..3", stop={"steps": 40}, **options)

    often, another = run(task(), evaluate={"steps": 3}, folder=tmp_path / "run"), task()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    states = drawn()
    once = run(another, evaluate={"steps": 40})
    assert states == drawn()
    np.testing.assert_array_equal(once.x, often.x)
    assert once.final == often.final
    half = offbeat.run(task(), "pure(lr=0.1)", "3 1..3", stop={"steps": 20}, folder=tmp_path / "h")
    assert half.reason == "steps"
    gone_on = offbeat.resume(tmp_path / "h", task=task(), overrides=["stop.steps=40"])
    np.testing.assert_array_equal(gone_on.x, often.x)
    single = task()
    many, alone = single.gradient(*jobs(single, 20)), single.gradient(*jobs(single, 3))
    np.testing.assert_allclose(many[1][:3], alone[1], rtol=1e-4, atol=1e-6)


def counted():
    calls = iter(range(10**6))
    return lambda a, y: (a * (next(calls) % 2), y)


def drawing():
    own = np.random.default_rng(0)
    return lambda a, y: (a + float(own.normal()), y)


def remembering():
    seen = {}

    def change(a, y):
        key = a.sum().item()
        if key not in seen:
            seen[key] = torch.randn(6)
        return a + seen[key], y

    return change


class Counts(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.calls = 0

    def forward(self, a):
        self.calls += 1
        return super().forward(a) * (1 + self.calls % 2)


class Buffered(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, a):
        self.seen += 1
        return super().forward(a)


STATEFUL = {
    "counter": (lambda: {"data": Pairs(counted())}, "the same samples, asked for again, are other"),
    "generator": (lambda: {"data": Pairs(drawing())}, "the same samples, asked for again, are oth"),
    "cache": (lambda: {"data": Pairs(remembering())}, "only when it is first asked for, and remem"),
    "module": (lambda: {"module": Counts()}, "module and loss, given the same again, answer other"),
    "buffer": (lambda: {"module": Buffered()}, 'the module changes its "seen" as it computes'),
    "spectral norm": (
        lambda: {"module": nn.utils.parametrizations.spectral_norm(linear())},
        "answer otherwise|changes its",
    ),
}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("batch", [1, 8, 12, "full"])
def test_what_keeps_a_state_is_refused(kind, batch):
    options, sentence = STATEFUL[kind]
    with pytest.raises(offbeat.ConfigError, match=sentence):
        made(**options(), batch=batch)


MINE = """
import random
import numpy as np
import torch

SHIFT = float(torch.randn(()))

def make():
    a = torch.from_numpy(np.random.randn(30, 2).astype(np.float32)) + random.random() + SHIFT
    data = torch.utils.data.TensorDataset(a, a.sum(1, keepdim=True))
    more = {"accuracy": lambda z, y: (z - y).abs() < 0.1, "labels": range(30)}
    return torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, data, more
"""


def test_a_file_is_made_by_its_seed_alone(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    table = {"name": "torch", "file": str(tmp_path / "mine.py"), "workers": 3, "holdout": 0.2}
    tasks = [TASKS.table({**table, "seed": seed, "partition": "sorted"}) for seed in (4, 4, 5)]
    facts = [task.evaluate(np.ones(3, np.float32)) for task in tasks]
    assert facts[0] == facts[1] != facts[2]
    assert (np.diff(tasks[0]._order) > 0).all()  # by its labels
    (tmp_path / "mine.py").write_text(MINE.replace('"labels"', '"label"'))
    with pytest.raises(offbeat.ConfigError, match='the unknown "label"; did you mean "labels"'):
        TASKS.table(table)
