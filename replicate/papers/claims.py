"""Claims as data: what a paper prints, where, and what would count as finding it again.

One TOML file a paper:

    [paper]
    key = "ncsn"                      # the module's name
    title = "..."
    authors = "..."
    year = 2019
    arxiv = "1907.05600"              # or url = "..."
    deviations = "..."                # of all its experiments, in a few sentences
    bibtex = '''...'''

    [[claim]]
    id = "N2"
    place = "sec 3.2.2, Fig 3(b)"
    says = "what the paper states, in our words"
    kind = "ordering"                 # number, ordering, identity or slope
    quantity = "what is measured, in words"
    unit = "probability"
    published = "wrong weights (figure)"   # as printed: a number, or text
    source_quality = "R"              # R, S or U
    target = 0.0                      # the number compared with; `published` where that is a number
    relation = "above"                # see RELATIONS
    tolerance = 0.05
    tolerance_why = "..."             # chosen before the run, from what
    profile = "standard"              # the smallest profile at which it may be judged
    experiment = "ncsn-langevin"      # or none, where `measure` names a task and a model
    measure = "weight_error:1000"     # METRIC of the experiment, or TASK/MODEL/METRIC

and where needed `minus` or `over` (a second measure: the quantity is the difference or the ratio, paired by seed),
`deterministic = true` (no randomness: one run, no interval), `seed_sd` (tolerance is at least so many standard
deviations over seeds), `setup`, `deviations`, `not_comparable` (why this is never judged), `needs` (what must be there
for it to run) and `plots` (names of the experiment's plots to show).
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

Relation = Literal["within", "at most", "at least", "above", "below"]
#: how a value is compared with target t and tolerance d
RELATIONS: dict[str, str] = {
    "within": "within t - d and t + d",
    "at most": "at most t + d: the printed value or a smaller one",
    "at least": "at least t - d: the printed value or a larger one",
    "above": "above t + d: by a margin of d",
    "below": "below t - d: by a margin of d",
}
Kind = Literal["number", "ordering", "identity", "slope"]
SOURCES: dict[str, str] = {
    "R": "read in the paper's own text or the authors' repository",
    "S": "read in a later paper, a re-implementation or a summary that quotes it",
    "U": "unverified source: widely quoted, not checked against any text",
}
JUDGED_AT = ("standard", "full")


class ClaimError(ValueError):
    """A claims file is wrong; the message has its name, the line and what to write there."""


@dataclass(frozen=True)
class Claim:
    """One claim; the fields are those of the file, as the module's docstring explains them."""

    id: str
    place: str
    says: str
    kind: Kind
    quantity: str
    unit: str
    published: float | str
    source_quality: str
    relation: Relation
    tolerance: float
    tolerance_why: str
    profile: str
    measure: str
    experiment: str = ""
    target: float = math.nan
    minus: str = ""
    over: str = ""
    deterministic: bool = False
    seed_sd: float = 0.0
    setup: str = ""
    deviations: str = ""
    not_comparable: str = ""
    needs: str = ""
    plots: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperClaims:
    """A whole file: the paper's own lines and its claims."""

    key: str
    title: str
    authors: str
    year: int
    bibtex: str
    claims: tuple[Claim, ...]
    arxiv: str = ""
    url: str = ""
    deviations: str = ""

    @property
    def cite(self) -> str:
        """Authors, year and where to find it, in one line."""
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.url
        return f"{self.authors} {self.year}" + (f", {where}" if where else "")


_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


def read_claims(path: Path) -> PaperClaims:
    """Read and check a claims file.

    Raises:
        ClaimError: all that is wrong with the file, one problem a line, each with its line number.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ClaimError(f"{path} is not TOML: {error}") from None
    checker = _Checker(path.name, _places(text))
    read = checker.file(data)
    if checker.problems:
        raise ClaimError("\n".join(checker.problems))
    assert read is not None
    return read


Places = dict[tuple[int, str], int]


def _places(text: str) -> Places:
    """Line of each key by (claim's number from 0, or -1 for the paper, key); key "" is the table's own header."""
    found: Places = {}
    table, quote = -2, ""
    for number, line in enumerate(text.splitlines(), 1):
        if quote:
            quote = "" if quote in line else quote
            continue
        stripped = line.strip()
        if stripped.startswith("[["):
            table = max(table, -1) + 1
            found[table, ""] = number
        elif stripped.startswith("["):
            table = -1
            found[table, ""] = number
        elif match := re.match(r"([A-Za-z0-9_-]+)\s*=", stripped):
            found.setdefault((table, match.group(1)), number)
        for mark in ("'''", '"""'):
            if line.count(mark) % 2:
                quote = mark
    return found


class _Checker:
    """Collects every problem of one file."""

    def __init__(self, name: str, places: Places) -> None:
        self.name, self.places = name, places
        self.problems: list[str] = []

    def wrong(self, table: int, key: str, problem: str) -> None:
        """Note a problem at a key's line, or at its table's header where the key is missing."""
        line = self.places.get((table, key)) or self.places.get((table, ""), 1)
        self.problems.append(f"{self.name}, line {line}: {problem}")

    def file(self, data: Mapping[str, Any]) -> PaperClaims | None:
        """The whole file, or None where something is wrong."""
        for key in sorted(set(data) - {"paper", "claim"}):
            self.wrong(-1, key, f"unknown table {key!r}; a claims file has [paper] and [[claim]]")
        paper, rows = data.get("paper"), data.get("claim")
        if not isinstance(paper, dict):
            self.wrong(-1, "", "there is no [paper] table")
            return None
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            self.wrong(-1, "", "there is no [[claim]]; a paper has at least one")
            return None
        self.table(-1, "the paper", paper, PaperClaims, frozenset({"claims"}))
        if not (paper.get("arxiv") or paper.get("url")):
            self.wrong(-1, "", "the paper has no source: give arxiv or url")
        claims = [self.claim(i, row) for i, row in enumerate(rows)]
        ids = [str(r.get("id")) for r in rows]
        for i, name in enumerate(ids):
            if name in ids[:i]:
                self.wrong(i, "id", f"claim id {name!r} is used twice")
        if self.problems:
            return None
        return PaperClaims(**paper, claims=tuple(c for c in claims if c is not None))

    def table(self, at: int, name: str, row: Mapping[str, Any], kind: type, skip: frozenset[str]) -> None:
        """Unknown, missing and wrongly typed keys of one table."""
        known = {f.name: f for f in fields(kind) if f.name not in skip}
        for key in row:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self.wrong(at, key, f"{name} has an unknown key {key!r}{hint}")
        hints = get_type_hints(kind)
        for key, f in known.items():
            if key not in row:
                if f.default is MISSING:
                    self.wrong(at, key, f"{name} has no {key}")
            elif not _fits(row[key], hints[key]):
                self.wrong(at, key, f"{key} of {name} is {row[key]!r}; it must be {_words(hints[key])}")
            elif f.default is MISSING and isinstance(row[key], str) and not row[key].strip():
                self.wrong(at, key, f"{key} of {name} is empty")

    def claim(self, at: int, row: Mapping[str, Any]) -> Claim | None:
        """One claim, or None where something is wrong."""
        before, name = len(self.problems), f"claim {row.get('id', at + 1)}"
        self.table(at, name, row, Claim, frozenset())
        if len(self.problems) > before:
            return None
        self.choices(at, name, row)
        if not _ID.fullmatch(row["id"]):
            self.wrong(at, "id", f"{name}: an id is letters, digits, dots and dashes")
        if not math.isfinite(row["tolerance"]) or row["tolerance"] < 0:
            self.wrong(at, "tolerance", f"{name}: tolerance is {row['tolerance']}; it must be 0 or more")
        if row.get("seed_sd", 0.0) < 0:
            self.wrong(at, "seed_sd", f"{name}: seed_sd is {row['seed_sd']}; it must be 0 or more")
        target = row.get("target", row["published"])
        if isinstance(target, str) or not math.isfinite(target):
            self.wrong(at, "target", f"{name}: published is text, so the number compared with belongs into target")
        if row.get("minus") and row.get("over"):
            self.wrong(at, "over", f"{name}: give minus or over, not both")
        for key in ("measure", "minus", "over"):
            parts = row.get(key, "").split("/")
            if not all(parts) and row.get(key):
                self.wrong(at, key, f"{name}: {key} is {row[key]!r}; it must be METRIC or TASK/MODEL/METRIC")
            elif row.get(key) and not (len(parts) == 3 or (len(parts) == 1 and row.get("experiment"))):
                self.wrong(at, key, f"{name}: {key} {row[key]!r} needs an experiment, or the form TASK/MODEL/METRIC")
        if len(self.problems) > before:
            return None
        published = row["published"] if isinstance(row["published"], str) else float(row["published"])
        plots = tuple(row.get("plots", ()))
        return Claim(**{**row, "published": published, "target": float(target), "plots": plots})

    def choices(self, at: int, name: str, row: Mapping[str, Any]) -> None:
        """Fields with a closed set of values."""
        allowed: dict[str, tuple[str, ...]] = {
            "kind": get_args(Kind),
            "relation": get_args(Relation),
            "source_quality": tuple(SOURCES),
            "profile": JUDGED_AT,
        }
        for key, values in allowed.items():
            if row[key] not in values:
                self.wrong(at, key, f"{name}: {key} is {row[key]!r}; it must be one of {', '.join(values)}")


def _fits(value: Any, hint: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return number
    if hint == float | str:
        return number or isinstance(value, str)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return isinstance(value, str)


def _words(hint: Any) -> str:
    if hint == float | str:
        return "a number or text"
    return {bool: "true or false", float: "a number", int: "a whole number"}.get(hint, "text")


def resolved(measure: str, claim: Claim, key: str) -> str:
    """A claim's measure as TASK/MODEL/METRIC; "" stays "".

    Args:
        key: the paper's.
    """
    if not measure or "/" in measure:
        return measure
    return f"{claim.experiment}/{key}/{measure}"
