"""The verdict on a claim, from its row and the measurements alone.

Two one-sided tests at 5 %: the 90 % t-interval over seeds wholly inside the band that target, relation and tolerance
give is `reproduced`, wholly outside is `not reproduced`, anything else `inconclusive`. At the band's edge that says
"reproduced" one time in twenty, where "the mean lies in the band" would say it every second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev

import pandas as pd
from scipy import stats

from replicate.errors import ReportError
from replicate.metrics.intervals import t_interval
from replicate.model import kind_of_difference
from replicate.report.records import FAILED, MIN_SEEDS, good_rows, mean

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not comparable", "not run")
#: the interval of two one-sided tests at 5 %
LEVEL = 0.90
_RANK = {"smoke": 0, "standard": 1, "full": 2}


@dataclass(frozen=True)
class Asked:
    """What of a claim decides its verdict; each field is a column of claims.csv.

    Attributes:
        target, relation, tolerance, seed_sd: the band (`replicate.ledger.claims.RELATIONS`).
        measure, minus, over: TASK/MODEL/METRIC; the value of a seed is measure, measure - minus or measure / over.
        deterministic: no randomness, so that one run is enough and its interval is a point.
        kind: number, ordering, identity or slope.
        judged_at: the smallest profile at which it may be judged.
        not_comparable, needs: reasons given beforehand.
    """

    target: float
    relation: str
    tolerance: float
    seed_sd: float
    measure: str
    minus: str
    over: str
    deterministic: bool
    kind: str
    judged_at: str
    not_comparable: str
    needs: str


@dataclass(frozen=True)
class Judged:
    """A verdict with its numbers: nan where there are none.

    Attributes:
        seeds: (seed, value) of each.
        number_kind: exact, bound or estimate; "" without a number.
        probability: of an ordering, that a further seed shows it, under the spread of these.
        run_ids: every run behind the values, joined by ";".
    """

    verdict: str
    reason: str
    mean: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    seeds: tuple[tuple[int, float], ...] = ()
    number_kind: str = ""
    probability: float = math.nan
    run_ids: str = ""


class Measured:
    """Measurements by (task, model, metric), read once for all claims."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.rows: dict[tuple[str, str, str], list[tuple[int, float, str, str]]] = {}
        good = good_rows(frame)
        columns = (good[c] for c in ("task", "model", "metric", "seed", "value", "kind", "run_id"))
        for task, model, metric, *rest in zip(*columns, strict=True):
            self.rows.setdefault((task, model, metric), []).append((int(rest[0]), float(rest[1]), *rest[2:]))
        lost = frame[frame["metric"] == FAILED]
        self.lost = {(t, m): int(n) for (t, m), n in lost.groupby(["task", "model"]).size().items()}
        none = frame[frame["status"].str.startswith("n/a")]
        keys = zip(none["task"], none["model"], none["metric"], strict=True)
        self.none = dict(zip(keys, none["status"], strict=True))

    def seeds(self, measure: str) -> dict[int, tuple[float, str, str]]:
        """(value, kind, run id) by seed.

        Raises:
            ReportError: a seed has two values.
        """
        task, model, metric = measure.split("/")
        out: dict[int, tuple[float, str, str]] = {}
        for seed, value, kind, run_id in self.rows.get((task, model, metric), ()):
            if seed in out:
                raise ReportError(f"measurements.csv: {measure} has two values for seed {seed}")
            out[seed] = (value, kind, run_id)
        return out

    def failed(self, measures: Iterable[str]) -> int:
        """Failed runs behind these measures."""
        return sum(self.lost.get((m.split("/")[0], m.split("/")[1]), 0) for m in measures)

    def why_none(self, measures: Iterable[str]) -> str:
        """The reason that a record gives for having no such number; "" where there is none."""
        keys = [(a, b, c) for a, b, c in (m.split("/") for m in measures)]
        return next((self.none[k] for k in keys if k in self.none), "")


def band(asked: Asked, values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value that agree with the claim."""
    spread = stdev(values) if len(values) > 1 else 0.0
    t, d = asked.target, max(asked.tolerance, asked.seed_sd * spread)
    ends = {
        "within": (t - d, t + d),
        "at most": (-math.inf, t + d),
        "at least": (t - d, math.inf),
        "above": (t + d, math.inf),
        "below": (-math.inf, t - d),
    }
    return ends[asked.relation]


def _paired(asked: Asked, measured: Measured) -> tuple[list[tuple[int, float]], str, list[str]]:
    """(seed, value) of each seed that all measures have, the kind of the values, and run ids."""
    first = measured.seeds(asked.measure)
    second = asked.minus or asked.over
    if not second:
        kinds = {k for _, k, _ in first.values()}
        pairs = [(s, first[s][0]) for s in sorted(first)]
        return pairs, _one(kinds), [first[s][2] for s in sorted(first)]
    other = measured.seeds(second)
    both = sorted(set(first) & set(other))
    kinds = {kind_of_difference(first[s][1], other[s][1]) for s in both}
    if asked.over and kinds - {"exact"}:
        kinds = {"estimate"}
    pairs = [(s, _combined(first[s][0], other[s][0], bool(asked.over))) for s in both]
    ids = [first[s][2] for s in both] + [other[s][2] for s in both]
    return pairs, _one(kinds), list(dict.fromkeys(ids))


def _one(kinds: set[str]) -> str:
    return kinds.pop() if len(kinds) == 1 else "estimate" if kinds else ""


def _combined(a: float, b: float, ratio: bool) -> float:
    if ratio and b == 0:
        raise ReportError("a claim divides by a measurement that is 0")
    return a / b if ratio else a - b


def judge(asked: Asked, measured: Measured, profile: str) -> Judged:
    """The verdict on one claim at a profile's measurements."""
    measures = [m for m in (asked.measure, asked.minus, asked.over) if m]
    pairs, number_kind, ids = _paired(asked, measured)
    failed = measured.failed(measures)
    if not pairs:
        return _without_numbers(asked, measured, measures, failed, profile)
    values = [v for _, v in pairs]
    low, high = (values[0], values[0]) if asked.deterministic else t_interval(values, LEVEL)
    fits = band(asked, values)
    verdict, reason = _verdict(asked, fits, float(low), float(high), len(values), failed, profile)
    probability = _probability(values, fits) if asked.kind == "ordering" else math.nan
    return Judged(
        verdict, reason, mean(values), float(low), float(high), tuple(pairs), number_kind, probability, ";".join(ids)
    )


def _without_numbers(asked: Asked, measured: Measured, measures: list[str], failed: int, profile: str) -> Judged:
    if asked.not_comparable:
        return Judged("not comparable", asked.not_comparable)
    if failed:
        return Judged("not run", f"{failed} runs failed")
    if none := measured.why_none(measures):
        return Judged("not run", none)
    return Judged("not run", away(asked.needs, asked.judged_at, profile) or f"the {profile} profile did not measure it")


def away(needs: str, judged_at: str, profile: str) -> str:
    """Why a profile has no number for what needs something, or is judged at another profile; "" where neither holds."""
    if needs:
        return f"needs {needs}"
    if _RANK[profile] < _RANK[judged_at]:
        return f"needs the {judged_at} profile"
    return f"the {judged_at} profile measures it" if _RANK[profile] > _RANK[judged_at] else ""


def _verdict(
    asked: Asked, fits: tuple[float, float], low: float, high: float, seeds: int, failed: int, profile: str
) -> tuple[str, str]:
    if asked.not_comparable:
        return "not comparable", asked.not_comparable
    if _RANK[profile] < _RANK[asked.judged_at]:
        return "not comparable", f"a {profile} run is reduced; it is judged at the {asked.judged_at} profile"
    if math.isnan(low):
        return "not comparable", f"{seeds} seeds; an interval needs {MIN_SEEDS}"
    if failed:
        return "inconclusive", f"{failed} runs failed, and those that ended may differ from them"
    inside = f"[{low:.4g}, {high:.4g}] against [{fits[0]:.4g}, {fits[1]:.4g}]"
    if fits[0] <= low and high <= fits[1]:
        return "reproduced", f"inside: {inside}"
    if high < fits[0] or low > fits[1]:
        side = "below" if high < fits[0] else "above"
        return "not reproduced", f"{side} the band: {inside}"
    return "inconclusive", f"across an end of the band: {inside}"


def _probability(values: Sequence[float], fits: tuple[float, float]) -> float:
    """Predictive probability that one more seed falls into the band, for normal values of unknown mean and spread."""
    n = len(values)
    if n < MIN_SEEDS:
        return math.nan
    centre, spread = mean(values), stdev(values) * math.sqrt(1 + 1 / n)
    if spread == 0:
        return float(fits[0] <= centre <= fits[1])
    low, high = ((end - centre) / spread for end in fits)
    return float(stats.t.cdf(high, n - 1) - stats.t.cdf(low, n - 1))
