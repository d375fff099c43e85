"""Dequantisers against quadrature and Jacobians, inpainting against a conditional, and the experiments on images."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sessions import Sitting, found
from torch import Tensor

from replicate.experiments import Experiment, Run, image_scores
from replicate.ledger.claims import claims_of, resolved
from replicate.model import DataInfo, Estimate, Training
from replicate.papers import score_sde, scoreflow
from replicate.papers.score_sde.images import DIFFUSIONS, denoised, hidden_error
from replicate.papers.scoreflow.images import WEIGHTINGS
from replicate.resume import State
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.runs.training import train
from replicate.sampling.annealed import annealed_langevin
from replicate.score_based.diffusion import UniformTime
from replicate.score_based.images import (
    SDES,
    DequantisedImages,
    LearnedDequantisation,
    ScaledLevels,
    VariationalDequantiser,
    build_diffusion,
    build_ncsn,
    even_levels,
    inpaint,
)
from replicate.tasks.base import Task

EXPERIMENTS = {e.name: e for e in (*WEIGHTINGS, *DIFFUSIONS)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dequantiser(image: tuple[int, int], levels: int = 3, stirred: bool = True) -> VariationalDequantiser:
    """A dequantiser of width 4 as before training, or with weights drawn at random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        q = VariationalDequantiser(image, levels, channels=4)
        if stirred:
            for p in q.parameters():
                p.data += 0.15 * torch.randn(p.shape)
    return q.double()


# -- dequantisation


def test_before_training_the_dequantiser_is_uniform() -> None:
    q, x = dequantiser((2, 3), stirred=False), torch.zeros(50, 6)
    u, log_q = q.sample(x, generator())
    torch.testing.assert_close(log_q, torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(u, torch.rand(50, 6, generator=generator(), dtype=torch.float64))


def test_its_density_integrates_to_one() -> None:
    """By the trapezoidal rule over the logits of two pixels, for two images."""
    q = dequantiser((1, 2))
    a = torch.linspace(-20, 20, 121, dtype=torch.float64)
    u = torch.sigmoid(torch.cartesian_prod(a, a))
    for x in ((0.0, 2.0), (1.0, 1.0)):
        with torch.no_grad():
            density = q.log_prob(u, torch.tensor(x).expand(len(u), 2)).exp() * (u * (1 - u)).prod(1)
        assert float(density.sum() * (a[1] - a[0]) ** 2) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("image", [(1, 1), (2, 2), (3, 2)])
def test_a_draw_s_log_density_is_that_of_the_inverse_flow_and_of_the_jacobian(image: tuple[int, int]) -> None:
    dim = image[0] * image[1]
    q, x = dequantiser(image), torch.randint(0, 3, (4, dim), generator=generator(1)).double()
    u, log_q = q.sample(x, generator(2))
    torch.testing.assert_close(q.log_prob(u, x), log_q)
    uniform = torch.rand(4, dim, generator=generator(2), dtype=torch.float64)
    assert not torch.allclose(u, uniform, atol=0.01)
    for row, at, value in zip(uniform, x, log_q, strict=True):
        # the flow as a map of uniform noise: its log density is minus the log determinant
        jacobian = torch.autograd.functional.jacobian(lambda v, at=at: flow_of(q, v, at), row)
        assert float(-torch.linalg.slogdet(jacobian).logabsdet) == pytest.approx(float(value.detach()), abs=1e-8)


def flow_of(q: VariationalDequantiser, uniform: Tensor, x: Tensor) -> Tensor:
    """u (D,) that the flow makes of one row of uniform noise."""
    a = torch.logit(uniform)[None]
    for i in range(len(q.nets)):
        log_scale, shift = q._affine(i, a, x[None])
        a = a * log_scale.exp() + shift
    return torch.sigmoid(a)[0]


def test_levels_come_back_and_volumes_are_those_of_the_map() -> None:
    x = torch.randint(0, 256, (50, 16), generator=generator()).float()
    for q in (None, dequantiser((4, 4), 256)):
        transform = ScaledLevels(256, q)
        y, log_volume = transform(x, generator(1))
        assert y.dtype == torch.float32
        assert y.min() >= -1
        assert y.max() <= 1
        assert torch.equal(transform.inverse(y), x)
        log_q = 0.0 if q is None else q.sample(x, generator(1))[1]
        torch.testing.assert_close(log_volume, (torch.zeros(50) - 16 * math.log(128) - log_q).float())


def made_up() -> tuple[Tensor, Tensor]:
    """All 1x2 images of three levels (9, 2) and a probability for each (9,)."""
    images = torch.tensor(list(itertools.product((0.0, 1.0, 2.0), repeat=2)))
    weights = torch.tensor([5.0, 1, 1, 1, 4, 1, 2, 1, 3], dtype=torch.float64)
    return images, weights / weights.sum()


def test_no_density_s_bound_is_below_the_entropy_of_the_images() -> None:
    """Whatever q, in expectation."""
    images, p = made_up()
    entropy = -float((p * p.log()).sum())
    transform = ScaledLevels(3, dequantiser((1, 2)))
    x = images[torch.multinomial(p, 10_000, True, generator=generator())].double()
    y, log_volume = (v.detach() for v in transform(x, generator(1)))
    gaussian = torch.distributions.MultivariateNormal(y.mean(0), torch.cov(y.T))
    bound = -(gaussian.log_prob(y) + log_volume)
    assert float(bound.mean()) > entropy + 4 * float(bound.std()) / 100
    # the density of the images spread over their bins by q reaches the entropy when q is its own conditional
    cell = p.view(3, 3)[x[:, 0].long(), x[:, 1].long()].log()
    u = (y + 1) / 2 * 3 - x
    own = transform.dequantiser.log_prob(u, x).detach()  # type: ignore[union-attr]
    exact = -(cell + own + 2 * math.log(3 / 2) + log_volume)
    torch.testing.assert_close(exact, -cell, rtol=0, atol=1e-6)


INFO = DataInfo(16, "levels", 4, (4, 4))


def tiny_diffusion() -> DequantisedImages:
    """An untrained VP model of 4x4 images of 4 levels with its Gaussian fit, and images that are 0 half the time."""
    sde = SDES["vp"]
    model = DequantisedImages(build_diffusion(INFO, sde, even_levels(sde), "likelihood", 2, channels=4), INFO)
    model.initialise(tiny_images(), generator(1))
    return model


def tiny_images() -> Tensor:
    return (torch.randint(-4, 4, (200, 16), generator=generator())).clamp_min(0).float()


def test_a_learned_dequantiser_lowers_the_bound_and_leaves_the_score_model_alone() -> None:
    """On a Gaussian, whose log p is known: uniform bins do not suit it."""
    base = tiny_diffusion()
    before = {k: v.clone() for k, v in base.inner.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LearnedDequantisation(base.inner, INFO, channels=4)  # type: ignore[arg-type]
    settings = Training(steps=25, batch_size=32, lr=3e-2)
    train(model, tiny_images(), tiny_images(), settings, Streams("t", "m", 0))
    assert all(torch.equal(v, before[k]) for k, v in base.inner.state_dict().items())
    fit, _ = base.transform(tiny_images(), generator(1))
    gaussian = torch.distributions.MultivariateNormal(fit.mean(0), torch.cov(fit.T, correction=0))
    x = tiny_images().repeat(5, 1)
    bounds = {}
    for name, one in {"uniform": base, "learned": model}.items():
        y, log_volume = one.transform(x, generator(3))
        bounds[name] = (gaussian.log_prob(y) + log_volume).detach()
    gain = bounds["learned"] - bounds["uniform"]
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(x))


# -- inpainting and the last step


def test_inpainting_a_gaussian_follows_its_conditional() -> None:
    """At the last level: the noised hidden part given the known part with that level's noise, in closed form."""
    covariance = 0.25 * 0.9 ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double()
    known, observed = torch.tensor([True, False, True, False]), torch.tensor([0.8, 9.0, 0.1, 9.0]).double()
    sigmas = torch.logspace(0, -0.8, 5).double()
    last = float(sigmas[-1])

    def score_at(x: Tensor, sigma: Tensor) -> Tensor:
        return -x @ torch.linalg.inv(covariance + sigma[0] ** 2 * torch.eye(4).double())

    start = torch.randn(3000, 4, generator=generator(1), dtype=torch.float64)
    chain = inpaint(score_at, sigmas, observed.expand(3000, 4), known, start, 100, 0.2 * last**2, generator())
    assert chain.nfe == 500
    noised = covariance + last**2 * torch.eye(4).double()
    gain = torch.linalg.solve(noised[known][:, known], noised[known][:, ~known]).T
    spread = noised[~known][:, ~known] - gain @ noised[known][:, ~known] + last**2 * gain @ gain.T
    hidden, pasted = chain.samples[:, ~known], chain.samples[:, known] - observed[known]
    torch.testing.assert_close(hidden.mean(0), gain @ observed[known], rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(hidden.T), spread, rtol=0.08, atol=2e-3)
    torch.testing.assert_close(torch.cov(pasted.T), last**2 * torch.eye(2).double(), rtol=0.1, atol=2e-3)


def test_the_denoising_step_is_that_of_annealed_langevin() -> None:
    model = DequantisedImages(build_ncsn(INFO, (2.0, 0.1, 3, 2, 0.4), channels=4), INFO)
    model.initialise(tiny_images(), generator(1))
    inner: Any = model.inner
    start = inner.sigmas[0] * torch.randn(5, 16, generator=(g := generator(2)))
    chain = annealed_langevin(inner.score_at_level, inner.sigmas, start, 2, 0.4 * 0.1**2, g, denoise=True)
    torch.testing.assert_close(denoised(inner, inner.sample(5, generator(2))), chain.samples)


# -- experiments

TINY: dict[str, Any] = {
    "channels": 4,
    "steps": 2,
    "batch_size": 4,
    "rows": 6,
    "samples": 5,
    "reference": 8,
    "ode_steps": 2,
    "bound_levels": 1,
    "sample_steps": 1,
    "dequantiser_steps": 2,
    "dequantiser_channels": 4,
    "levels": 2,
    "steps_per_level": 2,
    "inpainted": 3,
}


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up 4x8 images of 256 levels in place of the files, and their mean in place of a classifier's features."""
    x = (torch.randint(-256, 256, (30, 32), generator=generator())).clamp_min(0).float()
    task = Task("mnist", "made up", DataInfo(32, "levels", 256, (4, 8)), x[:10], x[10:20], x[20:])

    def quality(samples: Tensor, real: Tensor, name: str) -> dict[str, Estimate]:
        assert name in ("mnist", "fashion-mnist")
        assert samples.shape[1:] == real.shape[1:] == (32,)
        return {"frechet": Estimate(float(samples.mean() - real.mean()) ** 2, 0.0, "estimate", "grey levels", 5)}

    monkeypatch.setattr(image_scores, "task_entry", lambda name: SimpleNamespace(load=lambda: task))
    monkeypatch.setattr(image_scores, "sample_quality", quality)
    monkeypatch.setattr("replicate.metrics.inception.find", lambda name: None)
    monkeypatch.setattr(image_scores, "image_features", lambda name: SimpleNamespace(sha256="f" * 64))


def new_run(what: Experiment, stage: str = "", **changes: Any) -> Run:
    tiny = {k: v for k, v in TINY.items() if k in what.params}
    return Run({**what.params, **tiny, **changes}, Streams(stage + what.name, "t", 0), torch.device("cpu"))


def outcome(name: str) -> Outcome:
    return EXPERIMENTS[name].measure(new_run(EXPERIMENTS[name]))


@pytest.mark.parametrize("name", ["score-mnist-subvp-plain", "score-mnist-vp-variational", "ncsn-mnist"])
def test_an_experiment_killed_twice_ends_with_the_same_bits(name: str) -> None:
    undisturbed = Sitting()
    want = undisturbed.outcome(lambda: outcome(name))
    part = math.ceil(0.35 * undisturbed.count)
    first = Sitting(last=part)
    assert first.outcome(lambda: outcome(name)) is None
    second = Sitting(first.kept, last=part)
    assert second.outcome(lambda: outcome(name)) is None
    rest = Sitting(second.kept)
    again = rest.outcome(lambda: outcome(name))
    assert want is not None
    assert again is not None
    assert found(again) == found(want)
    assert first.count + second.count + rest.count == undisturbed.count


@cache
def asked(name: str) -> frozenset[str]:
    """Metrics of an experiment that the claims of both papers name; at least one."""
    found = set()
    for paper in (scoreflow.PAPER, score_sde.PAPER):
        for claim in claims_of(paper).claims:
            measures = [resolved(m, claim, paper.key) for m in (claim.measure, claim.minus, claim.over) if m]
            found |= {m.split("/")[2] for m in measures if m.startswith(f"{name}/{paper_of(name)}/")}
    assert found
    return frozenset(found)


def paper_of(name: str) -> str:
    """The paper that lists an experiment."""
    (key,) = (p.key for p in (scoreflow.PAPER, score_sde.PAPER) if name in {e.name for e in p.experiments})
    return key


@pytest.mark.parametrize("name", ["score-mnist-vp", "ncsn-mnist"])
def test_with_the_weights_on_disk_every_variant_has_a_fid_and_the_record_names_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = outcome(name)
    fids = {metric for metric in without.missing if metric.startswith("fid")}
    assert fids == ({"fid", "fid:denoised"} if name == "ncsn-mnist" else {"fid"})
    assert all("is not in REPLICATE_DATA" in without.missing[metric] for metric in fids)

    def features(x: Tensor, image: tuple[int, int], device: torch.device) -> Tensor:
        return x.view(-1, *image).mean(1)

    monkeypatch.setattr(image_scores, "unavailable", lambda: "")
    monkeypatch.setattr(image_scores, "inception", lambda: SimpleNamespace(features=features, sha256="e" * 64))
    found = outcome(name)
    assert found.estimates.keys() - without.estimates.keys() == fids
    assert all(found.estimates[metric].unit == "squared feature distance" for metric in fids)
    assert found.classifiers == {**without.classifiers, "inception": "e" * 64}
    assert not found.missing


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_measures_what_the_claims_ask_and_what_the_report_draws(name: str) -> None:
    found = outcome(name)
    assert all(math.isfinite(e.value) for e in found.estimates.values())
    assert asked(name) <= found.estimates.keys()
    assert {plot.name for plot in found.plots} >= {"samples", "training"}
    for plot in found.plots:
        rows = plot.as_dict()["lines"]
        assert all(len(row["y"]) % 32 == 0 or plot.image is None for row in rows)
    if "nll" in found.estimates:
        nll, bits = found.estimates["nll"], found.estimates["bits_per_dim"]
        assert nll.kind == bits.kind == "upper_bound"
        assert bits.value == pytest.approx(nll.value / (32 * math.log(2)))
        log_p = found.examples["mnist"]
        assert log_p.kind == "lower_bound"
        assert float(log_p.values.mean()) == pytest.approx(-nll.value)
        assert len(log_p.values) == TINY["rows"]


def weights(what: Experiment, stage: str = "", **changes: Any) -> State:
    """The trained diffusion model of an experiment."""
    run = new_run(what, stage, **changes)
    names = {f.name for f in fields(image_scores.DiffusionSettings)}
    settings = image_scores.DiffusionSettings(**{k: v for k, v in run.settings.items() if k in names})
    return image_scores.train_diffusion(run, settings, image_scores.load(run, settings))[0].state_dict()


def test_experiments_pair_by_seed_and_designs_are_not_judged() -> None:
    """The same first weights everywhere, and the dequantiser's score model is score-mnist-vp's to the bit."""
    a, b = (weights(EXPERIMENTS[name]) for name in ("score-mnist-vp", "score-mnist-vp-variational"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    first, other, judged = (
        weights(EXPERIMENTS[name], stage, steps=0)
        for name, stage in (("score-mnist-vp-plain", ""), ("score-mnist-ve", ""), ("score-mnist-vp", "judged/"))
    )
    key = "inner.net.net.first.weight"
    assert torch.equal(first[key], other[key])
    assert not torch.equal(first[key], judged[key])


def test_plain_times_are_uniform_and_likelihood_s_are_even_in_log_rho() -> None:
    sde = SDES["vp"]
    proposal, weighting = image_scores.proposal_of(sde, "plain")
    assert isinstance(proposal, UniformTime)
    assert weighting == "proposal"
    proposal, weighting = image_scores.proposal_of(sde, "likelihood")
    density = proposal.density(torch.linspace(proposal.low, proposal.high, 9))
    torch.testing.assert_close(density, torch.full((9,), 1 / (proposal.high - proposal.low)))
    assert weighting == "likelihood"


def test_hidden_errors_are_over_the_unknown_pixels_alone() -> None:
    known = torch.tensor([True, False, False])
    found = hidden_error(torch.tensor([[9.0, 3, 4], [9, 3, 4]]), torch.zeros(2, 3), known)
    assert found.value == pytest.approx(math.sqrt(12.5))
    assert found.stderr == pytest.approx(0.0)
