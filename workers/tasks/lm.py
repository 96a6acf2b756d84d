"""A language model on text: a decoder-only transformer that predicts the next byte or character."""

import glob
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Count, Positive, Reads, Seed
from offbeat.runtime.base.tables import read_bytes
from offbeat.workers.tasks.contract import TASKS, alone
from offbeat.workers.tasks.module import TorchTask
from offbeat.workers.tasks.shards import Sampling

BYTES = 256
BUNDLED = "topics"  # the texts of Python's help(), 0.7 MB of English and code
EVALUATED = 32  # windows at a time
MOST_BYTES = 2**30  # of text
MOST_CHARACTERS = 2**15  # that are distinct, which int16 numbers


class Shape(NamedTuple):
    """Layers, width, attention heads, size of a head."""

    layers: int
    width: int
    heads: int
    head: int


# The three largest are those of arXiv:2401.09135, named as there: with its vocabulary of 32,000.
# On bytes they have 5, 32 and 127 million parameters.
SHAPES = {
    "0.1M": Shape(2, 64, 4, 16),
    "1M": Shape(5, 128, 4, 32),
    "20M": Shape(6, 256, 4, 64),
    "60M": Shape(3, 896, 16, 64),
    "150M": Shape(12, 896, 16, 64),
}


def read_text(source: str) -> bytes:
    """The bytes of "topics", of a file, or of the files of a glob by name, all unpacked."""
    if source == BUNDLED:
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics)).encode()
    pattern = str(Path(source.removeprefix("text:")).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ConfigError(
            f'lm: no text file "{pattern}"; give a path, a glob such as text:books/*.txt, or '
            f'"{BUNDLED}" for the texts that come with Python'
        )
    if (size := sum(path.stat().st_size for path in paths)) <= MOST_BYTES:
        text = b"\n".join(map(read_bytes, paths))
        if (size := len(text)) <= MOST_BYTES:
            return text
    raise ConfigError(f"lm: {pattern} is {size:,} bytes; at most {MOST_BYTES:,} are read")


def read_characters(source: str) -> tuple[NDArray[np.int16], str]:
    """The characters of ``source`` as numbers ``[T]``, and its distinct ones, sorted, by number."""
    try:
        text = read_text(source).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"lm: {source} is not UTF-8 ({error.reason} at byte {error.start:,}), so it has no "
            'characters; take tokens="bytes"'
        ) from None
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    there = np.zeros(sys.maxunicode + 1, bool)
    there[codes] = True
    if (count := np.count_nonzero(there)) > MOST_CHARACTERS:
        raise ConfigError(
            f"lm: {source} has {count:,} distinct characters; at most {MOST_CHARACTERS:,} are "
            'numbered: take tokens="bytes"'
        )
    numbers = (there.cumsum() - 1).astype(np.int16)
    return numbers[codes], "".join(map(chr, np.flatnonzero(there)))


class LanguageModel(TorchTask):
    """f_i(x) = mean cross-entropy (nats a token) over worker i's windows of the text.

    The text's end is held out, by position; ``evaluate`` looks at it alone.

    Args:
        text: tokens ``[T]``, 0..vocabulary-1.
        vocabulary: how many there are.
        shape: of the transformer.
        length: tokens a window.
        holdout: fraction of the text held out.
        evaluated: most windows that an evaluation looks at, spread over what is held out.
        options: workers, partition, batch, sampling and seed, see ``TorchTask``; the classes of
            partitions by class are the tenths of the text.
    """

    def __init__(
        self,
        text: NDArray[np.uint8 | np.int16],
        vocabulary: int,
        shape: Shape,
        *,
        length: int,
        holdout: float,
        evaluated: int,
        seed: int,
        **options: Any,
    ) -> None:
        import torch

        from offbeat.workers.tasks.transformer import Transformer, next_token_loss

        kept = len(text) - round(holdout * len(text))
        self._train, held = torch.from_numpy(text[:kept]), torch.from_numpy(text[kept:])
        self.length, windows = length, (kept - 1) // length
        if windows < options["workers"] or len(held) <= length:
            raise ConfigError(
                f"lm: {len(text)} tokens of text are too few for {options['workers']} workers and "
                f"windows of {length} tokens with holdout={holdout}; give more text"
            )
        self._span = torch.arange(length + 1)
        starts = torch.arange(0, len(held) - length, length)
        few = torch.linspace(0, len(starts) - 1, min(evaluated, len(starts))).long()
        self._held = held[starts[few][:, None] + self._span].long()
        module = Transformer(vocabulary, length, *shape, seed=seed)
        super().__init__(module, next_token_loss, range(windows), seed=seed, **options)
        if not self.apart:  # nobody trains the module's own parameters: they are the start itself
            start = torch.from_numpy(self._initial)
            torch.nn.utils.vector_to_parameters(start, module.parameters())
        self._vmaps = False  # attention is slower under vmap than in a loop

    def to(self, device: str) -> "LanguageModel":
        """See ``TorchTask``; the text goes along."""
        super().to(device)
        text = self._train, self._held, self._span
        self._train, self._held, self._span = (part.to(self.device) for part in text)
        return self

    def _classes(self, given: Any) -> NDArray:
        return np.arange(len(self._data)) * 10 // len(self._data)

    def _samples(self, rows: NDArray) -> tuple[Any, Any]:
        first = self.load(rows) * self.length
        tokens = self._train[first[..., None] + self._span].long()
        return tokens[..., :-1], tokens[..., 1:]

    @alone
    def evaluate(self, x: NDArray) -> dict[str, float]:
        """Mean loss and perplexity on the text held out."""
        total, flat = 0.0, self.load(x)
        with self._torch.inference_mode():
            for windows in self._held.split(EVALUATED):
                value = self._value(flat, windows[:, :-1], windows[:, 1:])
                total += float(value) * len(windows)
        loss = total / len(self._held)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@TASKS.register("lm")
def lm(
    data: Annotated[str, Reads(bundled=(BUNDLED,), prefix="text:")] = BUNDLED,
    *,
    tokens: Literal["bytes", "characters"] = "bytes",
    workers: Count = 10,
    size: Literal["0.1M", "1M", "20M", "60M", "150M"] = "0.1M",
    length: Count = 64,
    batch: Count = 16,
    partition: str = "iid",
    sampling: Sampling = "replacement",
    holdout: Positive = 0.1,
    evaluated: Count = 128,
    seed: Seed = 0,
    device: str = "cpu",
) -> LanguageModel:
    """A decoder-only transformer that predicts the next token of a text.

    Args:
        data: "topics" (comes with Python), a file, or a glob, as text:books/*.txt.
        tokens: "bytes", all 256, or "characters" of UTF-8 text, as many as are in it.
        workers: n.
        size: of the model, by its usual name.
        length: tokens a window.
        batch: windows a gradient.
        partition: how the windows are divided; classes are tenths of the text.
        sampling: "replacement" or "passes".
        holdout: fraction at the end of the text that is for evaluation.
        evaluated: windows looked at in an evaluation.
        seed: of parameters, division and sampling.
        device: where gradients are computed.
    """
    if holdout >= 1:
        raise ConfigError(f"lm: holdout={holdout} leaves nothing to learn from; give less than 1")
    text: NDArray[np.uint8 | np.int16]
    if tokens == "bytes":
        text, vocabulary = np.frombuffer(read_text(data), np.uint8).copy(), BYTES
    else:
        text, characters = read_characters(data)
        vocabulary = len(characters)
    return LanguageModel(
        text,
        vocabulary,
        SHAPES[size],
        length=length,
        holdout=holdout,
        evaluated=evaluated,
        seed=seed,
        workers=workers,
        partition=partition,
        batch=batch,
        sampling=sampling,
        device=device,
    )
