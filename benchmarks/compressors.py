"""Time and bytes of every compressor at a million numbers, and of the two that are to be fast.

Medians of repeated calls on one float32 Gaussian vector, one thread.  The bound of a sparse
message is log2 C(d, k) bits for its indices (a seed of 64 bits for rand-k) and 32 or 16 bits a
value; that of a dense one is the entropy of the codes it sends, given their frequencies; that of a
combination is its parts' sum.  Exact top-k is compared with torch.topk on the same memory, which is
read before each, and packed signs with a copy, in turn.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import arguments, finish, where

from offbeat.algorithms.compression import COMPRESSORS, decode
from offbeat.algorithms.compression.coding import entropy_bits
from offbeat.algorithms.compression.sign import sign_bits
from offbeat.algorithms.compression.topk import largest_of_many

TEXTS = [
    "identity", "topk(0.01)", "topk(0.001)", "randk(0.01)", "threshold(2.576)", "bernoulli(1.0)",
    "sign", "scaled-sign", "qsgd(4)", "qsgd(128)", "qsgd(7, norm='max')", "terngrad", "natural",
    "natural-dithering(8)",
    "bf16", "fp16", "blocks(quantile, 4096)", "powersgd(2)", "kashin", "contractive(natural)",
    "compose(topk(0.01), bf16)",
    "compose(topk(0.01), qsgd(16))", "induced(topk(0.01), natural)", "blocks(scaled-sign, 1024)",
]  # fmt: skip


def rows(message: Any) -> list[Any]:
    """The messages of single rows in those of blocks."""
    return [row for part in message.parts for row in getattr(part, "rows", [part] * part.n)]


def median_ms(
    functions: list[Callable[[], Any]], repeats: int, prepare: Callable[[], Any] = lambda: None
) -> list[float]:
    """Of each function, called in turn, each after ``prepare``, which is not timed."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):  # the first warms up
        for function, taken in zip(functions, times, strict=True):
            prepare()
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def entropy_bytes(codes: np.ndarray) -> float:
    """Of ``codes``, each coded on its own by its frequency."""
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * codes.size / 8)


def bound(text: str, message: Any) -> float:
    """Bytes that the message costs at least."""
    if text.startswith("induced"):
        return bound("topk", message.one) + bound("natural", message.two)
    if text.startswith("kashin"):
        return 8 + entropy_bytes(message.inner.dense())
    if text.startswith("powersgd"):
        return float(message.p.nbytes + message.q.nbytes)
    if text == "blocks(quantile, 4096)":
        return sum(part.codes.nbytes + entropy_bytes(part.which) for part in rows(message))
    if text.startswith("blocks"):
        return sum(4 + part.d / 8 for part in rows(message))
    dense = message.dense().ravel()
    d, k = len(dense), int(np.count_nonzero(dense))
    if text == "compose(topk(0.01), qsgd(16))":
        inner = message.values
        return entropy_bits(d, inner.d) / 8 + entropy_bytes(inner.dense())
    if text.startswith(("topk", "threshold")):
        return entropy_bits(d, k) / 8 + 4 * k
    if text == "compose(topk(0.01), bf16)":
        return entropy_bits(d, k) / 8 + 2 * k
    if text.startswith("randk"):
        return 8 + 4 * k
    if text.startswith(("identity", "bernoulli", "bf16", "fp16")):
        return d * (4 if text.startswith(("identity", "bernoulli")) else 2)
    return entropy_bytes(dense)


def main() -> None:
    options = arguments(__doc__ or "")
    repeats = 5 if options.quick else 25
    d = 10**6
    x = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    torch.set_num_threads(1)
    print(where())
    print(f"{'':34}{'compress':>9}{'encode':>9}{'decode':>9}  ms{'bytes':>11}{'/ bound':>9}")
    figures: dict[str, Any] = {}
    for text in TEXTS:
        compressor, rng = COMPRESSORS.parse(text), np.random.default_rng(1)
        message = compressor.compress(x, rng)
        frames = message.encode()
        assert message.nbytes == sum(map(len, frames))
        times = median_ms(
            [
                lambda c=compressor, g=rng: c.compress(x, g),  # type: ignore[misc]
                message.encode,
                lambda f=frames: decode(f, d).dense(),  # type: ignore[misc]
            ],
            repeats,
        )
        ratio = message.nbytes / bound(text, message)
        cells = "".join(f"{t:9.2f}" for t in times)
        print(f"{text:34}{cells}    {message.nbytes:11,}{ratio:9.4f}")
        figures[text] = {
            **dict(zip(("compress_ms", "encode_ms", "decode_ms"), times, strict=True)),
            "bytes": message.nbytes, "ratio": ratio,
        }  # fmt: skip
    tensor, out = torch.from_numpy(x), np.empty_like(x)
    speedups = {}
    for k in (10**4, 10**3):
        ours, theirs = median_ms(
            [
                lambda k=k: largest_of_many(x, k),  # type: ignore[misc]
                lambda k=k: torch.topk(tensor.abs(), k),  # type: ignore[misc]
            ],
            4 * repeats,
            x.sum,  # so that neither finds the other's leavings in the cache
        )
        found = torch.topk(tensor.abs(), k).indices.sort().values.numpy()
        assert np.array_equal(largest_of_many(x, k)[0], found)
        speedups[k] = theirs / ours
        print(f"top-k, k = {k}: {ours:.2f} ms, torch.topk {theirs:.2f} ms, {theirs / ours:.1f} x")
    signs, copy = median_ms([lambda: sign_bits(x[None]), lambda: np.copyto(out, x)], 4 * repeats)
    print(f"signs: {signs:.3f} ms, copy {copy:.3f} ms, {copy / signs:.2f} x the copy's speed")
    figures |= {"topk_speedup": speedups, "signs_of_copy": copy / signs}
    targets = {
        "top-k 1 % is 5 x torch.topk": speedups[10**4] >= 5,
        "top-k 1 % within 1 % of its bound": figures["topk(0.01)"]["ratio"] <= 1.01,
        "top-k 1 % in 52 kB": figures["topk(0.01)"]["bytes"] <= 52_000,
        "signs in twice the time of a copy": copy / signs >= 0.5,
    }
    finish(figures, targets)


if __name__ == "__main__":
    main()
