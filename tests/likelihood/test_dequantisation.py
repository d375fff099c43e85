"""The shared preprocessing is an exact change of variables, and on discrete data a bound."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replicate.likelihood.dequantisation import Affine, DequantisedGaussian, DequantisedLogit, Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import DataInfo, Family, Model

LEVELS = 5


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 4000) -> Tensor:
    """Two dependent dimensions with unequal level frequencies."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    a = torch.multinomial(p, n, True, generator=gen(1))
    b = torch.multinomial(p, n, True, generator=gen(2))
    return torch.stack([a, torch.where(torch.rand(n, generator=gen(3)) < 0.6, a, b)], 1).float()


def fitted(kind: type[DequantisedLogit] | type[DequantisedGaussian]) -> DequantisedLogit | DequantisedGaussian:
    transform = kind(2, LEVELS)
    transform.fit(data(), gen())
    return transform


@pytest.mark.parametrize("kind", [DequantisedLogit, DequantisedGaussian])
def test_inverse_returns_the_levels(kind: type[DequantisedLogit]) -> None:
    transform = fitted(kind)
    assert torch.equal(transform.inverse(transform(data(), gen(7))[0]), data())


@pytest.mark.parametrize("kind", [DequantisedLogit, DequantisedGaussian])
def test_log_determinant_is_that_of_the_inverse_map_by_finite_differences(kind: type[DequantisedLogit]) -> None:
    """Two noise draws of one example: dz / du along each dimension."""
    transform = fitted(kind).double()
    x = torch.full((2000, 2), 2.0, dtype=torch.float64)
    z, logdet = transform(x, gen(1))
    u = torch.rand(x.shape, generator=gen(1), dtype=torch.float64)
    order = u[:, 0].argsort()
    z0, u0 = z[order, 0], u[order, 0]
    numerical = ((z0[2:] - z0[:-2]) / (u0[2:] - u0[:-2])).log()
    # the determinant of both dimensions, minus the same for dimension 1 from its own sorted draws
    order1 = u[:, 1].argsort()
    z1, u1 = z[order1, 1], u[order1, 1]
    numerical1 = torch.empty(2000, dtype=torch.float64)
    numerical1[order1[1:-1]] = ((z1[2:] - z1[:-2]) / (u1[2:] - u1[:-2])).log()
    total = numerical + numerical1[order[1:-1]]
    ok = ~torch.isin(order[1:-1], torch.stack([order1[0], order1[-1]]))
    error = (total - logdet[order[1:-1]])[ok].abs()
    assert float(error.median()) < 1e-3


def test_gaussianised_marginals_are_standard_normal() -> None:
    z, _ = fitted(DequantisedGaussian)(data(50_000), gen(5))
    grid = torch.linspace(-2.5, 2.5, 11)
    empirical = (z[:, :, None] < grid).float().mean(0)
    assert float((empirical - torch.special.ndtr(grid)).abs().max()) < 0.02


class Uniform(Model):
    """The density of z under which y = (x + u) / L is uniform: log P(x) = -D log L exactly."""

    family: ClassVar[Family] = "flow"
    capabilities = frozenset({"log_prob"})

    def __init__(self, transform: DequantisedLogit | DequantisedGaussian) -> None:
        super().__init__()
        self.transform = transform

    def log_prob(self, z: Tensor) -> Tensor:
        assert isinstance(self.transform, DequantisedLogit)
        t = self.transform
        s = torch.sigmoid(z.double() * t.std.double() + t.mean.double())
        log_jacobian = t.std.double().log() + s.log() + (-s).log1p() - math.log(1 - 2 * t.alpha)
        return log_jacobian.sum(1).to(z.dtype)


def test_a_uniform_density_gives_exactly_the_uniform_mass() -> None:
    """Noise on half a bin would gain ln 2 a dimension here: the trap of a widely read textbook's code."""
    model = Preprocessed(Uniform(fitted(DequantisedLogit)), DataInfo(2, "levels", LEVELS), "logit")
    model.transform = fitted(DequantisedLogit)
    out = log_likelihood(model, data(200), Effort(dequantisation_draws=3), gen(2))
    torch.testing.assert_close(
        out.values, torch.full((200,), -2 * math.log(LEVELS), dtype=torch.float64), atol=2e-3, rtol=0
    )
    assert out.kind == "lower_bound"
    assert out.draws == 3


class Normal(Model):
    """Standard normal z."""

    family: ClassVar[Family] = "flow"
    capabilities = frozenset({"log_prob", "score", "sample"})

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 2, generator=generator)


@pytest.mark.parametrize("transform", ["logit", "gaussianise"])
def test_no_dequantised_model_beats_the_entropy_and_more_draws_tighten_the_bound(transform: str) -> None:
    """The bound, averaged over all states under the exact mass it defines, stays below the states' own frequencies."""
    model = Preprocessed(Normal(), DataInfo(2, "levels", LEVELS), transform)
    model.initialise(data(), gen())
    x = data()
    _, inverse, counts = x.unique(dim=0, return_inverse=True, return_counts=True)
    entropy = -float((counts[inverse] / len(x)).log().mean())
    nll = [float(-log_likelihood(model, x, Effort(dequantisation_draws=k), gen(4)).mean().value) for k in (1, 16)]
    assert nll[0] >= nll[1] - 1e-3
    assert nll[1] >= entropy


def test_independent_data_under_gaussianisation_have_their_marginal_entropy() -> None:
    x = data()
    x[:, 1] = x[torch.randperm(len(x), generator=gen(9)), 1]
    model = Preprocessed(Normal(), DataInfo(2, "levels", LEVELS), "gaussianise")
    model.initialise(x, gen())
    entropy = -sum(float((torch.bincount(c.long(), minlength=LEVELS) / len(x)).log()[c.long()].mean()) for c in x.T)
    nll = -log_likelihood(model, x, Effort(dequantisation_draws=1), gen(4)).mean().value
    assert nll == pytest.approx(entropy, abs=2e-3)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_affine_round_trip_and_log_determinant(dim: int, seed: int) -> None:
    transform = Affine(dim).double()
    x = torch.randn(50, dim, generator=gen(seed), dtype=torch.float64) * torch.rand(dim, generator=gen(seed)) * 9
    transform.fit(x, gen())
    z, logdet = transform(x)
    torch.testing.assert_close(transform.inverse(z), x)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v[None])[0][0], x[0])
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_affine_preprocessing_carries_log_p_and_score_over() -> None:
    x = torch.randn(300, 2, generator=gen(1)) * torch.tensor([3.0, 0.5]) + 4
    model = Preprocessed(Normal(), DataInfo(2, "continuous"))
    model.initialise(x, gen())
    exact = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), exact)
    torch.testing.assert_close(model.score(x), -(x - x.mean(0)) / x.var(0))


def test_levels_counted_some_rows_at_a_time_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(5, (70, 6), generator=torch.Generator().manual_seed(0)).float()
    counted = DequantisedGaussian(6, 5)
    monkeypatch.setattr("replicate.likelihood.dequantisation.ROWS", 16)
    counted.fit(x, torch.Generator())
    shares = torch.stack([((x == level).sum(0) + 0.5) / (70 + 2.5) for level in range(5)], 1).double()
    assert torch.allclose(counted.cdf[:, 1:], shares.cumsum(1), atol=1e-7)
