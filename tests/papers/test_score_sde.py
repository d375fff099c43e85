"""score SDE's experiments against closed forms: mixtures by autograd and Monte Carlo, the flow of one Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.metrics.quality import frechet
from replicate.papers.score_sde import PAPER, samplers
from replicate.papers.score_sde.samplers import (
    SAMPLERS,
    MixtureDiffusion,
    adaptive_flow,
    exact_mixture,
    identities,
    measure_flow_errors,
    measure_variances,
    mixture_distance,
    on_sde,
    sample,
    trained_digits,
)
from replicate.papers.scoreflow.digits import ARMS
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.score_based.networks import NoiseNet
from replicate.sde import SDE, VE, VP, SubVP
from replicate.tasks.densities import GaussianMixture, mixture

CPU = torch.device("cpu")
SDES: dict[str, SDE] = {"ve": VE(0.01, 50.0), "vp": VP(t_min=1e-3), "subvp": SubVP(t_min=0.03)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_run(experiment: Experiment) -> Run:
    return Run(experiment.settings("smoke"), Streams(experiment.name, PAPER.key, 0), CPU)


def outcome(experiment: Experiment) -> Outcome:
    found = experiment.measure(new_run(experiment))
    assert all(math.isfinite(e.value) for e in found.estimates.values())
    for plot in found.plots:
        plot.as_dict()
    return found


@pytest.mark.parametrize("name", SDES)
def test_the_noised_mixture_is_the_suite_s_mixture_with_other_parameters(name: str) -> None:
    """At every time log p and score are those of a GaussianMixture with means s mu, covariance s^2 Sigma + sigma^2."""
    truth, sde = mixture(3), SDES[name]
    noised = MixtureDiffusion(truth, sde, CPU)
    x = 2 * torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    for time in (max(sde.t_min, 1e-3), 0.2, 0.9):
        t = torch.full((20,), time, dtype=torch.float64)
        scale, std = (float(v[0]) for v in sde.marginal(t))
        covariance = scale**2 * truth.covariance + std**2 * torch.eye(3, dtype=torch.float64)
        other = GaussianMixture(scale * truth.means, covariance, truth.weights)
        torch.testing.assert_close(noised.log_prob_at(x, t), other.log_prob(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(noised.score_at(x, t), other.score(x), rtol=1e-8, atol=1e-8)
        point = x.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(noised.log_prob_at(point, t).sum(), point)
        torch.testing.assert_close(noised.score_at(x, t), grad, rtol=1e-8, atol=1e-8)


def test_rows_may_have_times_of_their_own() -> None:
    noised = MixtureDiffusion(mixture(2), SDES["vp"], CPU)
    x, t = torch.randn(3, 2, generator=generator()).double(), torch.tensor([0.1, 0.5, 0.9]).double()
    one_by_one = torch.cat([noised.score_at(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(noised.score_at(x, t), one_by_one)


def test_the_mixture_distance_is_frechet_s_and_small_for_the_truth() -> None:
    truth = mixture(4)
    x = truth.sample(20000, generator()).double()
    found = mixture_distance(truth, x)
    assert found.value < 3 * (4 / 20000 + 20 / 160000) + 3 * found.stderr
    wide = truth.means[truth.mode_of(x)] + 1.1 * (x - truth.means[truth.mode_of(x)])
    assert mixture_distance(truth, wide).value == pytest.approx(4 * 0.01, rel=0.1)
    residual = torch.linalg.solve(truth.factor, (wide - truth.means[truth.mode_of(wide)]).T).T
    normal = torch.randn(200000, 4, generator=generator(1), dtype=torch.float64)
    assert mixture_distance(truth, wide).value == pytest.approx(frechet(residual, normal).value, abs=2e-3)


def test_the_distance_s_error_is_its_spread() -> None:
    truth = mixture(3)
    values, errors = [], []
    for seed in range(40):
        x = truth.sample(2000, generator(seed)).double()
        centre = truth.means[truth.mode_of(x)]
        found = mixture_distance(truth, centre + 1.2 * (x - centre) + 0.1)
        values.append(found.value)
        errors.append(found.stderr)
    assert np.std(values, ddof=1) == pytest.approx(np.mean(errors), rel=0.35)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_use_equal_numbers_of_evaluations(name: str) -> None:
    calls = 0
    noised = MixtureDiffusion(mixture(2), SDES["vp"], CPU)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return noised.score_at(x, t)

    x = sample(name, counted, SDES["vp"], 5, dim=2, nfe=40, snr=0.16, generator=generator())
    assert x.shape == (5, 2)
    assert calls == 40 + 1  # and the denoising step


@pytest.mark.parametrize("name", SDES)
def test_the_adaptive_flow_of_one_gaussian_is_a_scaling(name: str) -> None:
    """From N(0, s^2 v + sigma^2) to itself at t_min: every point is scaled by the ratio of standard deviations."""
    sde, v = SDES[name], 0.7
    gaussian = GaussianMixture(torch.zeros(1, 2), v * torch.eye(2), torch.ones(1))
    noised = MixtureDiffusion(gaussian, sde, CPU)
    x = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    ends = torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    scale, std = sde.marginal(ends)
    deviation = (scale.square() * v + std.square()).sqrt()
    answer, nfe = adaptive_flow(noised.score_at, sde, sde.prior_std * x, 1e-8)
    torch.testing.assert_close(answer, sde.prior_std * x * deviation[0] / deviation[1], rtol=1e-5, atol=1e-6)
    _, fewer = adaptive_flow(noised.score_at, sde, sde.prior_std * x, 1e-3)
    assert fewer < nfe


def test_one_network_serves_every_sde() -> None:
    """y = x / s and log(sigma / s) are all that the network sees: at one noise level the scores agree."""
    arm = ARMS["plain"]
    net = NoiseNet(3, hidden=8, depth=2)
    torch.nn.init.normal_(net.last.weight, generator=generator())
    vp = arm.on(net, 3, 4).eval()
    ve = on_sde(vp, VE(0.0106, 50.0))
    y, level = torch.randn(4, 3, generator=generator()), torch.tensor([-0.5])
    noise = []
    for model in (vp, ve):
        t = model.sde.time_of(level).expand(4)
        scale, std = (v[:, None] for v in model.sde.marginal(t))
        noise.append(-std * model.score_at(scale * y, t))
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-4, atol=1e-5)


def test_the_identities_hold_at_full_size() -> None:
    run = new_run(identities)
    measure_variances(run, 101)
    found = run.estimates
    assert found["variance_excess"].value <= 0
    for name in ("square_error", "variance_error:vp", "variance_error:subvp"):
        assert found[name].value < 1e-9


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the standard deviation of sub-VP taken for its variance."""

    class Wrong(SubVP):
        def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
            scale, std = super().marginal(t)
            return scale, std.sqrt()

    monkeypatch.setattr(samplers, "SubVP", Wrong)
    run = new_run(identities)
    measure_variances(run, 51)
    assert run.estimates["variance_error:subvp"].value > 0.1


def test_a_wrong_score_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a score 2 % too large."""
    right = MixtureDiffusion.score_at

    def wrong(self: MixtureDiffusion, x: Tensor, t: Tensor) -> Tensor:
        return 1.02 * right(self, x, t)

    run = new_run(identities)
    measure_flow_errors(run, 3, 40)
    assert run.estimates["log_prob_error:vp"].value < 1e-2
    monkeypatch.setattr(MixtureDiffusion, "score_at", wrong)
    measure_flow_errors(run, 3, 40)
    assert run.estimates["log_prob_error:vp"].value > 2e-2


@pytest.mark.parametrize("experiment", [exact_mixture, trained_digits, identities], ids=lambda e: e.name)
def test_experiments_run_and_measure_what_claims_name(experiment: Experiment) -> None:
    found = outcome(experiment)
    drawn = {plot.name for plot in found.plots}
    for claim in claims_of(PAPER).claims:
        if claim.experiment == experiment.name:
            named = {m for m in (claim.measure, claim.minus, claim.over) if m}
            assert named <= set(found.estimates), claim.id
            assert set(claim.plots) <= drawn, claim.id


def test_claims_read() -> None:
    claims = {c.id: c for c in claims_of(PAPER).claims}
    assert {"D1-ve-pc-exact", "D1-ve-c", "D2-elbo", "D2-subvp", "D2-discrete", "D3-tenth", "sub-vp-square"} <= set(
        claims
    )
    assert all(c.needs for c in claims.values() if c.id.startswith(("cifar10", "D2-cifar10", "D1-cifar10")))
    assert claims["D3-count"].not_comparable
