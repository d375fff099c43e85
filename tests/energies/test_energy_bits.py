"""Training an energy on bits: every gradient against its own objective by enumeration, on an RBM of five bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.stats import bernoulli
from torch import Tensor

from replicate.energies.bits import (
    BitFlipContrastive,
    FactorisedBernoulli,
    RatioMatching,
    block_gibbs,
    flipped,
    neighbours,
)
from replicate.energies.objectives import (
    ContrastiveDivergence,
    NoiseContrastive,
    Objective,
    PersistentCD,
    ShortRun,
)
from replicate.experiments.rbm import Machine

DIM, HIDDEN = 5, 3
SIZES = (DIM * HIDDEN, DIM, HIDDEN)
STATES = np.array(list(itertools.product((0.0, 1.0), repeat=DIM)))
HIDDEN_STATES = np.array(list(itertools.product((0.0, 1.0), repeat=HIDDEN)))
V = torch.tensor(STATES)
#: how far each pair of states is apart, in bits
DISTANCE = np.abs(STATES[:, None] - STATES[None]).sum(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(seed: int, scale: float = 0.7) -> Tensor:
    """Weights and biases in a row, float64."""
    return scale * torch.randn(sum(SIZES), generator=seeded(seed), dtype=torch.float64)


def machine(theta: Tensor) -> Machine:
    w, b, c = theta.split(SIZES)
    return Machine(w.view(DIM, HIDDEN), b, c)


class Gibbs:
    """A machine as the moves see it."""

    def __init__(self, theta: Tensor) -> None:
        self.machine = machine(theta.detach())

    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        return self.machine.gibbs(x, sweeps, generator)


def log_joint(theta: np.ndarray) -> np.ndarray:
    """v'W h + b'v + c'h of all pairs of states, in numpy."""
    w, b, c = np.split(theta, np.cumsum(SIZES)[:2])
    return STATES @ w.reshape(DIM, HIDDEN) @ HIDDEN_STATES.T + (STATES @ b)[:, None] + HIDDEN_STATES @ c


def unnormalised(theta: np.ndarray) -> np.ndarray:
    """exp(-f) of every visible state, by summing over the hidden ones."""
    return np.exp(log_joint(theta)).sum(1)


def distribution(theta: Tensor) -> np.ndarray:
    f = unnormalised(theta.numpy())
    return f / f.sum()


TRUTH, ELSEWHERE = numbers(1), numbers(2)
DATA = distribution(TRUTH)
NOISE_RATES = np.array([0.3, 0.6, 0.5, 0.7, 0.4])
NOISE = np.prod(np.where(STATES > 0, NOISE_RATES, 1 - NOISE_RATES), 1)
FLIP = 0.3
FLIPS = FLIP**DISTANCE * (1 - FLIP) ** (DIM - DISTANCE)
RATIO = 3


def ratio_matching(theta: np.ndarray) -> float:
    """E_data sum_i (p(x_i) / (p(x) + p(x_i)))^2 in probabilities, x_i at one flip of bit i from x."""
    p = unnormalised(theta)
    share = p[None, :] / (p[:, None] + p[None, :])
    return float((DATA[:, None] * np.where(DISTANCE == 1, share**2, 0)).sum())


def noise_contrast(theta: np.ndarray) -> float:
    """-E_data log h - nu E_noise log(1 - h) with h = p / (p + nu q); the last number is -log Z."""
    p = unnormalised(theta[:-1]) * np.exp(theta[-1])
    h = p / (p + RATIO * NOISE)
    return float(-(DATA * np.log(h)).sum() - RATIO * (NOISE * np.log(1 - h)).sum())


def conditional_contrast(theta: np.ndarray) -> float:
    """-2 E log(p(x) / (p(x) + p(x'))) over data x and flips x'."""
    p = unnormalised(theta)
    return float(-2 * (DATA[:, None] * FLIPS * np.log(p[:, None] / (p[:, None] + p[None, :]))).sum())


def loss_gradient(objective: Objective, theta: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of one evaluation of the loss, in weights, biases and what the objective learns itself."""
    theta = theta.clone().requires_grad_(True)
    loss = objective.loss(lambda x: machine(theta).free_energy(x), rows, generator)
    grads = torch.autograd.grad(loss, [theta, *objective.parameters()])
    return torch.cat([g.flatten() for g in grads])


def z_scores(
    make: Callable[[Tensor], Objective], theta: Tensor, expected: Tensor, draws: int = 60, rows: int = 1000
) -> Tensor:
    """(mean of simulated gradients - expected) / its standard error, each number of the gradient by itself."""
    g, data = seeded(3), torch.tensor(DATA)
    objective = make(theta)
    found = torch.stack(
        [
            loss_gradient(objective, theta, V[torch.multinomial(data, rows, replacement=True, generator=g)], g)
            for _ in range(draws)
        ]
    )
    return (found.mean(0) - expected) / (found.std(0) / draws**0.5)


def bernoulli_noise() -> FactorisedBernoulli:
    noise = FactorisedBernoulli()
    noise.rates = torch.tensor(NOISE_RATES)
    return noise


def contrast(log_z: float) -> NoiseContrastive:
    objective = NoiseContrastive(bernoulli_noise(), RATIO)
    objective.log_z.data = torch.tensor(log_z, dtype=torch.float64)
    return objective


def after_sweeps(theta: Tensor, k: int) -> np.ndarray:
    """The distribution of visible states k Gibbs sweeps after the data, by transition matrices in numpy."""
    f = np.exp(log_joint(theta.numpy()))
    up, down = f / f.sum(1, keepdims=True), f.T / f.sum(0)[:, None]
    return DATA @ np.linalg.matrix_power(up @ down, k)


def energy_gap_gradient(theta: Tensor, negatives: np.ndarray) -> Tensor:
    """Gradient of E_data f - E_negatives f with the negatives' distribution held fixed, by finite differences."""
    difference = DATA - negatives
    return torch.tensor(
        approx_fprime(theta.numpy(), lambda t: float(-(difference * np.log(unnormalised(t))).sum()), 1e-7)
    )


# -- the pieces


def test_the_noise_is_bernoulli_at_the_rates_of_the_data() -> None:
    rows = torch.bernoulli(torch.tensor(NOISE_RATES).expand(4000, -1), generator=seeded())
    noise = FactorisedBernoulli()
    noise.fit(rows, seeded())
    assert (noise.rates - rows.mean(0)).abs().max() < 1e-3
    expected = bernoulli.logpmf(STATES, noise.rates.numpy()).sum(1)
    np.testing.assert_allclose(noise.log_prob(V).numpy(), expected, rtol=1e-12)
    draws = noise.sample(40_000, seeded(1))
    assert (draws.mean(0) - noise.rates).abs().max() < 0.01
    assert np.abs(np.corrcoef(draws.numpy().T) - np.eye(DIM)).max() < 0.02


def test_a_bit_that_never_changes_in_the_data_keeps_a_finite_log_probability() -> None:
    noise = FactorisedBernoulli()
    noise.fit(torch.tensor([[1.0, 0.0]] * 9), seeded())
    torch.testing.assert_close(noise.rates, torch.tensor([0.95, 0.05]))
    assert noise.log_prob(torch.tensor([[0.0, 1.0]])).isfinite().all()


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=6))
def test_neighbours_differ_in_one_bit_each_and_flips_keep_bits(rows: list[list[int]]) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    changed = (neighbours(x) - x[:, None]).abs()
    assert torch.equal(changed, torch.eye(4).expand(len(x), 4, 4))
    assert torch.equal(flipped(x, 0.0, seeded()), x)
    assert torch.equal(flipped(x, 1.0, seeded()), 1 - x)
    assert set(flipped(x, 0.5, seeded()).unique().tolist()) <= {0.0, 1.0}


def test_flips_have_their_rate_and_are_symmetric() -> None:
    x = V.repeat(2000, 1)
    moved = flipped(x, FLIP, seeded(4))
    assert float((moved - x).abs().mean()) == pytest.approx(FLIP, abs=0.005)
    place = torch.tensor(2.0 ** np.arange(DIM - 1, -1, -1))
    index = ((x @ place) * len(V) + moved @ place).long()
    frequency = torch.bincount(index, minlength=len(V) ** 2).view(len(V), -1).double() / 2000
    assert (frequency - torch.tensor(FLIPS)).abs().max() < 0.05


def test_a_gibbs_sweep_leaves_the_distribution_of_the_machine_invariant() -> None:
    start = V[torch.multinomial(torch.tensor(DATA), 40_000, replacement=True, generator=seeded(5))]
    moved = block_gibbs(Gibbs(TRUTH))(lambda x: x.sum(1), start, seeded(6))
    assert not torch.equal(moved, start)
    place = torch.tensor(2.0 ** np.arange(DIM - 1, -1, -1))
    counts = torch.bincount((moved @ place).long(), minlength=len(V)).numpy()
    z = (counts - 40_000 * DATA) / np.sqrt(40_000 * DATA * (1 - DATA))
    assert np.abs(z).max() < 4


# -- gradients


@pytest.mark.parametrize("theta", [TRUTH, ELSEWHERE], ids=["truth", "elsewhere"])
def test_the_gradient_of_ratio_matching_is_that_of_its_objective(theta: Tensor) -> None:
    per_state = torch.stack([loss_gradient(RatioMatching(), theta, v[None], seeded()) for v in V])
    exact = approx_fprime(theta.numpy(), ratio_matching, 1e-7)
    np.testing.assert_allclose((torch.tensor(DATA) @ per_state).numpy(), exact, atol=1e-6)


def test_ratio_matching_is_a_squared_distance_of_ratios_up_to_a_constant() -> None:
    def distance(theta: Tensor) -> float:
        p = unnormalised(theta.numpy())
        model, data = (q[None, :] / (q[:, None] + q[None, :]) for q in (p, DATA))
        return float((DATA[:, None] * np.where(DISTANCE == 1, (model - data) ** 2, 0)).sum())

    constants = [ratio_matching(t.numpy()) - distance(t) for t in (TRUTH, ELSEWHERE, numbers(7), numbers(8))]
    np.testing.assert_allclose(constants, constants[0], rtol=1e-10)
    assert distance(TRUTH) < 1e-20
    assert distance(ELSEWHERE) > 0.1


@pytest.mark.parametrize("log_z", [0.0, 2.5])
def test_the_mean_gradient_of_noise_contrast_is_that_of_its_objective(log_z: float) -> None:
    exact = approx_fprime(np.append(ELSEWHERE.numpy(), -log_z), noise_contrast, 1e-7)
    exact[-1] *= -1  # the objective learns log Z, not its negative
    z = z_scores(lambda theta: contrast(log_z), ELSEWHERE, torch.tensor(exact))
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 2


def test_the_mean_gradient_of_bit_flip_contrast_is_that_of_its_objective() -> None:
    exact = torch.tensor(approx_fprime(ELSEWHERE.numpy(), conditional_contrast, 1e-7))
    z = z_scores(lambda theta: BitFlipContrastive(FLIP, RATIO), ELSEWHERE, exact)
    assert z.abs().max() < 4
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("k", [1, 3])
def test_the_mean_gradient_of_cd_is_that_of_chains_by_transition_matrix(k: int) -> None:
    exact = energy_gap_gradient(ELSEWHERE, after_sweeps(ELSEWHERE, k))
    z = z_scores(lambda theta: ContrastiveDivergence(block_gibbs(Gibbs(theta)), k), ELSEWHERE, exact)
    assert z.abs().max() < 4


def test_short_runs_from_noise_have_the_mean_gradient_of_chains_by_transition_matrix() -> None:
    f = np.exp(log_joint(ELSEWHERE.numpy()))
    up, down = f / f.sum(1, keepdims=True), f.T / f.sum(0)[:, None]
    exact = energy_gap_gradient(ELSEWHERE, NOISE @ np.linalg.matrix_power(up @ down, 2))
    z = z_scores(lambda theta: ShortRun(block_gibbs(Gibbs(theta)), 2, bernoulli_noise()), ELSEWHERE, exact)
    assert z.abs().max() < 4


def test_persistent_chains_approach_the_likelihood_gradient() -> None:
    objective = PersistentCD(block_gibbs(Gibbs(ELSEWHERE)), 30, 20_000, FactorisedBernoulli())
    rows = V[torch.multinomial(torch.tensor(DATA), 20_000, replacement=True, generator=seeded(9))]
    objective.prepare(rows, seeded(10))
    found = loss_gradient(objective, ELSEWHERE, rows, seeded(11))
    likelihood = energy_gap_gradient(ELSEWHERE, distribution(ELSEWHERE))
    assert (found - likelihood).abs().max() < 0.02
    assert likelihood.abs().max() > 0.1


# -- consistency, and the want of it


@pytest.mark.parametrize("name", ["ratio-matching", "nce", "cnce"])
def test_consistent_objectives_are_stationary_at_the_truth_alone(name: str) -> None:
    log_z = float(np.log(unnormalised(TRUTH.numpy()).sum()))
    objective, at = {
        "ratio-matching": (ratio_matching, TRUTH.numpy()),
        "nce": (noise_contrast, np.append(TRUTH.numpy(), -log_z)),
        "cnce": (conditional_contrast, TRUTH.numpy()),
    }[name]
    # central differences, since a one-sided one has an error as large as what is looked for
    step = 1e-5 * np.eye(len(at))
    slope = np.array([(objective(at + h) - objective(at - h)) / 2e-5 for h in step])
    assert np.abs(slope).max() < 1e-8
    assert objective(at) < min(objective(at + h) for h in 1e4 * step) - 1e-6


@pytest.mark.parametrize("name", ["ratio-matching", "nce", "cnce", "cd"])
def test_the_mean_gradient_at_the_truth_is_zero(name: str) -> None:
    log_z = float(np.log(unnormalised(TRUTH.numpy()).sum()))
    make: dict[str, Callable[[Tensor], Objective]] = {
        "ratio-matching": lambda theta: RatioMatching(),
        "nce": lambda theta: contrast(log_z),
        "cnce": lambda theta: BitFlipContrastive(FLIP, RATIO),
        "cd": lambda theta: ContrastiveDivergence(block_gibbs(Gibbs(theta)), 1),
    }
    assert z_scores(make[name], TRUTH, torch.zeros(())).abs().max() < 4


def test_cd_is_biased_away_from_the_truth_and_its_bias_falls_with_k() -> None:
    likelihood = energy_gap_gradient(ELSEWHERE, distribution(ELSEWHERE))
    sweeps = (1, 2, 4, 8, 16)
    bias = [float((energy_gap_gradient(ELSEWHERE, after_sweeps(ELSEWHERE, k)) - likelihood).norm()) for k in sweeps]
    assert bias[0] > 0.03 * float(likelihood.norm())
    assert all(late < early for early, late in itertools.pairwise(bias))
    assert bias[-1] < 0.02 * bias[0]
