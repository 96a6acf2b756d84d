"""State as a tree: numbers, text, arrays, lists and dictionaries, for checkpoints.

An object becomes the dictionary of its fields; loading fills the fields of an object of the same
make, so that only state is stored and the object itself is built from its settings.
"""

from itertools import zip_longest
from typing import Any

import numpy as np

from offbeat.runtime.errors import ConfigError

LEAVES = (bool, int, float, str, type(None), np.ndarray)


def dump(value: Any, where: str = "the algorithm") -> Any:
    """``value`` as a tree.

    Raises:
        ConfigError: a field holds something else, such as a set or a generator.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, list | tuple):
        return [dump(item, where) for item in value]
    if isinstance(value, dict):
        return {"dict": [[dump(key, where), dump(item, where)] for key, item in value.items()]}
    if not hasattr(value, "__dict__"):
        raise ConfigError(
            f"{where} holds a {type(value).__name__}, which cannot be written to a checkpoint; "
            "keep state in numbers, text, arrays, lists and dictionaries"
        )
    return {"fields": {k: dump(v, f"{where}.{k}") for k, v in vars(value).items() if k != "spec"}}


def load(target: Any, tree: Any) -> Any:
    """``tree`` as a value; objects are filled in place, everything else is made anew."""
    if isinstance(tree, dict) and "fields" in tree:
        for key, item in tree["fields"].items():
            setattr(target, key, load(getattr(target, key), item))
        return target
    if isinstance(tree, dict):
        return {key: load(None, item) for key, item in tree["dict"]}
    if isinstance(tree, list):
        olds = target if isinstance(target, list) else []
        return [load(old, item) for old, item in zip_longest(olds[: len(tree)], tree)]
    return tree
