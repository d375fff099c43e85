"""Denoising score matching against explicit score matching of the Parzen density, both by quadrature."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.experiments.planar import networks
from replicate.likelihood.quadrature import grid
from replicate.model import Estimate
from replicate.score_based.matching import denoising_score_matching, explicit_score_matching

#: noise levels from the outermost point to the border of the grid: exp(-9.5^2 / 2) < 1e-19
REACH = 9.5


@dataclass(frozen=True)
class Parzen:
    """q_sigma(y) = 1/m sum_i N(y; x_i, sigma^2 I) of the points x (m, 2), float64."""

    points: Tensor
    sigma: float

    def _log_joint(self, y: Tensor) -> Tensor:
        m, dim = self.points.shape
        square = (y[:, None] - self.points).square().sum(2)
        return -0.5 * square / self.sigma**2 - float(0.5 * dim * np.log(2 * np.pi * self.sigma**2) + np.log(m))

    def density(self, y: Tensor) -> Tensor:
        """Return q_sigma(y), shape (n,)."""
        return self._log_joint(y).logsumexp(1).exp()

    def score(self, y: Tensor) -> Tensor:
        """Return grad log q_sigma(y), shape (n, 2)."""
        return (self._log_joint(y).softmax(1) @ self.points - y) / self.sigma**2


def denoising_objective(network: nn.Module, parzen: Parzen, nodes: int) -> Tensor:
    """Average J_DSM, a scalar, over data and noise, the noise by Gauss-Hermite quadrature with nodes^2 points."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    axis = torch.from_numpy(node).to(parzen.points)
    mass = torch.from_numpy(weight / weight.sum()).to(parzen.points)
    z, w = torch.cartesian_prod(axis, axis), torch.cartesian_prod(mass, mass).prod(1)
    values = [denoising_score_matching(network, x.expand_as(z), parzen.sigma, z) @ w for x in parzen.points]
    return torch.stack(values).mean() / parzen.sigma**2


def plane(parzen: Parzen, cells: int) -> tuple[Tensor, Tensor]:
    """Return midpoints (n, 2) of a grid of cells^2 that holds all of q_sigma, and q_sigma's mass in each cell (n,)."""
    y, log_cell = grid(float(parzen.points.abs().max()) + REACH * parzen.sigma, cells, 2, torch.float64)
    y = y.to(parzen.points.device)
    return y, parzen.density(y) * float(np.exp(log_cell))


def explicit_objective(network: nn.Module, parzen: Parzen, y: Tensor, mass: Tensor) -> Tensor:
    """Return J_ESM of q_sigma, a scalar, by the midpoint rule on midpoints y (n, 2) with masses (n,)."""
    return explicit_score_matching(network, parzen.score, y) @ mass


def gradient(objective: Tensor, network: nn.Module) -> Tensor:
    """Return the gradient in all parameters, flattened; 0 for those that the objective does not depend on."""
    parts = torch.autograd.grad(objective, list(network.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


@experiment("vincent-equivalence", family="score", seeds=3, precision="float64")
def check_equivalence(
    run: Run,
    *,
    points: int = 6,
    spread: float = 1.5,
    sigma: float = 0.5,
    hidden: int = 32,
    depth: int = 2,
    nodes: int = 40,
    cells: int = 240,
) -> None:
    """Denoising score matching against explicit score matching of the Parzen density."""
    draw = torch.randn(points, 2, generator=run.stream("points"), dtype=torch.float64, device=run.device)
    parzen = Parzen(spread * draw, sigma)
    y, mass = plane(parzen, cells)
    expected = 2 / (2 * sigma**2) - 0.5 * float(parzen.score(y).square().sum(1) @ mass)
    errors, constants, objectives = [], [], []
    for network in networks(run, hidden, depth).values():
        denoising, explicit = denoising_objective(network, parzen, nodes), explicit_objective(network, parzen, y, mass)
        ours, theirs = gradient(denoising, network), gradient(explicit, network)
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max()))
        constants.append(float(denoising.detach()) - float(explicit.detach()))
        objectives.append(float(explicit.detach()))
    n, unit = len(constants), "squared score"
    run.measure("gradient_error", Estimate.exact(max(errors), "ratio", n))
    run.measure("constant_spread", Estimate.exact(max(constants) - min(constants), unit, n))
    run.measure("constant_error", Estimate.exact(max(abs(c - expected) for c in constants), unit, n))
    run.measure("constant", Estimate.exact(constants[0], unit))
    run.measure("objective_range", Estimate.exact(max(objectives) - min(objectives), unit, n))
