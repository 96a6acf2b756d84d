"""A torch data set of the user's: its rows as batches, and their classes."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.tensors import load
from offbeat.workers.tasks.scores import one_hot

Part = int | str | None  # which part of a sample is its target


class Samples:
    """Rows of a map-style data set as batches on a device.

    A sample is an (input, target) pair, or ``target`` says which of its parts is the target; then
    the module is given the others, by name where samples are dicts, else in their order.

    Rows are indexed at once where the data set is a ``TensorDataset``, or a ``Subset`` of one, and
    nothing derived from them; of others each sample is asked for, as torch's own loader does.

    Args:
        dataset: with ``__getitem__`` and ``__len__``.
        target: key or position; None: samples are pairs.
        collate: makes a batch of a list of samples; None: torch's ``default_collate``.

    Raises:
        ConfigError: it is no such data set, or empty.
    """

    def __init__(self, dataset: Any, target: Part, collate: Callable[..., Any] | None) -> None:
        _check(dataset)
        self._dataset, self._target = dataset, target
        self._collate = collate
        found = None if collate else _tensors(dataset)
        self.direct = found is not None and target is None and len(found[0]) == 2
        self._tensors: tuple[Any, ...] = ()
        self._chosen: Any = None  # which rows of them; None: all
        if found is not None and self.direct:
            self._tensors, self._chosen = found
        self.stacks = collate is None  # batches of equally many samples are of one shape
        self.device: Any = None

    def __len__(self) -> int:
        return len(self._dataset)

    def to(self, device: Any) -> None:
        """Answer batches on ``device``, and keep there what is indexed at once."""
        self.device = device
        self._tensors = tuple(tensor.to(device) for tensor in self._tensors)
        self._chosen = None if self._chosen is None else self._chosen.to(device)

    def batch(self, rows: NDArray) -> tuple[Any, Any]:
        """Inputs and targets of ``rows [B]``; ``[k, B]``, too, where ``direct``.  New memory."""
        if self.direct:
            at = load(rows, self.device)
            at = at if self._chosen is None else self._chosen[at]
            inputs, targets = (tensor[at] for tensor in self._tensors)
            return inputs, targets
        from torch.utils.data import default_collate

        inputs, targets = self._parted((self._collate or default_collate)(self._fetched(rows)))
        return mapped(self._placed, inputs), mapped(self._placed, targets)

    def called(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments, and named ones, with which the module is called."""
        if self._target is None:
            return (inputs,), {}
        return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})

    def labels(self) -> NDArray | None:
        """``[N]`` classes; None where targets are neither whole numbers nor one-hot."""
        rows = np.arange(len(self))
        try:
            if self.direct:
                return classes(self.batch(rows)[1].cpu().numpy())
            return classes(np.array([self._class(int(row)) for row in rows]))
        except (TypeError, ValueError, RuntimeError):
            return None

    def _class(self, row: int) -> NDArray:
        return np.asarray(self._parted(self._fetched(np.array([row]))[0])[1])

    def _fetched(self, rows: NDArray) -> list[Any]:
        chosen = rows.tolist()
        if many := getattr(self._dataset, "__getitems__", None):
            found: list[Any] = many(chosen)
            return found
        return [self._dataset[row] for row in chosen]

    def _parted(self, whole: Any) -> tuple[Any, Any]:
        """Inputs and target of a sample, or of a batch."""
        target, named = self._target, isinstance(whole, Mapping)
        if not named and not (isinstance(whole, Sequence) and not isinstance(whole, str)):
            raise ConfigError(
                f"TorchTask: a sample is {type(whole).__name__}, and (input, target) pairs are "
                "wanted; give a data set of pairs, or collate="
            )
        if target is None and not named and len(whole) == 2:
            return whole[0], whole[1]
        if target is None:
            parts = f"dicts of {', '.join(map(str, whole))}" if named else f"of {len(whole)} parts"
            example = repr(str([*whole][-1])) if named else len(whole) - 1
            raise ConfigError(
                f"TorchTask: samples are {parts}, not (input, target) pairs; say which is the "
                f"target, for example target={example}; the module is given the others"
            )
        if named and target in whole:
            return {key: part for key, part in whole.items() if key != target}, whole[target]
        if not named and isinstance(target, int) and -len(whole) <= target < len(whole):
            at = target % len(whole)
            return [part for place, part in enumerate(whole) if place != at], whole[at]
        has = f"the parts {', '.join(map(str, whole))}" if named else f"{len(whole)} parts"
        raise ConfigError(
            f"TorchTask: target={target!r} is no part of a sample, which has {has}"
            + (nearest(str(target), map(str, whole)) if named else "")
        )

    def _placed(self, tensor: Any) -> Any:
        return tensor.to(self.device, copy=self._collate is not None)  # it may answer its own


def _check(dataset: Any) -> None:
    from torch.utils.data import DataLoader, IterableDataset

    if isinstance(dataset, DataLoader):
        raise ConfigError(
            "TorchTask: a DataLoader is given; give its .dataset (and collate=its.collate_fn): "
            "which samples make a batch is what batch, sampling and seed say"
        )
    has = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not has:
        raise ConfigError(
            f"TorchTask: {type(dataset).__name__} has no samples by number, and a job's are drawn "
            "by number; give a map-style data set, for example list(dataset)"
        )
    if not len(dataset):
        raise ConfigError("TorchTask: the dataset is empty")


def _tensors(dataset: Any) -> tuple[tuple[Any, ...], Any] | None:
    """The tensors that a data set indexes and does nothing else with, and which rows of them."""
    import torch
    from torch.utils.data import Subset, TensorDataset

    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset and (inner := _tensors(dataset.dataset)):
        mine = torch.as_tensor(np.asarray(dataset.indices))
        if mine.dtype != torch.int64:  # a mask is none
            return None
        return inner[0], mine if inner[1] is None else inner[1][mine]
    return None


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` of dicts and sequences, its tensors changed and all else as it is."""
    if isinstance(tree, Mapping):
        return {key: mapped(change, part) for key, part in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(change, part) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(change, part) for part in tree)
    return change(tree) if hasattr(tree, "requires_grad") else tree


def leaves(tree: Any) -> list[Any]:
    """The tensors in ``tree``."""
    found: list[Any] = []
    mapped(found.append, tree)
    return found


def stacked(trees: Sequence[Any]) -> Any:
    """One tree, whose tensors are those of ``trees``, all alike, one above the other."""
    import torch

    columns = zip(*map(leaves, trees), strict=True)
    above = iter([torch.stack(column) for column in columns])
    return mapped(lambda _: next(above), trees[0])


def classes(targets: NDArray) -> NDArray | None:
    """``[N]`` classes of ``targets [N, ...]``: whole numbers, or one-hot rows; None: they are none.

    >>> classes(np.array([[0.0, 1.0], [1.0, 0.0]])).tolist(), classes(np.array([2, 0])).tolist()
    ([1, 0], [2, 0])
    >>> classes(np.array([[0.3, 0.7], [1.0, 0.0]])) is classes(np.array([0.5, 1.0])) is None
    True
    """
    if targets.dtype.kind not in "biuf":
        return None
    flat = targets.reshape(len(targets), -1)
    if flat.shape[1] == 1:
        whole = targets.dtype.kind != "f" or bool((flat == np.floor(flat)).all())
        return flat[:, 0] if whole else None
    return flat.argmax(axis=1) if targets.ndim == 2 and one_hot(targets) else None


@cache
def _spare() -> np.random.MT19937:
    """What the user's code draws from through numpy, in a job."""
    return np.random.MT19937(0)


@contextmanager
def generators(device: Any) -> Iterator[Callable[[int], None]]:
    """Seed the global generators of torch, numpy and Python at will; then they are as before.

    As ``fork_rng`` and ``manual_seed``, which look for all devices that torch knows of.  numpy's is
    exchanged for another so long, which is thirty times faster than to copy its state; only the
    second of a pair of normal numbers, which numpy had kept for later, is drawn anew.
    """
    import torch

    ours = [torch.default_generator]
    if device.type == "cuda":
        at = torch.cuda.current_device() if device.index is None else device.index
        ours.append(torch.cuda.default_generators[at])

    def seed(number: int) -> None:
        for generator in ours:
            generator.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)

    states = [generator.get_state() for generator in ours]
    numpys: Any = np.random  # whose types do not know the two
    before, pythons = numpys.get_bit_generator(), random.getstate()
    numpys.set_bit_generator(_spare())
    try:
        yield seed
    finally:
        for generator, state in zip(ours, states, strict=True):
            generator.set_state(state)
        numpys.set_bit_generator(before)
        random.setstate(pythons)


def drawn() -> tuple[Any, ...]:
    """What the global generators on the CPU have come to."""
    import torch

    mine = torch.default_generator.get_state().numpy().tobytes()
    theirs: Any = np.random.get_state()  # with an array of words
    return mine, theirs[1].tobytes(), theirs[2:], random.getstate()
