"""Intervals over seeds, over tasks and over paired examples.

Per task: Student's t over seeds. Across tasks: the interquartile mean with a stratified bootstrap (Agarwal et al. 2021,
arXiv:2108.13264). Between two models: a bootstrap of the per-example difference. With 3 to 10 seeds a percentile
bootstrap covers far less than it says, which is why seeds get the t interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

#: fewest values that get an interval
FEWEST = 3
#: resampled indices held at a time
CHUNK = 4_000_000

Matrix = NDArray[np.float64]


class Interval(NamedTuple):
    """Two ends, in the unit of the values; nan where no interval is due."""

    low: float
    high: float


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values; nan, nan below 3 values."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < FEWEST:
        return Interval(math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()) - half, float(x.mean()) + half)


def iqm(x: Matrix) -> float:
    """Interquartile mean: the mean of the values left when a quarter is cut off at each end."""
    return float(stats.trim_mean(np.asarray(x), 0.25, axis=None))


def _quantiles(draws: Matrix, level: float) -> Interval:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def stratified_bootstrap(
    x: Matrix, statistic: Callable[[Matrix], float], reps: int, generator: torch.Generator, level: float = 0.95
) -> Interval:
    """Percentile interval of a statistic of x (runs, tasks), with runs redrawn within each task.

    Args:
        x: one value a run and task, (runs, tasks).
        statistic: of a matrix of x's shape.
        reps: bootstrap draws.
        generator: draws the runs.
        level: nominal coverage.
    """
    x = np.asarray(x, dtype=np.float64)
    runs, tasks = x.shape
    index = torch.randint(runs, (reps, runs, tasks), generator=generator, device=generator.device).cpu().numpy()
    columns = np.arange(tasks)
    return _quantiles(np.array([statistic(x[rows, columns]) for rows in index]), level)


def paired_bootstrap(difference: Tensor, generator: torch.Generator, reps: int = 2000, level: float = 0.95) -> Interval:
    """Percentile interval of the mean of per-example differences (n,) between two models on the same examples."""
    d = difference.detach().double().flatten().to(generator.device)
    per_chunk = max(1, CHUNK // d.numel())
    means = []
    for start in range(0, reps, per_chunk):
        shape = (min(per_chunk, reps - start), d.numel())
        means.append(d[torch.randint(d.numel(), shape, generator=generator, device=d.device)].mean(1))
    return _quantiles(torch.cat(means).cpu().numpy(), level)
