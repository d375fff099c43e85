"""Measure distances between two sets of samples: 2-Wasserstein, maximum mean discrepancy, weights of modes.

All compare samples with samples, so that the truth compared with itself is not 0: read every number with that of the
row `truth`, which has the same number of samples.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import ot
import torch
from torch import Tensor

from replicate.model import Estimate

#: bandwidths of the MMD kernel, in units of the median distance
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: pivots after which the transport solver gives up; 1500 points need about a hundredth of them
PIVOTS = 10_000_000


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(f"two sets (n, D) of the same size n >= 2 are needed; got {tuple(x.shape)}, {tuple(y.shape)}")


def w2(x: Tensor, y: Tensor) -> Estimate:
    """Return the 2-Wasserstein distance between the empirical measures of x and y, by exact optimal transport.

    Biased upwards as an estimate of the distance between the distributions; time and memory grow like n^2 and
    more (n = 1500: about a second). The standard error is that of the central limit theorem for the transport cost (del
    Barrio and Loubes 2019, arXiv:1705.01299): the optimal dual potentials are its influence functions. It does not
    cover the bias, and is nan where the distance is 0.

    Args:
        x, y: samples, (n, D) each.

    Raises:
        ValueError: the shapes differ or n < 2.
        RuntimeError: the solver did not reach the optimum.

    Example:
        A shift by (3, 4) moves every point by 5:

        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> round(w2(x, x + torch.tensor([3.0, 4.0])).value, 3)
        5.0
    """
    _check_pair(x, y)
    n = len(x)
    a, b = (v.detach().cpu().double().numpy() for v in (x, y))
    weights = np.full(n, 1 / n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the solver's state is read from the log instead
        _, log = ot.emd(weights, weights, ot.dist(a, b, metric="sqeuclidean"), numItermax=PIVOTS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport of {n} points failed: {log['warning']}")
    distance = math.sqrt(max(0.0, float(log["cost"])))
    variance = (np.var(log["u"], ddof=1) + np.var(log["v"], ddof=1)) / n
    stderr = math.sqrt(variance) / (2 * distance) if distance > 0 else math.nan
    return Estimate(distance, stderr, "estimate", "distance", n)


def median_distance(y: Tensor) -> float:
    """Return the median Euclidean distance between different rows of y (n, D)."""
    return float(torch.pdist(y.double()).median())


def _kernel(squared: Tensor, median: float) -> Tensor:
    scale = 2 * median**2
    total = torch.zeros_like(squared)
    for factor in BANDWIDTHS:
        total += torch.exp(squared / (-scale * factor**2))
    return total / len(BANDWIDTHS)


def mmd(x: Tensor, y: Tensor) -> Estimate:
    """Return the unbiased squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, Eq. 4); may be negative.

    Kernel: mean of Gaussian kernels exp(-||a - b||^2 / 2h^2) with h = median distance within y times `BANDWIDTHS`,
    so that y is the reference and all models have the same kernel. The standard error is Hoeffding's variance of the
    U-statistic with plug-in terms, which holds under the null hypothesis as well.

    Args:
        x, y: samples and reference samples, (n, D) each.

    Raises:
        ValueError: the shapes differ, n < 2, or more than half of the pairs of y coincide, which leaves no bandwidth.

    Example:
        Two samples of one distribution are within the error of 0, a shifted one is not:

        >>> x, y = torch.randn(2, 200, 1, generator=torch.Generator().manual_seed(0))
        >>> [found.value > 3 * found.stderr for found in (mmd(x, y), mmd(x + 1, y))]
        [False, True]
    """
    _check_pair(x, y)
    n = len(x)
    a, b = x.detach().double(), y.detach().double()
    median = median_distance(b)
    if median == 0:
        raise ValueError("more than half of the reference samples' distances are 0; mmd has no bandwidth for them")
    cross = _kernel(torch.cdist(a, b).square(), median)
    h = _kernel(torch.cdist(a, a).square(), median) + _kernel(torch.cdist(b, b).square(), median) - cross - cross.T
    h.fill_diagonal_(0)
    pairs = n * (n - 1)
    value = float(h.sum()) / pairs
    pair_variance = float(h.square().sum()) / pairs - value**2
    # the spread of row means holds 1/(n-1) of the pair variance besides that of the projection
    projection = max(0.0, float((h.sum(1) / (n - 1)).var()) - pair_variance / (n - 1))
    stderr = math.sqrt(2 / pairs * (2 * (n - 2) * projection + pair_variance))
    return Estimate(value, stderr, "estimate", "squared mmd", n)


def mode_weight_error(modes_of_samples: Tensor, true_weights: Tensor) -> Estimate:
    """Return the total variation, half the L1 distance, between the samples' share of each mode and the true weights.

    Biased upwards by sampling noise. Standard error: delta method with the signs of the errors held fixed.

    Args:
        modes_of_samples: index of each sample's mode, (n,), int64.
        true_weights: probability of each mode, (M,).

    Raises:
        ValueError: an index is outside 0..M-1, or there are no samples.

    Example:
        >>> mode_weight_error(torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 0.5])).value
        0.25
    """
    modes, weights = modes_of_samples.detach().cpu(), true_weights.detach().cpu().double()
    n, m = modes.numel(), weights.numel()
    if n == 0 or int(modes.min()) < 0 or int(modes.max()) >= m:
        raise ValueError(f"mode_weight_error needs at least one sample, with modes in 0..{m - 1}")
    error = torch.bincount(modes, minlength=m).double() / n - weights
    per_sample = 0.5 * error.sign()[modes]
    stderr = float(per_sample.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(error.abs().sum() / 2), stderr, "estimate", "probability", n)


#: every distance from samples to as many reference samples, (n, D) each, by the metric's name
DISTANCES: dict[str, Callable[[Tensor, Tensor], Estimate]] = {"w2": w2, "mmd": mmd}
