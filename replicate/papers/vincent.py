"""Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders", Neural Computation 23(7).

For data x_1..x_m, noise N(0, sigma^2 I) and the Parzen density q_sigma that the two make, the paper proves

    J_DSM(theta) = J_ESM(theta; q_sigma) + C:

denoising score matching is explicit score matching of the smoothed density up to a constant, so both have the same
gradient. Replicated on a handful of points in the plane, where q_sigma and its score are known, with each expectation
by the quadrature that is natural to it: J_DSM over data and noise by Gauss-Hermite, J_ESM over q_sigma on a grid. The
two sides share the network and nothing else. By the paper's derivation C = D / (2 sigma^2) - E|grad log q_sigma|^2 / 2.

Deviations: the paper's networks are one-layer denoising autoencoders; the theorem is about any score, and ours are
free score networks and the gradient of an energy. The suite's objective is sigma^2 times the paper's and is divided by
it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments.planar import networks
from replicate.likelihood.quadrature import grid
from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import Paper
from replicate.score_based.matching import denoising_score_matching, explicit_score_matching

#: the grid reaches so many noise levels beyond the outermost point: exp(-9.5^2 / 2) < 1e-19
REACH = 9.5


@dataclass(frozen=True)
class Parzen:
    """q_sigma(y) = 1/m sum_i N(y; x_i, sigma^2 I).

    Attributes:
        points: x, shape (m, 2), float64.
        sigma: noise level.
    """

    points: Tensor
    sigma: float

    def _log_joint(self, y: Tensor) -> Tensor:
        m, dim = self.points.shape
        square = (y[:, None] - self.points).square().sum(2)
        log_norm = 0.5 * dim * np.log(2 * np.pi * self.sigma**2) + np.log(m)
        return -0.5 * square / self.sigma**2 - float(log_norm)

    def density(self, y: Tensor) -> Tensor:
        """q_sigma(y), shape (n,)."""
        return self._log_joint(y).logsumexp(1).exp()

    def score(self, y: Tensor) -> Tensor:
        """grad log q_sigma(y), shape (n, 2)."""
        return (self._log_joint(y).softmax(1) @ self.points - y) / self.sigma**2


def denoising_objective(network: nn.Module, parzen: Parzen, nodes: int) -> Tensor:
    """J_DSM, a scalar: the mean over data and noise, the noise by Gauss-Hermite quadrature with nodes^2 points."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    axis = torch.from_numpy(node).to(parzen.points)
    mass = torch.from_numpy(weight / weight.sum()).to(parzen.points)
    z, w = torch.cartesian_prod(axis, axis), torch.cartesian_prod(mass, mass).prod(1)
    values = [denoising_score_matching(network, x.expand_as(z), parzen.sigma, z) @ w for x in parzen.points]
    return torch.stack(values).mean() / parzen.sigma**2


@dataclass(frozen=True)
class Plane:
    """Midpoints y (n, 2) of a grid over the plane and the mass of q_sigma in each cell (n,)."""

    y: Tensor
    mass: Tensor

    @staticmethod
    def over(parzen: Parzen, cells: int) -> Plane:
        """A grid of cells^2 that holds all of q_sigma."""
        half_width = float(parzen.points.abs().max()) + REACH * parzen.sigma
        y, log_cell = grid(half_width, cells, 2, torch.float64)
        y = y.to(parzen.points.device)
        return Plane(y, parzen.density(y) * float(np.exp(log_cell)))


def explicit_objective(network: nn.Module, parzen: Parzen, plane: Plane) -> Tensor:
    """J_ESM of q_sigma, a scalar, by the midpoint rule."""
    return explicit_score_matching(network, parzen.score, plane.y) @ plane.mass


def gradient(objective: Tensor, network: nn.Module) -> Tensor:
    """Its gradient with respect to all parameters, flattened; 0 for those that it does not depend on."""
    parameters = list(network.parameters())
    parts = torch.autograd.grad(objective, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    return torch.cat([g.flatten() for g in whole])


def check_equivalence(context: Context) -> Outcome:
    """Gradients and constants of the two objectives for three networks on one random set of points."""
    p = context.params
    generator = context.streams.fresh("points")
    draw = torch.randn(p["points"], 2, generator=generator, dtype=torch.float64, device=generator.device)
    parzen = Parzen(p["spread"] * draw, p["sigma"])
    plane = Plane.over(parzen, p["cells"])
    expected = 2 / (2 * p["sigma"] ** 2) - 0.5 * float(parzen.score(plane.y).square().sum(1) @ plane.mass)
    errors, constants, objectives = [], [], []
    for network in networks(context).values():
        denoising = denoising_objective(network, parzen, p["nodes"])
        explicit = explicit_objective(network, parzen, plane)
        ours, theirs = gradient(denoising, network), gradient(explicit, network)
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max()))
        constants.append(float(denoising.detach()) - float(explicit.detach()))
        objectives.append(float(explicit.detach()))
    count = len(constants)
    spread = max(constants) - min(constants)
    error = max(abs(c - expected) for c in constants)
    return Outcome(
        {
            "gradient_error": Estimate.exact(max(errors), "ratio", count),
            "constant_spread": Estimate.exact(spread, "squared score", count),
            "constant_error": Estimate.exact(error, "squared score", count),
            "constant": Estimate.exact(constants[0], "squared score"),
            "objective_range": Estimate.exact(max(objectives) - min(objectives), "squared score", count),
        }
    )


EQUIVALENCE = Experiment(
    name="vincent-equivalence",
    about="denoising score matching against explicit score matching of the Parzen density",
    family="score",
    run=check_equivalence,
    params={"points": 6, "spread": 1.5, "sigma": 0.5, "hidden": 32, "depth": 2, "nodes": 40, "cells": 240},
    seeds=3,
    precision="float64",
)

PAPER = Paper("vincent", Path(__file__).with_suffix(".toml"), experiments=(EQUIVALENCE,))
