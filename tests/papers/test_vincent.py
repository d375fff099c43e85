"""The equivalence of denoising and explicit score matching: its parts against torch.distributions and scipy."""

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import distributions

from replicate.experiments import Run
from replicate.experiments.planar import networks
from replicate.ledger.claims import claims_of
from replicate.papers.vincent import PAPER
from replicate.papers.vincent.equivalence import (
    Parzen,
    check_equivalence,
    denoising_objective,
    explicit_objective,
    plane,
)
from replicate.runs.seeds import Streams

SMALL = {"points": 3, "nodes": 24, "cells": 160, "hidden": 8}
POINTS = torch.tensor([[0.0, 1.0], [-1.2, 0.3], [0.8, -0.9]], dtype=torch.float64)
PARZEN = Parzen(POINTS, 0.6)


def run(seed: int = 0) -> Run:
    settings = {**check_equivalence.settings("standard"), **SMALL}
    return Run(settings, Streams(check_equivalence.name, "vincent", seed), torch.device("cpu"))


def test_parzen_is_the_mixture_of_torch_distributions() -> None:
    y = torch.tensor([[0.3, 0.2], [-2.0, 1.5]], dtype=torch.float64, requires_grad=True)
    kernels = distributions.Independent(distributions.Normal(POINTS, 0.6), 1)
    mixture = distributions.MixtureSameFamily(distributions.Categorical(torch.ones(3).double()), kernels)
    log_prob = mixture.log_prob(y)
    (score,) = torch.autograd.grad(log_prob.sum(), y)
    torch.testing.assert_close(PARZEN.density(y.detach()), log_prob.detach().exp())
    torch.testing.assert_close(PARZEN.score(y.detach()), score)


def test_the_plane_holds_all_mass() -> None:
    assert abs(float(plane(PARZEN, 160)[1].sum()) - 1) < 1e-12


class Linear(torch.nn.Module):
    """s(y) = a - b y, whose objectives have closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.4, -0.2], dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.a - self.b * y


def test_denoising_objective_of_a_linear_score_is_its_closed_form() -> None:
    a, b, sigma = np.array([0.4, -0.2]), 0.7, 0.6
    x = POINTS.numpy()
    # a - b (x + sigma z) + z / sigma: constant part a - b x, noise part (1 / sigma - b sigma) z
    expected = 0.5 * (np.square(a - b * x).sum(1).mean() + 2 * (1 / sigma - b * sigma) ** 2)
    assert float(denoising_objective(Linear(), PARZEN, 12).detach()) == pytest.approx(expected, rel=1e-12)


def test_explicit_objective_against_scipy() -> None:
    def integrand(v: float, u: float) -> float:
        y = np.array([u, v])
        weight = np.exp(-0.5 * np.square(y - POINTS.numpy()).sum(1) / 0.36)
        score = (weight @ POINTS.numpy() / weight.sum() - y) / 0.36
        gap = np.array([0.4, -0.2]) - 0.7 * y - score
        return float(0.5 * gap @ gap * weight.sum() / (3 * 2 * np.pi * 0.36))

    expected = integrate.dblquad(integrand, -5, 5, -5, 5, epsabs=1e-7, epsrel=1e-7)[0]
    ours = float(explicit_objective(Linear(), PARZEN, *plane(PARZEN, 160)).detach())
    assert ours == pytest.approx(expected, abs=1e-6)


def test_networks_differ() -> None:
    y = torch.ones(1, 2, dtype=torch.float64)
    values = [network(y).detach() for network in networks(run(), 8, 2).values()]
    assert len({tuple(v.flatten().tolist()) for v in values}) == 3


def test_the_experiment_holds_and_repeats() -> None:
    found = check_equivalence.measure(run()).estimates
    assert found["gradient_error"].value < 1e-10
    assert found["constant_spread"].value < 1e-10
    assert found["constant_error"].value < 1e-9
    assert found["objective_range"].value > 1e-3
    assert found == check_equivalence.measure(run()).estimates
    assert found["constant"] != check_equivalence.measure(run(1)).estimates["constant"]


def test_sigma_misread_as_a_variance_is_caught(monkeypatch) -> None:
    from replicate.score_based.matching import denoising_score_matching

    def wrong(score, x, sigma, z):
        return denoising_score_matching(score, x, sigma**2, z)

    monkeypatch.setattr("replicate.papers.vincent.equivalence.denoising_score_matching", wrong)
    found = check_equivalence.measure(run()).estimates
    assert found["gradient_error"].value > 1e-2
    assert found["constant_spread"].value > 1e-3


def test_claims_read() -> None:
    measured = check_equivalence.measure(run()).estimates
    for claim in claims_of(PAPER).claims:
        assert measured[claim.measure].unit == claim.unit
