"""Comparisons: models with each other, paired by seed, and new results with the committed ones.

Seeds pair models because the batch stream of a task and seed is the same for all of them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from replicate.model import kind_of_difference
from replicate.report.labels import is_timing, metric_info, short, symbol, task_key
from replicate.report.records import good_rows, interval
from replicate.report.text_table import TextTable

COMPARISON_COLUMNS = (
    *("task", "metric", "model_a", "model_b", "mean_a", "mean_b"),
    *("kind", "difference", "ci_low", "ci_high", "unit", "n_seeds", "verdict"),
)
#: differences below this share of the number are the rounding of another machine or library
ROUNDING = 1e-6
#: a number from another machine may differ by so many standard errors and seed-to-seed standard deviations
SIGMAS = 4.0


def _verdict(metric: str, a: str, b: str, kind: str, low: float, high: float) -> str:
    """Name the better model, as far as interval and kind decide."""
    better = metric_info(metric).better
    if better is None:
        return ""
    if math.isnan(low):
        return "too few seeds"
    if low <= 0 <= high:
        return "no difference seen"
    below = high < 0
    winner = a if below == (better == "lower") else b
    # an upper bound below 0 and a lower bound above 0 are conclusive; the other way round they say nothing
    if kind == "estimate" or (kind == "lower_bound" and below) or (kind == "upper_bound" and not below):
        return f"{winner} looks better, but the kinds do not decide"
    return f"{winner} is better"


def compare_models(measurements: pd.DataFrame, models: Sequence[str], metric: str = "nll") -> pd.DataFrame:
    """Return differences between models on every task that they share, paired by seed, with a 95 % t-interval.

    Args:
        measurements: as in measurements.csv.
        models: two or more names; every pair is compared, the earlier minus the later.
        metric: as in measurements.csv.

    Returns:
        One row per task and pair, with the columns COMPARISON_COLUMNS. `kind` is the sign of the difference's kind.

    Raises:
        ValueError: fewer than two models.
    """
    if len(set(models)) < 2:
        raise ValueError("name at least two different models to compare")
    rows = good_rows(measurements)
    rows = rows[(rows["metric"] == metric) & rows["model"].isin(models)]
    out = []
    for task in sorted(set(rows["task"]), key=task_key):
        here = rows[rows["task"] == task]
        for a, b in combinations(dict.fromkeys(models), 2):
            sides = (here[here["model"] == m].groupby("kind") for m in (a, b))
            for (kind_a, left), (kind_b, right) in product(*sides):
                left, right = (side[["seed", "unit", "value"]] for side in (left, right))
                pair = left.merge(right, on=["seed", "unit"], suffixes=("_a", "_b")).sort_values("seed")
                if pair.empty:
                    continue
                kind, difference = kind_of_difference(str(kind_a), str(kind_b)), pair["value_a"] - pair["value_b"]
                low, high = interval(difference)
                means, unit = (float(pair[f"value_{side}"].mean()) for side in "ab"), str(pair["unit"].iat[0])
                numbers = (*means, symbol(kind), float(difference.to_numpy().mean()), low, high, unit, len(pair))
                out.append((task, metric, a, b, *numbers, _verdict(metric, a, b, kind, low, high)))
    return pd.DataFrame(out, columns=list(COMPARISON_COLUMNS))


def comparison_table(frame: pd.DataFrame) -> TextTable:
    """Make a text table of what `compare_models` returns."""
    found = frame.itertuples(index=False, name=None)
    rows = ([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in found)
    return TextTable.of_text("comparison", "Models compared", "", frame.columns, rows)


@dataclass(frozen=True)
class Difference:
    """One number whose bits differ from the reference.

    Attributes:
        label: "rounding" (relative 1e-6), "within error" (4 standard errors and seed-to-seed deviations),
            "differs", "status" (a number on one side only), "missing" (only in the reference), "new".
        new, reference: values; nan where there is none.
    """

    run_id: str
    task: str
    model: str
    seed: int
    metric: str
    label: str
    new: float
    reference: float

    def __str__(self) -> str:
        where = f"{self.model} on {self.task}, seed {self.seed}, {self.metric} (run {short(self.run_id)})"
        return f"{self.label}: {where}: {self.new:.8g}, was {self.reference:.8g}"


_KEY = ["run_id", "metric", "split"]


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[~frame["metric"].map(is_timing)].copy()
    rows[["split", "kind"]] = rows[["split", "kind"]].fillna("").astype(object)
    # one key may have two rows of a kind: number them
    rows["nth"] = rows.groupby([*_KEY, "kind"]).cumcount()
    return rows


def differences(new: pd.DataFrame, reference: pd.DataFrame) -> list[Difference]:
    """Return every number whose bits differ from the reference, times and memory left out.

    Runs are matched by id, which covers all that can change a number but the machine.

    Args:
        new, reference: as in measurements.csv.
    """
    old = _comparable(reference)
    # the seed-to-seed standard deviation of each number, nan below two seeds
    spread = old[np.isfinite(old["value"])].groupby(["task", "model", "metric"])["value"].std().to_dict()
    both = _comparable(new).merge(old, on=[*_KEY, "kind", "nth"], how="outer", suffixes=("", "_old"), indicator=True)
    both = both.sort_values([*_KEY, "kind", "nth"])
    out = []
    for row in both.to_dict("records"):
        side = row["_merge"]
        tail = "_old" if side == "right_only" else ""
        who = (row["run_id"], row["task" + tail], row["model" + tail], int(row["seed" + tail]), row["metric"])
        label = {"left_only": "new", "right_only": "missing"}.get(side) or _label(row, spread)
        if label:
            out.append(Difference(*who, label, float(row["value"]), float(row["value_old"])))
    return out


def _label(row: Mapping[Any, Any], spread: Mapping[Any, float]) -> str:
    """Return the class of a pair of values; "" where they are the same bits."""
    a, b = float(row["value"]), float(row["value_old"])
    if math.isnan(a) != math.isnan(b):
        return "status"
    if a == b or math.isnan(a):
        return ""
    if abs(a - b) <= ROUNDING * max(abs(a), abs(b)):
        return "rounding"
    deviation = math.sqrt(2) * spread.get((row["task"], row["model"], row["metric"]), 0.0)
    scale = math.hypot(*(e for e in (row["stderr"], row["stderr_old"], deviation) if math.isfinite(e)))
    return "within error" if abs(a - b) <= SIGMAS * scale else "differs"


#: so many differences are listed, all others counted
SHOWN = 20


def compare_with_reference(new: pd.DataFrame, reference: pd.DataFrame) -> list[str]:
    """Describe the `differences` in lines for a reader: the counts, then the worst, at most 20.

    The first line always has the numbers compared and those with the same bits.
    """
    found = differences(new, reference)
    matched = _comparable(new).merge(_comparable(reference), on=[*_KEY, "kind", "nth"])
    changed = sum(d.label not in ("new", "missing") for d in found)
    lines = [f"{len(matched) - changed} of {len(matched)} numbers are bit for bit those of the earlier results"]
    counts = Counter(d.label for d in found)
    meanings = {
        "rounding": "differ by rounding",
        "within error": f"differ within {SIGMAS:g} standard errors and seed-to-seed deviations",
        "differs": "differ by more than that",
        "status": "have a value on one side only",
        "missing": "are gone",
        "new": "are new",
    }
    lines += [f"{counts[label]} {meaning}" for label, meaning in meanings.items() if counts[label]]
    serious = [f"  {d}" for d in found if d.label in ("differs", "status")]
    more = [f"  and {len(serious) - SHOWN} more"] if len(serious) > SHOWN else []
    return [*lines, *serious[:SHOWN], *more]
