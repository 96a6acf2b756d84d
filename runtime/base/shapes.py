"""Names and shapes of a model's parameters, as text that travels and can be compared."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from offbeat.runtime.base.errors import BadHeader

FILE = "shapes.json"  # in a run's folder
MOST_RANK = 16
MOST_SHOWN = 4  # differences in one sentence
Size = Annotated[int, Meta(ge=0, lt=2**53)]
Shape = Annotated[tuple[Size, ...], Meta(max_length=MOST_RANK)]
Shapes = list[tuple[str, Shape]]
_decoder = msgspec.json.Decoder(Shapes)
COMPILED, PARALLEL = "_orig_mod.", "module."  # what torch.compile and DataParallel add to names


def write(shapes: Iterable[tuple[str, Iterable[int]]]) -> str:
    """The text of ``shapes``.

    >>> read(write([("weight", (3, 2)), ("scale", ())]))
    [('weight', (3, 2)), ('scale', ())]
    """
    return msgspec.json.encode([(name, tuple(shape)) for name, shape in shapes]).decode()


def read(text: str, dim: int | None = None) -> Shapes:
    """The shapes in ``text``; none in "".

    Args:
        text: that was written.
        dim: entries that they have together, where that is known.

    Raises:
        BadHeader: it is no such text.
    """
    try:
        found: Shapes = _decoder.decode(text) if text else []
    except msgspec.MsgspecError as error:
        raise BadHeader(f"the shapes of a model cannot be read: {error}") from None
    if dim is not None:
        if len({name for name, _ in found}) < len(found):
            raise BadHeader("the shapes of a model name a parameter twice")
        if (made := sum(math.prod(shape) for _, shape in found)) != dim:
            raise BadHeader(f"the shapes of a model make {made} parameters, not {dim}")
    return found


def stripped(names: Sequence[str]) -> dict[str, str]:
    """Names -> the same without what wrappers add.

    >>> stripped(["module.a._orig_mod.b"]), stripped(["module.a", "b"])
    ({'module.a._orig_mod.b': 'a.b'}, {'module.a': 'module.a', 'b': 'b'})
    """
    found = {name: name.replace(COMPILED, "") for name in names}
    if all(name.startswith(PARALLEL) for name in found.values()):
        return {name: kept.removeprefix(PARALLEL) for name, kept in found.items()}
    return found


def bare(shapes: Shapes) -> Shapes:
    """Without what wrappers add to names: a file does not say who did."""
    called = stripped([name for name, _ in shapes])
    return [(called[name], shape) for name, shape in shapes]


def difference(here: Shapes, there: Shapes) -> str:
    """In what a model here differs from one there, "" if in nothing.

    >>> difference([("a", (3,)), ("b", (2,))], [("a", (4,)), ("c", ())])
    'a is [3] here, [4] there; b [2] is here alone; c [] is there alone'
    """
    mine, theirs = dict(bare(here)), dict(bare(there))
    said = [
        f"{name} is {list(shape)} here, {list(theirs[name])} there"
        for name, shape in mine.items()
        if name in theirs and theirs[name] != shape
    ]
    said += [f"{name} {list(s)} is here alone" for name, s in mine.items() if name not in theirs]
    said += [f"{name} {list(s)} is there alone" for name, s in theirs.items() if name not in mine]
    more = f"; and {len(said) - MOST_SHOWN} more" if len(said) > MOST_SHOWN else ""
    return "; ".join(said[:MOST_SHOWN]) + more


def unlike(text: str, known: str, dim: int) -> str:
    """Why a model of shapes ``text`` is not one of ``dim`` and of ``known``, if known; else ""."""
    try:
        theirs = read(text, dim)
    except BadHeader as error:
        return str(error)
    ours = read(known)
    if ours and bare(theirs) != bare(ours):
        return f"its model is another than the run's: {difference(theirs, ours)}"
    return ""
