"""The ICA benchmark against scipy, quadrature and autograd; each experiment once, tiny."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from replicate.experiments import Experiment, Run, ica
from replicate.experiments.ica import Ica
from replicate.ledger.claims import claims_of
from replicate.papers.lsd import PAPER
from replicate.papers.lsd import components as lsd
from replicate.papers.lsd.components import Objective
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.score_based import matching

W = torch.tensor([[1.3, 0.4], [-0.5, 0.9]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stratified(points: int, w: Tensor) -> Tensor:
    """x = W^-1 s on the grid of the sources' quantiles: means over it are integrals over the density."""
    s = torch.logit((torch.arange(points, dtype=torch.float64) + 0.5) / points)
    grid = torch.cartesian_prod(s, s)
    return torch.linalg.solve(w, grid.T).T


def test_the_density_is_scipy_s_and_log_z_is_exact() -> None:
    model = Ica(W)
    x = torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    expected = stats.logistic.logpdf((x @ W.T).numpy()).sum(1) + math.log(abs(np.linalg.det(W.numpy())))
    np.testing.assert_allclose(model.log_prob(x).numpy(), expected, rtol=1e-12)
    line = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    z = model.log_density(torch.cartesian_prod(line, line)).exp().sum() * float(line[1] - line[0]) ** 2
    assert float(z.log()) == pytest.approx(float(model.log_z()), abs=1e-8)


def test_score_and_laplacian_are_those_of_autograd() -> None:
    model = Ica(torch.randn(4, 4, generator=generator(1), dtype=torch.float64))
    x = torch.randn(30, 4, generator=generator(), dtype=torch.float64).requires_grad_(True)
    (grad,) = torch.autograd.grad(model.log_density(x).sum(), x)
    torch.testing.assert_close(model.score(x.detach()), grad)
    closed = lsd.score_matching(x.detach())(model, torch.zeros(()))
    by_traces = matching.implicit_score_matching(model.score, x.detach()).mean()
    torch.testing.assert_close(closed, by_traces.detach())


def test_samples_have_logistic_sources() -> None:
    s = Ica(W).sample(20_000, generator()) @ W.T
    for column in s.T:
        assert stats.kstest(column.numpy(), "logistic").pvalue > 1e-3
    assert abs(float(torch.corrcoef(s.T)[0, 1])) < 0.03
    for seed in range(5):
        assert np.linalg.cond(ica.draw_unmixing(5, generator(seed)).numpy()) < 5


def gradient(objective: Objective, w: Tensor, c: float) -> Tensor:
    theta = torch.cat([w.flatten(), torch.tensor([c], dtype=torch.float64)]).requires_grad_(True)
    (grad,) = torch.autograd.grad(objective(Ica(theta[:-1].view(2, 2)), theta[-1]), theta)
    return grad


@pytest.mark.parametrize("name", ["mle", "sm", "ssm", "ssm-vr", "nce", "nce-full"])
def test_consistent_objectives_are_stationary_at_the_truth(name: str) -> None:
    x = stratified(500, W)
    g = generator(2)
    objective = {
        "mle": lambda: lsd.maximum_likelihood(x),
        "sm": lambda: lsd.score_matching(x),
        "ssm": lambda: lsd.sliced(x, False, g),
        "ssm-vr": lambda: lsd.sliced(x, True, g),
        "nce": lambda: lsd.contrasting(x, True, g),
        "nce-full": lambda: lsd.contrasting(x, False, g),
    }[name]()
    true_c = -float(Ica(W).log_z())
    at_truth = gradient(objective, W, true_c).abs().max()
    beside = gradient(objective, 1.1 * W, true_c).abs().max()
    assert at_truth < 0.02
    assert beside > 3 * at_truth


def test_denoising_is_not_stationary_at_the_truth_but_at_a_wider_model() -> None:
    x = stratified(300, W)
    objective = lsd.denoising(x, 0.5, generator())
    assert gradient(objective, W, 0.0).abs().max() > 0.05
    white = ica.whitening(x)
    fit = lsd.minimum(objective, W @ torch.linalg.inv(white), white)
    assert float(Ica(fit.w).log_z()) > float(Ica(W).log_z()) + 0.05


def test_the_minimum_of_maximum_likelihood_is_scipy_s() -> None:
    x = 0.6 * torch.logit(torch.rand(300, 1, generator=generator(), dtype=torch.float64))
    fit = lsd.minimum(lsd.maximum_likelihood(x), torch.ones(1, 1, dtype=torch.float64), torch.eye(1).double())
    _, scale = stats.logistic.fit(x[:, 0].numpy(), floc=0)
    assert float(fit.w.abs()) == pytest.approx(1 / scale, rel=1e-3)


def test_whitening_and_rotation() -> None:
    x = Ica(W).sample(500, generator())
    torch.testing.assert_close(torch.cov((x @ ica.whitening(x).T).T), torch.eye(2, dtype=torch.float64))
    q = ica.rotation(4, generator())
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64))


def test_contrastive_divergence_climbs_to_maximum_likelihood() -> None:
    x = Ica(W).sample(2000, generator(3))
    white = ica.whitening(x)
    settings = lsd.Settings(2, cd_updates=80, cd_lr=0.2, cd_steps=1, cd_step_size=1.0)
    start = 0.5 * ica.rotation(2, generator(4))
    fit = lsd.contrastive_divergence(x, start, white, settings, generator(5))
    best = lsd.minimum(lsd.maximum_likelihood(x), start, white)
    fresh = Ica(W).sample(20_000, generator(6))
    loss = float((Ica(best.w).log_prob(fresh) - Ica(fit.w).log_prob(fresh)).mean())
    assert abs(loss) < 0.01
    assert float((Ica(best.w).log_prob(fresh) - Ica(fit.path[0] @ white).log_prob(fresh)).mean()) > 0.2


@pytest.mark.parametrize("experiment", PAPER.experiments, ids=lambda e: e.name)
def test_experiments_run_and_repeat(experiment: Experiment) -> None:
    dim = min(experiment.params["dim"], 5)
    settings = {**experiment.settings("smoke"), "dim": dim, "examples": 200, "test_examples": 500, "cd_updates": 3}

    def outcome() -> Outcome:
        return experiment.measure(Run(settings, Streams(experiment.name, "lsd", 0), torch.device("cpu")))

    first, second = outcome(), outcome()
    assert first.estimates == second.estimates or str(first.estimates) == str(second.estimates)  # nan != nan
    for name, estimate in first.estimates.items():
        assert math.isfinite(estimate.value), name
    gap = first.estimates["log_likelihood:truth"].value - first.estimates["log_likelihood:sm"].value
    assert first.estimates["gap:sm"].value == pytest.approx(gap)
    (plot,) = first.plots
    assert {line.label for line in plot.lines} >= {"mle", "cd", "nce"}


def test_claims_measure_what_the_experiments_give() -> None:
    claims = claims_of(PAPER).claims
    experiment = PAPER.experiments[0]
    settings = {**experiment.settings("smoke"), "examples": 100, "test_examples": 100, "cd_updates": 1}
    found = experiment.measure(Run(settings, Streams(experiment.name, "lsd", 1), torch.device("cpu")))
    for claim in claims:
        for measure in filter(None, (claim.measure, claim.minus, claim.over)):
            assert measure.split("/")[-1] in found.estimates, claim.id
        assert found.estimates[claim.measure].unit == claim.unit, claim.id
        assert set(claim.plots) <= {p.name for p in found.plots}
