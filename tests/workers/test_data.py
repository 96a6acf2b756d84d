"""Data files, whole and broken; partitions."""

import bz2
import gzip
import lzma
import subprocess
import sys

import numpy as np
import pytest

import offbeat
from offbeat import ConfigError
from offbeat.runtime.base.randomness import rng
from offbeat.workers import data
from offbeat.workers.data import BUNDLED, load
from offbeat.workers.partition import PARTITIONS
from offbeat.workers.tasks import TASKS, logistic

LINES = "+1 1:0.5 3:2\n-1 2:1\n+1 1:1.5\n"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled(name):
    features, labels = load(name)
    assert features.dtype == np.float32
    assert len(features) == len(labels)
    assert set(labels) == set(range(labels.max() + 1))


OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# As they are called where LibSVM's authors publish them.
NAMES = (
    "a9a a9a.t news20.binary.bz2 mnist.scale.xz ijcnn1.tr.bz2 ijcnn1.val w1a.svm.gz cod-rna.r "
    "letter.scale.val shuttle.scale.tr covtype.libsvm.binary.scale.bz2 sector.t.scale heart.txt"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_libsvm_by_the_names_its_files_have(tmp_path, name):
    path = tmp_path / name
    with OPEN.get(path.suffix, open)(path, "wb") as file:
        file.write(LINES.encode())
    features, labels = load(str(path), "float64")
    np.testing.assert_array_equal(features, [[0.5, 0, 2], [0, 1, 0], [1.5, 0, 0]])
    np.testing.assert_array_equal(labels, [1, 0, 1])


def test_what_is_packed_is_told_by_what_is_in_it(tmp_path):
    (tmp_path / "a.t").write_bytes(bz2.compress(LINES.encode()))
    (tmp_path / "a.csv.gz").write_bytes(TABLE.encode("utf-16"))
    assert load(str(tmp_path / "a.t"))[0].sum() == 5
    assert load(str(tmp_path / "a.csv.gz"), target="kind")[0].sum() == 45.5
    (tmp_path / "b.t.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(ConfigError, match=r"b\.t\.gz: not a readable LibSVM file \(Compressed"):
        load(str(tmp_path / "b.t.gz"))


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.MAT", "a.npz.gz", "a.arff.bz2"])
def test_other_formats_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    with pytest.raises(ConfigError, match=r"cannot read a \.\w+ file; give the path of a LibSVM"):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 1:1\n\n# so\n-1 2:1 1:3\n", "line 4: index 1 comes after 2"),
        ("1 1:1\n-1 1:3 1:4\n", "line 2: index 1 comes after 1"),
        ("1 1:1\n-1 1:x\n", 'line 2: "1:x" is not index:value'),
        ("1 1:1\n1.0 2.5 3.5\n", 'line 2: "2.5" is not index:value'),
        ("1 1:1\n1,2 1:3\n", 'line 2: the label "1,2" is no number: it has one label'),
        ("+1 1:0.5 junk\n", 'line 1: "junk" is not index:value'),
        ("1 1:1\n-1 1:nan\n", "row 2 has a value that is not finite"),
        ("", "has no values"),
        ("age,label\n", 'line 1: the label "age,label" is no number'),
    ],
)
def test_what_is_wrong_in_a_libsvm_file_has_its_line(tmp_path, text, said):
    (tmp_path / "a.t").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.t: .*{said}"):
        load(str(tmp_path / "a.t"))


TABLE = "width,length,kind\n1,0.5,rose\n2,-1,daisy\n3,4e1,rose\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.CSV", TABLE),
        ("a.csv", TABLE.replace(",", "\t")),
        ("a.csv", "\ufeff" + TABLE.replace("width", '"width"').replace("\n", "\r\n")),
        ("a.csv", TABLE.replace(",", ";")),
        ("a.csv", TABLE.replace("1,0.5", "1, 0.5")),
        ("a.tsv", TABLE.replace(",", "\t")),
        ("a.csv.xz", TABLE),
    ],
)
def test_csv(tmp_path, name, text):
    path = tmp_path / name
    with OPEN.get(path.suffix, open)(path, "wb") as file:
        file.write(text.encode())
    features, labels = load(str(path), "float64", target="kind")
    np.testing.assert_array_equal(features, [[1, 0.5], [2, -1], [3, 40]])
    np.testing.assert_array_equal(labels, [1, 0, 1])  # daisy, rose


def test_the_target_is_any_column_and_flags_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("y,a,b\n7,True,1\n3,False,2\n7,True,3\n")
    features, labels = load(str(tmp_path / "a.csv"), target="y")
    np.testing.assert_array_equal(features, [[1, 1], [0, 2], [1, 3]])
    np.testing.assert_array_equal(labels, [1, 0, 1])


def test_a_csv_on_the_command_line_and_in_a_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,kind\n" + "0.5,1,x\n-1,2,y\n2,0,z\n" * 4)
    for name in ("logistic", "mlp"):
        task = TASKS.parse(f"{name}('{path}', target='kind', workers=2)")
        again = TASKS.table(task.spec.table())
        assert task.shards.classes == again.shards.classes == 3
        np.testing.assert_array_equal(task.shards.features, again.shards.features)
    with pytest.raises(ConfigError, match=r"names a column of a \.csv"):
        logistic("digits", target="kind")


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        (TABLE, None, 'which column is the label. Give target = "kind"'),
        (TABLE, "kin", 'no column is called "kin"; did you mean "kind"'),
        (TABLE.replace("-1", ""), "kind", 'row 2, column "length": there is no value .1 such'),
        (TABLE.replace("-1", "NA"), "kind", 'row 2, column "length": there is no value'),
        (TABLE.replace("daisy", ""), "kind", 'row 2, column "kind": there is no value'),
        (TABLE.replace("-1", "?"), "kind", r'column "length" is text \("\?" in row 2\)'),
        (TABLE, "width", 'column "kind" is text ."rose" in row 1'),
        (TABLE.replace("-1", "inf"), "kind", "row 2 has a value that is not finite"),
        (TABLE.replace("daisy", "rose"), "kind", "all 3 labels are equal"),
        (TABLE, "length", 'column "kind" is text'),
        ("a,b\n1,0.5\n2,1.5\n", "b", "whole numbers, not measurements"),
        ("1,2,0\n3,4,1\n", "0", "first line has numbers"),
        (",a,y\n0,5,1\n1,6,0\n", "y", "column 1 has no name"),
        ("a,a,y\n0,5,1\n1,6,0\n", "y", 'two columns are called "a"'),
        ("a,y\n0,5,1\n1,6,0\n", "y", "more values than its header"),
        ("a,y\n0,5\n1,6,0\n", "y", "cannot be read.*line 3, saw 3"),
        ("a;b,y\n0,5\n1,6\n", "y", "header has both , and ;"),
        ("a\tb;y\n0,5\n1,6\n", "y", "header has both ; and tab"),
        ("a;y\n0,5;1\n1,5;0\n", "y", 'column "a" is text ."0,5"'),
        ("y\n0\n1\n", "y", "no column besides"),
        ("", "y", "cannot be read"),
        ("a,b,y\n", "y", "has no rows below its header"),
    ],
)
def test_a_csv_that_is_not_understood_is_refused(tmp_path, text, target, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(str(tmp_path / "a.csv"), target=target)
    assert str(tmp_path / "a.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """A LibSVM file with two of fifty values a row, and what is dense and sparse of it."""
    rows, draws = [], np.random.default_rng(0)
    for row in range(60):
        first, second = sorted(draws.choice(50, 2, replace=False) + 1)
        values = draws.standard_normal(2)
        rows.append(f"{row % 3} {first}:{values[0]} {second}:{values[1]}")
    (tmp_path / "wide.t").write_text("\n".join([*rows, "0 50:1"]))

    def make(sparse, **options):
        monkeypatch.setattr(data, "SPARSE_BYTES", 0 if sparse else 2**40)
        task = logistic(str(tmp_path / "wide.t"), workers=4, dtype="float64", **options)
        assert isinstance(task.shards.features, np.ndarray) is not sparse
        return task

    return make


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch": "full"}, {"sampling": "passes"}, {"intercept": True, "holdout": 0.3, "l2": 0.1}],
)
def test_sparse_rows_compute_what_dense_ones_do(wide, tmp_path, classes, options):
    if classes == 2:
        text = (tmp_path / "wide.t").read_text().replace("\n2 ", "\n1 ")
        (tmp_path / "wide.t").write_text(text)
    sparse, dense = wide(True, **options), wide(False, **options)
    draws = np.random.default_rng(1)
    x, worker = draws.standard_normal((5, dense.dim)), np.array([0, 3, 1, 1, 2])
    if options.get("batch") == "full":
        x, worker = x[:1], worker[:1]
    draw = np.arange(len(x))
    found, expected = sparse.gradient(x, worker, draw), dense.gradient(x, worker, draw)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    alone = [sparse.gradient(x[[j]], worker[[j]], draw[[j]])[1][0] for j in range(len(x))]
    assert np.array_equal(found[1], alone)  # to the bit, whatever is computed beside it
    one, other = sparse.evaluate(x[0]), dense.evaluate(x[0])
    assert one == pytest.approx(other, rel=1e-12)
    assert one["accuracy"] == other["accuracy"]


def test_a_run_on_sparse_rows(wide):
    runs = [
        offbeat.run(wide(sparse), "shuffled(lr=0.5)", "4 1..4", stop={"steps": 100})
        for sparse in (True, False)
    ]
    np.testing.assert_allclose(runs[0].x, runs[1].x, rtol=1e-10, atol=1e-12)


def test_sparse_data_take_the_memory_of_what_is_not_zero(tmp_path):
    """As dense rows 305 MiB, and more while they are divided."""
    path = tmp_path / "wide.binary"
    path.write_text("".join(f"{row % 2} {row + 1}:1 200000:0.5\n" for row in range(400)))
    code = f"""
import resource, sys
from offbeat.workers.tasks import logistic
logistic("digits")  # what libraries take
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
task = logistic({str(path)!r})
assert task.dim == 200_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 60, done.stderr


def test_what_is_too_large_as_dense_rows_is_refused_with_its_size(tmp_path):
    path = tmp_path / "wide.binary"
    path.write_text("0 1:1\n1 600000000:1\n" + "1 2:1\n" * 2)
    said = "4 x 600,000,000 values are 8.9 GiB as dense rows, and twice that .*; the limit is 4 GiB"
    with pytest.raises(ConfigError, match=said + "; logistic keeps sparse data"):
        TASKS.parse(f"mlp('{path}', workers=2)")
    with pytest.raises(ConfigError, match=r"are 17\.9 GiB"):
        TASKS.parse(f"mlp('{path}', workers=2, dtype='float64')")


def test_sparse_data_with_a_value_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SPARSE_BYTES", 0)
    (tmp_path / "a.t").write_text("0 1:1\n1 50:2\n1 3:1 40:1e39\n")
    with pytest.raises(ConfigError, match=r"row 3 has a value that is not finite.*\(1 such"):
        logistic(str(tmp_path / "a.t"), workers=1)


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.arange(12).reshape(3, 2, 2), y=[3, 5, 3])
    features, labels = load(str(tmp_path / "a.npz"))
    assert features.shape == (3, 4)
    np.testing.assert_array_equal(labels, [0, 1, 0])
    np.savez(tmp_path / "b.npz", x=np.full((2, 3), 255, np.uint8), y=[0, 1])
    assert load(str(tmp_path / "b.npz"))[0].max() == 1.0  # pixels


def test_labels_of_npz_may_be_text(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.eye(3), y=["b", "a", "b"])
    np.testing.assert_array_equal(load(str(tmp_path / "a.npz"))[1], [1, 0, 1])


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
        (ragged, r"X is an array of Python objects .*unequal lengths.* X.astype\(float\)"),
        (
            lambda p: np.savez(p, X=np.eye(2), y=np.array(["a", "b"], object)),
            r"y is an array of Python objects .text.* save labels as y.astype\(str\)",
        ),
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
