"""Annealed importance sampling and enumeration against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from replicate.likelihood.ais import ais, bracket, reverse_ais, schedule
from replicate.likelihood.enumeration import enumerate_log_z, log_sum_over_states, rbm_log_z, states
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import Model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianPath(Model):
    """f_beta(x) = N(x; 0, I)^(1 - beta) exp(-beta x^2 / (2 s^2)): Z_1 = (2 pi)^(D/2) s^D, moves are exact draws."""

    family = "ebm"
    capabilities = frozenset({"energy", "annealing", "sample"})

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale

    @property
    def exact(self) -> float:
        return self.dim * (0.5 * math.log(2 * math.pi) + math.log(self.scale))

    def _log_f(self, x: Tensor, beta: float) -> Tensor:
        base = -0.5 * x.square().sum(1) - self.dim / 2 * math.log(2 * math.pi)
        return (1 - beta) * base - beta * x.square().sum(1) / (2 * self.scale**2)

    def energy(self, x: Tensor) -> Tensor:
        return -self._log_f(x, 1.0)

    def base_log_z(self) -> float:
        return 0.0

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.dim, generator=generator, dtype=torch.float64)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.scale * self.base_sample(n, generator)

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        increment = self._log_f(x, beta_next) - self._log_f(x, beta)
        precision = 1 - beta_next + beta_next / self.scale**2
        return increment, self.base_sample(len(x), generator) / precision**0.5


class TestGaussianPath:
    model = GaussianPath(3, 2.5)

    @pytest.mark.parametrize("shape", ["linear", "sigmoidal"])
    def test_log_z_is_the_closed_form_within_its_own_error(self, shape: str) -> None:
        both = bracket(self.model, 2000, schedule(100, shape), seeded(0))
        for result in both:
            assert 0 < result.log_z.stderr < 0.02
            assert abs(result.log_z.value - self.model.exact) < 4 * result.log_z.stderr
        assert (both.forward.log_z.kind, both.reverse.log_z.kind) == ("lower_bound", "upper_bound")

    def test_stderr_is_the_spread_over_repeated_runs(self) -> None:
        generator = seeded(1)
        runs = [ais(self.model, 200, schedule(30), generator).log_z for _ in range(200)]
        spread = torch.tensor([r.value for r in runs]).std()
        claimed = torch.tensor([r.stderr for r in runs]).mean()
        assert 0.85 < float(spread / claimed) < 1.15  # the spread of 200 runs is itself known to 5 %

    def test_few_steps_are_low_forward_and_high_in_reverse(self) -> None:
        generator = seeded(2)
        pairs = [bracket(self.model, 5, schedule(4), generator) for _ in range(300)]
        low = torch.tensor([p.forward.log_z.value for p in pairs]) - self.model.exact
        high = torch.tensor([p.reverse.log_z.value for p in pairs]) - self.model.exact
        assert low.mean() < -3 * low.std() / 300**0.5
        assert high.mean() > 3 * high.std() / 300**0.5

    def test_mean_weight_is_unbiased_both_ways(self) -> None:
        start = self.model.sample(20000, seeded(3))
        forward = ais(self.model, 20000, schedule(10), seeded(4)).log_weights
        reverse = reverse_ais(self.model, start, schedule(10), seeded(5)).log_weights
        for weights, truth in ((forward, self.model.exact), (reverse, -self.model.exact)):
            ratio = (weights - truth).exp()
            assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20000**0.5

    def test_effective_sample_size(self) -> None:
        result = ais(self.model, 500, schedule(3), seeded(6))
        w = result.log_weights.exp()
        assert result.ess.value == pytest.approx(float(w.sum() ** 2 / w.square().sum()))

    def test_log_likelihood_is_the_gaussian(self) -> None:
        x = torch.randn(7, 3, generator=seeded(7), dtype=torch.float64)
        ll = log_likelihood(self.model, x, Effort(ais_chains=2000, ais_steps=100), seeded(8))
        exact = -self.model.energy(x) - self.model.exact
        assert ll.kind == "estimate"
        assert set(ll.details) == {"ais_log_z_forward", "ais_log_z_reverse", "ais_ess"}
        gap = ll.details["ais_log_z_reverse"].value - ll.details["ais_log_z_forward"].value
        assert ll.shared_stderr >= abs(gap) / 2
        assert torch.allclose(ll.values, exact, atol=4 * ll.shared_stderr, rtol=0)


class Drift(GaussianPath):
    """Increments of (beta' - beta) * 1000 exactly: what is summed is the schedule itself."""

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.full((len(x),), 1000 * (beta_next - beta), dtype=torch.float64), x


class TestPrecision:
    def test_ten_thousand_steps_add_up_in_float64(self) -> None:
        log_z = ais(Drift(1, 1.0), 2, schedule(10000), seeded(0)).log_z
        assert log_z.value == pytest.approx(1000, abs=1e-9)
        in_float32 = torch.zeros(())
        for step in schedule(10000).diff().tolist():
            in_float32 += 1000 * step
        assert abs(float(in_float32) - 1000) > 1e-3  # what the same sum would have lost

    def test_float32_temperatures_are_refused(self) -> None:
        with pytest.raises(ValueError, match="float64"):
            ais(Drift(1, 1.0), 2, schedule(10).float(), seeded(0))

    @pytest.mark.parametrize("values", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.7, 0.6, 1.0], [1.0]])
    def test_schedules_that_do_not_run_from_0_to_1_are_refused(self, values: list[float]) -> None:
        with pytest.raises(ValueError, match="increase from exactly 0"):
            ais(Drift(1, 1.0), 2, torch.tensor(values, dtype=torch.float64), seeded(0))

    @pytest.mark.parametrize("shape", ["linear", "sigmoidal"])
    def test_schedule_increases_from_0_to_1(self, shape: str) -> None:
        betas = schedule(1000, shape)
        assert betas.dtype == torch.float64
        assert len(betas) == 1001
        assert betas[0] == 0
        assert betas[-1] == 1
        assert (betas.diff() > 0).all()
        assert torch.allclose(betas + betas.flip(0), torch.ones(1001, dtype=torch.float64))


class TestEnumeration:
    def test_states_are_all_there_once(self) -> None:
        expected = list(itertools.product(range(3), repeat=4))
        assert [tuple(map(int, s)) for s in states(4, 3, 0, 81)] == expected

    @pytest.mark.parametrize("chunk", [7, 64, 2**16])
    def test_independent_units_factorise(self, chunk: int) -> None:
        bias = torch.randn(5, 3, generator=seeded(0), dtype=torch.float64)
        log_z = enumerate_log_z(
            lambda x: -bias.expand(len(x), -1, -1).gather(2, x.long()[..., None]).sum((1, 2)), 5, 3, chunk
        )
        assert log_z.value == pytest.approx(float(torch.logsumexp(bias, 1).sum()), abs=1e-12)
        assert log_z.kind == "exact"

    @pytest.mark.parametrize(("dim", "levels", "hidden"), [(3, 4, 9), (6, 3, 4), (8, 2, 10), (10, 2, 8)])
    def test_rbm_equals_the_sum_over_both_layers(self, dim: int, levels: int, hidden: int) -> None:
        g = seeded(1)
        w = torch.randn(dim, levels, hidden, generator=g, dtype=torch.float64)
        b = torch.randn(dim, levels, generator=g, dtype=torch.float64)
        c = torch.randn(hidden, generator=g, dtype=torch.float64)
        h = states(hidden, 2, 0, 2**hidden)

        def log_f(v: Tensor) -> Tensor:
            index = torch.arange(dim)
            pairs = w[index, v.long()].sum(1) @ h.T + h @ c  # (n, 2^H): the negated energy of every pair
            return b[index, v.long()].sum(1) + torch.logsumexp(pairs, 1)

        exact = log_sum_over_states(log_f, dim, levels, chunk=500)
        assert torch.allclose(rbm_log_z(w, b, c, chunk=50), exact, atol=1e-10)

    def test_too_many_states_are_refused(self) -> None:
        with pytest.raises(ValueError, match="too many"):
            enumerate_log_z(lambda x: x.sum(1), 64, 2)
