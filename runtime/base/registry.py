"""Named, validated factories: how ``"lognormal(1.0)"`` or a TOML table becomes an object.

Every method, task, speed law and partition is a plain function with typed keyword
arguments.  Registering it under a name gives it a text form, a table form, one-sentence
errors, and a stamp (``spec``) from which a run folder can build it again.
"""

import ast
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

import pydantic
import pydantic.dataclasses
from pydantic import ConfigDict, Field, ValidationError

from offbeat.runtime.base.errors import ConfigError, nearest

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
MOST_SEEDS = 2**32
Seed = Annotated[int, Field(ge=0, lt=MOST_SEEDS)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]

MADE_BY_HAND = "python:"  # how a file names what it cannot hold


def _itself(path: Path) -> Iterable[Path]:
    return (path,)


@dataclass(frozen=True)
class Reads:
    """Says of an option, in its annotation, that its text names files: a path, or a glob.

    Args:
        bundled: texts that name none.
        prefix: that may stand before the path.
        files: what is read where a path is named.
    """

    bundled: Collection[str] = ("",)
    prefix: str = ""
    files: Callable[[Path], Iterable[Path]] = _itself

    def parts(self, text: str) -> tuple[str, str]:
        """The prefix, where ``text`` has it, and the path."""
        prefix = self.prefix if text.startswith(self.prefix) else ""
        return prefix, text.removeprefix(prefix)

    def found(self, text: str) -> list[Path]:
        """The files that ``text`` names, in the order of their names."""
        path = Path(self.parts(text)[1]).expanduser().absolute()
        there = [path] if path.exists() else map(Path, sorted(glob(str(path), recursive=True)))
        named = dict.fromkeys(file for one in there for file in self.files(one))
        return [file for file in named if file.is_file()]

    def root(self, text: str) -> Path:
        """The folder below which all of them are."""
        path = Path(self.parts(text)[1]).expanduser().absolute()
        if path.is_dir():
            return path
        folder = path.parent
        while not path.exists() and has_magic(str(folder)):
            folder = folder.parent
        return folder


Change = Callable[[str, Reads], str]  # (text that names files, how it does) -> another
File = Annotated[str, Reads()]


@dataclass(frozen=True)
class Holds:
    """Says of an option, in its annotation, that it is a part of that registry, or several."""

    registry: "Registry"


_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Spec:
    """The name and arguments an object was built from."""

    name: str
    options: Mapping[str, Any]

    def portable(self) -> bool:
        """Whether a file can hold it: only numbers, text, flags, and lists or tables of these."""
        return all(_plain(value) for value in self.options.values())

    def table(self) -> dict[str, Any]:
        """The TOML table; absent values (None) are left out."""
        given = {key: value for key, value in self.options.items() if value is not None}
        return {"name": self.name, **given}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)
        return f"{self.name}({inner})" if inner else self.name


def told_apart(specs: Sequence[Spec]) -> list[str]:
    """The names in ``specs``, with the options that tell apart those of one name.

    >>> told_apart([Spec("ring", {"n": 4}), Spec("ring", {"n": 8}), Spec("star", {"n": 8})])
    ['ring n=4', 'ring n=8', 'star']
    """
    return [
        " ".join(
            [spec.name]
            + [
                f"{key}={value}"
                for key, value in spec.options.items()
                if any(o.name == spec.name and o.options.get(key) != value for o in specs)
            ]
        )
        for spec in specs
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(_plain(item) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str)


def validated(where: str) -> Callable[[F], F]:
    """Decorator: wrong arguments are one ConfigError that begins with ``where``."""

    def decorate(function: F) -> F:
        checked = pydantic.validate_call(config=_STRICT)(function)
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return checked(*args, **kwargs)
            except ValidationError as error:
                raise ConfigError(explain(error, where, parameters)) from None

        return call  # type: ignore[return-value]

    return decorate


class Registry:
    """A family of named factories, for example all speed laws.

    Args:
        kind: what they make.
        elsewhere: name in the literature -> name here, to be proposed.
    """

    def __init__(self, kind: str, elsewhere: Mapping[str, str] | None = None) -> None:
        self.kind, self._elsewhere = kind, dict(elsewhere or {})
        self._factories: dict[str, Callable[..., Any]] = {}
        self._marks: dict[str, dict[str, Reads | Holds]] = {}  # options that name files, or parts

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: publish a factory under ``name``; calls to it are validated and stamped."""

        def decorate(factory: F) -> F:
            signature = inspect.signature(factory)
            checked = validated(f'{self.kind} "{name}"')(factory)

            @functools.wraps(factory)
            def build(*args: Any, **kwargs: Any) -> Any:
                made = checked(*args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                made.spec = Spec(name, dict(bound.arguments))
                return made

            self._factories[name] = build
            marks = {k: _mark(p.annotation) for k, p in signature.parameters.items()}
            self._marks[name] = {key: mark for key, mark in marks.items() if mark is not None}
            return build  # type: ignore[return-value]

        return decorate

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._factories:
            here = self._elsewhere.get(name.lower().replace("_", "-"))
            meant = f'; did you mean "{here}"?' if here else nearest(name, self)
            raise ConfigError(f'no {self.kind} is called "{name}"{meant}')
        return self._factories[name]

    def parse(self, text: str, **extra: Any) -> Any:
        """Build from the text form, ``name``, ``name(arguments)`` or ``name:argument``.

        ``extra`` fills arguments that the factory has and the text leaves out.
        """
        name, args, kwargs = parse_call(text, self.kind)
        return self._build(name, args, kwargs, extra)

    def table(self, table: Mapping[str, Any], **extra: Any) -> Any:
        """Build from the table form: ``name`` and the arguments as keys."""
        options = dict(table)
        if not isinstance(name := options.pop("name", None), str):
            raise ConfigError(f'the {self.kind} table needs name = "..."; known: {", ".join(self)}')
        if name.startswith(MADE_BY_HAND):
            raise ConfigError(
                f'the {self.kind} "{name}" was made in Python and no file can hold it; give it '
                f"there, as in offbeat.resume(folder, {self.kind}=...)"
            )
        return self._build(name, [], options, extra)

    def _build(
        self, name: str, args: list[Any], kwargs: dict[str, Any], extra: dict[str, Any]
    ) -> Any:
        factory = self[name]
        parameters = list(inspect.signature(factory).parameters)
        taken = set(parameters[: len(args)]) | kwargs.keys()
        fill = {k: v for k, v in extra.items() if k in parameters and k not in taken}
        return factory(*args, **kwargs, **fill)

    def rewritten(self, given: Any, change: Change) -> Any:
        """A part's text or table, in which what names files is as ``change`` has it.

        What cannot be read, or is neither, stays: who builds it says what is wrong.
        """
        args: Sequence[Any] = ()
        if isinstance(given, str):
            try:
                name, args, options = parse_call(given, self.kind)
            except ConfigError:
                return given
        elif isinstance(given, Mapping):
            name, options = str(given.get("name")), dict(given)
        else:
            return given
        if not (marks := self._marks.get(name, {})):
            return given
        options = dict(zip(inspect.signature(self[name]).parameters, args, strict=False)) | options
        named = {key: options[key] for key in marks if key in options}
        changed = {key: _changed(value, marks[key], change) for key, value in named.items()}
        if changed == named:
            return given
        made = options | changed
        return str(Spec(name, made)) if isinstance(given, str) else made

    def describe(self) -> list[tuple[str, str, str]]:
        """``(name, arguments, first line of the docstring)`` of every factory."""
        rows = []
        for name in self:
            factory = self._factories[name]
            shown = [
                key if p.default is p.empty else f"{key}={p.default!r}"
                for key, p in inspect.signature(factory).parameters.items()
            ]
            first = (factory.__doc__ or "").strip().split("\n")[0]
            rows.append((name, ", ".join(shown), first))
        return rows


def _mark(annotation: Any) -> Reads | Holds | None:
    """What an annotation says, however deep, of files."""
    inner = [*getattr(annotation, "__metadata__", ()), *map(_mark, get_args(annotation))]
    return next((one for one in inner if isinstance(one, Reads | Holds)), None)


def _changed(value: Any, mark: Reads | Holds, change: Change) -> Any:
    if isinstance(value, list):
        return [_changed(one, mark, change) for one in value]
    if isinstance(mark, Holds):
        return mark.registry.rewritten(value, change)
    return change(value, mark) if isinstance(value, str) and value not in mark.bundled else value


_CALL = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\)|:(.+))?\s*", re.DOTALL)
_RANGE = re.compile(r"(?<![\"'\w.])(\d+(?:\.\d+)?\.\.\d+(?:\.\d+)?)(?![\"'\w])")


def parse_call(text: str, kind: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Split ``name(1, key=x)`` or ``name:x`` into a name and plain arguments.

    Bare words are text, ``1..10`` is a range and stays text, nested calls stay text.

    >>> parse_call("classes(2)", "partition")
    ('classes', [2], {})
    >>> parse_call("logistic:digits", "task"), parse_call("ring:16", "topology")
    (('logistic', ['digits'], {}), ('ring', [16], {}))
    >>> parse_call("classes(2", "partition")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: cannot read the partition "classes(2"; write name, \
name(arguments) or name:argument
    """
    match = _CALL.fullmatch(text)
    unreadable = ConfigError(
        f'cannot read the {kind} "{text}"; write name, name(arguments) or name:argument'
        + (", with quotes around a path in brackets" if "/" in text else "")
    )
    if match is None:
        raise unreadable
    name, inner, single = match.groups()
    if single is not None:
        word = single.strip()
        return name, [int(word) if word.isdecimal() else word], {}
    quoted = _RANGE.sub(r'"\1"', inner or "")
    source = f"f({quoted})"
    try:
        call = ast.parse(source, mode="eval").body
    except SyntaxError:
        raise unreadable from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise unreadable
    keys = [keyword.arg for keyword in call.keywords]
    if None in keys or len(set(keys)) < len(keys):
        raise unreadable
    args = [_value(node, source) for node in call.args]
    return name, args, {str(k.arg): _value(k.value, source) for k in call.keywords}


def _value(node: ast.expr, source: str) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, source) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        written = ast.get_source_segment(source, node)
        return {"true": True, "false": False}.get(str(written), written)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only record whose mistakes are ``ConfigError``."""
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    init = made.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            fields = made.__dataclass_fields__
            raise ConfigError(explain(error, made.__name__.lower(), fields)) from None

    made.__init__ = checked  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def explain(error: ValidationError, where: str, known: Mapping[str, Any]) -> str:
    """All of a validation error's findings as one sentence that names place and remedy."""
    findings: dict[str, list[str]] = {}  # place -> what is wrong there
    for item in error.errors():
        first, *rest = item["loc"] or ("",)
        if isinstance(first, int) and first < len(known):  # a positional argument
            first = list(known)[first]
        # Of a type with alternatives each is told; the names pydantic gives them are left out.
        place = ".".join(map(str, (first, *(part for part in rest if isinstance(part, int)))))
        kind, given, reason = item["type"], item["input"], item.get("ctx", {}).get("error")
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            said = f'unknown key "{place}"{nearest(place, known)}'
        elif kind in ("missing_argument", "missing", "missing_keyword_only_argument"):
            said = f'"{place}" is missing'
        elif kind in ("unexpected_positional_argument", "multiple_argument_values"):
            said = f"too many arguments; it takes {', '.join(known) or 'none'}"
        elif isinstance(reason, ValueError):
            said = str(reason)
        else:
            said = f'"{place}" {item["msg"].removeprefix("Input ")}, not {given!r}'
            if place in findings:  # another alternative
                said = said.removeprefix(f'"{place}" ')
                last = findings[place].pop().removesuffix(f", not {given!r}")
                said = f"{last}, or {said}"
        findings.setdefault(place, []).append(said)
    told = [said for place in findings.values() for said in place]
    return f"{where}: {'; '.join(dict.fromkeys(told))}"
