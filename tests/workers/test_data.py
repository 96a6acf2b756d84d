"""Data files, whole and broken; partitions."""

import bz2
import gzip

import numpy as np
import pytest

from offbeat import ConfigError
from offbeat.runtime.randomness import rng
from offbeat.workers.data import BUNDLED, load
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.tasks import logistic

LINES = "+1 1:0.5 3:2\n-1 2:1\n+1 1:1.5\n"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name):
    features, labels = load(name)
    assert features.dtype == np.float32
    assert len(features) == len(labels)
    assert set(labels) == set(range(labels.max() + 1))


@pytest.mark.parametrize("ending", ["svm", "gz", "bz2"])
def test_libsvm(tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    opened = {"svm": open, "gz": gzip.open, "bz2": bz2.open}[ending]
    with opened(path, "wb") as file:
        file.write(LINES.encode())
    features, labels = load(str(path), "float64")
    np.testing.assert_array_equal(features, [[0.5, 0, 2], [0, 1, 0], [1.5, 0, 0]])
    np.testing.assert_array_equal(labels, [1, 0, 1])


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.arange(12).reshape(3, 2, 2), y=[3, 5, 3])
    features, labels = load(str(tmp_path / "a.npz"))
    assert features.shape == (3, 4)
    np.testing.assert_array_equal(labels, [0, 1, 0])
    np.savez(tmp_path / "b.npz", x=np.full((2, 3), 255, np.uint8), y=[0, 1])
    assert load(str(tmp_path / "b.npz"))[0].max() == 1.0  # pixels


def ragged(path):
    rows = np.empty(2, object)
    rows[:] = [[1.0], [1.0, 2.0]]
    np.savez(path, X=rows, y=[0, 1])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda p: np.savez(p, X=[[1.0, np.nan], [1, 1]], y=[0, 1]),
            "row 1 .*not finite.*features",
        ),
        (lambda p: np.savez(p, X=[[1.0], [np.inf]], y=[0, 1]), "row 2 .*not finite"),
        (lambda p: np.savez(p, X=[[1.0], [2.0]], y=[0.0, np.nan]), "row 2 .*not finite.*labels"),
        (lambda p: np.savez(p, X=[[1.0], [2.0]], y=[0, 1, 1]), "2 rows of features but 3 labels"),
        (lambda p: np.savez(p, X=[[1.0], [2.0]], y=[1, 1]), "two classes"),
        (lambda p: np.savez(p, X=[["a"], ["b"]], y=[1, 0]), "numbers are needed"),
        (lambda p: np.savez(p, a=[[1.0]]), "needs an array named X"),
        (lambda p: np.savez(p, X=np.ones((2, 0)), y=[0, 1]), "has no rows of values"),
        (lambda p: np.savez(p, X=[[1.0], [2.0]], y=[0.5, 1.25]), "not measurements"),
        (lambda p: np.savez(p, X=[[1.0], [1e39]], y=[0, 1]), "row 2 .*not finite"),
        (lambda p: p.write_bytes(b"\x93NUMPY nonsense"), "cannot be read"),
        (ragged, "unequal lengths"),
        (lambda p: p.write_bytes(b"PK\x03\x04 torn"), "cannot be read"),
        (lambda p: p.write_bytes(b""), "cannot be read"),
    ],
)
def test_broken_npz_is_one_sentence(tmp_path, write, said):
    path = tmp_path / "a.npz"
    write(path)
    with pytest.raises(ConfigError, match=said) as caught:
        load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1 1:x\n", "+1 1:0.5 junk\n", "1 3:1 1:2\n", ""])
def test_broken_libsvm_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.svm"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.svm"):
        load(str(path))


def test_libsvm_with_nan(tmp_path):
    path = tmp_path / "a.svm"
    path.write_text("1 1:1\n-1 1:nan\n")
    with pytest.raises(ConfigError, match="row 2"):
        load(str(path))


def test_unknown_names():
    with pytest.raises(ConfigError, match='did you mean "digits"'):
        load("digit")
    with pytest.raises(ConfigError, match="no data set or file"):
        load("/nowhere/a.svm")


@pytest.mark.parametrize(
    "text", ["iid", "contiguous", "sorted", "classes(2)", "dirichlet(0.3)", "dirichlet(100.0)"]
)
@pytest.mark.parametrize("workers", [1, 7])
def test_partitions_are_disjoint_and_complete(text, workers):
    labels = load("digits")[1]
    parts = PARTITIONS.parse(text)(labels, workers, 3)
    rows = np.concatenate(parts)
    assert len(parts) == workers
    assert min(map(len, parts)) >= 1
    assert len(set(rows.tolist())) == len(rows)
    left_out = len(labels) % workers if text == "contiguous" else 0
    assert len(rows) == len(labels) - left_out
    again = PARTITIONS.parse(text)(labels, workers, 3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_skew_is_what_it_says():
    labels = load("digits")[1]
    seen = [len(set(labels[p])) for p in PARTITIONS.parse("sorted")(labels, 10, 0)]
    assert max(seen) <= 3
    seen = [len(set(labels[p])) for p in PARTITIONS.parse("classes(2)")(labels, 10, 0)]
    assert max(seen) <= 4
    entropy = []
    for alpha in (0.05, 1.0, 100.0):
        parts = PARTITIONS.parse(f"dirichlet({alpha})")(labels, 10, 0)
        shares = np.array([np.bincount(labels[p], minlength=10) / len(p) for p in parts])
        entropy.append(-(shares * np.log(shares + 1e-12)).sum(axis=1).mean())
    assert entropy[0] < entropy[1] < entropy[2] <= np.log(10)


def test_more_workers_than_samples():
    with pytest.raises(ConfigError, match="151 workers but only 150 samples"):
        logistic("iris", workers=151)
    with pytest.raises(ConfigError, match="without samples"):
        logistic("iris", workers=150, partition="dirichlet(0.001)")


def test_holdout_is_held_out():
    task = logistic("digits", workers=4, holdout=0.25)
    features, labels = task.shards.test
    assert len(labels) == round(0.25 * 1797)
    assert len(task.shards.labels) == 1797 - len(labels)
    both = np.concatenate([features, task.shards.features])
    assert sorted(map(bytes, both)) == sorted(map(bytes, load("digits")[0]))


def test_the_holdout_does_not_change_the_model():
    """Classes are counted before samples are held out."""
    dims = {logistic("iris", workers=2, holdout=0.6, seed=seed).dim for seed in range(5)}
    assert dims == {12}


def test_a_holdout_that_leaves_one_class_is_refused(tmp_path):
    away = set(rng(0, "holdout").permutation(40)[:20].tolist())  # held out with seed 0
    held, kept = min(away), min(set(range(40)) - away)
    np.savez(tmp_path / "a.npz", X=np.eye(40), y=np.arange(40) == kept)
    assert logistic(str(tmp_path / "a.npz"), workers=2, holdout=0.5).dim == 40
    np.savez(tmp_path / "a.npz", X=np.eye(40), y=np.arange(40) == held)
    with pytest.raises(ConfigError, match="one class only"):
        logistic(str(tmp_path / "a.npz"), workers=2, holdout=0.5)
