"""State as a tree: numbers, text, arrays, lists and dictionaries, for checkpoints.

An object becomes the dictionary of its fields; loading fills the fields of an object of the same
make, so that only state is stored and the object itself is built from its settings.
"""

import hashlib
import json
from itertools import zip_longest
from typing import Any

import numpy as np
import safetensors.numpy as safetensors
from numpy.typing import NDArray

from offbeat.runtime.base.errors import ConfigError

LEAVES = (bool, int, float, str, type(None), np.ndarray)
MARK = "\0array"  # stands for an array in the tree; no field has such a name


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
    return hashlib.blake2b(dumps({"tree": dump(value)}), digest_size=8).hexdigest()


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


def split(tree: Any, arrays: dict[str, NDArray]) -> Any:
    """``tree`` with its arrays moved to ``arrays``."""
    places: dict[int, str] = {}  # id -> key: a model that a job in flight has, too, is kept once

    def strip(tree: Any) -> Any:
        if isinstance(tree, np.ndarray):
            if id(tree) not in places:
                key = places[id(tree)] = f"{len(arrays):06d}"
                arrays[key] = np.asarray(tree, order="C")
            return {MARK: places[id(tree)]}
        if isinstance(tree, dict):
            return {key: strip(item) for key, item in tree.items()}
        if isinstance(tree, list | tuple):
            return [strip(item) for item in tree]
        return tree

    return strip(tree)


def fill(tree: Any, arrays: dict[str, NDArray]) -> Any:
    """``tree`` with its arrays put back from ``arrays``."""
    if isinstance(tree, dict):
        if tree.keys() == {MARK}:
            return arrays[tree[MARK]]
        return {key: fill(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return [fill(item, arrays) for item in tree]
    return tree


def dumps(state: dict[str, Any]) -> bytes:
    """``state`` as bytes, to be sent."""
    arrays: dict[str, NDArray] = {}
    tree = json.dumps(split(state, arrays)).encode()
    return safetensors.save({MARK: np.frombuffer(tree, np.uint8), **arrays})


def loads(data: bytes) -> dict[str, Any]:
    """What ``dumps`` was given."""
    arrays = safetensors.load(data)
    state = fill(json.loads(arrays.pop(MARK).tobytes()), arrays)
    assert isinstance(state, dict)
    return state
