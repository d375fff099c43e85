"""Completion and inference: samplers against exact conditionals, measures and baselines against other libraries."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from replicate.experiments import Run
from replicate.ledger.claims import claims_of
from replicate.papers.lecun import PAPER
from replicate.papers.lecun.digits import (
    HALF,
    RIDGE,
    HalfDigits,
    Pairs,
    completion_metrics,
    half_digits,
    ridge_answers,
    simple_answers,
    slopes,
)
from replicate.papers.lecun.families import Settings, flow_completions, inpainted, log_prob_given_upper, vae_completions
from replicate.papers.lecun.inference import BouncingEnergy, displaced, rank_estimates
from replicate.papers.ncsn.langevin import Gaussian
from replicate.registry import model_entry
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.tasks.bouncing import CANVAS, OBSERVED, bouncing
from replicate.tasks.digits import textbook_split
from replicate.tasks.loading import load_task

CPU = torch.device("cpu")
EXPERIMENTS = PAPER.experiments


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data() -> HalfDigits:
    return half_digits(CPU)


# -- the tasks


def test_no_test_digit_is_nearly_a_training_digit() -> None:
    (train, _), _, (test, _) = textbook_split()
    between = torch.cdist(test / 16, train / 16).min()
    within = (torch.cdist(train / 16, train / 16) + 9 * torch.eye(1000)).min()
    assert float(between) == pytest.approx(0.6465, abs=1e-3)
    assert float(within) == pytest.approx(0.5896, abs=1e-3)


def test_the_next_frame_is_one_of_the_displaced_last_frames() -> None:
    pairs = Pairs.of(bouncing().test[:200], OBSERVED * CANVAS**2)
    moved = displaced(pairs.x.view(-1, OBSERVED, CANVAS, CANVAS)[:, -1])
    assert ((moved == pairs.y.unsqueeze(1)).all(2).sum(1) == 1).all()


def test_a_displacement_is_a_roll_where_nothing_leaves_the_canvas() -> None:
    frame = torch.zeros(1, CANVAS, CANVAS)
    frame[:, 4:12, 4:12] = torch.rand(8, 8, generator=generator())
    rolls = [torch.roll(frame, (2 - r, 2 - c), (1, 2)).flatten() for r in range(5) for c in range(5)]
    assert torch.equal(displaced(frame)[0], torch.stack(rolls))


def test_the_energy_of_frames_reads_motion_and_walls_and_not_brightness() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = BouncingEnergy(8, 0.4)
    x = Pairs.of(bouncing().test[:5], OBSERVED * CANVAS**2).x
    torch.testing.assert_close(energy.costs(x), energy.costs(0.5 * x), rtol=1e-4, atol=1e-5)


# -- measures and baselines


def test_the_truth_is_as_sharp_as_itself_and_labelled_as_the_classifier_labels_it(data: HalfDigits) -> None:
    found = completion_metrics(data.test.y.unsqueeze(1), data)
    assert found["squared_error"].value == 0
    assert found["sharpness"].value == pytest.approx(1.0)
    whole = data.features.accuracy(data.task.test, data.labels)
    assert found["agreement"].value == pytest.approx(whole.value)
    assert "diversity" not in found


def test_errors_and_diversity_are_those_of_numpy(data: HalfDigits) -> None:
    y = torch.rand(len(data.test.y), 3, HALF, generator=generator())
    found = completion_metrics(y, data)
    a, t = y.double().numpy(), data.test.y.double().numpy()
    error = ((a - t[:, None]) ** 2).mean(2)
    assert found["squared_error"].value == pytest.approx(error.mean(), rel=1e-5)
    assert found["squared_error_best"].value == pytest.approx(error.min(1).mean(), rel=1e-5)
    assert found["squared_error_mean"].value == pytest.approx(((a.mean(1) - t) ** 2).mean(), rel=1e-5)
    apart = [np.sqrt(((a[:, i] - a[:, j]) ** 2).mean(1)).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["diversity"].value == pytest.approx(np.mean(apart), rel=1e-5)


def test_slopes_are_counted_from_the_row_above_the_lower_half() -> None:
    image = torch.zeros(8, 8)
    image[:4] = 1.0  # one edge, between the fourth and the fifth row
    assert float(slopes(image.flatten())) == pytest.approx(8 / (4 * 8 + 4 * 7))


def test_baselines_are_those_of_scikit_learn(data: HalfDigits) -> None:
    found = simple_answers(data.known, data.test) | {"ridge": ridge_answers(data.known, data.test.x)}
    x, y, new = (part.double().numpy() for part in (*data.known, data.test.x))
    ridge = Ridge(alpha=RIDGE).fit(x, y).predict(new).clip(0, 1)
    np.testing.assert_allclose(found["ridge"][:, 0].numpy(), ridge, atol=1e-5)
    nearest = KNeighborsRegressor(1).fit(x, y).predict(new)
    assert np.mean(np.abs(found["neighbour"][:, 0].numpy() - nearest).max(1) < 1e-6) > 0.99  # ties aside
    np.testing.assert_allclose(found["mean"][0, 0].numpy(), y.mean(0), atol=1e-6)


def test_the_ranking_bound_on_information_is_that_of_a_table() -> None:
    found = rank_estimates(torch.tensor([[0.0, 1.0], [2.0, 0.5]]), generator())["mutual_information:ranking"]
    rows = [math.log(2) - math.log(1 + math.exp(-1.0)), math.log(2) - math.log(1 + math.exp(-1.5))]
    assert found.value == pytest.approx(sum(rows) / 2, rel=1e-5)
    assert found.kind == "lower_bound"


# -- the families


def small_causal_conv() -> Any:
    task = load_task("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model_entry("causal-conv").build(task.info, width=8, layers=2).eval()


@torch.no_grad()
def test_rows_are_continued_from_the_model_s_own_conditionals(monkeypatch: pytest.MonkeyPatch) -> None:
    net, upper = small_causal_conv(), load_task("digits").test[:6, :HALF]
    seen: list[Tensor] = []
    draw = net.head.sample
    monkeypatch.setattr(net.head, "sample", lambda p, g: seen.append(p) or draw(p, g))
    lower = net.continued(upper, generator())
    expected = net.conditionals(torch.cat([upper, lower], dim=1))[:, HALF:]
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_log_p_of_the_lower_half_given_the_upper_is_what_a_change_of_it_changes() -> None:
    net, x = small_causal_conv(), load_task("digits").test[:6]
    other = torch.cat([x[:, :HALF], x[:, HALF:].flip(0)], dim=1)
    difference = net.log_prob(x) - net.log_prob(other)
    given = log_prob_given_upper
    torch.testing.assert_close(given(net, x) - given(net, other), difference, rtol=1e-4, atol=1e-3)


class GaussianWhole:
    """A stand-in for a trained model: 64 correlated Gaussian numbers with exact density and noise prediction."""

    def __init__(self) -> None:
        index = torch.arange(2 * HALF, dtype=torch.float64)
        covariance = 0.7 ** (index[:, None] - index).abs()
        self.law = Gaussian(torch.zeros(2 * HALF, dtype=torch.float64), covariance, HALF)
        self.variance, self.basis = torch.linalg.eigh(covariance)
        self.inner = SimpleNamespace(log_prob=self.log_prob, net=self.noise)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * ((z @ self.law.noised_precision(0.0)) * z).sum(1)

    def noise(self, z: Tensor, log_level: Tensor) -> Tensor:
        level = float(log_level[0].exp())
        return level * (z @ self.basis / (self.variance + level**2)) @ self.basis.T

    class Identity:
        def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return x, x.sum(1)

        def inverse(self, z: Tensor) -> Tensor:
            return z

    transform = Identity()


@pytest.mark.parametrize("family", ["realnvp", "sde-vp"])
@torch.no_grad()
def test_completion_in_a_continuous_space_has_the_conditional_law(family: str) -> None:
    model: Any = GaussianWhole()
    observed = torch.linspace(-1, 1, HALF, dtype=torch.float64)
    upper = observed.expand(1000, HALF)
    settings = Settings(langevin_steps=150, noise_levels=60, steps_per_level=10, noise_step_size=0.2)
    if family == "realnvp":
        drawn, acceptance = flow_completions(model, upper, settings, generator())
        assert 0.5 < acceptance < 1
    else:
        drawn = inpainted(model, upper, settings, generator())
    mean, covariance = model.law.conditional(observed)
    sd = covariance.diagonal().sqrt()
    assert float(((drawn.mean(0) - mean) / sd).abs().max()) < 0.2
    assert float((drawn.std(0) / sd - 1).abs().max()) < 0.15


@torch.no_grad()
def test_langevin_of_the_latent_finds_the_posterior_of_a_small_autoencoder() -> None:
    """One latent number: its posterior given the upper half by quadrature, and through it each pixel's mean."""
    task = load_task("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae = model_entry("vae").build(task.info, latent=1, width=8, components=1).eval()
    vae.initialise(task.train, generator())
    upper = task.test[:1, :HALF]
    z = torch.linspace(-6, 6, 601)[:, None]
    logits = vae.decoder.logits(vae.decode(z)).log_softmax(-1)
    fit = logits[:, :HALF].gather(-1, upper.long().expand(601, HALF).unsqueeze(-1)).squeeze(-1).sum(1)
    weight = (vae.prior.log_prob(z) + fit).softmax(0)
    shares = torch.einsum("z,zdl->dl", weight, logits[:, HALF:].exp())
    level = torch.arange(17.0)
    expected = shares @ level
    sd = (shares @ level.square() - expected.square()).sqrt()
    many, mean = upper.expand(400, HALF), task.train[:, HALF:].mean(0)
    drawn, acceptance = vae_completions(vae, many, mean, Settings(langevin_steps=60), generator())
    assert acceptance > 0.3
    off = (drawn.mean(0) - expected) * 400**0.5 / sd.clamp_min(0.1)
    assert float(off.abs().max()) < 4.5  # standard errors, the largest of 32


# -- the experiments


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=[e.name for e in EXPERIMENTS])
def test_the_experiments_at_smoke_settings_measure_what_the_claims_ask(experiment: Any) -> None:
    def once() -> Outcome:
        outcome: Outcome = experiment.measure(
            Run(experiment.settings("smoke"), Streams(experiment.name, "lecun", 0), CPU)
        )
        return outcome

    outcome, again = once(), once()

    def lasting(found: Outcome) -> dict[str, float]:
        return {k: e.value for k, e in found.estimates.items() if not k.startswith("time_")}

    assert all(math.isfinite(v) for v in lasting(outcome).values())
    assert lasting(outcome) == lasting(again)
    asked = set()
    for claim in claims_of(PAPER).claims:
        for measure in (claim.measure, claim.minus):
            task, _, metric = measure.rpartition("/lecun/")
            if measure and (task or claim.experiment) == experiment.name:
                asked.add(metric)
        if claim.experiment == experiment.name:
            assert set(claim.plots) <= {plot.name for plot in outcome.plots}
    assert asked
    assert asked <= set(outcome.estimates)
