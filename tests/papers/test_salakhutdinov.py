"""AIS on trained machines against enumeration, and the full-size experiments on a few random bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.experiments.rbm import Machine, exact_samples, hidden_log_weights, to_float64
from replicate.ledger.claims import claims_of
from replicate.likelihood.ais import Bracket, ais
from replicate.likelihood.enumeration import rbm_log_z, states
from replicate.model import Estimate
from replicate.papers.carreira.divergence import Enumerated
from replicate.papers.salakhutdinov import PAPER
from replicate.papers.salakhutdinov.annealing import (
    STATIC,
    Recipe,
    against_enumeration,
    anneal,
    centred,
    compared,
    measure_rbm,
    paper_betas,
    train,
)
from replicate.runs.seeds import Streams


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def machine(dim: int = 6, hidden: int = 5, strength: float = 1.0) -> Machine:
    g = seeded(0)
    shapes = ((dim, hidden), dim, hidden)
    return Machine(*(strength * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes))


def bits(n: int = 200, dim: int = 8) -> Tensor:
    """Two clusters, so that there is something to learn."""
    g = seeded(1)
    which = torch.rand(n, 1, generator=g) < 0.5
    return (torch.rand(n, dim, generator=g) < torch.where(which, 0.85, 0.2)).float()


def new_run(experiment: Experiment, **changes: object) -> Run:
    settings = {**experiment.settings("smoke"), **changes}
    return Run(settings, Streams(experiment.name, "salakhutdinov", 0), torch.device("cpu"))


def measured(recipe: Recipe, rows: Tensor, test: Tensor) -> Mapping[str, Estimate]:
    run = new_run(STATIC[0])
    measure_rbm(run, recipe, rows, test)
    return run.estimates


class TestSchedule:
    def test_the_paper_s_temperatures(self) -> None:
        betas = paper_betas().numpy()
        expected = np.concatenate([np.arange(500) * 1e-3, 0.5 + np.arange(4000) * 1e-4, 0.9 + np.arange(10001) * 1e-5])
        assert betas.dtype == np.float64
        assert len(betas) == 14_501
        assert np.allclose(betas, expected, atol=1e-12)

    def test_thinned_temperatures_are_among_them(self) -> None:
        thin = paper_betas(10)
        assert len(thin) == 1451
        assert set(thin.tolist()) <= set(paper_betas().tolist())

    def test_temperatures_in_float32_are_refused(self) -> None:
        with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match="float64"):
            ais(machine().model(bits(dim=6).double(), seeded(0)), 10, paper_betas(100).float(), seeded(0))


class TestRecipe:
    def test_ramp_raises_k_and_divides_the_rate(self) -> None:
        recipe = Recipe(gibbs=25, ramp=True)
        assert recipe.at(1) == (1, 0.05, 0.5)
        assert recipe.at(11) == (2, 0.025, 0.9)
        assert recipe.at(250)[0] == 25

    def test_rate_is_linear_in_epochs(self) -> None:
        recipe = Recipe(epochs=11, rate=0.01, last_rate=0.001)
        assert [recipe.at(e)[1] for e in (1, 6, 11)] == pytest.approx([0.01, 0.0055, 0.001])


class TestEnumeration:
    @pytest.mark.parametrize("hidden", [1, 4, 5])
    def test_hidden_weights_sum_to_the_enumerated_z(self, hidden: int) -> None:
        m = machine(hidden=hidden)
        log_weights = hidden_log_weights(m)
        assert float(torch.logsumexp(log_weights, 0)) == pytest.approx(float(rbm_log_z(*m.table())), abs=1e-11)
        by_hidden = torch.logsumexp(Enumerated(6, hidden).log_joint(m), 0)
        assert torch.allclose(log_weights, by_hidden, atol=1e-11)

    def test_exact_samples_have_the_enumerated_frequencies(self) -> None:
        m, n = machine(dim=4, hidden=3), 20_000
        v = exact_samples(m, hidden_log_weights(m), n, seeded(0))
        place = 2.0 ** torch.arange(3, -1, -1, dtype=torch.float64)
        counts = torch.bincount((v @ place).long(), minlength=16).numpy()
        p = Enumerated(4, 3).distribution(m).exp().numpy()
        assert chisquare(counts, n * p).pvalue > 1e-3


class TestAnnealing:
    def bracket(self, strength: float = 1.0) -> tuple[Bracket, float]:
        m = machine(dim=8, strength=strength)
        log_weights = hidden_log_weights(m)
        start = exact_samples(m, log_weights, 300, seeded(3))
        run = new_run(against_enumeration)
        return anneal(m, bits().double(), 300, paper_betas(100), run, start), float(torch.logsumexp(log_weights, 0))

    def test_estimate_agrees_with_enumeration_and_brackets_it(self) -> None:
        both, exact = self.bracket()
        found = compared(both, exact)
        assert found["error"].value < 0.2
        assert found["error_in_stderr"].value < 4
        assert found["bracket_excess"].value < 4

    def test_a_wrong_log_z_is_caught(self) -> None:
        both, exact = self.bracket()
        assert compared(both, exact + 0.693)["error_in_stderr"].value > 4
        assert compared(both, exact - 0.693)["bracket_excess"].value > 4
        assert compared(both, exact + 0.693)["bracket_excess"].value > 4


class TestTraining:
    def nll(self, m: Machine, rows: Tensor) -> float:
        wide = to_float64(m)
        return float(wide.free_energy(rows.double()).mean() + rbm_log_z(*wide.table()))

    @pytest.mark.parametrize("variant", ["cd", "ramp", "pcd", "centred"])
    def test_every_variant_learns(self, variant: str) -> None:
        cd = Recipe(hidden=4, epochs=60, batch=50)
        recipe = {
            "cd": cd,
            "ramp": replace(cd, gibbs=25, ramp=True),
            "pcd": replace(cd, persistent=True, nesterov=True, momentum=0.9, last_rate=0.01),
            "centred": replace(cd, persistent=True, momentum=0, late_momentum=0, rate=0.2, centred=True),
        }[variant]
        rows, run = bits(), new_run(STATIC[0])
        before, after = (self.nll(train(rows, r, run), rows) for r in (Recipe(hidden=4, epochs=0), recipe))
        assert before == pytest.approx(8 * math.log(2), abs=0.01)
        mean = rows.mean(0).double()
        independent = -float((mean * mean.log() + (1 - mean) * (1 - mean).log()).sum())
        if recipe.centred:
            start = self.nll(train(rows, replace(recipe, epochs=0), run), rows)
            assert start == pytest.approx(independent, abs=0.01)
        assert after < independent - 0.3

    def test_weight_cost_shrinks_the_weights_alone(self) -> None:
        recipes = (Recipe(hidden=4, epochs=100, batch=20, weight_cost=c) for c in (0.0, 2.0))
        free, held = (train(bits(), recipe, new_run(STATIC[0])) for recipe in recipes)
        assert float(held.weights.norm()) < 0.1 * float(free.weights.norm())
        assert float(held.visible.norm()) > 0.5  # biases are not held

    def test_a_centred_step_is_the_gradient_of_the_centred_energy(self) -> None:
        """By enumeration: parameters of E = -(v-mu)'W(h-lambda) - (v-mu)'b' - (h-lambda)'c' follow their gradient."""
        plain, g = machine(4, 3), seeded(2)
        mu, offset = torch.rand(4, generator=g).double(), torch.rand(3, generator=g).double()
        data = (torch.rand(30, 4, generator=g) < mu).double()
        v, h = (states(n, 2, 0, 2**n) for n in (4, 3))

        def log_likelihood(w: Tensor, b: Tensor, c: Tensor) -> Tensor:
            def joint(x: Tensor) -> Tensor:
                x = x - mu
                return x @ w @ (h - offset).T + (x @ b)[:, None] + (h - offset) @ c

            return joint(data).logsumexp(1).mean() - joint(v).logsumexp((0, 1))

        w, b, c = plain
        parts = [p.clone().requires_grad_() for p in (w, b + w @ offset, c + mu @ w)]
        gradient = torch.autograd.grad(log_likelihood(*parts), parts)
        moved = [p.detach() + 0.01 * d for p, d in zip(parts, gradient, strict=True)]
        want = Machine(moved[0], moved[1] - moved[0] @ offset, moved[2] - mu @ moved[0])

        p = torch.softmax(-plain.free_energy(v), 0)
        model = Machine((v * p[:, None]).T @ plain.hidden_mean(v), p @ v, p @ plain.hidden_mean(v))
        step = plain.statistics(data).plus(model, -1.0)
        got = plain.plus(centred(step, mu, offset), 0.01)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_nll_with_annealed_log_z_is_the_exact_one(self) -> None:
        rows, recipe = bits(), Recipe(hidden=6, epochs=30, chains=200, thinning=100)
        found = measured(recipe, rows[:150], rows[150:])
        exact = self.nll(train(rows[:150], recipe, new_run(STATIC[0])), rows[150:])
        for name in ("forward", "reverse", "middle"):
            assert found[f"nll:{name}"].value == pytest.approx(exact, abs=0.1)
        assert found["nll:forward"].kind == "lower_bound"  # log Z too low makes the NLL too good


def test_against_enumeration_small() -> None:
    outcome = against_enumeration.measure(new_run(against_enumeration, sizes="4 5"))
    assert {"error_in_stderr:4", "error:5", "error:worst", "bracket_excess:worst"} <= set(outcome.estimates)
    assert outcome.estimates["error:worst"].value < 1
    assert len(outcome.plots[0].lines[0].x) == 2
    assert states(2, 2, 0, 4).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]  # the order that exact_samples relies on


def test_claims_read_and_their_metrics_exist() -> None:
    claims = claims_of(PAPER).claims
    assert {c.id for c in claims} >= {"C3.10", "C3.20", "C3.bracket", "RBM500.cd25"}
    names = set(measured(Recipe(hidden=3, epochs=1, chains=5, thinning=1000), bits(), bits()))
    for claim in claims:
        if claim.experiment.startswith("static-rbm"):
            assert claim.measure in names
            assert claim.profile == "full"
            assert claim.needs
