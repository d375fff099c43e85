"""The energy's gradient, the sampler and the measures against autograd, numpy and closed forms; both learnings once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from replicate.experiments import Run, planar
from replicate.ledger.claims import claims_of
from replicate.papers.anatomy import PAPER
from replicate.papers.anatomy import learning as anatomy
from replicate.papers.anatomy.learning import FoldedEnergy, Method
from replicate.runs.seeds import Streams

METHOD = Method(updates=3, steps=4, epsilon=0.125, lr=0.1, anneal=False, chains=6)


def energy() -> FoldedEnergy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FoldedEnergy().double()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(variance: float) -> anatomy.Callable[[Tensor], Tensor]:
    return lambda x: x.square().sum(1) / (2 * variance)


def test_the_ring_is_the_mixture_that_scipy_has() -> None:
    density = anatomy.ring(1.0, 0.15)
    x = density.sample(20, generator()).double()
    angles = 2 * np.pi * np.arange(8) / 8
    parts = [multivariate_normal([np.cos(a), np.sin(a)], 0.15**2 * np.eye(2)).pdf(x.numpy()) for a in angles]
    np.testing.assert_allclose(density.log_prob(x).numpy(), np.log(np.mean(parts, axis=0)), rtol=1e-12)


def test_the_written_out_gradient_is_that_of_autograd() -> None:
    f = energy()
    x = torch.randn(50, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(f.gradient()(x.detach()), expected, rtol=1e-12, atol=1e-14)


def test_one_step_is_that_of_the_released_code() -> None:
    f = energy()
    x = torch.randn(5, 2, generator=generator(1), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    chain, ratio = anatomy.langevin(f, METHOD, x.detach(), 1, generator(2))
    z = torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(chain.samples, x.detach() - slope + 0.125 * z)
    noise = np.linalg.norm(np.random.default_rng(0).standard_normal((400_000, 2)), axis=1).mean() * 0.125
    assert ratio == pytest.approx(float(slope.norm(dim=1).mean()) / noise, rel=5e-3)


def test_an_update_is_a_gradient_step_on_the_difference_of_mean_energies() -> None:
    f, twin = energy(), energy()
    data = torch.randn(30, 2, generator=generator(4), dtype=torch.float64)
    method = Method(updates=1, steps=2, epsilon=0.125, lr=0.1, anneal=False, chains=6)
    learned = anatomy.learn(method, 6, data, f, generator(5))

    g = generator(5)
    chains = 2 * torch.rand(6, 2, generator=g, dtype=torch.float64) - 1
    positive = data[torch.randint(30, (6,), generator=g)]
    order = torch.randperm(6, generator=g)
    moved = anatomy.langevin(twin, method, chains[order], 2, g)[0].samples
    gap = twin(positive).mean() - twin(moved).mean()
    gap.backward()
    assert float(learned.energy_gap[0]) == pytest.approx(128 * float(gap.detach()), rel=1e-5)
    torch.testing.assert_close(learned.chains[order], moved)
    for after, before in zip(f.parameters(), twin.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.1 * before.grad)


def test_the_divergence_is_the_closed_form_of_two_gaussians() -> None:
    density = anatomy.GaussianMixture(torch.zeros(1, 2), 0.25 * torch.eye(2, dtype=torch.float64), torch.ones(1))
    found = planar.model_kl(density, gaussian(0.4), 200, "cpu")
    assert found.value == pytest.approx(0.25 / 0.4 - 1 - math.log(0.25 / 0.4), abs=1e-6)
    scaled = planar.model_kl(density, lambda x: gaussian(0.4)(x) + 7.0, 200, "cpu")
    assert scaled.value == pytest.approx(found.value, abs=1e-5)


def test_the_steady_state_has_the_moments_of_its_energy() -> None:
    x = planar.steady_state(gaussian(0.3), 40_000, 200, generator(6))
    np.testing.assert_allclose(np.cov(x.T.numpy()), 0.3 * np.eye(2), atol=0.01)
    assert float(x.mean(0).abs().max()) < 0.01


def test_spread_is_one_on_the_data_and_quadratic_in_the_scale() -> None:
    density = anatomy.ring(1.0, 0.1)
    x = density.sample(20_000, generator(7))
    assert anatomy.spread(density, x).value == pytest.approx(1.0, abs=0.02)
    centres = density.means[density.mode_of(x)]
    shrunk = (centres + 0.5 * (x - centres)).float()
    assert anatomy.spread(density, shrunk).value == pytest.approx(0.25, abs=0.01)


def test_long_runs_are_read_at_several_times_of_the_last_half() -> None:
    f = energy()
    short = torch.randn(8, 2, generator=generator(8), dtype=torch.float64)
    states = anatomy.long_run(f, METHOD, short, 16, generator(9))
    chain, _ = anatomy.langevin(f, METHOD, short[:2], 16, generator(9), record_every=1)
    assert chain.path is not None
    torch.testing.assert_close(states, torch.cat([chain.path[t] for t in (10, 12, 14, 16)]))


def test_the_experiment_at_tiny_settings() -> None:
    tiny = {"convergent_updates": 4, "nonconvergent_updates": 4, "samples": 80, "long_run": 16, "grid": 60}
    settings = {**anatomy.compare.settings("smoke"), **tiny}

    def new_run() -> Run:
        return Run(settings, Streams("anatomy-learning", "anatomy", 0), torch.device("cpu"))

    outcome, again = (anatomy.compare.measure(new_run()) for _ in range(2))
    values = {name: estimate.value for name, estimate in outcome.estimates.items()}
    assert all(math.isfinite(v) for v in values.values())
    assert values == {name: estimate.value for name, estimate in again.estimates.items()}
    claims = claims_of(PAPER).claims
    assert {m for c in claims for m in (c.measure, c.minus, c.over) if m} <= set(values)
    drawn = {plot.name for plot in outcome.plots}
    assert all(set(c.plots) <= drawn for c in claims)
