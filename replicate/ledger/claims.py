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

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from replicate.errors import ClaimError
from replicate.runs.paper import Paper, papers
from replicate.validation import CELL, NAME, Problems, Range, brief, check_table, rules_of

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
_PAPER = rules_of(PaperClaims, ranges={"year": Range(1600, 2200)})
del _PAPER["claims"]  # which have rules of their own
_PAPER |= {"key": replace(_PAPER["key"], pattern=NAME), "authors": replace(_PAPER["authors"], pattern=CELL)}
_CLAIM = rules_of(
    Claim,
    ranges={"tolerance": Range(low=0), "seed_sd": Range(low=0)},
    choices={"source_quality": SOURCES, "profile": JUDGED_AT},
)
#: texts that become cells of claims.csv
_CELLS = ("place", "says", "quantity", "unit", "published", "measure", "minus", "over", "not_comparable", "needs")
_CLAIM |= {key: replace(_CLAIM[key], pattern=CELL) for key in _CELLS}


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
    except (ValueError, RecursionError) as error:  # a number of too many digits, or brackets without end
        raise ClaimError(f"{path} is not TOML: {error}") from None
    checker = _Checker(path.name, _places(text))
    read = checker.file(data)
    checker.problems.refuse(ClaimError)
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
        if stripped.startswith("["):
            table = max(table, -1) + 1 if stripped.startswith("[[") else -1
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
        self.problems = Problems()

    def wrong(self, table: int, key: str, problem: str) -> None:
        """Note a problem at a key's line, or at its table's header where the key is missing."""
        line = self.places.get((table, key)) or self.places.get((table, ""), 1)
        self.problems.add(problem, f"{self.name}, line {line}")

    def file(self, data: Mapping[str, Any]) -> PaperClaims | None:
        """Read the whole file, or return None where something is wrong."""
        for key in sorted(set(data) - {"paper", "claim"}):
            self.wrong(-1, key, f"unknown table {brief(key)}; a claims file has [paper] and [[claim]]")
        paper, rows = data.get("paper"), data.get("claim")
        if not isinstance(paper, dict):
            self.wrong(-1, "", "there is no [paper] table")
            return None
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            self.wrong(-1, "", "there is no [[claim]]; a paper has at least one")
            return None
        check_table(paper, _PAPER, "the paper", lambda key, problem: self.wrong(-1, key, problem))
        if not (paper.get("arxiv") or paper.get("url")):
            self.wrong(-1, "", "the paper has no source: give arxiv or url")
        claims = [self.claim(i, row) for i, row in enumerate(rows)]
        ids = [row.get("id") for row in rows]
        for i, name in enumerate(ids):
            if isinstance(name, str) and name in ids[:i]:
                self.wrong(i, "id", f"claim id {brief(name)} is used twice")
        if self.problems:
            return None
        return PaperClaims(**paper, claims=tuple(c for c in claims if c is not None))

    def claim(self, at: int, row: Mapping[str, Any]) -> Claim | None:
        """One claim, or None where something is wrong."""
        before, label = len(self.problems), row.get("id")
        known = isinstance(label, str) and _ID.fullmatch(label)
        name = f"claim {label}" if known else f"claim {at + 1}"
        check_table(row, _CLAIM, name, lambda key, problem: self.wrong(at, key, problem))
        if isinstance(label, str) and label.strip() and not known:
            self.wrong(at, "id", f"{name}: id is {brief(label)}; it must be letters, digits, dots and dashes")
        if len(self.problems) > before:
            return None
        target = row.get("target", row["published"])
        if isinstance(target, str):
            self.wrong(at, "target", f"{name}: published is text, so the number compared with belongs into target")
        if row.get("minus") and row.get("over"):
            self.wrong(at, "over", f"{name}: give minus or over, not both")
        for key in ("measure", "minus", "over"):
            self.measure(at, key, name, row)
        if len(self.problems) > before:
            return None
        published = row["published"] if isinstance(row["published"], str) else float(row["published"])
        plots = tuple(row.get("plots", ()))
        return Claim(**{**row, "published": published, "target": float(target), "plots": plots})

    def measure(self, at: int, key: str, name: str, row: Mapping[str, Any]) -> None:
        """Check that a measure is METRIC of the claim's experiment, or TASK/MODEL/METRIC."""
        parts = row.get(key, "").split("/")
        if not all(parts) and row.get(key):
            self.wrong(at, key, f"{name}: {key} is {brief(row[key])}; it must be METRIC or TASK/MODEL/METRIC")
        elif row.get(key) and not (len(parts) == 3 or (len(parts) == 1 and row.get("experiment"))):
            self.wrong(at, key, f"{name}: {key} {brief(row[key])} needs an experiment, or the form TASK/MODEL/METRIC")


def resolved(measure: str, claim: Claim, key: str) -> str:
    """Return a claim's measure, of the paper of this key, as TASK/MODEL/METRIC; "" stays ""."""
    return measure if not measure or "/" in measure else f"{claim.experiment}/{key}/{measure}"


def claims_of(paper: Paper) -> PaperClaims:
    """Read and check the claims of a paper.

    Raises:
        ClaimError: the file is not as this module's header says, or names an experiment that the paper does not have.
    """
    read = read_claims(paper.claims_path)
    if read.key != paper.key:
        raise ClaimError(f"{paper.claims_path}: key is {read.key!r}; its module says {paper.key!r}")
    known = {e.name for e in paper.experiments}
    for claim in read.claims:
        if claim.experiment and claim.experiment not in known:
            names = ", ".join(sorted(known)) or "none"
            named = f"claim {claim.id} names experiment {claim.experiment!r}"
            raise ClaimError(f"{paper.claims_path}: {named}; there are {names}")
    return replace(read, claims=tuple(_with_needs(claim, paper) for claim in read.claims))


def _with_needs(claim: Claim, paper: Paper) -> Claim:
    """Add what the claim's experiments need; the file says so where no experiment here measures the claim."""
    measures = (resolved(m, claim, paper.key).split("/")[0] for m in (claim.measure, claim.minus, claim.over))
    found = next((e.needs for name in measures for e in paper.experiments if e.name == name and e.needs), "")
    return replace(claim, needs=found) if found else claim


def all_claims() -> tuple[PaperClaims, ...]:
    """Read the claims of all papers by key; raises ClaimError if a file is wrong, or two claims share an id."""
    read = tuple(claims_of(papers()[key]) for key in sorted(papers()))
    owner: dict[str, str] = {}
    for paper in read:
        for claim in paper.claims:
            if claim.id in owner:
                raise ClaimError(f"claim id {claim.id!r} is used by {owner[claim.id]} and by {paper.key}")
            owner[claim.id] = paper.key
    return read
