"""The mathematics of the NCSN experiments against closed forms, quadrature and exact recursions; each runs once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.experiments.noise_schedules import geometric_levels
from replicate.ledger.claims import claims_of
from replicate.papers.ncsn import PAPER, langevin, networks
from replicate.papers.ncsn.langevin import MEANINGS, READINGS, Gaussian
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.score_based.matching import implicit_score_matching
from replicate.tasks.densities import two_gaussians

TINY: dict[str, dict[str, int]] = {
    "ncsn-score-error": {"steps": 3},
    "ncsn-langevin": {"chains": 40, "steps": 20, "long_steps": 60},
    "ncsn-passage": {},
    "ncsn-annealed": {"chains": 40, "steps": 3},
    "ncsn-manifold": {"steps": 20, "block": 1},
    "ncsn-noise-levels": {"steps": 3, "hidden": 8},
    "ncsn-inpainting": {"chains": 40, "steps": 3},
    "ncsn-step": {"chains": 40, "steps": 3},
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(experiment: Experiment, seed: int = 0, **changes: int) -> Outcome:
    settings = {**experiment.settings("standard"), **changes}
    return experiment.measure(Run(settings, Streams(experiment.name, "ncsn", seed), torch.device("cpu")))


@pytest.mark.parametrize("experiment", PAPER.experiments, ids=lambda e: e.name)
def test_each_experiment_runs_and_measures_what_its_claims_require(experiment: Experiment) -> None:
    outcome = measured(experiment, **TINY[experiment.name])
    claims = [c for c in claims_of(PAPER).claims if c.experiment == experiment.name]
    assert claims
    plots = {plot.name for plot in outcome.plots}
    for claim in claims:
        asked = {m for m in (claim.measure, claim.minus, claim.over) if m}
        assert asked <= set(outcome.estimates) | set(outcome.missing), claim.id
        assert set(claim.plots) <= plots, claim.id
    for plot in outcome.plots:
        plot.as_dict()


def test_an_experiment_depends_on_its_streams_alone() -> None:
    first, again = (measured(langevin.annealed, **TINY["ncsn-annealed"]) for _ in "ab")
    assert first.estimates == again.estimates


# -- N1


def test_the_regions_of_log_density_hold_the_share_of_the_data_that_they_are_named_for() -> None:
    density = two_gaussians()
    log_p = density.log_prob(density.sample(200_000, rng()).double())
    for q in (0.1, 0.001):
        share = float((log_p < networks.log_density_quantile(q)).double().mean())
        assert abs(share - q) < 4 * math.sqrt(q / 200_000)


def test_the_score_error_of_a_score_scaled_by_three_quarters_is_a_quarter() -> None:
    true = torch.randn(50, 2, generator=rng())
    assert networks.relative_error(0.75 * true, true) == pytest.approx(0.25)


def test_sliced_training_finds_the_score_of_a_gaussian() -> None:
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    generator = rng(1)
    sd = torch.tensor([1.0, 2.0])
    sources = {"projections": rng(2)}
    losses = networks.train_sliced(net, lambda: sd * torch.randn(512, 2, generator=generator), 600, 1e-2, sources)
    torch.testing.assert_close(net.weight.detach(), -torch.diag(sd**-2), atol=0.12, rtol=0)
    assert float(losses[-100:].mean()) == pytest.approx(-0.5 * (1 + 0.25), abs=0.1)


# -- N2 to N4: the coordinate along the axis moves on its own, so its law follows from a matrix on a grid


def test_the_score_in_few_operations_is_the_mixture_s() -> None:
    density = two_gaussians()
    x = 8 * torch.randn(100, 2, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(langevin.pair_score(density, x.device)(x), density.score(x))


def axis_score(u: np.ndarray, variance: float) -> np.ndarray:
    half = 5 * math.sqrt(2)
    return (-u + half * np.tanh(half * u / variance + 0.5 * math.log(4))) / variance


def kernel(to: np.ndarray, grid: np.ndarray, variance: float, alpha: float) -> np.ndarray:
    """Carries a law's density from an even `grid` to `to` by one Langevin step of size alpha."""
    centre = grid + alpha / 2 * axis_score(grid, variance)
    square = (to[:, None] - centre) ** 2
    return np.exp(-square / (2 * alpha)) * (grid[1] - grid[0]) / math.sqrt(2 * math.pi * alpha)


def start_density(u: np.ndarray) -> np.ndarray:
    edge = 8 * math.sqrt(2)  # (x + y) / sqrt(2) of the square is triangular
    return np.clip(edge - np.abs(u), 0, None) / edge**2


def exact_minority_weight(levels: list[tuple[float, float]], steps: int) -> float:
    """The share below 0 of infinitely many chains, from the law on one grid for each (variance, alpha)."""
    grid = np.linspace(-12, 12, 1201)
    law = start_density(grid)
    for variance, alpha in levels:
        reach = 5 * math.sqrt(2) + 6 * math.sqrt(variance) + 3
        new = np.arange(-reach, reach, 0.9 * math.sqrt(alpha))  # the trapezium rule errs by exp(-2 pi^2 / 0.9^2)
        law = kernel(new, grid, variance, alpha) @ law
        step = kernel(new, new, variance, alpha)
        for _ in range(steps - 1):
            law = step @ law
        grid = new
    width = grid[1] - grid[0]
    assert law.sum() * width == pytest.approx(1, abs=1e-3)
    return float(law[grid < 0].sum() * width)


@pytest.mark.parametrize(
    ("name", "meaning"), [("appendix", "added"), ("appendix", "replaced"), ("text-scaled", "added")]
)
def test_annealed_chains_have_the_weight_of_the_exact_recursion(name: str, meaning: str) -> None:
    (reading,) = (r for r in READINGS if r.name == name)
    sigmas = geometric_levels(reading.first, reading.last).tolist()
    levels = [(MEANINGS[meaning](s), reading.eps * (s / reading.last) ** 2) for s in sigmas]
    exact = exact_minority_weight(levels, reading.steps)
    x = langevin.annealed_chain(reading, meaning, langevin.uniform_start(2500, rng(1)), rng())
    assert abs(langevin.share_near(x, 0).value - exact) < 4 * math.sqrt(exact * (1 - exact) / 2500)
    if name == "appendix":  # sigma_L = 1: components of variance 1 + 1 where noise is added, else 1
        sd = langevin.spread(x)
        assert sd is not None
        assert sd.value == pytest.approx({"added": math.sqrt(2), "replaced": 1.0}[meaning], rel=0.05)


def test_plain_langevin_has_the_weight_of_the_exact_recursion_and_keeps_it() -> None:
    exact = exact_minority_weight([(1.0, 0.1)], 1000)
    outcome = measured(langevin.plain_langevin, chains=4000, steps=150, long_steps=300)
    for metric in ("minority_weight:printed", "minority_weight:long"):
        assert abs(outcome.estimates[metric].value - exact) < 4 * 0.5 / math.sqrt(4000)
    assert exact == pytest.approx(0.5, abs=0.02)


def test_the_chain_as_the_text_and_appendix_together_print_it_is_unstable() -> None:
    """One step multiplies the distance from the mode by 1 - alpha / 2v: over 1 in size means divergence."""
    (text,) = (r for r in READINGS if r.name == "text")
    for meaning in ("added", "replaced"):
        assert abs(1 - text.eps * (text.first / text.last) ** 2 / (2 * MEANINGS[meaning](text.first))) > 3
    (appendix,) = (r for r in READINGS if r.name == "appendix")
    for sigma in geometric_levels(appendix.first, appendix.last).tolist():
        assert abs(1 - appendix.eps * sigma**2 / (2 * sigma**2)) < 1


def test_the_mean_passage_time_is_that_of_adaptive_quadrature_and_of_the_barrier() -> None:
    def p(y: float) -> float:
        return 0.2 * stats.norm.pdf(y, -2.0) + 0.8 * stats.norm.pdf(y, 2.0)

    def cdf(y: float) -> float:
        return 0.2 * stats.norm.cdf(y, -2.0) + 0.8 * stats.norm.cdf(y, 2.0)

    expected, _ = integrate.quad(lambda y: 2 * cdf(y) / p(y), -2.0, 2.0)
    assert langevin.mean_passage_time(2.0, 0.2) == pytest.approx(expected, rel=1e-5)
    # far apart only the barrier counts: p = 2 sqrt(w (1 - w)) exp(-h^2 / 2) phi(y) cosh(h y + c), int 1 / cosh = pi / h
    half = 5 * math.sqrt(2)
    barrier = math.exp(half**2 / 2) * math.sqrt(2 * math.pi) / (2 * math.sqrt(0.2 * 0.8)) * math.pi / half
    assert langevin.mean_passage_time(half, 0.2) == pytest.approx(2 * 0.2 * barrier, rel=0.05)


def test_a_simulated_passage_takes_the_mean_time() -> None:
    half, eps, n = 1.5, 0.002, 400
    x = np.full(n, -half)
    noise = np.random.default_rng(0)
    time = np.zeros(n)
    running = np.ones(n, dtype=bool)
    for _ in range(40_000):
        drift = -x + half * np.tanh(half * x + 0.5 * math.log(4))
        x = x + eps / 2 * drift + math.sqrt(eps) * noise.standard_normal(n)
        time += eps * running
        running &= x < half
        if not running.any():
            break
    assert time.mean() == pytest.approx(langevin.mean_passage_time(half, 0.2), rel=0.15)


def test_mode_spread_and_share_of_a_known_cloud() -> None:
    means = two_gaussians().means.double()
    x = torch.cat([means[:1].repeat(1000, 1), means[1:].repeat(3000, 1)])
    x = x + 0.5 * torch.randn(4000, 2, generator=rng(), dtype=torch.float64)
    x[0] = math.nan
    assert langevin.share_near(x, 0).value == pytest.approx(999 / 4000)
    sd = langevin.spread(x)
    assert sd is not None
    assert sd.value == pytest.approx(0.5, abs=0.02)


# -- N5


def test_the_loss_floor_is_the_loss_of_the_exact_score() -> None:
    basis = networks.plane(10, 5, rng())
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-6, rtol=0)
    covariance = (0.09 * basis @ basis.T + 0.01 * torch.eye(10)).double()
    precision = covariance.inverse()
    x = torch.randn(20_000, 10, generator=rng(1), dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    loss = implicit_score_matching(lambda y: -y @ precision, x).detach()
    floor = networks.loss_floor(10, 5, 0.3, 0.1)
    assert abs(float(loss.mean()) - floor) < 4 * float(loss.std()) / math.sqrt(20_000)
    assert networks.loss_floor(10, 5, 0.3, 0.0) == -math.inf


def test_a_steady_decline_is_no_fluctuation() -> None:
    line = np.linspace(0, -1e4, 400)
    assert networks.fluctuation(line) < 1e-6
    noise = np.random.default_rng(0).standard_normal(4000)
    assert networks.fluctuation(np.linspace(0, -1e5, 4000) + noise) == pytest.approx(1, abs=0.1)


# -- N6


def test_the_optimal_score_is_a_weighted_mean_of_the_training_images() -> None:
    train = torch.rand(6, 3, generator=rng(), dtype=torch.float64)
    x, sigma = torch.rand(4, 3, generator=rng(1), dtype=torch.float64), 0.4
    weights = np.array([[stats.multivariate_normal.pdf(a, b, sigma**2) for b in train] for a in x])
    weights /= weights.sum(1, keepdims=True)
    expected = (torch.from_numpy(weights) @ train - x) / sigma**2
    torch.testing.assert_close(networks.optimal_score(train, sigma).score(x), expected)


def test_norm_and_loss_of_a_point_mass_and_of_a_gaussian() -> None:
    x = torch.zeros(20_000, 4)
    norm, loss = networks.norm_and_loss(lambda y: -y / 0.01, x, 0.1, rng())
    assert loss < 1e-9  # all noise is known where the data are one point
    assert norm == pytest.approx(stats.chi.mean(4) / 0.1, rel=0.01)
    x = torch.randn(20_000, 4, generator=rng(1))
    _, loss = networks.norm_and_loss(lambda y: -y / 1.25, x, 0.5, rng(2))
    assert loss == pytest.approx(0.5 * 4 * 1 / 1.25, rel=0.03)  # D / 2 of v / (v + sigma^2)


# -- N7 and the step


def step_matrices(density: Gaussian, sigma: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_hidden <- A x_hidden + B (x_known - mean) + sqrt(alpha) z, in deviations from the mean."""
    precision = torch.linalg.inv(density.covariance + sigma**2 * torch.eye(len(density.mean), dtype=torch.float64))
    k = density.known
    a = torch.eye(len(density.mean) - k, dtype=torch.float64) - alpha / 2 * precision[k:, k:]
    return a, -alpha / 2 * precision[k:, :k], precision


def exact_inpainting(
    density: Gaussian, observed: Tensor, sigmas: list[float], steps: int, eps: float, rule: str
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the hidden part: every step is linear with Gaussian noise, from U[0, 1]."""
    hidden = len(density.mean) - density.known
    mean = torch.full((hidden,), 0.5, dtype=torch.float64) - density.mean[density.known :]
    cov = torch.eye(hidden, dtype=torch.float64) / 12
    shift = observed - density.mean[: density.known]
    for sigma in sigmas:
        alpha = eps * (sigma / sigmas[-1]) ** 2
        a, b, _ = step_matrices(density, sigma, alpha)
        noise = alpha * torch.eye(hidden, dtype=torch.float64)
        gain = torch.zeros_like(b)  # of the level's one draw, for "once"
        for _ in range(steps):
            mean = a @ mean + b @ shift
            cov = a @ cov @ a.T + noise + (sigma**2 * b @ b.T if rule == "redrawn" else 0)
            gain = a @ gain + b
        cov = cov + (sigma**2 * gain @ gain.T if rule == "once" else 0)
    return mean + density.mean[density.known :], cov


@pytest.mark.parametrize("rule", langevin.RULES)
def test_inpainting_has_the_mean_and_covariance_of_the_exact_recursion(rule: str) -> None:
    density = langevin.image_like(5, 2, 0.9, torch.device("cpu"))
    observed = torch.tensor([0.9, 0.7], dtype=torch.float64)
    sigmas, n = geometric_levels(1.0, 0.05, 5).tolist(), 20_000
    start = torch.rand(n, 5, generator=rng(), dtype=torch.float64)
    x = langevin.inpaint(density, observed, sigmas, 20, 0.5 * 0.05**2, rule, start, rng(1))
    mean, cov = exact_inpainting(density, observed, sigmas, 20, 0.5 * 0.05**2, rule)
    errors = langevin.conditional_errors(x[:, 2:], mean, cov)
    assert errors["mean_error"].value < 3 / math.sqrt(n)
    assert errors["covariance_error"].value < 3 * math.sqrt(4 / n)
    off = (x[:, :2] - observed).square().mean().sqrt()
    if rule == "once":  # what was pasted last is the known part plus noise of the last level
        assert float(off) == pytest.approx(0.05, rel=0.03)
    else:
        assert float(off) > 0.052


def test_the_conditional_is_that_of_scipy_s_regression() -> None:
    density = langevin.image_like(5, 2, 0.9, torch.device("cpu"))
    observed = torch.tensor([0.9, 0.7], dtype=torch.float64)
    mean, cov = density.conditional(observed)
    joint = stats.multivariate_normal(density.mean.numpy(), density.covariance.numpy())
    marginal = stats.multivariate_normal(density.mean[:2].numpy(), density.covariance[:2, :2].numpy())
    rest = stats.multivariate_normal(mean.numpy(), cov.numpy())
    point = np.array([0.1, 0.5, 1.2])
    whole = np.concatenate([observed.numpy(), point])
    assert rest.logpdf(point) == pytest.approx(joint.logpdf(whole) - marginal.logpdf(observed.numpy()))


def test_both_readings_of_the_step_have_their_closed_bias() -> None:
    outcome = measured(langevin.step_readings)
    for reading, expected in (("printed", 1 / 0.95 - 1), ("released", 1 / 0.9 - 1)):
        found = outcome.estimates[f"excess_variance:{reading}"]
        assert abs(found.value - expected) < 4 * found.stderr


def test_claims_read_and_ids_are_the_ledger_s() -> None:
    ids = {c.id for c in claims_of(PAPER).claims}
    assert {f"N{i}" for i in range(1, 8)} <= ids
