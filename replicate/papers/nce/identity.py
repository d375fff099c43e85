"""The population gradient of the contrastive loss vanishes at the true density and log Z."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from replicate.experiments import Run, experiment
from replicate.model import Estimate
from replicate.papers.nce.gaussian import log_standard_normal
from replicate.score_based.contrastive import data_term, noise_term

#: standard deviations of the noise, noises per datum, and (location, scale) of the data
NOISES, RATIOS, TRUTHS = (1.0, 2.0, 5.0), (0.1, 1.0, 10.0), ((0.0, 1.0), (0.7, 0.5))


def population_gradient(location: float, scale: float, log_z_error: float, noise_std: float, nu: float) -> Tensor:
    """Return the gradient of the population objective for a logistic density, shape (3,).

    It is taken at the truth but for `log_z_error`, by the trapezoidal rule on [-60, 60], which converges geometrically
    on integrands like these.
    """
    grid = torch.linspace(-60, 60, 24_001, dtype=torch.float64)[:, None]
    true = torch.tensor([location, scale, math.log(scale)], dtype=torch.float64)

    def log_logistic(x: Tensor, theta: Tensor) -> Tensor:
        u = (x[:, 0] - theta[0]) / theta[1]
        return logsigmoid(u) + logsigmoid(-u) - theta[2]

    log_noise = log_standard_normal(grid / noise_std) - math.log(noise_std)
    theta = (true + torch.tensor([0.0, 0.0, log_z_error], dtype=torch.float64)).requires_grad_(True)
    log_ratio = log_logistic(grid, theta) - log_noise
    data = log_logistic(grid, true).exp() * data_term(log_ratio, nu)
    noise = log_noise.exp() * noise_term(log_ratio, nu)
    loss = (data + nu * noise).sum() * (grid[1, 0] - grid[0, 0])
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient


ABOUT = "population gradient of the contrastive loss at the true density and log Z, by quadrature"


@experiment("nce-identity", about=ABOUT, family="ebm", seeds=1, precision="float64")
def vanishing_gradient(run: Run) -> None:
    """Measure the population gradient at the truth, log Z included, for several noises, ratios and data."""
    cases = list(product(NOISES, RATIOS, TRUTHS))
    at_truth, beside = (
        [float(population_gradient(*truth, error, std, nu).abs().max()) for std, nu, truth in cases]
        for error in (0.0, 0.1)
    )
    unit = "nats per unit of the parameter"
    run.measure("largest_gradient", Estimate.exact(max(at_truth), unit, len(cases)))
    run.measure("smallest_gradient_beside", Estimate.exact(min(beside), unit, len(cases)))
