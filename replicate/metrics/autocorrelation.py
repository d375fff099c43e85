"""Integrated autocorrelation time: the number of states of a chain that are worth one independent draw.

tau = 1 + 2 sum_{k >= 1} rho(k), so that the variance of a mean over N states is tau / N times that of one independent
draw. Geyer's initial monotone sequence ends the sum (Geyer 1992, "Practical Markov chain Monte Carlo", Stat. Sci.
7, sec 3.3): the sums of neighbours rho(2m) + rho(2m + 1) are positive and decrease for a reversible chain, so those
after the first one that is not positive are noise, and one that exceeds its predecessor is lowered to it. For a chain
that is not reversible (ULA off a Gaussian) the rule is customary, without the theorem. Standard error: Madras and
Sokal 1988, J. Stat. Phys. 50, eq. A.16.

A chain that hardly moves must not look good. Its own mean and variance would hide this, so the functions here need the
true mean: a chain that never leaves a mode then has rho = 1 at every lag, and the result is N, as a lower bound.
"""

import math

import torch
from torch import Tensor

from replicate.model import Estimate

#: a chain of fewer autocorrelation times cuts its own tail off: it gives a lower bound
SHORTEST = 10


def autocorrelation(series: Tensor, mean: Tensor | float) -> Tensor:
    """Return rho(k) for k = 0 .. N-1, averaged over independent chains before the division, shape (N,), float64.

    Args:
        series: a function of the state along the chains, shape (N, ...).
        mean: its true mean; a number, or a tensor that broadcasts with the trailing shape.

    Raises:
        ValueError: fewer than 2 states, a value that is not finite, or a series that is constantly at its mean.

    Example:
        >>> autocorrelation(torch.tensor([1.0, -1.0, 1.0, -1.0]), mean=0.0).round(decimals=6).tolist()
        [1.0, -0.75, 0.5, -0.25]
    """
    if len(series) < 2 or not bool(torch.isfinite(series).all()):
        raise ValueError(f"autocorrelation needs at least 2 states, all finite; got {len(series)}")
    n, centre = len(series), torch.as_tensor(mean, dtype=torch.float64, device=series.device)
    x = (series.detach().double() - centre).reshape(n, -1)
    # zero padding to twice the length makes the circular correlation of the transform a plain one
    power = torch.fft.rfft(x, n=2 * n, dim=0).abs().square().sum(1)
    covariance = torch.fft.irfft(power, n=2 * n)[:n]
    if not float(covariance[0]) > 0:
        raise ValueError("the series stays at its mean: it has no autocorrelation")
    return covariance / covariance[0]


def autocorrelation_time(series: Tensor, mean: Tensor | float, unit: str = "steps") -> Estimate:
    """Estimate tau of independent chains together, in states of the series.

    Args:
        series: a function of the state along the chains, shape (N, ...): the trailing entries are chains, or chains
            and several functions of their states, whose covariances are added.
        mean: its true mean; a number, or a tensor that broadcasts with the trailing shape.
        unit: of the result.

    Returns:
        tau, of kind "estimate", or "lower_bound" where the chains are shorter than `SHORTEST` tau.

    Raises:
        ValueError: as `autocorrelation`.

    Example:
        An autoregression x <- x / 2 + noise has tau = (1 + 1/2) / (1 - 1/2) = 3:

        >>> noise, states = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)), [torch.zeros(50)]
        >>> for z in noise:
        ...     states.append(0.5 * states[-1] + z)
        >>> found = autocorrelation_time(torch.stack(states), mean=0.0)
        >>> round(found.value), found.kind
        (3, 'estimate')
    """
    rho = autocorrelation(series, mean)
    n = len(rho)
    pairs = rho[: n - n % 2].view(-1, 2).sum(1)
    ends = (pairs <= 0).nonzero()
    kept = int(ends[0]) if len(ends) else len(pairs)
    # at least the first pair: tau of a chain that alternates is 2 (1 + rho(1)) - 1 and may be 0
    total = float(pairs[: max(kept, 1)].cummin(0).values.sum())
    tau = max(2 * total - 1, 0.0)
    chains = series.shape[1] if series.dim() > 1 else 1
    stderr = tau * math.sqrt(2 * (2 * (2 * kept) + 1) / (n * chains))
    return Estimate(tau, stderr, "estimate" if n >= SHORTEST * tau else "lower_bound", unit, n * chains)
