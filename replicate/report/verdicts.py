"""The verdict on a claim, from its row and the measurements alone.

Two one-sided tests at 5 %: the 90 % t-interval over seeds wholly inside the band that target, relation and tolerance
give is `reproduced`, wholly outside is `not reproduced`, anything else `inconclusive`. At the band's edge that says
"reproduced" one time in twenty, where "the mean lies in the band" would say it every second time.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev

import pandas as pd
from scipy import stats

from replicate.errors import ReportError
from replicate.metrics.intervals import FEWEST, t_interval
from replicate.model import kind_of_difference
from replicate.report.records import FAILED, good_rows, mean

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not comparable", "not run")
#: the interval of two one-sided tests at 5 %
LEVEL = 0.90
_RANK = {"smoke": 0, "standard": 1, "full": 2}


@dataclass(frozen=True)
class Criterion:
    """The parts of a claim that decide its verdict; each field is a column of claims.csv.

    Attributes:
        target, relation, tolerance, seed_sd: the band (`replicate.ledger.claims.RELATIONS`).
        measure, minus, over: TASK/MODEL/METRIC; the value of a seed is measure, measure - minus or measure / over.
        deterministic: no randomness, so that one run is enough and its interval is a point.
        kind: number, ordering, identity or slope.
        judged_at: the smallest profile at which it can be judged.
        not_comparable, needs: reasons stated before the runs.
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
class Judgement:
    """A verdict with its numbers: nan where there are none.

    Attributes:
        seeds: (seed, value) of each.
        number_kind: exact, bound or estimate; "" without a number.
        probability: that a further seed shows the ordering, given the spread of these.
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
        self.lost = Counter(zip(lost["task"], lost["model"], strict=True))
        none = frame[frame["status"].str.startswith("n/a")]
        self.none = none.set_index(["task", "model", "metric"])["status"].to_dict()

    def seeds(self, measure: str) -> dict[int, tuple[float, str, str]]:
        """Return (value, kind, run id) by seed.

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

    def values(self, measure: str, minus: str = "", over: str = "") -> tuple[dict[int, float], str, list[str]]:
        """Return the values, differences or ratios of measures by seed, their kind ("" without any), and run ids.

        Seeds that only one of two measures has are left out.

        Raises:
            ReportError: a seed has two values, or a ratio divides by 0.
        """
        sides = [self.seeds(m) for m in (measure, minus or over) if m]
        shared = sorted(set.intersection(*map(set, sides)))
        ids = [side[s][2] for side in sides for s in shared]
        if len(sides) == 1:
            out, kinds = {s: sides[0][s][0] for s in shared}, {sides[0][s][1] for s in shared}
        else:
            first, other = sides
            if over and any(other[s][0] == 0 for s in shared):
                raise ReportError("a claim divides by a measurement that is 0")
            out = {s: first[s][0] / other[s][0] if over else first[s][0] - other[s][0] for s in shared}
            kinds = {str(kind_of_difference(first[s][1], other[s][1])) for s in shared}
            kinds = {"estimate"} if over and kinds - {"exact"} else kinds
        return out, kinds.pop() if len(kinds) == 1 else "estimate" if kinds else "", list(dict.fromkeys(ids))

    def failed(self, measures: Iterable[str]) -> int:
        """Count the failed runs behind these measures."""
        return sum(self.lost[task, model] for task, model, _ in (m.split("/") for m in measures))

    def why_none(self, measures: Iterable[str]) -> str:
        """Return the reason that a record gives for having no such number; "" where there is none."""
        keys = (tuple(m.split("/")) for m in measures)
        return next((str(self.none[k]) for k in keys if k in self.none), "")


def band(criterion: Criterion, values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value that agree with the claim."""
    spread = stdev(values) if len(values) > 1 else 0.0
    t, d = criterion.target, max(criterion.tolerance, criterion.seed_sd * spread)
    ends = {
        "within": (t - d, t + d),
        "at most": (-math.inf, t + d),
        "at least": (t - d, math.inf),
        "above": (t + d, math.inf),
        "below": (-math.inf, t - d),
    }
    return ends[criterion.relation]


def judge(criterion: Criterion, measured: Measured, profile: str) -> Judgement:
    """Judge one claim on a profile's measurements."""
    measures = [m for m in (criterion.measure, criterion.minus, criterion.over) if m]
    values, number_kind, ids = measured.values(criterion.measure, criterion.minus, criterion.over)
    failed = measured.failed(measures)
    if not values:
        if criterion.not_comparable:
            return Judgement("not comparable", criterion.not_comparable)
        lost = f"{failed} runs failed" if failed else measured.why_none(measures)
        elsewhere = away(criterion.needs, criterion.judged_at, profile)
        return Judgement("not run", lost or elsewhere or f"the {profile} profile did not measure it")
    x = list(values.values())
    low, high = map(float, (x[0], x[0]) if criterion.deterministic else t_interval(x, LEVEL))
    fits = band(criterion, x)
    verdict, reason = _verdict(criterion, fits, (low, high), len(x), failed, profile)
    probability = _probability(x, fits) if criterion.kind == "ordering" else math.nan
    seeds = tuple(values.items())
    return Judgement(verdict, reason, mean(x), low, high, seeds, number_kind, probability, ";".join(ids))


def away(needs: str, judged_at: str, profile: str) -> str:
    """Return why a profile has no number: a need, or judgement at another profile; "" where neither holds."""
    if needs:
        return f"needs {needs}"
    if _RANK[profile] < _RANK[judged_at]:
        return f"needs the {judged_at} profile"
    return f"the {judged_at} profile measures it" if _RANK[profile] > _RANK[judged_at] else ""


def _verdict(
    criterion: Criterion, fits: tuple[float, float], found: tuple[float, float], seeds: int, failed: int, profile: str
) -> tuple[str, str]:
    if criterion.not_comparable:
        return "not comparable", criterion.not_comparable
    if _RANK[profile] < _RANK[criterion.judged_at]:
        return "not comparable", f"a {profile} run is reduced; it is judged at the {criterion.judged_at} profile"
    low, high = found
    if math.isnan(low):
        return "not comparable", f"{seeds} seeds; an interval needs {FEWEST}"
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
    """Return the predictive probability that one more seed is in the band, for normal values of unknown mean and sd."""
    n = len(values)
    if n < FEWEST:
        return math.nan
    centre, spread = mean(values), stdev(values) * math.sqrt(1 + 1 / n)
    if spread == 0:
        return float(fits[0] <= centre <= fits[1])
    low, high = ((end - centre) / spread for end in fits)
    return float(stats.t.cdf(high, n - 1) - stats.t.cdf(low, n - 1))
