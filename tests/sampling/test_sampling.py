"""Langevin, predictor-corrector and probability-flow samplers against closed forms on Gaussians and mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import Chain, langevin_step, mala, ula
from replicate.sampling.predictor_corrector import (
    Corrector,
    corrector_step,
    predictor_corrector,
    reverse_sde,
    time_grid,
    transition,
)
from replicate.sampling.probability_flow import probability_flow
from replicate.sde import SDE, VE, VP, SubVP

torch.set_num_threads(1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(s: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Unnormalised log density and score of N(0, s^2 I)."""
    return (lambda x: -0.5 * (x / s).square().sum(-1)), (lambda x: -x / s**2)


def variance_error(x: Tensor, expected: float) -> float:
    """(variance of all entries - expected) in standard errors, for independent Gaussian entries of mean 0."""
    return (float(x.double().square().mean()) / expected - 1) * math.sqrt(x.numel() / 2)


# -- one convention


def test_a_step_has_drift_eps_over_two_t_and_noise_root_eps() -> None:
    x, score, noise = (torch.randn(5, 3, generator=rng(i)) for i in range(3))
    step = langevin_step(x, score, 0.25, noise, temperature=2.0)
    torch.testing.assert_close(step, x + 0.0625 * score + 0.5 * noise)


@pytest.mark.parametrize("eps", [0.5, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ula_has_the_variance_that_discretisation_predicts(eps: float, temperature: float) -> None:
    s = 1.3
    _, score = gaussian(s)
    x = ula(score, torch.zeros(40_000, 2), 60, eps, rng(), temperature).samples
    target = temperature * s**2
    biased = target / (1 - eps / (4 * target))
    assert abs(variance_error(x, biased)) < 4
    assert abs(variance_error(x, target)) > 6  # the test can tell the bias from none


def test_ula_leaves_its_own_stationary_law_alone_at_every_step() -> None:
    s, eps = 1.0, 1.0
    _, score = gaussian(s)
    start = math.sqrt(1 / (1 - eps / 4)) * torch.randn(40_000, 1, generator=rng(1))
    path = ula(score, start, 3, eps, rng(2), record_every=1).path
    assert path is not None
    assert all(abs(variance_error(state, 4 / 3)) < 4 for state in path)


# -- MALA


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_mala_has_no_bias_at_a_step_size_where_ula_has(temperature: float) -> None:
    log_p, score = gaussian(1.3)
    chain = mala(log_p, score, torch.zeros(20_000, 2), 60, 2.0, rng(), temperature)
    assert abs(variance_error(chain.samples, temperature * 1.69)) < 4
    assert chain.acceptance is not None
    assert 0.3 < chain.acceptance < 0.99


def bimodal(x: Tensor) -> Tensor:
    """Unnormalised 1-D mixture of N(-1, 0.5^2) and N(1.5, 1), with a density of no symmetry."""
    x = x.squeeze(-1)
    return torch.logaddexp(math.log(0.3 / 0.5) - 0.5 * ((x + 1) / 0.5) ** 2, math.log(0.7) - 0.5 * (x - 1.5) ** 2)


def bimodal_score(x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(bimodal(x).sum(), x)[0]


def bimodal_sample(n: int, generator: torch.Generator) -> Tensor:
    left = torch.rand(n, 1, generator=generator) < 0.3
    z = torch.randn(n, 1, generator=generator)
    return torch.where(left, -1 + 0.5 * z, 1.5 + z)


def test_mala_is_in_detailed_balance() -> None:
    """From a stationary start, moves A -> B are as frequent as B -> A, for every pair of intervals."""
    start = bimodal_sample(200_000, rng(3))
    end = mala(bimodal, bimodal_score, start, 1, 1.5, rng(4)).samples
    edges = torch.tensor([-1.2, -0.5, 0.5, 1.5])
    a, b = (torch.bucketize(v.flatten(), edges) for v in (start, end))
    flow = torch.bincount(5 * a + b, minlength=25).reshape(5, 5).double()
    pairs = torch.triu_indices(5, 5, 1)
    there, back = flow[pairs[0], pairs[1]], flow[pairs[1], pairs[0]]
    z = (there - back) / (there + back).clamp_min(1).sqrt()
    assert float((there + back).sum()) > 20_000
    assert float(z.abs().max()) < 4


def test_one_unadjusted_step_breaks_the_balance_that_one_adjusted_step_keeps() -> None:
    start = bimodal_sample(200_000, rng(3))
    exact_mean = 0.3 * -1 + 0.7 * 1.5
    second = 0.3 * (1 + 0.25) + 0.7 * (2.25 + 1)
    stderr = start.square().std().item() / math.sqrt(len(start))
    adjusted = mala(bimodal, bimodal_score, start, 1, 1.5, rng(4)).samples
    unadjusted = ula(bimodal_score, start, 1, 1.5, rng(4)).samples
    assert abs(adjusted.mean().item() - exact_mean) < 4 * start.std().item() / math.sqrt(len(start))
    assert abs(adjusted.square().mean().item() - second) < 4 * stderr
    assert abs(unadjusted.square().mean().item() - second) > 20 * stderr


def test_a_wrong_score_costs_mala_acceptance_and_not_correctness() -> None:
    log_p, _ = gaussian(1.0)
    wrong = lambda x: 0.5 - 2 * x  # noqa: E731
    chain = mala(log_p, wrong, torch.zeros(20_000, 1), 150, 0.5, rng())
    assert abs(variance_error(chain.samples, 1.0)) < 4
    assert abs(chain.samples.mean().item()) < 4 / math.sqrt(20_000)


def test_mala_rejects_proposals_of_density_nan() -> None:
    log_p = lambda x: torch.where(x > 0, -x, math.nan).squeeze(-1)  # noqa: E731
    x = mala(log_p, lambda x: -torch.ones_like(x), torch.ones(4000, 1), 200, 1.0, rng()).samples
    assert bool((x > 0).all())
    assert x.mean().item() == pytest.approx(1.0, abs=5 / math.sqrt(4000))  # the exponential distribution's


# -- what chains record, and where their randomness comes from


def test_a_chain_records_its_path_from_the_start_and_counts_evaluations() -> None:
    log_p, score = gaussian(1.0)
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return score(x)

    start = torch.ones(3, 2)
    chain = ula(counted, start, 10, 0.1, rng(), record_every=5)
    assert chain.nfe == calls == 10
    assert chain.acceptance is None
    assert chain.path is not None
    assert chain.path.shape == (3, 3, 2)
    assert torch.equal(chain.path[0], start)
    assert torch.equal(chain.path[-1], chain.samples)
    calls = 0
    assert mala(log_p, counted, start, 10, 0.1, rng()).nfe == calls == 11
    assert torch.equal(start, torch.ones(3, 2))


def every_sampler() -> dict[str, Callable[[torch.Generator], Chain]]:
    log_p, score = gaussian(1.0)
    noisy = lambda x, sigma: -x / (1 + sigma.square())[:, None]  # noqa: E731
    x, sde = torch.zeros(50, 2), VP()
    at = diffused_gaussian(sde, 1.0)
    return {
        "ula": lambda g: ula(score, x, 5, 0.1, g),
        "mala": lambda g: mala(log_p, score, x, 5, 0.1, g),
        "annealed": lambda g: annealed_langevin(noisy, torch.tensor([2.0, 1.0]), x, 3, 0.1, g, denoise=True),
        "predictor-corrector": lambda g: predictor_corrector(at, sde, (50, 2), 5, Corrector(1, 0.1), g),
        "probability flow": lambda g: probability_flow(at, sde, 50, 2, 5, g),
    }


def diffused_gaussian(sde: SDE, s: float, mean: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Score of N(mean, s^2 I) carried to time t."""

    def score_at(x: Tensor, t: Tensor) -> Tensor:
        scale, std = (v[:, None] for v in sde.marginal(t))
        return (scale * mean - x) / ((scale * s).square() + std.square())

    return score_at


@pytest.mark.parametrize("name", ["ula", "mala", "annealed", "predictor-corrector", "probability flow"])
def test_the_generator_alone_decides_the_samples(name: str) -> None:
    sampler = every_sampler()[name]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler(rng(7)).samples
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sampler(rng(7)).samples, first)
    assert not torch.equal(sampler(rng(8)).samples, first)


@pytest.mark.parametrize(("steps", "eps", "temperature"), [(-1, 0.1, 1.0), (1, 0.0, 1.0), (1, 0.1, 0.0)])
def test_settings_out_of_range_are_refused(steps: int, eps: float, temperature: float) -> None:
    with pytest.raises(ValueError, match="needs steps >= 0"):
        ula(gaussian(1.0)[1], torch.zeros(1, 1), steps, eps, rng(), temperature)


# -- annealed Langevin dynamics


def annealed_variance(s: float, sigmas: list[float], steps: int, eps: float, start: float, denoise: bool) -> float:
    """Variance that the linear recursion of annealed Langevin on N(0, s^2) has exactly."""
    variance = start
    for sigma in sigmas:
        alpha = eps * sigma**2 / sigmas[-1] ** 2
        decay = 1 - alpha / (2 * (s**2 + sigma**2))
        for _ in range(steps):
            variance = decay**2 * variance + alpha
    shrink = 1 - sigmas[-1] ** 2 / (s**2 + sigmas[-1] ** 2)
    return variance * shrink**2 if denoise else variance


@pytest.mark.parametrize("denoise", [False, True])
def test_annealed_langevin_follows_its_recursion_on_a_gaussian(denoise: bool) -> None:
    s, sigmas = 0.8, [4.0, 2.0, 1.0, 0.5]
    score_at = lambda x, sigma: -x / (s**2 + sigma.square())[:, None]  # noqa: E731
    start = 3 * torch.randn(20_000, 2, generator=rng(1))
    chain = annealed_langevin(score_at, torch.tensor(sigmas), start, 3, 0.1, rng(2), denoise)
    assert abs(variance_error(chain.samples, annealed_variance(s, sigmas, 3, 0.1, 9.0, denoise))) < 4
    assert abs(variance_error(chain.samples, annealed_variance(s, sigmas, 3, 0.1, 9.0, not denoise))) > 20
    assert chain.nfe == 12 + int(denoise)


def test_annealed_langevin_finds_mode_weights_that_plain_langevin_does_not() -> None:
    """Modes 1/5 and 4/5 at -5 and 5: a plain chain keeps the weights of its start (Song and Ermon 2019, Sec. 3.2)."""

    def score_at(x: Tensor, sigma: Tensor) -> Tensor:
        variance = 1 + sigma.square()[:, None]
        log_w = torch.tensor([0.2, 0.8]).log()
        r = torch.softmax(log_w - 0.5 * (x - torch.tensor([-5.0, 5.0])) ** 2 / variance, -1)
        return (r @ torch.tensor([[-5.0], [5.0]]) - x) / variance

    start = 16 * torch.rand(4000, 1, generator=rng(1)) - 8
    sigmas = torch.logspace(math.log10(20), math.log10(0.5), 20)
    annealed = annealed_langevin(score_at, sigmas, start, 50, 0.05, rng(2), denoise=False).samples
    plain = ula(lambda x: score_at(x, torch.zeros(len(x))), start, 500, 0.05, rng(3)).samples
    assert (annealed > 0).float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert (plain > 0).float().mean().item() < 0.65


@pytest.mark.parametrize("sigmas", [[], [1.0, 2.0], [1.0, 0.0]])
def test_noise_levels_that_do_not_decrease_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="positive and decreasing"):
        annealed_langevin(lambda x, s: -x, torch.tensor(sigmas), torch.zeros(1, 1), 1, 0.1, rng(), denoise=False)


# -- samplers of SDEs

SDES: dict[str, SDE] = {"VE": VE(1e-2, 20.0), "VP": VP(), "sub-VP": SubVP()}
sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


@sdes
def test_the_grid_goes_from_t_max_to_t_min_evenly_in_the_root_of_noise(sde: SDE) -> None:
    times = time_grid(sde, 12, torch.device("cpu"))
    assert (float(times[0]), float(times[-1])) == (sde.t_max, sde.t_min)
    assert bool((times.diff() < 0).all())
    scale, std = sde.marginal(times)
    steps = (std / scale).pow(1 / 7).diff()
    torch.testing.assert_close(steps, steps.mean().expand(12), rtol=1e-6, atol=0)


@sdes
def test_transitions_compose_to_the_marginals(sde: SDE) -> None:
    """N(m_min x, std_min^2) pushed through every transition kernel is N(m_max x, std_max^2)."""
    times = time_grid(sde, 9, torch.device("cpu"))
    scale, std = sde.marginal(times)
    m, variance = scale[-1], std[-1].square()
    # kernels are stated forwards in time between neighbours of the descending grid
    ratio, added = transition(sde, times)
    for r, v in zip(ratio.flip(0), added.flip(0), strict=True):
        m, variance = r * m, r.square() * variance + v
    torch.testing.assert_close(m, scale[0])
    torch.testing.assert_close(variance, std[0].square())


def test_the_predictor_is_the_printed_update_on_ve_and_vp() -> None:
    times = torch.tensor([0.5, 0.4], dtype=torch.float64)
    ve, vp = VE(1e-2, 20.0), VP()
    ratio, variance = transition(ve, times)
    _, std = ve.marginal(times)
    assert (float(ratio), float(variance)) == pytest.approx((1.0, float(std[0] ** 2 - std[1] ** 2)))
    ratio, variance = transition(vp, times)
    beta = 1 - math.exp(float(vp.beta_integral(times[1]) - vp.beta_integral(times[0])))
    assert (float(ratio), float(variance)) == pytest.approx((math.sqrt(1 - beta), beta))


def predictor_std(sde: SDE, s: float, steps: int) -> float:
    """Standard deviation that the predictor's linear recursion, ended by Tweedie's mean, has on N(0, s^2)."""
    times = time_grid(sde, steps, torch.device("cpu"))
    scale, std = sde.marginal(times)
    ratio, variance = transition(sde, times)
    total = (scale * s).square() + std.square()
    now = torch.tensor(sde.prior_std**2, dtype=torch.float64)
    for i in range(steps):
        now = (2 - ratio[i] - variance[i] / total[i]).square() * now + variance[i]
    return float(now.sqrt() * scale[-1] * s**2 / total[-1])


@sdes
def test_the_predictor_follows_its_recursion_on_a_gaussian(sde: SDE) -> None:
    x = reverse_sde(diffused_gaussian(sde, 0.5), sde, 20_000, 2, 20, rng()).samples
    assert abs(variance_error(x, predictor_std(sde, 0.5, 20) ** 2)) < 4
    assert abs(variance_error(x, 0.25)) > 10  # 20 steps are too few, and the test can tell


@sdes
def test_the_bias_of_the_predictor_is_of_first_order(sde: SDE) -> None:
    coarse, fine = (predictor_std(sde, 0.5, steps) - 0.5 for steps in (200, 400))
    assert coarse / fine == pytest.approx(2, abs=0.3)
    assert abs(fine) < 0.01


@sdes
def test_predictor_corrector_recovers_a_gaussian(sde: SDE) -> None:
    score_at = diffused_gaussian(sde, 0.5, mean=1.0)
    chain = predictor_corrector(score_at, sde, (4000, 2), 200, Corrector(1, 0.1), rng())
    assert chain.samples.mean().item() == pytest.approx(1.0, abs=0.03)
    assert chain.samples.std().item() == pytest.approx(0.5, abs=0.015)
    assert chain.nfe == 200 * 2 + 1


@sdes
def test_the_reverse_sde_is_the_predictor_alone(sde: SDE) -> None:
    score_at = diffused_gaussian(sde, 1.0)
    alone = reverse_sde(score_at, sde, 100, 2, 20, rng(3)).samples
    assert torch.equal(alone, predictor_corrector(score_at, sde, (100, 2), 20, Corrector(0, 0.3), rng(3)).samples)


def test_the_corrector_alone_recovers_a_gaussian() -> None:
    sde = VE(1e-2, 20.0)
    score_at = diffused_gaussian(sde, 1.0)
    x = predictor_corrector(score_at, sde, (4000, 2), 200, Corrector(2, 0.15, predict=False), rng()).samples
    assert x.std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="predict=True or steps"):
        predictor_corrector(score_at, sde, (10, 2), 5, Corrector(0, 0.1, predict=False), rng())


def test_the_predictor_looks_at_the_old_time_and_the_corrector_at_the_new_one() -> None:
    sde, seen = VP(), []

    def score_at(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return -x

    predictor_corrector(score_at, sde, (4, 2), 3, Corrector(1, 0.1), rng())
    t = time_grid(sde, 3, torch.device("cpu")).float().tolist()
    assert seen == [t[0], t[1], t[1], t[2], t[2], t[3], t[3]]  # the last one denoises


def test_the_corrector_is_the_printed_step() -> None:
    """x + eps g + sqrt(2 eps) z with eps = 2 (r ||z|| / ||g||)^2 (2011.13456, Algorithm 4)."""
    x, g, z = (torch.randn(1, 6, generator=rng(i)) for i in range(3))
    eps = 2 * (0.16 * z.norm() / g.norm()) ** 2
    torch.testing.assert_close(corrector_step(x, g, 0.16, z), x + eps * g + (2 * eps).sqrt() * z)


@sdes
def test_the_probability_flow_carries_a_gaussian_exactly(sde: SDE) -> None:
    """The flow of a Gaussian is linear: x(t_min) = x(t_max) times the ratio of standard deviations."""
    s = 0.7
    scale, std = sde.marginal(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
    width = ((scale * s).square() + std.square()).sqrt()
    ends = float(width[1] / width[0])
    errors = []
    for steps in (20, 40):
        chain = probability_flow(diffused_gaussian(sde, s), sde, 100, 2, steps, rng(5), record_every=steps)
        assert chain.path is not None
        assert chain.nfe == 2 * steps
        errors.append(float((chain.samples - ends * chain.path[0]).abs().max()))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3  # second order: 4 in the limit


def mixture_score(sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
    """Score of 1/4 N(-2, 0.3^2) + 3/4 N(2, 0.3^2) carried to time t, in one dimension."""

    def score_at(x: Tensor, t: Tensor) -> Tensor:
        scale, std = (v[:, None] for v in sde.marginal(t))
        variance = (0.3 * scale).square() + std.square()
        means = torch.tensor([-2.0, 2.0]) * scale
        r = torch.softmax(torch.tensor([0.25, 0.75]).log() - 0.5 * (x - means) ** 2 / variance, -1)
        return ((r * means).sum(-1, keepdim=True) - x) / variance

    return score_at


@sdes
@pytest.mark.parametrize("method", ["reverse SDE", "probability flow"])
def test_sde_samplers_recover_a_mixture(sde: SDE, method: str) -> None:
    score_at = mixture_score(sde)
    if method == "reverse SDE":
        x = reverse_sde(score_at, sde, 10_000, 1, 100, rng()).samples
    else:
        x = probability_flow(score_at, sde, 10_000, 1, 30, rng()).samples
    right = x > 0
    assert right.float().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 10_000) + 0.005)
    assert x[right].mean().item() == pytest.approx(2.0, abs=0.03)
    assert x[right].std().item() == pytest.approx(0.3, abs=0.02)


def test_denoising_ends_with_the_posterior_mean() -> None:
    sde = VE(0.5, 20.0)
    score_at = diffused_gaussian(sde, 1.0)
    plain = probability_flow(score_at, sde, 50, 2, 10, rng(1))
    denoised = probability_flow(score_at, sde, 50, 2, 10, rng(1), denoise=True)
    torch.testing.assert_close(denoised.samples, plain.samples / (1 + 0.25))
    assert denoised.nfe == plain.nfe + 1


def test_a_sampler_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        probability_flow(diffused_gaussian(VP(), 1.0), VP(), 10, 2, 0, rng())
