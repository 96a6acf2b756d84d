"""Errors by whose fault it is, and the sentence that names the remedy."""

import difflib
from collections.abc import Iterable


class OffbeatError(Exception):
    """Base of every error a user may meet; ``exit_code`` is what the command line returns."""

    exit_code = 1


class ConfigError(OffbeatError, ValueError):
    """The user asked for something that cannot be: said before the run starts."""

    exit_code = 2


class StorageError(OffbeatError):
    """A file could not be written or read back; the last good checkpoint is untouched."""

    exit_code = 6


class Diverged(OffbeatError):
    """A loss or gradient stopped being finite."""

    exit_code = 7


class PeerError(OffbeatError, ValueError):
    """What came from a peer cannot be right; nothing of it was used."""

    exit_code = 5


class CrewError(OffbeatError):
    """The processes that compute are gone, or their code fails."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str:
    """``'; did you mean "x"?'`` where a known name is close, else the list of known names.

    >>> nearest("shufled", ["pure", "shuffled"])
    '; did you mean "shuffled"?'
    >>> nearest("zzz", ["pure", "shuffled"])
    '; known: pure, shuffled'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(names)}"
