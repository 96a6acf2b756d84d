"""Errors by whose fault it is, and the sentence that names the remedy."""

import difflib
import errno
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


class Fenced(OffbeatError):
    """Another process has taken this one's place; what it does no longer counts."""

    exit_code = 3


class Refused(OffbeatError):
    """The other side does not let this process in."""

    exit_code = 4


class PeerError(OffbeatError, ValueError):
    """What came from a peer cannot be right; nothing of it was used.

    Each way of being wrong is a class of its own, whose ``name`` is what counters call it.
    """

    exit_code = 5
    name = "peer_error"


class BadHeader(PeerError):
    """It cannot be read, or says what no header may say."""

    name = "bad_header"


class TooLarge(PeerError):
    """More frames or bytes than anything in this run needs."""

    name = "too_large"


class WrongVersion(PeerError):
    """Another version of the protocol."""

    name = "wrong_version"


class WrongRun(PeerError):
    """A message of another run."""

    name = "wrong_run"


class WrongNode(PeerError):
    """It names a node that its sender is not, or another node's job."""

    name = "wrong_node"


class UnknownKind(PeerError):
    """A kind of message that is not spoken here."""

    name = "unknown_kind"


class BadArray(PeerError):
    """An array with a name, dtype, shape or size that is not the one expected here."""

    name = "bad_array"


class NotFinite(PeerError):
    """An array with an entry that is not a finite number."""

    name = "not_finite"


class OldIncarnation(PeerError):
    """From a process that was declared dead, or to one that is."""

    name = "old_incarnation"


class UnknownJob(PeerError):
    """The result of a job that was never handed out."""

    name = "unknown_job"


class StaleJob(PeerError):
    """The result of a job that is done, cancelled or taken back."""

    name = "stale_job"


class ComputeError(OffbeatError):
    """The processes that compute are gone, or their code fails."""

    exit_code = 5


# What users may catch is called as they know it.
for public in (
    *(OffbeatError, ConfigError, StorageError, Diverged),
    *(Fenced, Refused, PeerError, ComputeError),
):
    public.__module__ = "offbeat"


def passes(error: BaseException | None) -> bool:
    """Whether ``error`` comes of too many open files: nothing is lost, and it can be tried again.

    >>> passes(OSError(24, "Too many open files")), passes(OSError(28, "No space left on device"))
    (True, False)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


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
