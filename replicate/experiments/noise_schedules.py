"""Noise schedules of annealed samplers."""

import math

import torch
from torch import Tensor


def geometric_levels(first: float, last: float, levels: int = 10) -> Tensor:
    """Return noise levels in geometric progression, shape (levels,), float64."""
    return torch.linspace(math.log(first), math.log(last), levels, dtype=torch.float64).exp()
