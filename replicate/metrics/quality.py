"""Measure sample quality in feature space: Frechet distance, precision and recall, density and coverage.

Frechet distance: Dowson and Landau 1982; of classifier features, Heusel et al. 2017, arXiv:1706.08500. Precision and
recall: Kynkaanniemi et al. 2019, arXiv:1904.06991. Density and coverage: Naeem et al. 2020, arXiv:2002.09797.
All are biased at finite n: compare numbers with the same n, and with the row `truth`.
"""

import math

import torch
from torch import Tensor

from replicate.model import Estimate

#: the metrics of `feature_metrics`
FEATURE_METRICS = ("frechet", "precision", "recall", "density", "coverage")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric positive semi-definite matrix; null directions stay null for negative powers."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    powered = torch.where(values > floor, values.clamp_min(1e-300).pow(exponent), torch.zeros_like(values))
    return (vectors * powered) @ vectors.T


def _influence_variance(x: Tensor, mean: Tensor, shift: Tensor, transport: Tensor) -> float:
    """Return the variance over x of the influence 2 shift . (x - mean) + (x - mean)' (I - transport) (x - mean)."""
    centred = x.detach().double() - mean
    quadratic = ((centred - centred @ transport) * centred).sum(1)
    return float((2 * centred @ shift + quadratic).var())


def frechet(fx: Tensor, fy: Tensor) -> Estimate:
    """Return the Frechet distance ||mx - my||^2 + tr(Cx + Cy - 2 (Cx^1/2 Cy Cx^1/2)^1/2) between fitted Gaussians.

    The square root of a symmetric matrix is computed from its eigenvalues, which needs no correction of complex parts
    and works for singular covariances. The standard error is first order (delta method: the Gaussian transport maps
    give the influence of each point) and does not cover the bias, which is upwards and falls like 1/n.

    Args:
        fx, fy: features, (n, F) and (m, F).

    Raises:
        ValueError: the numbers of features differ, or a set has fewer than 2 rows.

    Example:
        A shift by (3, 4) leaves the covariances equal, so the distance is 3^2 + 4^2:

        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet(x, x + torch.tensor([3.0, 4.0])).value, 3)
        25.0
    """
    if fx.ndim != 2 or fy.ndim != 2 or fx.shape[1] != fy.shape[1] or min(len(fx), len(fy)) < 2:
        raise ValueError(f"frechet needs features (n, F), (m, F), n, m >= 2; got {tuple(fx.shape)}, {tuple(fy.shape)}")
    (mx, cx), (my, cy) = _moments(fx), _moments(fy)
    root = _power(cx, 0.5)
    cross = _power(root @ cy @ root, 0.5)
    value = (mx - my).square().sum() + cx.trace() + cy.trace() - 2 * cross.trace()
    # optimal maps between the centred Gaussians, x to y and back
    inverse_root = _power(cx, -0.5)
    forward = inverse_root @ cross @ inverse_root
    backward = root @ _power(cross, -1.0) @ root
    variance = _influence_variance(fx, mx, mx - my, forward) / len(fx)
    variance += _influence_variance(fy, my, my - mx, backward) / len(fy)
    return Estimate(max(0.0, float(value)), math.sqrt(variance), "estimate", "squared feature distance", len(fx))


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the distance of each row of x (n, F) to its k-th nearest other row, shape (n,)."""
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    return distances.topk(k, dim=1, largest=False).values[:, -1]  # kthvalue is not deterministic on CUDA


def precision_recall_density_coverage(fx_real: Tensor, fx_fake: Tensor, k: int = 5) -> dict[str, Estimate]:
    """Measure fidelity (precision, density) and diversity (recall, coverage) of fake features against real ones.

    With B(i) the ball round row i that reaches to its k-th nearest neighbour within its own set:
    precision is the share of fakes in some real ball, recall the share of reals in some fake ball, density the mean
    over fakes of (number of real balls that hold it) / k, and coverage the share of real balls that hold a fake.
    Density may exceed 1. Standard errors are over the averaged rows with the balls held fixed.

    Args:
        fx_real: real features, (n, F).
        fx_fake: generated features, (m, F); the papers take m = n.
        k: neighbours; 3 in the first paper, 5 in the second.

    Returns:
        Estimates by the names "precision", "recall", "density", "coverage".

    Raises:
        ValueError: the numbers of features differ, or a set has at most k rows.

    Example:
        Fakes that all copy one real row are precise, but miss the rest:

        >>> real = torch.arange(20.0)[:, None]
        >>> found = precision_recall_density_coverage(real, torch.full((20, 1), 9.0), k=1)
        >>> found["precision"].value, found["recall"].value
        (1.0, 0.05)
    """
    if fx_real.shape[1:] != fx_fake.shape[1:] or min(len(fx_real), len(fx_fake)) <= k:
        raise ValueError(
            f"precision and recall need more than k = {k} rows of equally many features; "
            f"got {tuple(fx_real.shape)}, {tuple(fx_fake.shape)}"
        )
    real, fake = fx_real.detach().double(), fx_fake.detach().double()
    distances = torch.cdist(real, fake)
    in_real_ball = distances <= _radii(real, k)[:, None]
    in_fake_ball = distances <= _radii(fake, k)[None, :]
    per_row = {
        "precision": in_real_ball.any(0),
        "recall": in_fake_ball.any(1),
        "density": in_real_ball.sum(0) / k,
        "coverage": in_real_ball.any(1),
    }
    return {name: Estimate.mean_of(values, "estimate", "fraction") for name, values in per_row.items()}


def feature_metrics(fx_real: Tensor, fx_fake: Tensor) -> dict[str, Estimate]:
    """Return every metric of samples in feature space.

    Args:
        fx_real: features of data, (n, F).
        fx_fake: features of samples, (m, F); only the Frechet distance uses those beyond the n-th.
    """
    neighbours = precision_recall_density_coverage(fx_real, fx_fake[: len(fx_real)])
    return {"frechet": frechet(fx_fake, fx_real), **neighbours}
