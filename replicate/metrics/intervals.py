"""Intervals over seeds and over tasks.

Per task: Student's t over seeds. Across tasks: the interquartile mean with a stratified bootstrap (Agarwal et al. 2021,
arXiv:2108.13264). With 3 to 10 seeds the coverage of a percentile bootstrap is far below its nominal level, which is
why seeds have the t interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

#: fewest values that get an interval
FEWEST = 3

Matrix = NDArray[np.float64]


class Interval(NamedTuple):
    """Two ends, in the unit of the values; nan where there are too few values."""

    low: float
    high: float


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return Student's t interval of the mean of independent values; nan, nan below 3 values.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])  # 2 -+ 4.303 / sqrt(3)
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size < FEWEST:
        return Interval(math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def iqm(x: Matrix) -> float:
    """Return the interquartile mean: the mean of the values left when a quarter is cut off at each end.

    Example:
        >>> iqm(np.array([0.0, 1.0, 3.0, 100.0]))
        2.0
    """
    return float(stats.trim_mean(np.asarray(x), 0.25, axis=None))


def _quantiles(draws: Matrix, level: float) -> Interval:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def stratified_bootstrap(
    x: Matrix, statistic: Callable[[Matrix], float], reps: int, generator: torch.Generator, level: float = 0.95
) -> Interval:
    """Return the percentile interval of a statistic of x (runs, tasks), with runs redrawn within each task.

    Args:
        x: one value per run and task, (runs, tasks).
        statistic: of a matrix of x's shape.
        reps: bootstrap draws.
        generator: draws the runs.
        level: nominal coverage.

    Example:
        Runs that agree leave no spread, however far apart the tasks are:

        >>> stratified_bootstrap(np.array([[1.0, 9.0], [1.0, 9.0]]), iqm, 100, torch.Generator())
        Interval(low=5.0, high=5.0)
    """
    x = np.asarray(x, dtype=np.float64)
    runs, tasks = x.shape
    index = torch.randint(runs, (reps, runs, tasks), generator=generator, device=generator.device).cpu().numpy()
    columns = np.arange(tasks)
    return _quantiles(np.array([statistic(x[rows, columns]) for rows in index]), level)
