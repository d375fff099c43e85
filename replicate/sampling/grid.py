"""The time grid of the SDE samplers (Karras et al. 2022, arXiv:2206.00364, Eq. 5 with rho = 7).

For a linear SDE, x_t = m(t) x_0 + std(t) z, so x_t / m(t) is the data plus noise of level sigma(t) = std(t) / m(t). The
grid is even in sigma^(1/rho): fine where the noise is small, coarse where it is large. For a VE SDE with geometric
levels it lies between even in t and even in sigma.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from replicate.sde import SDE

RHO = 7.0


def time_grid(sde: SDE, steps: int, device: torch.device) -> Tensor:
    """Return times from t_max down to t_min, shape (steps + 1,), float64.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"an SDE sampler needs at least 1 step; got {steps}")
    # on the CPU, so that the grid is the same on every device
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    first, last = (sde.log_ratio(ends) / RHO).exp().tolist()
    root = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    times = sde.time_of(RHO * root.log())
    times[0], times[-1] = ends
    return times.to(device)
