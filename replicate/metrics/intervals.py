"""Intervals over seeds: Student's t, since a percentile bootstrap of 3 to 10 seeds covers far less than its level."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: fewest values that get an interval
FEWEST = 3


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
