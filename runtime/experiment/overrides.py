"""Settings by dotted keys, as ``--set fleet.workers=20``."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from offbeat.runtime.base.errors import ConfigError


def change(table: dict[str, Any], given: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Set dotted keys in a table: ``given`` values, and ``overrides`` as text.

    >>> change({}, {"stop.steps": 5}, ["stop.steps=9"])
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: stop.steps is set more than once; only one counts
    """
    once(given, overrides)
    for key, value in given.items():
        put(table, key, value)
    for override in overrides:
        apply_override(table, override)


def once(given: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ConfigError where a key is set twice, or its whole table after it."""
    keys = [*given, *(override.partition("=")[0].strip() for override in overrides)]
    for at, key in enumerate(keys, start=1):
        if any(f"{key}.".startswith(f"{later}.") for later in keys[at:]):
            raise ConfigError(f"{key} is set more than once; only one counts")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set ``key.key=value`` in a table; the value is TOML, else text.

    >>> table = {}
    >>> apply_override(table, "fleet.speeds=lognormal(1.0)")
    >>> apply_override(table, "algorithm.lr=0.5")
    >>> table
    {'fleet': {'speeds': 'lognormal(1.0)'}, 'algorithm': {'lr': 0.5}}
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f'cannot read "--set {override}"; write --set key.key=value')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    put(table, path, value)


def put(table: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key, in every table of a list of tables on the way."""
    *parents, last = (part.strip() for part in path.split("."))
    places = [table]
    for parent in parents:
        inner = [place.setdefault(parent, {}) for place in places]
        places = [one for item in inner for one in (item if isinstance(item, list) else [item])]
        if not all(isinstance(place, dict) for place in places):
            raise ConfigError(
                f'cannot set {path}: "{parent}" is written as text here; write it as a table, '
                f'[{parent}] with name = "..."'
            )
    for place in places:
        place[last] = value
