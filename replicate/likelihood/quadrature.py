"""Compute normalising constants in one and two dimensions by the midpoint rule.

For a smooth function that vanishes at the border of the box the rule converges faster than any power of the spacing;
across a discontinuity its error falls like the spacing. The stated error is the difference to the grid of half the
resolution: safe for smooth functions, where the finer grid is far better than that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from replicate.model import Estimate

#: grid points evaluated at a time
CHUNK = 65536


def grid(half_width: float, points: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, float]:
    """Return the midpoints of the cells of the box [-half_width, half_width]^dim.

    Args:
        points: cells per axis.
        dim: 1 or 2.

    Returns:
        (midpoints (points^dim, dim) of that dtype, last axis fastest; log volume of a cell).

    Raises:
        ValueError: dim is not 1 or 2, or half_width or points is not positive.
    """
    if dim not in (1, 2) or points < 1 or not half_width > 0:
        raise ValueError(f"a grid needs dim 1 or 2, points >= 1, half_width > 0; got {dim}, {points}, {half_width}")
    spacing = 2 * half_width / points
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) * spacing - half_width
    nodes = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return nodes.to(dtype), dim * math.log(spacing)


@torch.no_grad()
def log_z(
    log_f: Callable[[Tensor], Tensor],
    half_width: float,
    points: int = 400,
    dim: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Estimate:
    """Return the log of the integral of exp(log_f) over the box [-half_width, half_width]^dim, in nats.

    Args:
        log_f: (n, dim) -> (n,), the log of a function to integrate, such as minus an energy.
        half_width: the box must hold all but a negligible part of the integral.
        points: cells per axis, at least 2.
        dim: 1 or 2.
        dtype, device: of the points for log_f; the sum is in double precision.

    Returns:
        Estimate of kind "estimate", whose `stderr` is the numerical error |log Z - log Z at half the resolution|
        (no sampling is involved) and whose `n` is the number of grid points.

    Raises:
        ValueError: points < 2, or as `grid`.

    Example:
        The integral of exp(-|x|^2 / 2) over the plane is 2 pi:

        >>> found = log_z(lambda x: -0.5 * x.square().sum(1), half_width=8.0, points=100)
        >>> round(found.value, 4), round(math.log(2 * math.pi), 4)
        (1.8379, 1.8379)
    """
    if points < 2:
        raise ValueError(f"log_z compares with half the resolution and needs points >= 2; got {points}")

    def at(points: int) -> float:
        nodes, log_cell = grid(half_width, points, dim, dtype)
        parts = [torch.logsumexp(log_f(part.to(device)).detach().double(), 0) for part in nodes.split(CHUNK)]
        return float(torch.logsumexp(torch.stack(parts), 0)) + log_cell

    fine, coarse = at(points), at(points // 2)
    return Estimate(fine, abs(fine - coarse), "estimate", "nats", points**dim)
