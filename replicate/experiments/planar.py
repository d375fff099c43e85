"""Energies, densities and networks of the plane that several papers share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from replicate.likelihood.quadrature import grid, log_z
from replicate.model import Estimate
from replicate.runs.experiment import Run
from replicate.score_based.networks import EnergyScore, FreeScore
from replicate.tasks.densities import GaussianMixture

#: half width of the box on which a learned density is normalised; the data lie within 1.9
BOX = 4.0


def model_kl(density: GaussianMixture, energy: Callable[[Tensor], Tensor], points: int, device: str) -> Estimate:
    """Return KL(data || exp(-energy) / Z) in nats by the midpoint rule, Z over the box [-BOX, BOX]^2.

    An energy that holds mass outside the box would have a larger Z and a larger divergence.
    """
    z = log_z(lambda x: -energy(x), BOX, points, device=device)
    nodes, log_cell = grid(BOX, points, 2)
    with torch.no_grad():
        log_q = -energy(nodes.to(device)).double().cpu() - z.value
    log_p = density.log_prob(nodes.double())
    value = float((log_p.exp() * (log_p - log_q)).sum() * math.exp(log_cell))
    return Estimate(value, z.stderr, "estimate", "nats", points**2)


def spread(density: GaussianMixture, x: Tensor) -> Estimate:
    """Return the mean squared distance of x (n, 2) to its own Gaussian's centre over that of the data."""
    centres = density.means.to(x.device)[density.mode_of(x)]
    squared = (x.double() - centres).square().sum(1) / density.covariance.trace().item()
    return Estimate.mean_of(squared, "estimate", "ratio")


@torch.no_grad()
def steady_state(energy: Callable[[Tensor], Tensor], n: int, points: int, generator: torch.Generator) -> Tensor:
    """Draw n points (n, 2) of exp(-energy) on the box, the law of endless chains, uniform within a cell of the grid."""
    device = generator.device
    nodes, log_cell = grid(BOX, points, 2)
    share = (-energy(nodes.to(device)).double()).softmax(0).cumsum(0)
    u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    cell = torch.searchsorted(share, u * share[-1]).clamp(max=len(nodes) - 1)
    within = torch.rand(n, 2, generator=generator, device=device) - 0.5
    return nodes.to(device)[cell] + math.exp(log_cell / 2) * within


def noised(density: GaussianMixture, sigma: float) -> GaussianMixture:
    """Return the density convolved with N(0, sigma^2 I)."""
    eye = torch.eye(density.dim, dtype=torch.float64)
    return GaussianMixture(density.means, density.covariance + sigma**2 * eye, density.weights, density.modes)


def networks(run: Run, hidden: int, depth: int) -> dict[str, nn.Module]:
    """Build three kinds of score network of the plane with random weights in float64."""
    with run.initialisation():
        free = FreeScore(2, hidden, depth), FreeScore(2, hidden, depth, "softplus")
        made = {"free-silu": free[0], "free-softplus": free[1], "energy": EnergyScore(2, hidden, depth)}
    return {name: network.double().to(run.device) for name, network in made.items()}
