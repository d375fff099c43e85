"""Validation of external input: collect all problems, raise one error that lists them.

A table (a mapping from disk, network or command line) is checked against one `Rule` per key. Claims files, specs,
`--set` options and records use this module; each adds the checks that it alone needs.
"""

import difflib
import json
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from replicate.errors import UsageError

Scalar = bool | int | float | str
#: the sizes in which the suite is run
PROFILES = ("smoke", "standard", "full")

#: what a spec may hold as a setting; a list in JSON is a tuple here
Param = Scalar | tuple[Scalar, ...]
#: problems that one message lists; a hostile file could make millions
MOST_LISTED = 100
#: the largest size or count that anybody can mean
MOST = 1_000_000_000
#: whole numbers are kept in 64 bits by whatever reads them next
_WHOLE = 2**63
#: levels of lists and tables in free JSON
_DEEPEST = 12
#: characters that command a terminal or cannot be written as UTF-8
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

#: a name that also makes a file's name
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
#: text that stands in a cell of a CSV file, where a spreadsheet takes these first characters for a formula
CELL = re.compile(r"(?![=+\-@\t]).*", re.DOTALL)
_PATTERNS = {
    NAME: "a name of letters, digits, dots, dashes and underscores",
    DIGEST: "a sha256 of 64 hexadecimal digits",
    CELL: "text that does not begin with =, +, - or @, which a spreadsheet would run",
}


#: numbers that JSON refuses: .5, 5., +1, 1_000, 007
_NUMBER = re.compile(r"[+-]?(?=\.?\d)[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?", re.ASCII)


# -- words


class _Brief(reprlib.Repr):
    """repr in at most about sixty characters."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxdict = 3
        self.maxlist = self.maxtuple = 4
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 200 else f"a whole number of {x.bit_length()} bits"


_BRIEF = _Brief()


def brief(value: object) -> str:
    """Return any value in one short printable line."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def harmless(text: str) -> str:
    r"""Text from elsewhere with every character that could command a terminal written out, such as ESC as \\x1b."""
    return _COMMANDS.sub(lambda match: ascii(match.group())[1:-1], text)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a hint like "; did you mean steps?", or "" where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) and len(name) < 100 else []
    return f"; did you mean {near[0]}?" if near else ""


# -- problems


class Problems:
    """Every problem of one input, in the order found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: str, place: str = "") -> None:
        """Note a problem, and the place where it is: a line of a file, or "" where its own words name it."""
        self.found.append(f"{place}: {problem}" if place else problem)

    def __len__(self) -> int:
        return len(self.found)

    def refuse(self, error: type[ValueError]) -> None:
        """Raise one error that lists all problems, one per line; do nothing where there are none."""
        if self.found:
            more = len(self.found) - MOST_LISTED
            listed = [*self.found[:MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise error("\n".join(listed))


#: receives a key ("" for the table itself) and what is wrong with it
Wrong = Callable[[str, str], None]


# -- rules


@dataclass(frozen=True)
class Range:
    """Where a number must lie; without bounds it must be finite."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def must_be(self, value: float) -> str:
        """Return where the number had to lie, in words; "" where it lies there."""
        if isinstance(value, float) and not math.isfinite(value):
            bounded = min(self.high, self.below) < math.inf
            return self.words if bounded else " and ".join(w for w in (self.words, "finite") if w)
        if not (self.low <= value <= self.high and self.above < value < self.below):
            return self.words
        return "" if isinstance(value, float) or -_WHOLE <= value < _WHOLE else "below 2^63 in size"

    @property
    def words(self) -> str:
        """The bounds in words."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"from {self.low} to {self.high}"
        ends = {"{} or more": self.low, "above {}": self.above, "at most {}": self.high, "below {}": self.below}
        return " and ".join(text.format(end) for text, end in ends.items() if math.isfinite(end))


#: a count or size, such as steps
COUNT = Range(0, MOST)


@dataclass(frozen=True)
class Rule:
    """What the value of one key must be.

    Attributes:
        hint: its type, as a dataclass would annotate it: bool, int, float, str, a Literal of texts, a union, a tuple
            (a list in JSON and TOML); or list or Mapping, whose items are looked at elsewhere.
        range: of a number, or of each number in a tuple.
        choices: the texts allowed, where not all are.
        pattern: NAME, DIGEST or CELL, for text.
        required: whether the key must be there.
        blank: whether text may be empty.
    """

    hint: Any
    range: Range = Range()
    choices: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    required: bool = True
    blank: bool = False

    def must_be(self, value: object) -> str:
        """Return what the value had to be, in words; "" where it is that."""
        if self.choices:
            return "" if isinstance(value, str) and value in self.choices else f"one of {', '.join(self.choices)}"
        problem = _mismatch(value, self.hint, self.range)
        if not problem and isinstance(value, str) and value and self.pattern and not self.pattern.fullmatch(value):
            return _PATTERNS[self.pattern]
        return problem


def _mismatch(value: object, hint: Any, bounds: Range) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        problems = [_mismatch(value, arg, bounds) for arg in args]
        right_type = [p for p, arg in zip(problems, args, strict=True) if _is(value, arg)]
        return "" if "" in problems else right_type[0] if right_type else _words(hint)
    if origin is Literal:
        return "" if isinstance(value, str) and value in args else f"one of {', '.join(args)}"
    if not _is(value, hint):
        return _words(hint)
    if isinstance(value, str):
        return "text without control characters" if _COMMANDS.search(value) else ""
    if isinstance(value, (int, float)) and hint is not bool:
        return bounds.must_be(value)
    if isinstance(value, (list, tuple)) and args:
        inside = (_mismatch(v, args[0], bounds) for v in value)
        problem = next((p for p in inside if p), "")
        return "" if not problem else _words(hint) + (f", each {problem}" if problem != _words(args[0]) else "")
    return ""


def _is(value: object, hint: Any) -> bool:
    """Return whether a value has the type, whatever its content."""
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        args = get_args(hint)
        return isinstance(value, (list, tuple)) and (args[-1] is ... or len(value) == len(args))
    return isinstance(value, get_origin(hint) or hint)


_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Scalar: ("a number, text, true or false", "numbers, texts or truth values"),
    Param: ("a number, text, true, false or a list of these", "lists"),
    list: ("a list", "lists"),
    types.NoneType: ("null", "nulls"),
}


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint][0]
    if origin is tuple:
        items = _WORDS[args[0]][1] if args[0] in _WORDS else "values"
        return f"a list of {items}" if args[-1] is ... else f"a list of {len(args)} {items}"
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args if arg is not types.NoneType)
    return "a table"


def rules_of(
    kind: type,
    ranges: Mapping[str, Range] | None = None,
    choices: Mapping[str, Iterable[str]] | None = None,
    complete: bool = False,
) -> dict[str, Rule]:
    """Return one rule per field of a dataclass, by its annotation; a field with a default may be left out.

    Args:
        ranges, choices: what the annotation does not say, by field.
        complete: whether every field must be there, whatever its default.
    """
    hints, ranges, choices = get_type_hints(kind), ranges or {}, choices or {}
    out = {}
    for f in fields(kind):
        given = f.default is MISSING and f.default_factory is MISSING
        bounds, names = ranges.get(f.name, Range()), tuple(choices.get(f.name, ()))
        out[f.name] = Rule(hints[f.name], bounds, names, required=given or complete, blank=not given)
    return out


# -- checks


def check_value(key: str, value: object, rule: Rule, wrong: Wrong, name: str = "") -> None:
    """Report what is wrong with the value of one key of the table `name`."""
    of = f" of {name}" if name else ""
    problem = rule.must_be(value)
    if problem:
        wrong(key, f"{key}{of} is {brief(value)}; it must be {problem}")
    elif isinstance(value, str) and not rule.blank and not value.strip():
        wrong(key, f"{key}{of} is empty")


def check_table(table: object, rules: Mapping[str, Rule], name: str, wrong: Wrong) -> bool:
    """Report every unknown, missing and wrong key of the table `name`; return whether it is a table at all."""
    if not isinstance(table, Mapping):
        wrong("", f"{name} is {brief(table)}; it must be a table")
        return False
    for key in (k for k in table if k not in rules):
        place = key if isinstance(key, str) else ""
        wrong(place, f"{name} has an unknown key {brief(key)}{did_you_mean(key, rules)}")
    for key, rule in rules.items():
        if key in table:
            check_value(key, table[key], rule, wrong, name)
        elif rule.required:
            wrong(key, f"{name} has no {key}")
    return True


def check_json(value: object, name: str, wrong: Wrong) -> None:
    """Report what cannot be kept as JSON or shown in a free part of a file: odd numbers, characters, depth."""
    todo: list[tuple[object, str, int]] = [(value, name, 0)]
    while todo:
        item, at, depth = todo.pop()
        if depth > _DEEPEST:
            wrong("", f"{at} is nested more than {_DEEPEST} levels deep")
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                if problem := _mismatch(key, str, Range()):
                    wrong("", f"a key of {at} is {brief(key)}; it must be {problem}")
                plain = isinstance(key, str) and NAME.fullmatch(key)
                todo.append((inner, f"{at}.{key}" if plain else f"{at}[{brief(key)}]", depth + 1))
        elif isinstance(item, (list, tuple)):
            todo += ((inner, f"{at}[{i}]", depth + 1) for i, inner in enumerate(item))
        elif item is not None and (problem := _mismatch(item, Scalar, Range())):
            wrong("", f"{at} is {brief(item)}; it must be {problem}")


def check_profile(profile: str) -> None:
    """Check the name of a profile; raises UsageError if there is no such profile."""
    if profile not in PROFILES:
        near = did_you_mean(profile, PROFILES)
        raise UsageError(f"unknown profile {profile!r}{near}; choose smoke, standard or full.")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the settings of `--set key=value`; a value is JSON or a number, else text.

    Raises:
        UsageError: every pair that has another form or comes twice, one per line.
    """
    problems, out = Problems(), {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.add(f"--set {brief(pair)} is not of the form key=value.")
        elif key in out:
            problems.add(f"--set {brief(key)} is given twice; give it once.")
        else:
            out[key] = _parsed(text)
    problems.refuse(UsageError)
    return out


def _parsed(text: str) -> Any:
    with suppress(ValueError, RecursionError):  # no JSON, a number of too many digits, or brackets without end
        return json.loads(text)
    if _NUMBER.fullmatch(text.strip()):  # as people and Python write it
        with suppress(ValueError):
            return float(text) if set(text) & set(".eE") else int(text)
    return text
