"""The kernels' stationary laws against closed forms and scipy, and the samplers against the kernels; each run once."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.papers.roberts import PAPER, check_chains, kernel_bias
from replicate.papers.roberts.langevin import (
    SMALL,
    TARGETS,
    Gridded,
    gaussian_width,
    kl_divergence,
    stationary,
    variance,
    wasserstein,
)
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.sampling.langevin import mala, ula


def measured(experiment: Experiment) -> Outcome:
    streams = Streams(experiment.name, "roberts", 0)
    return experiment.measure(Run(experiment.settings("smoke"), streams, torch.device("cpu")))


@pytest.mark.parametrize("name", TARGETS)
def test_scores_are_the_derivatives_of_the_log_densities(name: str) -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).requires_grad_(True)
    (grad,) = torch.autograd.grad(TARGETS[name].log_density(x).sum(), x)
    torch.testing.assert_close(TARGETS[name].score(x.detach()), grad)


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0])
def test_ula_s_law_on_a_gaussian_is_the_closed_form(eps: float) -> None:
    grid = Gridded.of(TARGETS["gaussian"], eps, 0.7)
    law = stationary(grid.proposal)
    width = 1 / math.sqrt(1 - eps / 4)
    expected = stats.norm.pdf(grid.x.numpy(), scale=width) * float(grid.x[1] - grid.x[0])
    torch.testing.assert_close(law, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert gaussian_width(eps) == pytest.approx(width)
    kl = 0.5 * (width**2 - 1 - math.log(width**2))
    assert kl_divergence(law, grid.p) == pytest.approx(kl, rel=1e-6)
    assert wasserstein(grid.x, law, grid.p) == pytest.approx(width - 1, rel=2e-3)


def test_the_laws_do_not_depend_on_the_grid() -> None:
    for target in TARGETS.values():
        coarse, fine = (Gridded.of(target, 0.2, spacing) for spacing in (0.7, 0.25))
        a, b = (variance(g.x, stationary(g.proposal)) for g in (coarse, fine))
        assert a == pytest.approx(b, rel=1e-9)


def test_the_laws_are_those_of_the_samplers() -> None:
    """Second moments of long chains of the suite's own samplers, where the law has no closed form."""
    target, eps, n = TARGETS["two-gaussians"], 3.0, 2000
    start = 2 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = Gridded.of(target, eps, 0.35)
    assert variance(grid.x, grid.p) == pytest.approx(5.0, rel=1e-9)
    biased = variance(grid.x, stationary(grid.proposal))
    assert biased > 5.5

    def log_density(x: Tensor) -> Tensor:
        return target.log_density(x).squeeze(-1)

    generator = torch.Generator().manual_seed(1)
    plain = ula(target.score, start, 200, eps, generator, record_every=2).path
    adjusted = mala(log_density, target.score, start, 200, eps, generator, record_every=2).path
    for path, expected in ((plain, biased), (adjusted, 5.0)):
        assert path is not None
        assert float(path[20:].square().mean()) == pytest.approx(expected, rel=0.02)


def test_mala_keeps_the_density_and_its_acceptance_is_the_integral() -> None:
    grid = Gridded.of(TARGETS["gaussian"], 2.0, 0.1)
    kernel = grid.adjusted()
    torch.testing.assert_close(kernel.sum(1), torch.ones(len(kernel), dtype=torch.float64))
    flow = grid.p[:, None] * kernel
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)

    # step size 2 on N(0, 1): proposals are N(0, 2) wherever the chain is, one more likely to be better than its origin
    # where it is nearer to 0, so acceptance is 2 P(sqrt(2) |z| < |x|) for independent standard normal z and x
    assert grid.acceptance() == pytest.approx(4 / math.pi * math.atan(1 / math.sqrt(2)), abs=1e-3)


def test_wasserstein_is_the_shift_and_the_stretch() -> None:
    x = torch.linspace(-20, 20, 801, dtype=torch.float64)

    def law(mean: float, sd: float) -> Tensor:
        p = torch.from_numpy(stats.norm.pdf(x.numpy(), mean, sd))
        return p / p.sum()

    assert wasserstein(x, law(0, 1), law(0.3, 1)) == pytest.approx(0.3, rel=1e-4)
    assert wasserstein(x, law(0.1, 1.2), law(0, 1)) == pytest.approx(math.hypot(0.1, 0.2), rel=1e-3)


def test_the_kernel_experiment_finds_the_orders() -> None:
    found = measured(kernel_bias)
    assert found.estimates["order_w2:gaussian"].value == pytest.approx(1, abs=0.05)
    assert found.estimates["order_kl:gaussian"].value == pytest.approx(2, abs=0.1)
    assert {p.name for p in found.plots} == {"bias", "acceptance"}
    assert min(SMALL) == found.plots[0].lines[0].x[0]


def test_the_chains_experiment_finds_what_the_theorems_say() -> None:
    e = measured(check_chains).estimates
    assert e["left_share:ula_far"].value == 1
    assert e["left_share:mala_far"].value == e["acceptance:far"].value == 0
    assert e["acceptance:largest_step"].value < e["acceptance:smallest_step"].value
    assert e["growth:edge"].value == pytest.approx(4, abs=1.5)
    assert e["growth:beyond"].value == pytest.approx(math.log(9 / 4), abs=0.05)


def test_every_claim_and_plot_is_there() -> None:
    claims = claims_of(PAPER).claims
    metrics = {e.name: set(measured(e).estimates) for e in PAPER.experiments}
    assert all(c.measure in metrics[c.experiment] for c in claims)
