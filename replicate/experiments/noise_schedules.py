"""Noise schedules of annealed samplers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: levels L of every ladder
RUNGS = 10


def ladder(first: float, last: float, levels: int = RUNGS) -> Tensor:
    """Noise levels in geometric progression, shape (levels,), float64."""
    return torch.linspace(math.log(first), math.log(last), levels, dtype=torch.float64).exp()
