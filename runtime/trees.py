"""State as a tree: numbers, text, arrays, lists and dictionaries, for checkpoints.

An object becomes the dictionary of its fields; loading fills the fields of an object of the same
make, so that only state is stored and the object itself is built from its settings.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

LEAVES = (bool, int, float, str, type(None), np.ndarray)


def dump(value: Any) -> Any:
    """``value`` as a tree; raises TypeError where a field holds something else."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, list | tuple):
        return [dump(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[dump(key), dump(item)] for key, item in value.items()]}
    if isinstance(value, Callable) or not hasattr(value, "__dict__"):  # type: ignore[arg-type]
        if not hasattr(value, "__dict__") or isinstance(value, type):
            raise TypeError(f"{type(value).__name__} cannot be written to a checkpoint")
    return {"fields": {k: dump(v) for k, v in vars(value).items() if k != "spec"}}


def load(target: Any, tree: Any) -> Any:
    """``tree`` as a value; objects are filled in place, everything else is made anew."""
    if isinstance(tree, dict) and "fields" in tree:
        for key, item in tree["fields"].items():
            setattr(target, key, load(getattr(target, key), item))
        return target
    if isinstance(tree, dict):
        return {key: load(None, item) for key, item in tree["dict"]}
    if isinstance(tree, list):
        known = target if isinstance(target, list) and len(target) == len(tree) else [None] * len(tree)
        return [load(old, item) for old, item in zip(known, tree, strict=True)]
    return tree
