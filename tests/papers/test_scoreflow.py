"""ScoreFlow's bound and times against a Gaussian, where every term has a closed form, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.papers.scoreflow import PAPER, digits
from replicate.papers.scoreflow.digits import (
    ARMS,
    SAMPLED,
    DiscreteTime,
    ImportanceTime,
    ddpm_levels,
    objective_spread,
    objectives,
)
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.score_based.bound import mean_error, prior_divergence, variational_bound
from replicate.score_based.diffusion import UniformTime
from replicate.score_based.networks import NoiseNet
from replicate.sde import SDE, VE, VP, SubVP

SDES: dict[str, SDE] = {"ve": VE(0.01, 50.0), "vp": VP(t_min=1e-3), "subvp": SubVP(t_min=0.03)}


class Gaussian:
    """N(0, diag(v)) noised by an SDE, with a score that is off by a factor."""

    def __init__(self, sde: SDE, variance: Tensor, factor: float = 1.0) -> None:
        self.sde, self.variance, self.factor = sde, variance, factor

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        scale, std = (v[:, None] for v in self.sde.marginal(t))
        return -self.factor * x / (scale.square() * self.variance + std.square())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected_bound(model: Gaussian, x: Tensor) -> float:
    """The bound of one x (D,) with the expectation over z by hand and the integral over lambda by quadrature."""
    low, high = model.sde.log_ratio(torch.tensor([model.sde.t_min, 1.0], dtype=torch.float64)).tolist()
    prior = model.sde.prior_std**2
    scale, std = (float(v) for v in model.sde.marginal(torch.tensor([1.0], dtype=torch.float64)))
    total = 0.0
    for value, v in zip(x.tolist(), model.variance.tolist(), strict=True):

        def error(level: float, value: float = value, v: float = v) -> float:
            rho = math.exp(level)
            gain = model.factor * rho / (v + rho**2)  # eps = gain (x + rho z)
            return (gain * value) ** 2 + (gain * rho - 1) ** 2

        integral = quad(error, low, high, epsabs=1e-10, limit=200)[0]
        decoder = 0.5 * (math.log(2 * math.pi) + 2 * low) + 0.5 * error(low)
        mean_square = (scale * value) ** 2
        divergence = 0.5 * ((mean_square + std**2) / prior - 1 + math.log(prior / std**2))
        total -= integral + decoder + divergence
    return total


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("factor", [1.0, 0.8])
def test_the_bound_is_the_closed_form_s(name: str, factor: float) -> None:
    model = Gaussian(SDES[name], torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), factor)
    x = torch.tensor([0.7, -1.1, 2.0], dtype=torch.float64)
    values = variational_bound(model, x.expand(400, -1), 64, generator()).values
    stderr = float(values.std()) / 20
    assert stderr < 0.05
    assert float(values.mean()) == pytest.approx(expected_bound(model, x), abs=4 * stderr + 1e-6)


def test_the_exact_score_makes_the_bound_tight_and_another_does_not() -> None:
    variance = torch.tensor([0.5, 2.0], dtype=torch.float64)
    sde = VP(beta_max=60.0, t_min=1e-5)
    x = torch.randn(300, 2, generator=generator(), dtype=torch.float64) * variance.sqrt()
    log_p = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(x).sum(1)
    exact = variational_bound(Gaussian(sde, variance), x, 200, generator(1))
    assert exact.kind == "lower_bound"
    assert float((exact.values - log_p).mean()) == pytest.approx(0.0, abs=0.02)
    wrong = variational_bound(Gaussian(sde, variance, 0.8), x, 200, generator(1))
    assert float((wrong.values - log_p).mean()) < -0.1


def test_the_control_variate_is_exact_for_unit_data() -> None:
    """On N(0, I) the error at a level is known, (rho^2 |x|^2 + D) / (1 + rho^2)^2, and no noise is left in it."""
    model = Gaussian(SDES["vp"], torch.ones(4, dtype=torch.float64))
    x, level = torch.ones(6, 4, dtype=torch.float64), torch.linspace(-4, 3, 6, dtype=torch.float64)
    square = (2 * level).exp()
    expected = (square * 4 + 4) / (1 + square).square()
    for seed in range(2):
        torch.testing.assert_close(mean_error(model, x, level, generator(seed)), expected, rtol=1e-9, atol=1e-9)


def test_the_prior_term_is_torch_s_divergence() -> None:
    sde, x = SDES["vp"], torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    scale, std = (float(v) for v in sde.marginal(torch.tensor([1.0], dtype=torch.float64)))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(scale * x, std), normal(0.0, sde.prior_std)).sum(-1)
    torch.testing.assert_close(prior_divergence(sde, x), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SDES)
def test_uniform_times_have_the_density_that_they_claim(name: str) -> None:
    """Its integral over the levels is 1, and the share below a level is the time at which it is reached."""
    sde = SDES[name]
    times = UniformTime(sde)
    grid = torch.linspace(times.low, times.high, 20001, dtype=torch.float64)
    density = times.density(grid)
    share = torch.cumulative_trapezoid(density, grid)
    expected = (sde.time_of(grid[1:]) - sde.t_min) / (sde.t_max - sde.t_min)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-5)
    levels = times.sample(4000, generator())
    assert float(sde.time_of(levels).mean()) == pytest.approx((sde.t_min + 1) / 2, abs=0.02)


def test_importance_times_follow_g2_over_sigma2() -> None:
    """p(t) in proportion to g^2 / sigma^2 (section 4.3), by numerical integration of that ratio."""
    sde = SDES["vp"]
    levels = ImportanceTime(sde).sample(20000, generator())
    t = torch.logspace(-3, 0, 4001, dtype=torch.float64)
    rate = sde.diffusion(t).square() / sde.marginal(t)[1].square()
    share = torch.cumulative_trapezoid(rate, t)
    for at in (500, 2000, 3500):
        below = float((sde.time_of(levels) < t[at + 1]).double().mean())
        assert below == pytest.approx(float(share[at] / share[-1]), abs=0.015)


def test_ddpm_s_levels_lie_on_the_vp_sde() -> None:
    """beta_i = beta(i / 1000) / 1000 for beta from 0.1 to 20: the rest is of second order, sum beta_i^2 / 4 = 0.034."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(ddpm_levels()[50:], VP().log_ratio(t)[50:], rtol=0, atol=0.035)
    drawn = DiscreteTime(SDES["vp"]).sample(500, generator())
    assert torch.isin(drawn, ddpm_levels()).all()


def test_both_times_estimate_one_objective() -> None:
    """Likelihood-weighted means agree whatever the times; the model is the untrained Gaussian fit."""
    net = NoiseNet(3, hidden=8, depth=2)
    x = torch.randn(2000, 3, generator=generator())
    arm = ARMS["likelihood"]
    model = arm.on(net, 3, 4).eval()
    model.initialise(x, generator())
    found = objective_spread(model, x, 10, generator(1))
    a, b = found["objective_mean:likelihood"], found["objective_mean:importance"]
    assert abs(a.value - b.value) < 4 * math.hypot(a.stderr, b.stderr)
    integrand = variational_bound(model, x, 64, generator()).values
    decoder = 1.5 * (math.log(2 * math.pi) + 2 * UniformTime(arm.sde).low) + 1.5
    expected = -float((integrand + prior_divergence(arm.sde, x)).mean()) - decoder
    assert b.value == pytest.approx(expected, abs=4 * b.stderr + 0.01)


def test_the_arms_objectives_are_the_paper_s() -> None:
    """A network that answers 0 errs by |z|^2 = D: D when unweighted, and D times the range of lambda when weighted."""
    for name, arm in ARMS.items():
        net = NoiseNet(5, hidden=4, depth=1)
        net.gaussian.variance.fill_(1e12)  # so wide a fit predicts no noise
        model = arm.on(net, 5, 4).eval()
        low, high = arm.sde.log_ratio(torch.tensor([arm.sde.t_min, 1.0], dtype=torch.float64)).tolist()
        expected = 5.0 * (high - low if name in ("likelihood", "importance") else 1.0)
        loss = torch.stack([model.loss(torch.zeros(4000, 5), generator(i)).detach() for i in range(10)])
        assert float(loss.mean()) == pytest.approx(expected, rel=0.05), name


def outcome() -> Outcome:
    run = Run(objectives.settings("smoke"), Streams(objectives.name, PAPER.key, 0), torch.device("cpu"))
    return objectives.measure(run)


def test_the_experiment_runs_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm's numbers are its own: they come out again, bit by bit, without the arms beside it."""
    found = outcome()
    first = {name: e.value for name, e in found.estimates.items()}
    assert {line.label for line in found.plots[0].lines} == {"likelihood", "importance", "discrete"}
    found.plots[0].as_dict()
    assert all(math.isfinite(v) for v in first.values())
    assert len({first[f"nll:{name}"] for name in ARMS}) == len(ARMS)
    monkeypatch.setattr(digits, "ARMS", {name: ARMS[name] for name in SAMPLED})
    again = outcome().estimates
    assert {name: e.value for name, e in again.items()} == {name: first[name] for name in again}


def test_claims_read_and_name_what_the_experiment_measures() -> None:
    claims = claims_of(PAPER).claims
    assert {c.id for c in claims if c.profile == "standard"} == {
        "F1-nll-weighting",
        "F1-nll-importance",
        "F1-nll-both",
        "F1-samples-weighting",
        "F1-samples-both",
        "F1-variance",
    }
    measured = {f"nll:{arm}" for arm in ARMS} | {f"frechet:{arm}" for arm in SAMPLED}
    measured |= {"objective_sd:likelihood", "objective_sd:importance"}
    named = {m for c in claims if c.experiment == objectives.name for m in (c.measure, c.minus, c.over) if m}
    assert named <= measured
    assert all(c.needs for c in claims if not c.experiment)
