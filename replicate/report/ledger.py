"""The ledger: every claim with its verdict, from the claims and the measurements."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pandas as pd

from replicate.errors import ReportError
from replicate.ledger.claims import RELATIONS, SOURCES, Claim, PaperClaims, resolved
from replicate.ledger.tables import MeasureCell, MeasureTable
from replicate.report.labels import markdown, significant, symbol, with_interval
from replicate.report.records import interval, mean
from replicate.report.text_table import TextTable, csv_text
from replicate.report.verdicts import VERDICTS, Criterion, Judgement, Measured, away, judge

CLAIM_COLUMNS = (
    *("claim_id", "paper", "place", "quantity", "unit", "published", "source_quality", "tolerance"),
    *("mean", "ci_low", "ci_high", "n_seeds", "verdict", "reason", "run_ids"),
    *("says", "kind", "number_kind", "probability", "target", "relation", "seed_sd", "measure", "minus", "over"),
    *("deterministic", "judged_at", "profile", "not_comparable", "needs"),
)
#: columns of the criterion, which the verdict follows from
GIVEN = tuple(f.name for f in fields(Criterion))
Row = dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A claim, its paper, its criterion, and the judgement."""

    paper: PaperClaims
    claim: Claim
    criterion: Criterion
    judgement: Judgement

    @property
    def printed(self) -> str:
        """The published value."""
        value = self.claim.published
        return value if isinstance(value, str) else significant(value)

    @property
    def band(self) -> str:
        """The band in words."""
        return wanted(self.criterion)

    @property
    def ours(self) -> str:
        """Our number with its kind and 90 % interval."""
        j = self.judgement
        return _number_text(j.number_kind, j.mean, j.ci_low, j.ci_high)


def stated_columns(paper: PaperClaims, claim: Claim) -> Row:
    """Return the columns of claims.csv that a paper's file states."""
    same = ("place", "quantity", "unit", "published", "source_quality")
    criterion = dict(zip(GIVEN, map(_text, astuple(criterion_of(claim, paper.key))), strict=True))
    return {"claim_id": claim.id, "paper": paper.key, **{k: _text(getattr(claim, k)) for k in same}, **criterion}


def judged_columns(j: Judgement) -> Row:
    """Return the columns of claims.csv that follow from the criterion and the measurements."""
    numbers = {k: significant(getattr(j, k), 10) for k in ("mean", "ci_low", "ci_high", "probability")}
    words = {k: getattr(j, k) for k in ("verdict", "reason", "run_ids", "number_kind")}
    return {**numbers, **words, "n_seeds": str(len(j.seeds))}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def criterion_of(claim: Claim, key: str) -> Criterion:
    """Return what decides a claim's verdict, its measures written out."""
    band = (float(claim.target), claim.relation, float(claim.tolerance), float(claim.seed_sd))
    measure, minus, over = (resolved(m, claim, key) for m in (claim.measure, claim.minus, claim.over))
    judged = (claim.deterministic, claim.kind, claim.profile)
    return Criterion(*band, measure, minus, over, *judged, claim.not_comparable, claim.needs)


def entries(papers: Iterable[PaperClaims], frame: pd.DataFrame, profile: str) -> list[Entry]:
    """Judge every claim on the measurements of a profile's run, in the papers' order."""
    measured = Measured(frame)
    criteria = ((paper, claim, criterion_of(claim, paper.key)) for paper in papers for claim in paper.claims)
    return [Entry(paper, claim, c, judge(c, measured, profile)) for paper, claim, c in criteria]


def to_csv(ledger: Iterable[Entry], profile: str) -> str:
    """Write claims.csv."""
    rows = []
    for e in ledger:
        row = stated_columns(e.paper, e.claim) | judged_columns(e.judgement)
        row |= {"says": e.claim.says, "profile": profile}
        rows.append([row[c] for c in CLAIM_COLUMNS])
    return csv_text(CLAIM_COLUMNS, *rows)


def read_claims_csv(path: Path) -> list[Row]:
    """Read the rows of claims.csv as text.

    Raises:
        ReportError: it cannot be read or has other columns.
    """
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            rows = [dict(r) for r in reader]
            if tuple(reader.fieldnames or ()) != CLAIM_COLUMNS or any(None in r.values() for r in rows):
                raise ValueError(f"its columns are not {', '.join(CLAIM_COLUMNS)}")
    except (OSError, ValueError, csv.Error) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    return rows


def criterion_from(row: Row) -> Criterion:
    """Return what decides a verdict, from a row of claims.csv.

    Raises:
        ReportError: a number or relation in it is none.
    """
    try:
        if row["relation"] not in RELATIONS or row["deterministic"] not in ("true", "false"):
            raise ValueError(f"relation {row['relation']!r} or deterministic {row['deterministic']!r}")
        numbers = {k: float(row[k]) for k in ("target", "tolerance", "seed_sd")}
        words = {k: row[k] for k in GIVEN if k not in (*numbers, "deterministic")}
        return Criterion(**numbers, **words, deterministic=row["deterministic"] == "true")  # type: ignore[arg-type]
    except ValueError as error:
        raise ReportError(f"claims.csv: claim {row['claim_id']} cannot be judged: {error}") from None


def problems(rows: Sequence[Row], frame: pd.DataFrame) -> list[str]:
    """List where claims.csv contradicts its own criteria and the measurements."""
    measured, out = Measured(frame), []
    for row in rows:
        name = f"claims.csv: claim {row['claim_id']}"
        try:
            right = judged_columns(judge(criterion_from(row), measured, row["profile"]))
        except (ReportError, KeyError, ValueError) as error:
            out.append(f"{name}: {error}")
            continue
        wrong = (k for k, v in right.items() if not _agree(v, row[k]))
        out += (f"{name}: {k} is {row[k]!r}, its measurements give {right[k]!r}" for k in wrong)
    return out


def _agree(a: str, b: str) -> bool:
    try:
        return a == b or math.isclose(float(a), float(b), rel_tol=1e-8)
    except ValueError:
        return False


def definition_problems(rows: Sequence[Row], papers: Iterable[PaperClaims]) -> list[str]:
    """List where claims.csv judges another claim than the papers' files state."""
    out, written = [], {row["claim_id"]: row for row in rows}
    for paper in papers:
        for claim in paper.claims:
            row = written.pop(claim.id, None)
            if row is None:
                out.append(f"claims.csv has no claim {claim.id}; {paper.key}.toml has")
                continue
            stated = stated_columns(paper, claim).items()
            wrong = ((k, v) for k, v in stated if row[k] != v)
            out += (f"claims.csv: claim {claim.id}: {k} is {row[k]!r}, {paper.key}.toml says {v!r}" for k, v in wrong)
    return out + [f"claims.csv has claim {name}, which no paper's file has" for name in written]


# -- for readers


def summary_line(rows: Sequence[Row]) -> str:
    """Count the claims by verdict in one sentence of Markdown."""
    papers = len({row["paper"] for row in rows})
    counts = ", ".join(f"{n} {v}" for v, n in by_verdict(row["verdict"] for row in rows).items())
    head = f"{len(rows)} claims of {papers} paper{'' if papers == 1 else 's'}"
    text = f"**The ledger: {head}: {counts}** (profile {rows[0]['profile']})."
    lost = [markdown(row["claim_id"]) for row in rows if row["verdict"] == "not reproduced"]
    return text + (f" Not reproduced: {', '.join(lost)}." if lost else "")


def ours_text(row: Row) -> str:
    """Write our number with its kind and 90 % interval, from a row of claims.csv."""
    mean, low, high = (float(row[k]) if row[k] else math.nan for k in ("mean", "ci_low", "ci_high"))
    return _number_text(row["number_kind"], mean, low, high)


def _number_text(kind: str, mean: float, low: float, high: float) -> str:
    low = math.nan if low == high else low
    return "-" if math.isnan(mean) else f"{symbol(kind)} {with_interval(significant, mean, low, high)}"


def wanted(criterion: Criterion) -> str:
    """Write the band in words."""
    t, d = significant(criterion.target), significant(criterion.tolerance)
    wide = f" (or {significant(criterion.seed_sd)} sd of the seeds)" if criterion.seed_sd else ""
    signs = {"within": "±", "at least": "-", "below": "-"}
    start = "" if criterion.relation == "within" else f"{criterion.relation} "
    return f"{start}{t} {signs.get(criterion.relation, '+')} {d}{wide}"


def ledger_table(ledger: Sequence[Entry]) -> TextTable:
    """Make the ledger's table, one row per claim."""
    heads = ("claim", "source", "quantity", "unit", "as printed", "mark", "band", "ours", "P", "seeds", "verdict")
    rows = []
    for e in ledger:
        c, j = e.claim, e.judgement
        line = (c.id, f"{e.paper.cite}, {c.place}", c.quantity, c.unit, e.printed, c.source_quality, e.band, e.ours)
        p = "" if math.isnan(j.probability) else f"{j.probability:.2f}"
        rows.append((*line, p, str(len(j.seeds) or ""), _with_reason(j.verdict, j.reason)))
    marks = "; ".join(f"{k}: {v}" for k, v in SOURCES.items())
    caption = (
        "Claims as printed and as found. Ours: mean over seeds with the 90 % t-interval of two one-sided tests; "
        f"= exact, <= upper bound, >= lower bound, ~ estimate. Mark {marks}. P: probability that one more seed shows "
        "the ordering."
    )
    return TextTable.of_text("ledger", "The ledger", caption, heads, rows)


def _with_reason(verdict: str, reason: str) -> str:
    return f"{verdict}: {reason}" if verdict in ("not comparable", "not run") else verdict


def claims_table(rows: Sequence[Row]) -> TextTable:
    """Make a text table of rows of claims.csv, for a terminal."""
    heads = ("claim", "paper", "quantity", "as printed", "band", "ours, 90 % interval", "verdict")
    lines = []
    for row in rows:
        verdict = _with_reason(row["verdict"], row["reason"])
        quantity, published = f"{row['quantity']} [{row['unit']}]", f"{row['published']} ({row['source_quality']})"
        band = wanted(criterion_from(row))
        lines.append((row["claim_id"], row["paper"], quantity, published, band, ours_text(row), verdict))
    return TextTable.of_text("claims", "Claims", "", heads, lines)


def filled_tables(
    tables: Iterable[MeasureTable], frame: pd.DataFrame, papers: Iterable[PaperClaims], profile: str
) -> list[TextTable]:
    """Fill our numbers into the tables of print; those of which no measure has a number are left out.

    Args:
        papers: their claims name the needs of a measure that was not run, or the profile that measures it.
    """
    measured = Measured(frame)
    asking = [(_owners(c, p.key), why) for p in papers for c in p.claims if (why := away(c.needs, c.profile, profile))]
    # a comparison may name a need of its other side: the claim with the fewest measures comes last and wins
    asking.sort(key=lambda owners_why: len(owners_why[0]), reverse=True)
    reasons = {owner: why for owners, why in asking for owner in owners}

    def text(cell: str | MeasureCell) -> str:
        return cell if isinstance(cell, str) else _measured_text(cell, measured, reasons)

    return [
        TextTable.of_text(t.name, t.title, t.caption, t.heads, [[text(c) for c in row] for row in t.rows])
        for t in tables
        if any(measured.seeds(c.measure) for row in t.rows for c in row if isinstance(c, MeasureCell))
    ]


def _owners(claim: Claim, key: str) -> set[str]:
    """Return TASK/MODEL of each measure of a claim."""
    measures = (resolved(m, claim, key) for m in (claim.measure, claim.minus, claim.over))
    return {m.rpartition("/")[0] for m in measures if m}


def _measured_text(cell: MeasureCell, measured: Measured, reasons: Mapping[str, str]) -> str:
    values, kind, _ = measured.values(cell.measure, cell.minus)
    if x := list(values.values()):
        return _number_text(kind, mean(x), *interval(x))
    why = reasons.get(cell.measure.rpartition("/")[0])
    return measured.why_none([cell.measure]) or (f"not run: {why}" if why else "not run")


def by_verdict(verdicts: Iterable[str]) -> dict[str, int]:
    """Count all five verdicts, in the order of VERDICTS."""
    counts = Counter(verdicts)
    return {v: counts[v] for v in VERDICTS}
