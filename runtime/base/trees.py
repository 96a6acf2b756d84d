"""State as a tree: numbers, text, arrays, lists and dictionaries, for checkpoints.

An object becomes the dictionary of its fields; loading fills the fields of an object of the same
make, so that only state is stored and the object itself is built from its settings.
"""

import hashlib
from itertools import zip_longest
from typing import Any

import numpy as np

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.run import checkpoint

LEAVES = (bool, int, float, str, type(None), np.ndarray)


def dump(value: Any, where: str = "the algorithm") -> Any:
    """``value`` as a tree.

    Raises:
        ConfigError: a field holds something else, such as a set or a generator.
    """
    if isinstance(value, np.generic):
        return {"scalar": np.asarray(value)}
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, bytes):
        return {"bytes": np.frombuffer(value, np.uint8)}
    if isinstance(value, tuple):
        return {"tuple": [dump(item, where) for item in value]}
    if isinstance(value, list):
        return [dump(item, where) for item in value]
    if isinstance(value, dict):
        return {"dict": [[dump(key, where), dump(item, where)] for key, item in value.items()]}
    if not hasattr(value, "__dict__"):
        raise ConfigError(
            f"{where} holds a {type(value).__name__}, which cannot be written to a checkpoint; "
            "keep state in numbers, text, arrays, lists and dictionaries"
        )
    return {"fields": {k: dump(v, f"{where}.{k}") for k, v in vars(value).items() if k != "spec"}}


def digest(value: Any) -> str:
    """What tells ``value`` from others; raises ConfigError as ``dump`` does."""
    return hashlib.blake2b(checkpoint.dumps({"tree": dump(value)}), digest_size=8).hexdigest()


def load(target: Any, tree: Any, where: str = "the algorithm") -> Any:
    """``tree`` as a value; objects are filled in place, everything else is made anew.

    Raises:
        ConfigError: there is no object to fill, since the program made it only after the start.
    """
    if isinstance(tree, list):
        olds = target if isinstance(target, list) else []
        return [load(old, item, where) for old, item in zip_longest(olds[: len(tree)], tree)]
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "scalar":
        return inner[()]
    if kind == "bytes":
        return inner.tobytes()
    if kind == "tuple":
        return tuple(load(None, item, where) for item in inner)
    if kind == "dict":
        return {load(None, key, where): load(None, item, where) for key, item in inner}
    if target is None:
        raise ConfigError(
            f"{where} holds an object that was made during the run, which a resumed run could not "
            "make again; make it in __init__, or keep arrays and numbers instead"
        )
    for key, item in inner.items():
        setattr(target, key, load(getattr(target, key, None), item, f"{where}.{key}"))
    return target
