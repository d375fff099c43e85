"""The ledger: every claim with its verdict, from the claims and the measurements."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pandas as pd

from replicate.errors import ReportError
from replicate.ledger.claims import RELATIONS, SOURCES, Claim, PaperClaims, resolved
from replicate.ledger.tables import MeasureCell, MeasureTable
from replicate.report.compare import kind_of_difference
from replicate.report.labels import latex, markdown, symbol
from replicate.report.records import interval, mean
from replicate.report.verdicts import VERDICTS, Asked, Judged, Measured, away, judge

CLAIM_COLUMNS = (
    "claim_id",
    "paper",
    "place",
    "quantity",
    "unit",
    "published",
    "source_quality",
    "tolerance",
    "mean",
    "ci_low",
    "ci_high",
    "n_seeds",
    "verdict",
    "reason",
    "run_ids",
    "says",
    "kind",
    "number_kind",
    "probability",
    "target",
    "relation",
    "seed_sd",
    "measure",
    "minus",
    "over",
    "deterministic",
    "judged_at",
    "profile",
    "not_comparable",
    "needs",
)
#: columns that the verdict follows from; the others but the names follow from these and the measurements
GIVEN = tuple(f.name for f in fields(Asked))
FOUND = ("mean", "ci_low", "ci_high", "n_seeds", "verdict", "reason", "run_ids", "number_kind", "probability")
Row = dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A claim, its paper, and the verdict."""

    paper: PaperClaims
    claim: Claim
    asked: Asked
    judged: Judged

    def row(self, profile: str) -> Row:
        """The claim as a row of claims.csv."""
        c, j = self.claim, self.judged
        given = dict(zip(GIVEN, map(_text, astuple(self.asked)), strict=True))
        return {
            "claim_id": c.id,
            "paper": self.paper.key,
            "place": c.place,
            "quantity": c.quantity,
            "unit": c.unit,
            "published": _text(c.published),
            "source_quality": c.source_quality,
            "says": c.says,
            "profile": profile,
            **given,
            **found(j),
        }


def found(j: Judged) -> Row:
    """The columns of a verdict."""
    return {
        "mean": _rounded(j.mean),
        "ci_low": _rounded(j.ci_low),
        "ci_high": _rounded(j.ci_high),
        "n_seeds": str(len(j.seeds)),
        "verdict": j.verdict,
        "reason": j.reason,
        "run_ids": j.run_ids,
        "number_kind": j.number_kind,
        "probability": _rounded(j.probability),
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _rounded(value: float) -> str:
    """Ten significant digits: the quantiles of Student's t differ in the last bits between libraries."""
    return "" if math.isnan(value) else f"{value:.10g}"


def asked_of(claim: Claim, key: str) -> Asked:
    """What decides a claim's verdict, its measures written out."""
    return Asked(
        target=float(claim.target),
        relation=claim.relation,
        tolerance=float(claim.tolerance),
        seed_sd=float(claim.seed_sd),
        measure=resolved(claim.measure, claim, key),
        minus=resolved(claim.minus, claim, key),
        over=resolved(claim.over, claim, key),
        deterministic=claim.deterministic,
        kind=claim.kind,
        judged_at=claim.profile,
        not_comparable=claim.not_comparable,
        needs=claim.needs,
    )


def entries(papers: Iterable[PaperClaims], frame: pd.DataFrame, profile: str) -> list[Entry]:
    """Every claim judged on the measurements of a profile's run, in the papers' order."""
    measured = Measured(frame)
    out = []
    for paper in papers:
        for claim in paper.claims:
            asked = asked_of(claim, paper.key)
            out.append(Entry(paper, claim, asked, judge(asked, measured, profile)))
    return out


def to_csv(ledger: Iterable[Entry], profile: str) -> str:
    """claims.csv."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CLAIM_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(e.row(profile) for e in ledger)
    return out.getvalue()


def read_claims_csv(path: Path) -> list[Row]:
    """The rows of claims.csv as text.

    Raises:
        ReportError: it cannot be read or its columns are others.
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


def asked_from(row: Row) -> Asked:
    """What decides a verdict, from a row of claims.csv.

    Raises:
        ReportError: a number or relation in it is none.
    """
    try:
        if row["relation"] not in RELATIONS or row["deterministic"] not in ("true", "false"):
            raise ValueError(f"relation {row['relation']!r} or deterministic {row['deterministic']!r}")
        numbers = {k: float(row[k]) for k in ("target", "tolerance", "seed_sd")}
        words = {k: row[k] for k in GIVEN if k not in (*numbers, "deterministic")}
        return Asked(**numbers, **words, deterministic=row["deterministic"] == "true")  # type: ignore[arg-type]
    except ValueError as error:
        raise ReportError(f"claims.csv: claim {row['claim_id']} cannot be judged: {error}") from None


def problems(rows: Sequence[Row], frame: pd.DataFrame) -> list[str]:
    """Where claims.csv says other than its own given columns and the measurements."""
    measured, out = Measured(frame), []
    for row in rows:
        try:
            right = found(judge(asked_from(row), measured, row["profile"]))
        except (ReportError, KeyError, ValueError) as error:
            out.append(f"claims.csv: claim {row['claim_id']}: {error}")
            continue
        for column in FOUND:
            if not _agree(right[column], row[column]):
                out.append(
                    f"claims.csv: claim {row['claim_id']}: {column} is {row[column]!r}, its measurements give "
                    f"{right[column]!r}"
                )
    return out


def _agree(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-8)
    except ValueError:
        return False


def definition_problems(rows: Sequence[Row], papers: Iterable[PaperClaims]) -> list[str]:
    """Where claims.csv judges another claim than the papers' files state."""
    out, written = [], {row["claim_id"]: row for row in rows}
    for paper in papers:
        for claim in paper.claims:
            row = written.pop(claim.id, None)
            if row is None:
                out.append(f"claims.csv has no claim {claim.id}; {paper.key}.toml has")
                continue
            asked = asked_of(claim, paper.key)
            right = dict(zip(GIVEN, map(_text, astuple(asked)), strict=True))
            right |= {"paper": paper.key, "place": claim.place, "published": _text(claim.published)}
            right |= {"source_quality": claim.source_quality, "quantity": claim.quantity, "unit": claim.unit}
            out += (
                f"claims.csv: claim {claim.id}: {k} is {row[k]!r}, {paper.key}.toml says {v!r}"
                for k, v in right.items()
                if row[k] != v
            )
    return out + [f"claims.csv has claim {name}, which no paper's file has" for name in written]


# -- for readers


def summary_line(rows: Sequence[Row]) -> str:
    """How many claims, and how they stand, in one sentence of Markdown."""
    papers = len({row["paper"] for row in rows})
    stand = ", ".join(f"{n} {v}" for v, n in by_verdict(row["verdict"] for row in rows).items())
    sources = f"{papers} paper" + ("" if papers == 1 else "s")
    text = f"**The ledger: {len(rows)} claims of {sources}: {stand}** (profile {rows[0]['profile']})."
    lost = [markdown(row["claim_id"]) for row in rows if row["verdict"] == "not reproduced"]
    return text + (f" Not reproduced: {', '.join(lost)}." if lost else "")


def number(value: float) -> str:
    """Four significant digits."""
    return "" if math.isnan(value) else f"{value:.4g}"


def ours(j: Judged) -> str:
    """Our number with its kind and 90 % interval."""
    return _number_text(j.number_kind, j.mean, j.ci_low, j.ci_high)


def ours_text(row: Row) -> str:
    """The same from a row of claims.csv."""
    mean, low, high = (float(row[k]) if row[k] else math.nan for k in ("mean", "ci_low", "ci_high"))
    return _number_text(row["number_kind"], mean, low, high)


def _number_text(kind: str, mean: float, low: float, high: float) -> str:
    if math.isnan(mean):
        return "-"
    text = f"{symbol(kind)} {number(mean)}"
    return text if math.isnan(low) or low == high else f"{text} [{number(low)}, {number(high)}]"


def wanted(asked: Asked) -> str:
    """The band in words."""
    t, d = number(asked.target), number(asked.tolerance)
    wide = f" (or {number(asked.seed_sd)} sd of the seeds)" if asked.seed_sd else ""
    ends = {
        "within": f"{t} ± {d}",
        "at most": f"at most {t} + {d}",
        "at least": f"at least {t} - {d}",
        "above": f"above {t} + {d}",
        "below": f"below {t} - {d}",
    }
    return ends[asked.relation] + wide


@dataclass(frozen=True)
class Plain:
    """A table of text, written in three ways."""

    name: str
    title: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def csv(self) -> str:
        """As CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.heads)
        writer.writerows(self.rows)
        return out.getvalue()

    def markdown(self) -> str:
        """As Markdown, caption first."""
        lines = [f"{markdown(self.caption)}", "", "| " + " | ".join(map(markdown, self.heads)) + " |"]
        lines.append("|---" * len(self.heads) + "|")
        lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """As LaTeX: a longtable with booktabs' rules, since the ledger is longer than a page."""
        columns = "".join(r"p{%.2f\linewidth}" % (0.92 / len(self.heads)) for _ in self.heads)
        head = " & ".join(latex(h) for h in self.heads) + r" \\"
        body = [" & ".join(_latex_cell(c) for c in row) + r" \\" for row in self.rows]
        return "\n".join(
            [
                "% needs longtable and booktabs",
                rf"\begin{{longtable}}{{{columns}}}",
                rf"\caption{{{latex(self.caption)}}} \\",
                r"\toprule",
                head,
                r"\midrule \endhead",
                *body,
                r"\bottomrule",
                r"\end{longtable}",
                "",
            ]
        )


def _latex_cell(text: str) -> str:
    return latex(text).replace("±", r"$\pm$")


def ledger_table(ledger: Sequence[Entry]) -> Plain:
    """The ledger itself, a line a claim."""
    heads = ("claim", "source", "quantity", "unit", "as printed", "mark", "band", "ours", "P", "seeds", "verdict")
    rows = []
    for e in ledger:
        c, j = e.claim, e.judged
        printed = c.published if isinstance(c.published, str) else number(c.published)
        p = "" if math.isnan(j.probability) else f"{j.probability:.2f}"
        source = f"{e.paper.cite}, {c.place}"
        verdict = j.verdict if j.verdict not in ("not comparable", "not run") else f"{j.verdict}: {j.reason}"
        line = (c.id, source, c.quantity, c.unit, printed, c.source_quality, wanted(e.asked), ours(j), p)
        rows.append((*line, str(len(j.seeds) or ""), verdict))
    marks = "; ".join(f"{k}: {v}" for k, v in SOURCES.items())
    caption = (
        "Claims as printed and as found. Ours: mean over seeds with the 90 % t-interval of two one-sided tests; "
        f"= exact, <= upper bound, >= lower bound, ~ estimate. Mark {marks}. P: probability that one more seed shows "
        "the ordering."
    )
    return Plain("ledger", "The ledger", caption, heads, tuple(rows))


def filled_tables(
    tables: Iterable[MeasureTable], frame: pd.DataFrame, papers: Iterable[PaperClaims], profile: str
) -> list[Plain]:
    """Tables of print beside our numbers, their measures filled in; without those of which nothing was measured.

    Args:
        papers: their claims say what a measure that was not run needs, or which profile measures it.
    """
    measured = Measured(frame)
    asking = [(_owners(c, p.key), why) for p in papers for c in p.claims if (why := away(c.needs, c.profile, profile))]
    # what a comparison needs may be the need of its other side: the claim that measures least speaks last
    asking.sort(key=lambda owners_why: len(owners_why[0]), reverse=True)
    reasons = {owner: why for owners, why in asking for owner in owners}

    def text(cell: str | MeasureCell) -> str:
        return cell if isinstance(cell, str) else _measured_text(cell, measured, reasons)

    return [
        Plain(t.name, t.title, t.caption, t.heads, tuple(tuple(text(c) for c in row) for row in t.rows))
        for t in tables
        if any(measured.seeds(c.measure) for row in t.rows for c in row if isinstance(c, MeasureCell))
    ]


def _owners(claim: Claim, key: str) -> set[str]:
    """TASK/MODEL of each measure of a claim."""
    measures = (resolved(m, claim, key) for m in (claim.measure, claim.minus, claim.over))
    return {m.rpartition("/")[0] for m in measures if m}


def _measured_text(cell: MeasureCell, measured: Measured, reasons: Mapping[str, str]) -> str:
    first = measured.seeds(cell.measure)
    other = measured.seeds(cell.minus) if cell.minus else {}
    both = sorted(set(first) & set(other)) if cell.minus else sorted(first)
    if not both:
        why = reasons.get(cell.measure.rpartition("/")[0])
        return measured.why_none([cell.measure]) or (f"not run: {why}" if why else "not run")
    values = [first[s][0] - (other[s][0] if cell.minus else 0.0) for s in both]
    kinds = {kind_of_difference(first[s][1], other[s][1]) if cell.minus else first[s][1] for s in both}
    return _number_text(kinds.pop() if len(kinds) == 1 else "estimate", mean(values), *interval(values))


def by_verdict(verdicts: Iterable[str]) -> dict[str, int]:
    """Counts of all five verdicts, in the order of VERDICTS."""
    counts = Counter(verdicts)
    return {v: counts[v] for v in VERDICTS}
