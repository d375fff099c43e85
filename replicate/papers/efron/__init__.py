"""Efron 2011, "Tweedie's Formula and Selection Bias", JASA 106: the posterior mean from the score of the marginal.

For mu ~ g and z | mu ~ N(mu, sigma^2) with marginal density f, Efron takes from Robbins (1956)

    E[mu | z]   = z + sigma^2 l'(z),
    Var[mu | z] = sigma^2 (1 + sigma^2 l''(z)),         l = log f.

Replicated: both against the posterior itself, integrated numerically, for three priors far from Gaussian whose
marginals have closed forms: the paper's exponential, a uniform and a mixture of two narrow Gaussians. The formula
sees only the marginal (differentiated automatically), the posterior only the prior and Bayes' rule.

Deviation: the paper estimates l from data; here it is exact, so that the identity can be held to rounding error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.special import log_ndtr

from replicate.experiments import Paper, Run, experiment
from replicate.model import Estimate
from replicate.score_based.matching import tweedie

RATE = 0.5
HALF_WIDTH = 2.0
#: (weight, mean, standard deviation) of the bimodal prior's components
COMPONENTS = ((0.7, -2.0, 0.3), (0.3, 1.0, 0.8))
LEGENDRE_ORDER = 16


@dataclass(frozen=True)
class Prior:
    """A prior g of mu on the line and the marginal that Gaussian noise makes of it.

    Attributes:
        name: in metrics.
        log_density: log g(mu) up to a constant, (k,) -> (k,), in nats.
        log_marginal: (z (n,), sigma) -> log f(z) (n,), in nats.
        support: ends of an interval that holds all of g but a mass below 1e-16.
    """

    name: str
    log_density: Callable[[Tensor], Tensor]
    log_marginal: Callable[[Tensor, float], Tensor]
    support: tuple[float, float]


def _normal(x: Tensor, mean: float, sd: float) -> Tensor:
    return -0.5 * ((x - mean) / sd).square() - math.log(sd) - 0.5 * math.log(2 * math.pi)


def _exponential_marginal(z: Tensor, sigma: float) -> Tensor:
    """Log f of mu ~ Exp(RATE): the exponentially modified Gaussian."""
    return math.log(RATE) + RATE**2 * sigma**2 / 2 - RATE * z + log_ndtr(z / sigma - RATE * sigma)


def _uniform_marginal(z: Tensor, sigma: float) -> Tensor:
    """Log f of mu ~ U[-HALF_WIDTH, HALF_WIDTH], on the side where the difference of two Phi does not cancel."""
    above, below = (log_ndtr((end - z.abs()) / sigma) for end in (HALF_WIDTH, -HALF_WIDTH))
    return above + torch.log1p(-(below - above).exp()) - math.log(2 * HALF_WIDTH)


def _bimodal(x: Tensor, sigma: float = 0.0) -> Tensor:
    """Log density of the two-Gaussian mixture after noise of level sigma."""
    return torch.stack([math.log(w) + _normal(x, m, math.hypot(sd, sigma)) for w, m, sd in COMPONENTS]).logsumexp(0)


PRIORS = (
    Prior("exponential", lambda mu: -RATE * mu, _exponential_marginal, (0.0, 80.0)),
    Prior("uniform", torch.zeros_like, _uniform_marginal, (-HALF_WIDTH, HALF_WIDTH)),
    Prior("bimodal", _bimodal, _bimodal, (-9.0, 9.0)),
)


def derivatives(log_marginal: Callable[[Tensor, float], Tensor], z: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """l'(z) and l''(z) at noise level sigma, shape (n,) each."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        (first,) = torch.autograd.grad(log_marginal(z, sigma).sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), z)
    return first.detach(), second


def posterior_moments(prior: Prior, z: Tensor, sigma: float, panels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of mu | z at z (n,), float64, by Gauss-Legendre quadrature of g(mu) N(z; mu, sigma^2).

    The quadrature has LEGENDRE_ORDER nodes on each of the equal `panels` of the prior's support.
    """
    node, weight = np.polynomial.legendre.leggauss(LEGENDRE_ORDER)
    low, high = prior.support
    half = (high - low) / panels / 2
    centres = low + half * (2 * torch.arange(panels, dtype=torch.float64) + 1)
    mu = (centres[:, None] + half * torch.from_numpy(node)).flatten().to(z.device)
    log_weight = torch.from_numpy(weight).log().repeat(panels).to(z.device)
    probability = (log_weight + prior.log_density(mu) + _normal(z[:, None] - mu, 0.0, sigma)).softmax(1)
    mean = probability @ mu
    return mean, (probability * (mu - mean[:, None]).square()).sum(1)


# an even number of observations keeps clear of 0, where |z| in the uniform's marginal has no derivative
@experiment("efron-tweedie", family="score", seeds=1, profiles=("smoke", "standard"), precision="float64")
def check_tweedie(
    run: Run,
    *,
    from_: float = -5.0,
    to: float = 7.0,
    observations: int = 200,
    sigma_small: float = 0.5,
    sigma_large: float = 1.0,
    panels: int = 200,
) -> None:
    """Tweedie's formula for posterior mean and variance against posterior quadrature."""
    z = torch.linspace(from_, to, observations, dtype=torch.float64, device=run.device)
    mean_errors, variance_errors, curves = [], [], {}
    for prior in PRIORS:
        for sigma in (sigma_small, sigma_large):
            score, curvature = derivatives(prior.log_marginal, z, sigma)
            mean, variance = posterior_moments(prior, z, sigma, panels)
            formula = tweedie(z, score, sigma)
            mean_errors.append(float((formula - mean).abs().max()))
            variance_errors.append(float((sigma**2 * (1 + sigma**2 * curvature) - variance).abs().max()))
        curves[f"{prior.name}: formula"] = z.tolist(), formula.tolist()
        curves[f"{prior.name}: posterior"] = z[::8].tolist(), mean[::8].tolist()
    n = len(mean_errors) * observations
    run.measure("mean_error", Estimate.exact(max(mean_errors), "units of the observation", n))
    run.measure("variance_error", Estimate.exact(max(variance_errors), "squared units of the observation", n))
    title = f"Posterior mean by Tweedie's formula and by quadrature, sigma = {sigma_large:g}"
    run.curves("posterior-mean", title, ("observation z", "E[mu | z]"), curves)


PAPER = Paper("efron", __file__, experiments=(check_tweedie,))
