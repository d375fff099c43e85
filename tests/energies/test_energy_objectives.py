"""Every objective's gradient against its own exact gradient, got another way, on a Gaussian energy in the plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from replicate.energies import objectives as ob
from replicate.energies.objectives import METHODS, EnergyFunction, Objective
from replicate.model import DataInfo
from replicate.registry import model_entry

#: theta = (P11, P12, P22, b1, b2) of f = 1/2 x'Px - b'x; the truth and a model beside it
TRUE = torch.tensor([1.3, 0.4, 0.8, 0.3, -0.2], dtype=torch.float64)
BESIDE = torch.tensor([1.0, 0.1, 1.2, 0.0, 0.3], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def precision(theta: Tensor) -> Tensor:
    return torch.stack([theta[0], theta[1], theta[1], theta[2]]).view(2, 2)


def gaussian(theta: Tensor) -> EnergyFunction:
    p, b = precision(theta), theta[3:]
    return lambda x: 0.5 * ((x @ p) * x).sum(1) - x @ b


def moments(theta: Tensor) -> tuple[Tensor, Tensor]:
    cov = torch.linalg.inv(precision(theta))
    return cov @ theta[3:], cov


def draws(n: int, seed: int = 0, theta: Tensor = TRUE) -> Tensor:
    mean, cov = moments(theta)
    z = torch.randn(n, 2, generator=generator(seed), dtype=torch.float64)
    return mean + z @ torch.linalg.cholesky(cov).T


def nodes(theta: Tensor, order: int = 40) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite points (m, 2) and weights (m,) of the Gaussian with these parameters."""
    x, w = hermegauss(order)
    points = torch.tensor(list(itertools.product(x, x)), dtype=torch.float64)
    weights = torch.tensor([a * b for a, b in itertools.product(w, w)], dtype=torch.float64) / (2 * math.pi)
    mean, cov = moments(theta)
    return mean + points @ torch.linalg.cholesky(cov).T, weights


def gradient(of: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(of(theta), theta)
    return grad


def differences(of: Callable[[Tensor], Tensor], theta: Tensor, h: float = 1e-5) -> Tensor:
    """Central differences of a scalar function of theta."""
    bumps = h * torch.eye(len(theta), dtype=theta.dtype)
    return torch.stack([(of(theta + e) - of(theta - e)) / (2 * h) for e in bumps])


def of_theta(objective: Objective, batch: Tensor, seed: int = 5) -> Callable[[Tensor], Tensor]:
    """The loss as a function of theta, its randomness held fixed."""
    return lambda theta: objective.loss(gaussian(theta), batch, generator(seed))


class Standard(ob.Noise):
    """N(0, 2 I), with its density written out."""

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        pass

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return math.sqrt(2) * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.25 * x.square().sum(1) - math.log(4 * math.pi)


# -- maximum likelihood


def test_maximum_likelihood_has_the_gradient_of_the_closed_form() -> None:
    x = draws(50)
    found = gradient(of_theta(ob.MaximumLikelihood(ob.Quadrature(12.0, 80).double()), x), BESIDE)

    def closed(theta: Tensor) -> Tensor:
        p, b = precision(theta), theta[3:]
        log_z = 0.5 * b @ torch.linalg.solve(p, b) - 0.5 * torch.logdet(p) + math.log(2 * math.pi)
        return gaussian(theta)(x).mean() + log_z

    torch.testing.assert_close(found, gradient(closed, BESIDE), rtol=1e-6, atol=1e-7)


def autoregression(energy: EnergyFunction, x: Tensor, generator: torch.Generator) -> Tensor:
    """An exact kernel of exp(-f) with f Gaussian: x' - m = r (x - m) + sqrt(1 - r^2) L z with r = 0.6."""
    at = torch.zeros(3, 2, dtype=x.dtype)
    at[1, 0] = at[2, 1] = 1.0
    with torch.enable_grad():
        slopes = -ob.score_of(energy)(at).detach()
    p = torch.stack([slopes[1] - slopes[0], slopes[2] - slopes[0]])
    cov = torch.linalg.inv(p)
    mean = -cov @ slopes[0]
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return mean + 0.6 * (x - mean) + 0.8 * z @ torch.linalg.cholesky(cov).T


def energy_gradient_mean(mean: Tensor, cov: Tensor) -> Tensor:
    """E grad_theta f under a distribution with these moments."""
    second = cov + torch.outer(mean, mean)
    return torch.stack([second[0, 0] / 2, second[0, 1], second[1, 1] / 2, -mean[0], -mean[1]])


@pytest.mark.parametrize("k", [1, 3])
def test_contrastive_divergence_follows_its_exact_mean_update(k: int) -> None:
    """With a Gaussian kernel the law of the chain after k steps is known, and with it the update of CD."""
    x = draws(40_000, 1)
    found = gradient(of_theta(ob.ContrastiveDivergence(autoregression, k), x), BESIDE)
    m, cov = moments(BESIDE)
    mean, spread = x.mean(0), torch.cov(x.T, correction=0)
    r = 0.6**k
    after = energy_gradient_mean(m + r * (mean - m), r**2 * spread + (1 - r**2) * cov)
    exact = energy_gradient_mean(mean, spread) - after
    torch.testing.assert_close(found, exact, rtol=0, atol=0.03)
    likelihood = energy_gradient_mean(mean, spread) - energy_gradient_mean(m, cov)
    missing = (likelihood - exact).norm() / likelihood.norm()
    assert 0.6 ** (2 * k) / 2 < missing < 1.1 * r


def test_short_runs_and_persistent_chains_follow_their_exact_mean_update() -> None:
    x = draws(20_000, 2)
    mean, spread = x.mean(0), torch.cov(x.T, correction=0)
    m, cov = moments(BESIDE)
    short = ob.ShortRun(autoregression, 2, Standard())
    r = 0.6**2
    after = energy_gradient_mean((1 - r) * m, r**2 * 2 * torch.eye(2, dtype=torch.float64) + (1 - r**2) * cov)
    exact = energy_gradient_mean(mean, spread) - after
    torch.testing.assert_close(gradient(of_theta(short, x), BESIDE), exact, rtol=0, atol=0.05)

    persistent = ob.PersistentCD(autoregression, 1, 20_000)
    persistent.prepare(x, generator(3))
    for _ in range(12):  # the chains forget where they began
        persistent.loss(gaussian(BESIDE), x, generator(4 + _))
    likelihood = energy_gradient_mean(mean, spread) - energy_gradient_mean(m, cov)
    torch.testing.assert_close(gradient(of_theta(persistent, x), BESIDE), likelihood, rtol=0, atol=0.05)


@pytest.mark.parametrize("adjusted", [True, False])
def test_a_langevin_kernel_has_the_stationary_variance_of_its_kind(adjusted: bool) -> None:
    """Exact for MALA; 1 / (1 - eps / 4) for the unadjusted chain on a standard normal."""
    eps = 0.8
    kernel = ob.langevin_move(eps, adjusted)
    x = torch.randn(20_000, 2, generator=generator(), dtype=torch.float64)
    g = generator(1)
    for _ in range(25):
        x = kernel(lambda v: 0.5 * v.square().sum(1), x, g)
    expected = 1.0 if adjusted else 1 / (1 - eps / 4)
    assert float(x.var()) == pytest.approx(expected, rel=0.03)


def test_independence_proposals_reach_the_energy_and_keep_it() -> None:
    kernel = ob.with_independence(lambda energy, x, generator: x, Standard())
    x, g = torch.zeros(20_000, 2, dtype=torch.float64), generator(1)
    for _ in range(12):
        x = kernel(gaussian(TRUE), x, g)
    mean, cov = moments(TRUE)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.06)


def test_value_and_score_are_evaluated_once_per_point() -> None:
    calls: list[int] = []

    def energy(x: Tensor) -> Tensor:
        calls.append(len(x))
        return gaussian(TRUE)(x)

    ob.langevin_move(0.1)(energy, draws(7), generator())
    assert calls == [7, 7]


# -- score matching


def fisher(theta: Tensor) -> Tensor:
    """1/2 E_true |s_theta - s_true|^2 by Gauss-Hermite quadrature."""
    x, w = nodes(TRUE, 8)
    apart = (theta[3:] - TRUE[3:]) - x @ (precision(theta) - precision(TRUE))
    return 0.5 * w @ apart.square().sum(1)


@pytest.mark.parametrize("objective", [ob.ImplicitScoreMatching(), ob.SlicedScoreMatching()], ids=["ism", "ssm"])
def test_score_matching_has_the_gradient_of_the_fisher_divergence(objective: Objective) -> None:
    x = draws(100_000, 3)
    found = gradient(of_theta(objective, x), BESIDE)
    torch.testing.assert_close(found, gradient(fisher, BESIDE), rtol=0, atol=0.03)


def test_score_matching_of_a_batch_is_the_closed_form_of_hyvarinen() -> None:
    x = draws(60, 4)

    def closed(theta: Tensor) -> Tensor:
        s = theta[3:] - x @ precision(theta)
        return 0.5 * s.square().sum(1).mean() - theta[0] - theta[2]

    torch.testing.assert_close(
        gradient(of_theta(ob.ImplicitScoreMatching(), x), BESIDE), gradient(closed, BESIDE), rtol=1e-10, atol=1e-12
    )


def test_denoising_is_the_fisher_divergence_to_the_noised_truth() -> None:
    sigma, x = 0.5, draws(100_000, 5)
    found = gradient(of_theta(ob.DenoisingScoreMatching(sigma), x), BESIDE) / sigma**2
    mean, cov = moments(TRUE)
    p = torch.linalg.inv(cov + sigma**2 * torch.eye(2, dtype=torch.float64))
    noised = torch.stack([p[0, 0], p[0, 1], p[1, 1], *(p @ mean)])
    points, w = nodes(noised, 8)

    def distance(theta: Tensor) -> Tensor:
        apart = (theta[3:] - noised[3:]) - points @ (precision(theta) - p)
        return 0.5 * w @ apart.square().sum(1)

    torch.testing.assert_close(found, gradient(distance, BESIDE), rtol=0, atol=0.05)
    assert gradient(distance, noised).abs().max() < 1e-10
    assert gradient(distance, TRUE).abs().max() > 0.05  # the truth itself is not where it is stationary


def naive_ksd(score: Callable[[Tensor], Tensor], x: Tensor, c: float) -> Tensor:
    """The U-statistic by a double loop, the kernel's derivatives by autograd."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (c**2 + (a - b).square().sum()) ** -0.5

    s, total = score(x), torch.zeros((), dtype=x.dtype)
    for i, j in itertools.permutations(range(len(x)), 2):
        a, b = x[i].clone().requires_grad_(True), x[j].clone().requires_grad_(True)
        value = k(a, b)
        da, db = torch.autograd.grad(value, [a, b], create_graph=True)
        trace = sum(torch.autograd.grad(da[d], b, retain_graph=True)[0][d] for d in range(x.shape[1]))
        total = total + s[i] @ s[j] * value.detach() + s[i] @ db.detach() + s[j] @ da.detach() + trace
    return total / (len(x) * (len(x) - 1))


def test_the_stein_discrepancy_is_that_of_a_double_loop() -> None:
    x = draws(7, 6)
    objective = ob.MinimumKSD(0.7)
    objective.prepare(x, generator())
    c = 0.7 * float(torch.pdist(x).median())
    assert float(objective.scale) == pytest.approx(c)

    def naive(theta: Tensor) -> Tensor:
        return naive_ksd(lambda v: theta[3:] - v @ precision(theta), x, c)

    loss = of_theta(objective, x)
    torch.testing.assert_close(loss(BESIDE), naive(BESIDE), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss, BESIDE), gradient(naive, BESIDE), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient(loss, BESIDE), differences(naive, BESIDE), rtol=1e-6, atol=1e-7)


# -- contrast


def test_noise_contrast_has_the_gradient_of_its_population() -> None:
    """Against quadrature of -E_p log h - nu E_q log(1 - h), written out, in theta and in log Z."""
    nu = 2
    objective = ob.NoiseContrastive(Standard(), nu)
    x = draws(60_000, 7)
    objective.prepare(x, generator())
    objective.log_z.data.fill_(1.5)
    theta = BESIDE.clone().requires_grad_(True)
    loss = objective.loss(gaussian(theta), x, generator(8))
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [theta, objective.log_z])])

    at_data, w = nodes(TRUE, 30)
    at_noise, v = nodes(torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0], dtype=torch.float64), 30)

    def population(full: Tensor) -> Tensor:
        def h(points: Tensor) -> Tensor:
            log_p = -gaussian(full[:5])(points) - full[5]
            q = (-0.25 * points.square().sum(1)).exp() / (4 * math.pi)
            return log_p.exp() / (log_p.exp() + nu * q)

        return -(w @ h(at_data).log()) - nu * (v @ (1 - h(at_noise)).log())

    full = torch.cat([BESIDE, torch.tensor([1.5], dtype=torch.float64)])
    torch.testing.assert_close(found, differences(population, full), rtol=0, atol=0.02)
    mean, cov = moments(TRUE)
    log_z = 0.5 * TRUE[3:] @ mean + 0.5 * torch.logdet(cov) + math.log(2 * math.pi)
    assert differences(population, torch.cat([TRUE, log_z[None]])).abs().max() < 1e-4


def test_conditional_contrast_has_the_gradient_of_its_population() -> None:
    sigma = 0.8
    x = draws(60_000, 9)
    points, w = nodes(TRUE, 16)
    z, v = hermegauss(16)
    kernel = torch.tensor(list(itertools.product(z, z)), dtype=torch.float64)
    mass = torch.tensor([a * b for a, b in itertools.product(v, v)], dtype=torch.float64) / (2 * math.pi)

    def population(theta: Tensor) -> Tensor:
        f = gaussian(theta)
        moved = (points[:, None] + sigma * kernel).reshape(-1, 2)
        ratio = (f(moved).view(len(points), -1) - f(points)[:, None]).exp()  # phi(x) / phi(x')
        return -2 * w @ (ratio / (1 + ratio)).log() @ mass

    for ratio in (1, 2, 4):
        found = gradient(of_theta(ob.ConditionalNoiseContrastive(sigma, ratio), x), BESIDE)
        torch.testing.assert_close(found, differences(population, BESIDE), rtol=0, atol=0.03)
    assert differences(population, TRUE).abs().max() < 1e-3


def test_conditional_contrast_with_little_noise_is_score_matching() -> None:
    """Ceylan and Gutmann 2018, sec 3: 2 log 2 + sigma^2 / 2 * (score matching) to second order."""
    sigma, x = 0.02, draws(20_000, 10)
    contrast = gradient(of_theta(ob.ConditionalNoiseContrastive(sigma, 2), x), BESIDE) / sigma**2
    scores = gradient(of_theta(ob.ImplicitScoreMatching(), x), BESIDE)
    torch.testing.assert_close(contrast / contrast.norm(), scores / scores.norm(), rtol=0, atol=0.03)


def test_flow_contrast_fits_its_flow_then_leaves_it_alone() -> None:
    x = draws(4000, 11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = model_entry("realnvp").build(DataInfo(2, "continuous"), couplings=2, hidden=8).double()
    objective = ob.FlowContrastive(flow, 40)
    objective.prepare(x, generator(1))
    entropy = 0.5 * float(torch.logdet(2 * math.pi * math.e * moments(TRUE)[1]))
    assert -float(flow.log_prob(x).mean()) == pytest.approx(entropy, abs=0.1)
    assert [p for p in objective.parameters() if p.requires_grad] == [objective.log_z]
    y = flow.sample(4000, generator(2))

    def by_hand(theta: Tensor) -> Tensor:
        data, noise = (flow.log_prob(v) + gaussian(theta)(v) for v in (x, y))
        return (1 + data.exp()).log().mean() + (1 + (-noise).exp()).log().mean()

    torch.testing.assert_close(gradient(of_theta(objective, x, 2), BESIDE), gradient(by_hand, BESIDE))


# -- all of them


def consistent_objectives() -> dict[str, Objective]:
    move = ob.langevin_move(0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = model_entry("realnvp").build(DataInfo(2, "continuous"), couplings=2, hidden=8).double()
    return {
        "ml": ob.MaximumLikelihood(ob.Quadrature(12.0, 60).double()),
        "cd": ob.ContrastiveDivergence(move, 1),
        "pcd": ob.PersistentCD(move, 1, 4000, Truth()),
        "ism": ob.ImplicitScoreMatching(),
        "dsm": ob.DenoisingScoreMatching(0.05),
        "ssm": ob.SlicedScoreMatching(),
        "nce": ob.NoiseContrastive(Standard(), 1),
        "cnce": ob.ConditionalNoiseContrastive(0.5, 2),
        "ksd": ob.MinimumKSD(0.5),
        "flow-nce": ob.FlowContrastive(flow, 10),
    }


class Truth(Standard):
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        mean, cov = moments(TRUE)
        z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return mean + z @ torch.linalg.cholesky(cov).T


def test_every_consistent_method_is_tested() -> None:
    assert set(METHODS) - {"cd", "short-run"} <= set(consistent_objectives())


@pytest.mark.parametrize("name", list(consistent_objectives()))
def test_the_mean_gradient_vanishes_at_the_truth_and_not_beside_it(name: str) -> None:
    objective = consistent_objectives()[name]
    objective.prepare(draws(2000, 99), generator(98))
    mean, cov = moments(TRUE)
    log_z = 0.5 * TRUE[3:] @ mean + 0.5 * torch.logdet(cov) + math.log(2 * math.pi)
    if isinstance(objective, ob.NoiseContrastive):
        objective.log_z.data.copy_(log_z)
    repeats, n = 30, 300
    batches = [draws(n, seed) for seed in range(repeats)]
    at_truth = torch.stack([gradient(of_theta(objective, x, 100 + i), TRUE) for i, x in enumerate(batches)])
    error = at_truth.std(0) / math.sqrt(repeats)
    # denoising at sigma = 0.05 is off by a share sigma^2 of the precision, which these draws do not see
    assert (at_truth.mean(0).abs() < 4.5 * error + 2e-6).all()
    beside = torch.stack([gradient(of_theta(objective, x, 100 + i), BESIDE) for i, x in enumerate(batches)])
    wrong = beside.mean(0).abs() / (beside.std(0) / math.sqrt(repeats) + 1e-9)
    assert float(wrong.max()) > 6


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000))
def test_no_method_but_noise_contrast_sees_a_constant_in_the_energy(shift: float, seed: int) -> None:
    x = draws(16, seed)
    for objective in (
        ob.MaximumLikelihood(ob.Quadrature(9.0, 24).double()),
        ob.ContrastiveDivergence(ob.langevin_move(0.3), 2),
        ob.DenoisingScoreMatching(0.3),
        ob.ConditionalNoiseContrastive(0.5),
        ob.MinimumKSD(1.0),
    ):
        plain = objective.loss(gaussian(BESIDE), x, generator(seed))
        moved = objective.loss(lambda v: gaussian(BESIDE)(v) + shift, x, generator(seed))
        torch.testing.assert_close(plain, moved, rtol=1e-8, atol=1e-8)
    learned = ob.NoiseContrastive(Standard())
    plain = learned.loss(gaussian(BESIDE), x, generator(seed))
    learned = learned.double()
    learned.log_z.data.fill_(-shift)
    torch.testing.assert_close(plain, learned.loss(lambda v: gaussian(BESIDE)(v) + shift, x, generator(seed)))


def test_a_saved_state_sets_the_size_of_chains_and_noise() -> None:
    saved = ob.PersistentCD(ob.langevin_move(0.1), 1, 9)
    saved.prepare(draws(30), generator())
    fresh = ob.PersistentCD(ob.langevin_move(0.1), 1, 9).double()
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.state, saved.state)
    loss = [o.loss(gaussian(BESIDE), draws(5), generator(2)) for o in (saved, fresh)]
    assert torch.equal(*loss)


def test_negatives_carry_no_gradient() -> None:
    x = draws(50)
    objective = ob.ContrastiveDivergence(ob.langevin_move(0.3), 2)
    found = gradient(of_theta(objective, x, 3), BESIDE)
    chain = x
    g = generator(3)
    for _ in range(2):
        chain = ob.langevin_move(0.3)(gaussian(BESIDE), chain, g)
    by_hand = [
        (v.square()[:, 0].mean() / 2, (v[:, 0] * v[:, 1]).mean(), v.square()[:, 1].mean() / 2, *(-v.mean(0)))
        for v in (x, chain)
    ]
    np.testing.assert_allclose(found.numpy(), np.array(by_hand[0]) - np.array(by_hand[1]), atol=1e-12)
