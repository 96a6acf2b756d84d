"""Text tables as people have them: looked at before anything in them is believed."""

import bz2
import codecs
import csv
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from offbeat.runtime.base.errors import ConfigError

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?", re.ASCII)  # a number with a decimal comma
QUOTED = re.compile(r'"[^"]*"')
REMARK = re.compile(r"(^|\s)#.*")
PACKED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
BROKEN = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)  # what reading may raise
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MOST_DIGITS = 60  # of a whole number

Roles = Mapping[str, Sequence[str]]  # what a column is -> the names by which it is known


def ending(path: str | Path) -> str:
    """How a file's name ends, in lower case, but for what says that it is packed.

    >>> ending("a9a.T.bz2"), ending("w.npy"), ending("a.gz")
    ('.t', '.npy', '')
    """
    return Path(re.sub(r"\.(gz|bz2|xz)$", "", Path(path).name.lower())).suffix


def unpacked(path: str | Path) -> BinaryIO:
    """A file, open; of one that gzip, bzip2 or xz has packed, by whatever name, what is in it."""
    path = Path(path).expanduser()
    with path.open("rb") as file:
        start = file.read(max(map(len, PACKED)))
    return next((o for sign, o in PACKED.items() if start.startswith(sign)), open)(path, "rb")


def read_bytes(path: str | Path) -> bytes:
    """What is in a file, unpacked; a ConfigError where it cannot be read."""
    try:
        with unpacked(path) as file:
            return file.read()
    except BROKEN as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def read_text(path: str | Path) -> str:
    """A file's text, unpacked, in UTF-8 or in UTF-16 that says so.

    Raises:
        ConfigError: the file cannot be read.
    """
    data = read_bytes(path)
    try:
        text = data.decode("utf-16" if data[:2] in UTF16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it is no text; of an archive, give the file inside")
        return text
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def whole(word: str) -> int | None:
    """The whole number that ``word`` is, as 2, 2.0 and 2.000e+00 are, or None.

    >>> whole("2.000e+00"), whole("2.5"), whole("two")
    (2, None, None)
    """
    if not NUMBER.fullmatch(word):
        return None
    digits, _, exponent = word.lower().partition("e")
    if len(digits) + abs(int(exponent or 0)) > MOST_DIGITS:
        return None
    number = Fraction(word)
    return int(number) if number.denominator == 1 else None


def wholes(words: Iterable[str]) -> list[int] | None:
    """All words as whole numbers; None where one is none."""
    numbers = [whole(word) for word in words]
    found = [number for number in numbers if number is not None]
    return found if len(found) == len(numbers) else None


def natural(name: str) -> list[tuple[int, int, str]]:
    """The key that sorts w2 before w10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


@dataclass
class Table:
    """Rows of as many fields each; ``header`` has a role for each column, once it is known.

    Args:
        path: of the file.
        sign: that parts the fields: tab, semicolon, comma or space.
        lines: ``[m]``, the line of each row in the file.
        rows: ``[m]`` lists of fields, without quotes.
        remarks: what comes behind ``#`` or ``%`` before the first row, line by line.
    """

    path: str
    sign: str
    lines: list[int]
    rows: list[list[str]]
    remarks: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.rows[0]) if self.rows else 0

    def at(self, row: int) -> str:
        """Where a row is, and how it begins."""
        return f'{self.path} line {self.lines[row]}: "{self.sign.join(self.rows[row])[:40]}"'

    def column(self, role: str) -> list[str]:
        """The fields of the column that ``header`` calls ``role``."""
        place = self.header.index(role)
        return [row[place] for row in self.rows]

    def numbers(self, role: str) -> list[float]:
        """The same as numbers; a ConfigError at the first that is none."""
        found = []
        for at, word in enumerate(self.column(role)):
            if not NUMBER.fullmatch(word) or not abs(number := float(word)) < float("inf"):
                raise ConfigError(f'{self.at(at)}: its {role} "{word[:40]}" is no number')
            found.append(number)
        return found

    def named(self, roles: Roles, taken: str, *orders: Sequence[str]) -> "Table":
        """The same with its ``header``: the names above it, else the order of so many columns.

        Args:
            roles: the columns that there may be.
            taken: how errors say what would be right.
            orders: what columns are without a header, for each number of columns.

        Raises:
            ConfigError: a column by an unknown name, or twice; or as many as no order has.
        """
        words, below = self.titles(roles)
        if not words:
            for order in orders:
                if len(order) == self.columns:
                    return replace(self, header=list(order))
            where = self.at(0) if self.rows else f"{self.path}:"
            raise ConfigError(f"{where} has {self.columns} columns and no header; {taken}")
        known = {name: role for role, names in roles.items() for name in names}
        if words[0] == "" and below._counts(0):
            known[""] = ""  # the rows' numbers, as pandas writes them
        header: list[str] = []
        for word in words:
            if word not in known:
                raise ConfigError(f'{self.path}: unknown column "{word}"; {taken}')
            if known[word] in header:
                raise ConfigError(f"{self.path}: two columns are the {known[word]}; {taken}")
            header.append(known[word])
        return replace(below, header=header)

    def titles(self, roles: Roles) -> tuple[list[str], "Table"]:
        """The names above the columns, in lower case, and the table without them.

        They are the first row, or a remark above it, where these are known names; or a row of
        words above numbers.  None are an empty list.
        """
        if not self.rows:
            return [], self
        known = {name for names in roles.values() for name in names}
        first = [word.casefold() for word in self.rows[0]]
        below = replace(self, lines=self.lines[1:], rows=self.rows[1:])
        used = {word.casefold() for row in below.rows for word in row}
        if {*first} - {""} <= known and not {*first} & used - {""}:
            return first, below
        words = not any(NUMBER.fullmatch(word) for word in first)
        counted = zip(*below.rows, strict=True)
        if words and any(all(NUMBER.fullmatch(word) for word in column) for column in counted):
            return first, below
        for remark in self.remarks[-1:]:
            above = [word.casefold() for word in _fields(remark.strip(), self.sign)]
            if len(above) == self.columns and len({*above} & known) > 1:
                return above, self
        return [], self

    def _counts(self, place: int) -> bool:
        """Whether a column counts rows, from any number on."""
        numbers = wholes(row[place] for row in self.rows)
        return numbers is not None and all(b - 1 == a for a, b in pairwise(numbers))


def read_table(path: str | Path, content: str | None = None) -> Table:
    """The rows of a file, or of its ``content``, cut at tabs, semicolons, commas or spaces.

    Lines that begin with ``#`` or ``%`` are remarks, and what follows a space and ``#``.  Where
    semicolons part them, numbers may have decimal commas.

    Raises:
        ConfigError: it cannot be read, or lines are cut in several ways or into several numbers
            of fields; names file and line.
    """
    lines: list[tuple[int, str]] = []
    remarks: list[str] = []
    for number, line in enumerate(
        (read_text(path) if content is None else content).splitlines(), 1
    ):
        if line.lstrip().startswith(("#", "%")):
            if lines and line.strip() == "#":
                raise ConfigError(
                    f'{path} line {number}: is "#" alone, as between the nodes and the edges of '
                    "TGF; give one table"
                )
            if not lines:
                remarks.append(line.lstrip().lstrip("#% "))
        elif bare := REMARK.sub("", line).strip(" \r\n"):
            lines.append((number, bare))
    for number, line in lines:
        if re.search(r"[,;]#", QUOTED.sub("x", line)):
            raise ConfigError(
                f'{path} line {number}: "{line[:40]}" has a remark or a name that begins with #; '
                "put a space before remarks, and quotes around names"
            )
    sign = _sign(str(path), lines)
    rows = [_fields(line, sign) for _, line in lines]
    if rows and all(len(row) > 1 and row[-1] == "" for row in rows):
        rows = [row[:-1] for row in rows]  # each line ends with the sign
    table = Table(str(path), sign, [number for number, _ in lines], rows, remarks)
    for at, row in enumerate(rows):
        if len(row) != table.columns:
            raise ConfigError(
                f"{table.at(at)} has {len(row)} columns, and line {table.lines[0]} has "
                f"{table.columns}"
            )
    return _points(table)


def _sign(path: str, lines: list[tuple[int, str]]) -> str:
    """What parts the fields; a ConfigError where lines do not agree about it."""
    bare = [QUOTED.sub("x", line) for _, line in lines]
    for sign, name in ((";", "semicolon"), ("\t", "tab"), (",", "comma")):
        has = [sign in line for line in bare]
        if not any(has) or (sign == "\t" and not all(has)):  # which is a space, too
            continue
        if not all(has):
            number, line = lines[has.index(False)]
            raise ConfigError(
                f'{path} line {number}: "{line[:40]}" has no {name}, and other lines are cut at '
                "one; take one sign between columns, and a point in numbers"
            )
        words = [word for word in bare[0].split() if "," in word]
        if sign == "," and len(bare[0].split()) > 1 and all(map(COMMA.fullmatch, words)):
            raise ConfigError(
                f'{path} line {lines[0][0]}: "{words[0]}" may be one number or two; take one sign '
                "between columns, and a point in numbers"
            )
        return sign
    return " "


def _fields(line: str, sign: str) -> list[str]:
    if sign == " ":
        line = line.replace("\t", " ")
    try:
        (row,) = csv.reader([line], delimiter=sign, skipinitialspace=True)
    except csv.Error as error:
        raise ConfigError(f'"{line[:40]}" cannot be cut into columns ({error})') from None
    return [_unquoted(word.strip()) for word in row]


def _unquoted(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] == "'" else word


def _points(table: Table) -> Table:
    """The table with decimal points in the place of commas; refuses what could be either."""
    commas = points = ""
    for at, row in enumerate(table.rows):
        for place, word in enumerate(row):
            if table.sign == "," and " " in word and all(map(NUMBER.fullmatch, word.split())):
                raise ConfigError(
                    f"{table.at(at)} has commas and spaces between numbers; take one sign between "
                    "columns, and a point in numbers"
                )
            if "," in word and COMMA.fullmatch(word):
                commas = word
            elif "." in word and NUMBER.fullmatch(word):
                points = word
            if commas and (points or table.sign != ";"):
                raise ConfigError(
                    f'{table.at(at)}: numbers have commas as in "{commas}"; write a point in all '
                    "of them, or a comma in all and semicolons between columns"
                )
            if commas is word:
                row[place] = word.replace(",", ".")
    return table
