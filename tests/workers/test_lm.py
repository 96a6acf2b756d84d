"""The language model and the toy of mixtures: what they are, that they learn, mistakes."""

import lzma
import math

import numpy as np
import pytest
import torch

import offbeat
from offbeat import ConfigError
from offbeat.workers.tasks import lm, mixtures
from offbeat.workers.tasks.lm import BYTES, SHAPES, read_characters, read_text
from offbeat.workers.tasks.transformer import Transformer

SMALL = {"length": 16, "batch": 4, "evaluated": 16, "workers": 3}
ADAMW = "local-steps(adamw(lr=3e-3), steps=10, clip=1.0)"


def row(x, worker=0, draw=0):
    return x[None], np.array([worker]), np.array([draw])


def test_the_gradient_is_that_of_the_text():
    """Loss and gradient by hand: windows of the worker's share, the next byte of each position."""
    task, text = lm(**SMALL), np.frombuffer(read_text("topics"), np.uint8)
    x = task.initial(0)
    losses, gradients = task.gradient(*row(x, 1, 5))
    module = Transformer(BYTES, 16, *SHAPES["0.1M"])
    torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), module.parameters())
    starts = task._order[task._draws.rows(np.array([1]), np.array([5]))[0]] * 16
    assert len(set(starts.tolist())) > 1
    windows = torch.from_numpy(np.stack([text[s : s + 17] for s in starts]).astype(np.int64))
    logits = module(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, BYTES), windows[:, 1:].reshape(-1))
    loss.backward()
    by_hand = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).numpy()
    assert losses[0] == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(gradients[0], by_hand, rtol=1e-4, atol=1e-7)


def test_a_byte_is_told_from_those_before_it_only():
    module = Transformer(BYTES, 16, *SHAPES["0.1M"], seed=3)
    one = torch.randint(BYTES, (1, 16), generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[0, 9] = (other[0, 9] + 1) % BYTES
    with torch.no_grad():
        apart = (module(one) - module(other)).abs().amax(-1)[0]
    assert (apart[:9] == 0).all()
    assert (apart[9:] > 0).all()


def test_sizes_are_what_they_are_called():
    """Beside their embeddings, whose size depends on the vocabulary: 12 layers width^2."""
    for name, bytes_m, words_m in (
        ("0.1M", 0.12, None),
        ("1M", 1.03, None),
        ("20M", 4.8, 13),
        ("60M", 32, 60),
        ("150M", 127, 155),
    ):
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in Transformer(vocabulary, 64, *SHAPES[name]).parameters())
                for vocabulary in (BYTES, 32_000)
            ]
        assert counts[0] / 1e6 == pytest.approx(bytes_m, rel=0.05)
        if words_m:
            assert counts[1] / 1e6 == pytest.approx(words_m, rel=0.05)


def test_validation_is_the_end_of_the_text_and_perplexity_its_exponential(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 900 + b"b" * 100)
    task = lm(str(tmp_path / "a.txt"), **SMALL)
    assert set(task._held.reshape(-1).tolist()) == {ord("b")}
    assert set(task._train.tolist()) == {ord("a")}
    facts = task.evaluate(task.initial(0))
    assert facts["perplexity"] == pytest.approx(math.exp(facts["loss"]))
    assert facts["loss"] == pytest.approx(math.log(BYTES), rel=0.2)


def test_files_of_a_glob_are_joined_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_text(f"text:{tmp_path}/*.txt") == b"a.txt\nb.txt"
    assert read_text(f"{tmp_path}/c.md") == b"c.md"


def test_characters_are_numbered_in_their_order_over_the_whole_text(tmp_path):
    path = tmp_path / "greek.txt"
    path.write_text("βα😀a" * 250 + "ω" * 100, encoding="utf-8")
    numbers, characters = read_characters(f"text:{path}")
    assert characters == "aαβω😀"
    assert numbers[:4].tolist() == [2, 1, 4, 0]
    assert "".join(characters[i] for i in numbers) == path.read_text("utf-8")
    task = lm(str(path), tokens="characters", **SMALL)
    assert (len(task._train), task._held[-1, -1].item()) == (990, 3)  # split by position
    assert lm(str(path), **SMALL).dim - task.dim == (BYTES - 5) * SHAPES["0.1M"].width


def test_characters_of_the_bundled_text_are_learnt():
    numbers, characters = read_characters("topics")
    assert "".join(characters[i] for i in numbers).encode() == read_text("topics")
    task = lm(tokens="characters", **SMALL)
    result = offbeat.run(task, "delayed-nesterov", "3", work=ADAMW, stop={"gradients": 120})
    assert result.final["perplexity"] < result.metrics[0]["perplexity"] / 2


def test_texts_without_characters_are_told(tmp_path):
    path = tmp_path / "a.txt"
    for data, message in (
        (b"ab\xff", f"lm: {path} is not UTF-8 (invalid start byte at byte 2), so it has no"),
        (b"", "lm: 0 tokens of text are too few for 10 workers and windows of 64 tokens"),
        ("".join(map(chr, range(0x3400, 0xB401))).encode(), "has 32,769 distinct characters"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            lm(str(path), tokens="characters")
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="\"tokens\" should be 'bytes' or 'characters'"):
        lm(tokens="words")


def test_a_text_may_be_packed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"in the ")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"beginning"))
    assert read_text(f"{tmp_path}/*") == b"in the \nbeginning"
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"beginning")[:-20])
    with pytest.raises(ConfigError, match=r"b\.txt\.xz: cannot be read"):
        lm(f"{tmp_path}/*")


def test_it_learns_and_is_repeatable_and_resumes(tmp_path):
    """Local AdamW, Delayed Nesterov: a seventh of a new model's perplexity in 240 local steps."""
    method, fleet = "delayed-nesterov(dylu=true, grace_s=1.0)", "3 1..3"
    options = {"work": ADAMW, "evaluate": {"gradients": 80}}
    whole = offbeat.run(lm(**SMALL), method, fleet, stop={"gradients": 240}, **options)
    assert whole.final["perplexity"] < whole.metrics[0]["perplexity"] / 7
    text = {"name": "lm", **{k: v for k, v in SMALL.items() if k != "workers"}}
    offbeat.run(text, method, fleet, stop={"gradients": 90}, folder=tmp_path / "r", **options)
    again = offbeat.resume(tmp_path / "r", overrides=["stop.gradients=240"])
    np.testing.assert_array_equal(whole.x, again.x)
    np.testing.assert_array_equal(whole.x, offbeat.replay(tmp_path / "r").x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "/nowhere/*.txt"}, 'no text file "/nowhere/*.txt"; give a path, a glob such as'),
        ({"workers": 100_000}, "are too few for 100000 workers and windows of 64 tokens"),
        ({"holdout": 1.5}, "holdout=1.5 leaves nothing to learn from"),
        ({"size": "2M"}, "\"size\" should be '0.1M', '1M'"),
        ({"device": "cuda:7"}, "torch sees no GPU"),
    ],
)
def test_mistakes_are_told(options, message):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError) as caught:
        lm(**options)
    assert message in str(caught.value)


def test_mixtures_are_what_the_toy_says():
    task = mixtures(16, samples=6400, clusters=8, noise=0.05, evaluated=640)
    features, labels = task.shards.features, task.shards.labels
    assert task.dim == 512 * 16 + 16 + 16 * 4 + 4
    assert np.bincount(labels).tolist() == [1600] * 4
    assert [len(features[task.shards.draws.share(w)]) for w in range(4)] == [1600] * 4
    lengths = np.sqrt((features**2).sum(axis=1).mean())
    assert lengths == pytest.approx(math.sqrt(1 + 512 * 0.05**2), rel=0.01)
    x = task.initial(0)
    assert np.abs(x[: 512 * 16]).max() <= 512**-0.5
    assert np.abs(x[: 512 * 16]).std() > 0
    facts = task.evaluate(x)
    assert facts["loss"] == pytest.approx(math.log(4), abs=0.05)
    seen = task._seen
    logits = task.model.logits(x, features[seen]).astype(float)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert facts["loss"] == pytest.approx(-logp[np.arange(len(seen)), labels[seen]].mean())
    with pytest.raises(ConfigError, match="3 samples cannot fill 4 x 1 clusters"):
        mixtures(samples=3)


def test_matched_outer_steps_make_asynchronous_sgd_synchronous():
    """The toy, small: equal displacement by four pseudo-gradients, equal loss, a third of time."""
    fleet = offbeat.Fleet(workers=4, speeds=[0.58, 0.75, 1.51, 3.33])
    work = "local-steps(adamw(lr=2e-4), steps=20, fresh=true)"
    task, options = mixtures(128), {"work": work, "stop": {"gradients": 1600}}
    sync = offbeat.run(task, "diloco(lr=0.7, outer=sgd, sample_shards=true)", fleet, **options)
    method = "async-local-sgd(lr=0.175, outer=sgd, grace_s=0.5, charged=false, sample_shards=true)"
    other = offbeat.run(task, method, fleet, **options)
    before = sync.metrics[0]["loss"]
    assert other.final["loss"] - before == pytest.approx(sync.final["loss"] - before, rel=0.02)
    assert sync.final["time_s"] / other.final["time_s"] == pytest.approx(3.33, abs=0.1)
