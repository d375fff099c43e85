"""The probability-flow likelihood against densities whose log p is known at every time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.ode import flow, ode_log_prob, score_and_divergence
from replicate.model import DataInfo, Model
from replicate.score_based import entries
from replicate.sde import SDE, VE, VP, SubVP

# horizons at which data of unit scale are forgotten to 1e-6, so that what is measured is the solver
SDES = {"ve": VE(0.01, 1e6), "vp": VP(beta_max=60.0), "subvp": SubVP(beta_max=60.0)}


class MixtureDiffusion(Model):
    """The exact scores of a Gaussian mixture, equal weights, diffused by an SDE."""

    family = "score"
    capabilities = frozenset({"diffusion"})

    def __init__(self, sde: SDE, means: Tensor, std: float) -> None:
        super().__init__()
        self.sde, self.means, self.std = sde, means, std

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), shape (n,)."""
        scale, std = self.sde.marginal(t)
        variance = scale.square() * self.std**2 + std.square()
        square = (x[:, None] - scale[:, None, None] * self.means).square().sum(-1)
        normal = -0.5 * square / variance[:, None] - 0.5 * x.shape[1] * (2 * math.pi * variance[:, None]).log()
        return normal.logsumexp(1) - math.log(len(self.means))

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(self.log_density(x, t).sum(), x, create_graph=True)
        return grad


def model(name: str = "vp", dim: int = 2) -> MixtureDiffusion:
    means = 1.2 * torch.randn(3, dim, generator=generator(7), dtype=torch.float64)
    return MixtureDiffusion(SDES[name], means, 0.3)


def data(n: int = 12, dim: int = 2) -> Tensor:
    means = model(dim=dim).means
    noise = torch.randn(n, dim, generator=generator(), dtype=torch.float64)
    return means[torch.arange(n) % len(means)] + 0.6 * noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def truth(exact: MixtureDiffusion, x: Tensor) -> Tensor:
    """log density of the data under the noise of t_min."""
    t = torch.full_like(x[:, 0], exact.sde.t_min)
    scale, _ = exact.sde.marginal(t)
    return exact.log_density(scale[:, None] * x, t) + x.shape[1] * scale.log()


@pytest.mark.parametrize("name", SDES)
def test_exact_scores_give_the_exact_log_p(name: str) -> None:
    exact, x = model(name), data()
    answer = ode_log_prob(exact, x, generator(), steps=100)
    assert answer.kind == "estimate"
    assert answer.draws == 1
    torch.testing.assert_close(answer.values, truth(exact, x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SDES)
def test_the_flow_is_that_of_the_sde(name: str) -> None:
    """dx/dt = f x - g^2 score / 2, turned into the solver's coordinates by finite differences of the kernel."""
    exact = model(name)
    sde, w = exact.sde, data(4)
    for level in (-2.0, 0.0, 1.5):
        h = 1e-4

        def size(level: float) -> tuple[float, float]:
            t = sde.time_of(torch.tensor([level], dtype=torch.float64))
            scale, std = sde.marginal(t)
            return float(t), float(torch.hypot(scale, std))

        (t, c), (t_up, c_up), (t_down, c_down) = size(level), size(level + h), size(level - h)
        dt, dc = (t_up - t_down) / (2 * h), (c_up - c_down) / (2 * h)
        times = torch.full_like(w[:, 0], t)
        x = c * w
        dx = sde.drift(x, times) - 0.5 * sde.diffusion(times)[:, None] ** 2 * exact.score_at(x, times)
        expected = dx * dt / c - w * dc / c  # w = x / c
        torch.testing.assert_close(flow(exact, w, level, None)[0], expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_divergence_of_the_flow_is_the_trace_of_its_jacobian() -> None:
    exact, w = model(), data(3)
    _, divergence = flow(exact, w, -0.5, None)
    for row, value in zip(w, divergence, strict=True):
        columns = []
        for i in range(2):
            step = 1e-5 * torch.eye(2, dtype=torch.float64)[i]
            up, down = (flow(exact, (row + s)[None], -0.5, None)[0][0] for s in (step, -step))
            columns.append((up - down)[i] / 2e-5)
        assert float(value) == pytest.approx(float(sum(columns)), rel=1e-6, abs=1e-8)


def test_the_density_integrates_to_one() -> None:
    edge = torch.linspace(-4, 4, 49, dtype=torch.float64)
    answer = ode_log_prob(model(), torch.cartesian_prod(edge, edge), generator(), steps=24)
    assert float(answer.values.exp().sum() * (edge[1] - edge[0]) ** 2) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("steps", [12, 24, 48])
def test_the_stated_solver_error_covers_the_truth(steps: int) -> None:
    exact, x = model(), data(40)
    answer = ode_log_prob(exact, x, generator(), steps=steps)
    actual = float((answer.values - truth(exact, x)).abs().mean())
    stated = answer.details["solver_error"]
    assert stated.unit == "nats"
    assert actual < stated.value + 1e-6
    assert stated.value < 0.5


def test_steps_are_counted_and_odd_ones_refused() -> None:
    answer = ode_log_prob(model(), data(2), generator(), steps=10)
    assert answer.details["nfe_likelihood"].value == 40
    for steps in (0, 7):
        with pytest.raises(ValueError, match="even"):
            ode_log_prob(model(), data(2), generator(), steps=steps)


def test_hutchinson_trace_is_unbiased() -> None:
    """Over all sign vectors the estimate's mean is the exact trace, at a point and through a solution's first order."""
    field = model(dim=3)
    x = data(2, 3)
    t = torch.full_like(x[:, 0], 0.2)
    _, exact = score_and_divergence(lambda v: field.score_at(v, t), x, None)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    probes = signs[:, None].expand(-1, 2, -1)
    _, mean = score_and_divergence(lambda v: field.score_at(v, t), x, probes)
    torch.testing.assert_close(mean, exact)
    _, one = score_and_divergence(lambda v: field.score_at(v, t), x, probes[:1])
    assert (one - exact).abs().max() > 1e-3


def test_hutchinson_likelihood_is_unbiased() -> None:
    """The fixed probe enters log p linearly and never the path, so that the answer is unbiased for the exact one."""
    exact_model, x = model(dim=3), data(1, 3).expand(4000, -1)
    exact = ode_log_prob(exact_model, x[:1], generator(), steps=10, trace="exact").values
    answer = ode_log_prob(exact_model, x, generator(1), steps=10, trace="hutchinson", probes=2)
    assert answer.draws == 2
    mean = answer.mean()
    assert mean.stderr > 0
    assert abs(mean.value - float(exact)) < 4 * mean.stderr


def test_high_dimension_uses_probes_by_default() -> None:
    answer = ode_log_prob(model(dim=17), data(2, 17), generator(), steps=4, probes=3)
    assert answer.draws == 3


def test_an_example_does_not_depend_on_the_rest_of_its_batch() -> None:
    exact, x = model(), data(9)
    together = ode_log_prob(exact, x, generator(), steps=10).values
    far = torch.cat([x[:1], 1000 * x[1:]])
    torch.testing.assert_close(ode_log_prob(exact, x[:1], generator(), steps=10).values, together[:1])
    torch.testing.assert_close(ode_log_prob(exact, far, generator(), steps=10).values[:1], together[:1])


def test_a_gaussian_fit_is_exact_through_the_whole_stack() -> None:
    """Untrained, sde-* is the data's Gaussian fit; behind `Preprocessed` its log p is that Gaussian's."""
    info = DataInfo(2, "continuous")
    x = 3 + torch.randn(400, 2, generator=generator()) @ torch.tensor([[2.0, 0.7], [0.0, 0.5]])
    expected = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x)
    for entry in (entries.SDE_VP, entries.SDE_VE, entries.SDE_SUBVP):
        wrapped = Preprocessed(entry.build(info, **entry.params), info).eval()
        wrapped.initialise(x, generator())
        values = ode_log_prob(wrapped, x, generator(), steps=12).values
        torch.testing.assert_close(values, expected, rtol=0, atol=0.03)
        assert all(p.requires_grad for p in wrapped.parameters())
        assert all(p.grad is None for p in wrapped.parameters())
