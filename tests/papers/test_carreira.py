"""Contrastive divergence on an enumerated RBM against brute force, autograd and the chain's spectrum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.ebm import RBM
from replicate.experiments import Experiment, Run
from replicate.experiments.rbm import Machine, flat
from replicate.ledger.claims import claims_of
from replicate.likelihood.enumeration import rbm_log_z
from replicate.papers.carreira import PAPER
from replicate.papers.carreira.divergence import (
    Enumerated,
    ascend,
    biases,
    fixed_points,
    gradient_bias,
    independent,
    monte_carlo_deviation,
    patches,
)
from replicate.runs.seeds import Streams
from replicate.tasks.loading import load_task

DIM, HIDDEN = 4, 3
STATES = Enumerated(DIM, HIDDEN)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def machine(seed: int = 0, dim: int = DIM, hidden: int = HIDDEN) -> Machine:
    g = seeded(seed)
    return Machine(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((dim, hidden), dim, hidden)))


def data(seed: int = 1) -> Tensor:
    return torch.rand(2**DIM, generator=seeded(seed), dtype=torch.float64).softmax(0)


def new_run(experiment: Experiment, **changes: object) -> Run:
    settings = {**experiment.settings("smoke"), **changes}
    return Run(settings, Streams(experiment.name, "carreira", 0), torch.device("cpu"))


def brute_force_transitions(m: Machine) -> np.ndarray:
    """T[v, v'] = sum_h p(h | v) p(v' | h), one product of Bernoulli probabilities at a time."""
    w, b, c = (part.numpy() for part in m)
    vs, hs = (list(itertools.product((0, 1), repeat=n)) for n in (DIM, HIDDEN))

    def bernoulli(bits: tuple[int, ...], logits: np.ndarray) -> float:
        return math.prod(1 / (1 + math.exp(-z if on else z)) for on, z in zip(bits, logits, strict=True))

    up = np.array([[bernoulli(h, c + np.array(v) @ w) for h in hs] for v in vs])
    down = np.array([[bernoulli(v, b + w @ np.array(h)) for v in vs] for h in hs])
    return up @ down


class TestEnumerated:
    def test_distribution_is_normalised_by_the_enumerated_log_z(self) -> None:
        m = machine()
        expected = -m.free_energy(STATES.v) - rbm_log_z(*m.table())
        assert torch.allclose(STATES.distribution(m), expected, atol=1e-12)
        joint = STATES.log_joint(m).flatten().softmax(0).view(2**DIM, -1).sum(1)
        assert torch.allclose(STATES.distribution(m).exp(), joint, atol=1e-12)

    def test_likelihood_gradient_is_autograd_s(self) -> None:
        m = Machine(*(part.requires_grad_() for part in machine()))
        log_p = -m.free_energy(STATES.v) - rbm_log_z(*m.table())
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(data() @ log_p, m)])
        with torch.no_grad():
            assert torch.allclose(flat(STATES.direction(m, data(), None)), expected, atol=1e-12)

    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_chain_is_the_brute_force_transition_matrix(self, k: int) -> None:
        m = machine()
        after = data().numpy() @ np.linalg.matrix_power(brute_force_transitions(m), k)
        assert np.allclose(STATES.after_sweeps(m, data(), k)[-1].numpy(), after, atol=1e-13)
        v, h = STATES.v.numpy(), m.hidden_mean(STATES.v).numpy()
        expected = np.einsum("n,nd,nj->dj", data().numpy() - after, v, h)
        assert np.allclose(STATES.direction(m, data(), k).weights.numpy(), expected, atol=1e-13)

    def test_cd_of_the_model_s_own_distribution_is_zero(self) -> None:
        m = machine()
        assert float(flat(STATES.direction(m, STATES.distribution(m).exp(), 1)).abs().max()) < 1e-14

    def test_bias_dies_out_at_the_rate_of_the_second_eigenvalue(self) -> None:
        m = machine(3)
        second = np.sort(np.abs(np.linalg.eigvals(brute_force_transitions(m))))[-2]
        relative, cosine = biases(STATES, m, data(), 14)
        assert relative[13] / relative[12] == pytest.approx(second, rel=0.02)
        assert cosine[-1] == pytest.approx(1.0, abs=1e-6)
        exact, cd = flat(STATES.direction(m, data(), None)), flat(STATES.direction(m, data(), 3))
        assert relative[2] == pytest.approx(float((cd - exact).norm() / exact.norm()))

    def test_kl_is_zero_at_the_model(self) -> None:
        m = machine()
        assert STATES.kl(STATES.distribution(m).exp(), m) == pytest.approx(0.0, abs=1e-14)


class TestMachine:
    def test_the_suite_s_model_is_the_same_distribution(self) -> None:
        m = machine()
        with torch.random.fork_rng(devices=[]):
            model = m.model(torch.randint(2, (20, DIM), generator=seeded(2)).double(), seeded(2))
        assert torch.allclose(model.energy(STATES.v), m.free_energy(STATES.v), atol=1e-12)
        assert float(rbm_log_z(*model.table()).detach()) == pytest.approx(float(rbm_log_z(*m.table())), abs=1e-12)

    def test_gibbs_has_the_enumerated_distribution(self) -> None:
        m, n = machine(), 40_000
        v = m.gibbs(STATES.v[torch.multinomial(data(), n, replacement=True, generator=seeded(3))], 2, seeded(4))
        place = 2.0 ** torch.arange(DIM - 1, -1, -1, dtype=torch.float64)
        counts = torch.bincount((v @ place).long(), minlength=2**DIM)
        expected = n * STATES.after_sweeps(m, data(), 2)[-1]
        chi_square = float(((counts - expected).square() / expected).sum())
        assert chi_square < 2**DIM + 4 * math.sqrt(2 * 2**DIM)

    def test_plus_moves_machines_side_by_side_by_their_own_sizes(self) -> None:
        one, step = machine(0), machine(1)
        both = Machine(*(part.expand(2, *part.shape) for part in one))
        moved = both.plus(
            Machine(*(part.expand(2, *part.shape) for part in step)), torch.tensor([0.5, 2.0])[:, None, None]
        )
        for i, size in enumerate((0.5, 2.0)):
            for part, expected in zip(moved, one.plus(step, size), strict=True):
                assert torch.allclose(part[i], expected)


class TestMonteCarlo:
    def test_the_suite_s_sampler_has_the_enumerated_statistics(self) -> None:
        run = new_run(gradient_bias)
        assert 0.4 < monte_carlo_deviation(STATES, machine(), data(), 2, 20_000, run) < 1.8

    def test_a_sampler_that_leaves_a_sweep_out_is_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = RBM.gibbs_sweeps
        monkeypatch.setattr(RBM, "gibbs_sweeps", lambda model, x, sweeps, g: right(model, x, sweeps - 1, g))
        assert monte_carlo_deviation(STATES, machine(), data(), 1, 20_000, new_run(gradient_bias)) > 4


class TestLearning:
    def test_exact_ascent_arrives_where_the_gradient_vanishes(self) -> None:
        target = STATES.distribution(machine(5)).exp()
        start = independent(STATES, target, 0.1, seeded(6))
        run = ascend(STATES, start, target, None, 3000, 0.5)
        assert STATES.kl(target, run.path[-1]) < 0.01 * STATES.kl(target, start)
        assert run.residual < 1e-3

    def test_long_chains_learn_as_exact_learning_does(self) -> None:
        start = independent(STATES, data(), 0.1, seeded(6))
        exact, long = (ascend(STATES, start, data(), k, 50, 0.5).path[-1] for k in (None, 60))
        assert torch.allclose(flat(exact), flat(long), atol=1e-8)

    def test_patches_of_one_pixel_are_on_as_often_as_pixels(self) -> None:
        p = patches(50_000, 1, 0.0, seeded(0))
        assert float(p[1]) == pytest.approx(float(load_task("digits-binary").train.mean()), abs=0.01)
        mixed = patches(1000, 3, 0.01, seeded(0))
        assert float(mixed.sum()) == pytest.approx(1.0)
        assert float(mixed.min()) == pytest.approx(0.01 / 512)


def test_gradient_bias_small() -> None:
    outcome = gradient_bias.measure(new_run(gradient_bias))
    assert {"relative_bias:1", "relative_bias:25", "cosine:1", "bias_slope"} <= set(outcome.estimates)
    assert [plot.name for plot in outcome.plots] == ["bias", "cosine"]
    assert all(len(line.y) == 25 for line in outcome.plots[0].lines)


def test_fixed_points_small() -> None:
    outcome = fixed_points.measure(new_run(fixed_points, steps=40))
    assert {"excess_kl:cd1", "excess_kl:cd10", "excess_fraction:cd1"} <= set(outcome.estimates)
    assert outcome.estimates["kl:cd1"].value < outcome.estimates["kl:start"].value


def test_claims_read_and_measure_what_the_experiments_give() -> None:
    claims = claims_of(PAPER).claims
    found = {e.name: set(e.measure(new_run(e, steps=20)).estimates) for e in PAPER.experiments}
    for claim in claims:
        assert {m for m in (claim.measure, claim.over, claim.minus) if m} <= found[claim.experiment]
