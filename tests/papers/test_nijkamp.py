"""Short runs and long runs on tiny images: what the experiments measure, and that a killed run resumes bit for bit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sessions import Sitting, found
from hypothesis import given
from hypothesis import strategies as st

from baselines.conv_ebm import ConvEBM
from replicate.errors import TrainingError
from replicate.experiments import Experiment, Run
from replicate.ledger.claims import claims_of
from replicate.model import DataInfo, Estimate, LogLikelihood
from replicate.papers.nijkamp import PAPER, chains
from replicate.papers.nijkamp.chains import (
    Settings,
    Study,
    TiltedSettings,
    on_digits,
    on_mnist,
    to_levels,
    to_pixels,
)
from replicate.runs.experiment import Outcome
from replicate.runs.seeds import Streams
from replicate.tasks.base import Task

TINY: dict[str, Any] = {
    "width": 2,
    "layers": 1,
    "batch_size": 16,
    "chains": 30,
    "fresh_updates": 4,
    "fresh_steps": 3,
    "replay_updates": 5,
    "replay_steps": 2,
    "restart": 0.5,
    "samples": 20,
    "long_run": 20,
}
TINY_TILTED = {"tilted_updates": 4, "tilted_chains": 16, "annealing": 4, "after": 4, "ais_chains": 8, "ais_steps": 6}


def made_up(name: str) -> Task:
    """6x6 images of 5 grey levels, darker to the right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(130, 36, generator=generator).cumsum(1).view(130, 6, 6)
    x = (5 * x / x.amax((1, 2), keepdim=True)).floor().clamp(max=4).view(130, 36)
    return Task(name, "", DataInfo(36, "levels", 5, (6, 6)), x[:70], x[70:100], x[100:])


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny images in place of both data sets, and pixels in place of a classifier's features."""
    judge = SimpleNamespace(
        features=lambda x: x[:, ::9].cpu(), probabilities=lambda x: x[:, ::9].cpu().softmax(1), sha256="f" * 64
    )
    monkeypatch.setattr(chains, "digits", lambda: made_up("digits"))
    monkeypatch.setattr(chains, "mnist", lambda: made_up("mnist"))
    monkeypatch.setattr(chains, "task_features", lambda task: judge)


def new_run(what: Experiment, seed: int = 0) -> Run:
    tiny = TINY | (TINY_TILTED if what is on_mnist else {})
    return Run({**what.params, **tiny}, Streams(what.name, "t", seed), torch.device("cpu"))


def new_study(what: Experiment) -> Study:
    run, kind = new_run(what), TiltedSettings if what is on_mnist else Settings
    return Study(run, kind(**run.settings), made_up("mnist" if what is on_mnist else "digits"))


@given(levels=st.integers(2, 256), seed=st.integers(0, 100))
def test_a_dequantised_level_is_read_back(levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (20, 3), generator=generator).float()
    y = to_pixels(x, levels, generator)
    assert float(y.abs().max()) <= 1
    assert torch.equal(to_levels(y, levels), x)
    assert torch.equal(to_levels(torch.tensor([-3.0, 3.0]), levels), torch.tensor([0.0, levels - 1]))


def test_fresh_chains_always_restart_and_replayed_ones_sometimes() -> None:
    settings = Settings()
    assert settings.method("fresh") == (settings.fresh_updates, settings.fresh_steps, 1.0)
    assert settings.method("replay") == (settings.replay_updates, settings.replay_steps, settings.restart)


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("what", [on_digits, on_mnist], ids=lambda e: e.name)
def test_experiments_measure_what_claims_and_plots_name(what: Experiment) -> None:
    outcome = what.measure(new_run(what))
    assert not outcome.missing
    assert all(math.isfinite(e.value) for e in outcome.estimates.values())
    for claim in claims_of(PAPER).claims:
        if claim.experiment == what.name:
            assert {claim.measure, claim.minus, claim.over} - {""} <= set(outcome.estimates)
            assert set(claim.plots) <= {p.name for p in outcome.plots}
    samples, energy = (p.as_dict() for p in outcome.plots)
    assert samples["image"] == [6, 6]
    assert [line["label"] for line in energy["lines"]] == ["fresh", "replay"]
    assert all(len(line["x"]) == chains.STOPS + 1 for line in energy["lines"])
    assert ("bits_per_dim:tilted" in outcome.estimates) == (what is on_mnist)


@pytest.mark.usefixtures("small_data")
def test_the_likelihood_is_given_for_every_image_and_in_bits() -> None:
    outcome = on_mnist.measure(new_run(on_mnist))
    examples, nll, bits = (
        outcome.examples["mnist"],
        outcome.estimates["nll:tilted"],
        outcome.estimates["bits_per_dim:tilted"],
    )
    assert examples.values.shape == (30,)
    assert nll.value == pytest.approx(-float(examples.values.mean()))
    assert bits.value == pytest.approx(nll.value / 36 / math.log(2))
    # hardly trained, it is near the Gaussian of 36 pixels of 5 levels: better than uniform
    assert 0 < bits.value < math.log2(5)
    assert bits.kind == "estimate"


def log_p(gap: float) -> LogLikelihood:
    ends = {
        "ais_log_z_forward": Estimate(1.0, 0.3, "lower_bound", "nats", 8),
        "ais_log_z_reverse": Estimate(1.0 + gap, 0.4, "upper_bound", "nats", 8),
    }
    return LogLikelihood(torch.full((30,), -50.0), "estimate", details=ends)


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("gap", [-0.1, 9.0, 30.0])
def test_a_wide_bracket_gives_its_width_and_no_likelihood(gap: float) -> None:
    study = new_study(on_mnist)
    study.likelihood(log_p(gap))
    width = study.run.estimates["ais_gap:tilted"]
    assert (width.value, width.stderr) == (pytest.approx(gap), pytest.approx(0.5))
    wide = gap > chains.WIDEST
    assert ("nll:tilted" in study.run.missing) == wide
    assert ("nll:tilted" in study.run.estimates) != wide
    assert bool(study.run.examples) != wide
    if wide:
        assert "30.0 nats apart" in study.run.missing["bits_per_dim:tilted"]


@pytest.mark.usefixtures("small_data")
def test_diverged_chains_are_reported_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*args: Any) -> None:
        raise TrainingError("the training loss is nan at step 3; lower lr or set grad_clip")

    monkeypatch.setattr(chains, "train", diverge)
    outcome = on_mnist.measure(new_run(on_mnist))
    assert "training diverged" in outcome.missing["frechet:fresh_long"]
    assert "training diverged" in outcome.missing["bits_per_dim:tilted"]
    assert "frechet:gaussian" in outcome.estimates
    study = new_study(on_digits)
    nowhere = torch.full((20, 36), math.nan)
    study.measure("fresh_long", None, nowhere, Estimate(0.0, 0.0, "estimate", "nats", 1))  # type: ignore[arg-type]
    assert study.run.missing == {"frechet:fresh_long": "the chains diverged"}


@pytest.mark.usefixtures("small_data")
def test_pixels_far_outside_the_data_are_counted() -> None:
    study = new_study(on_digits)
    model = study.trained("fresh")
    x = torch.zeros(20, 36)
    x[:, :9] = 5.0
    study.measure("fresh_long", model, x, Estimate(0.0, 0.0, "estimate", "nats", 1))
    assert study.run.estimates["outside:fresh_long"].value == pytest.approx(0.25)
    with torch.no_grad():
        assert study.run.estimates["energy:fresh_long"].value == pytest.approx(float(model.energy(x).mean()))


@pytest.mark.usefixtures("small_data")
@pytest.mark.parametrize("what", [on_digits, on_mnist], ids=lambda e: e.name)
def test_experiment_killed_twice_ends_with_the_same_bits(what: Experiment) -> None:
    def measure() -> Outcome:
        return what.measure(new_run(what))

    undisturbed = Sitting()
    want = undisturbed.outcome(measure)
    part = math.ceil(0.35 * undisturbed.count)
    first = Sitting(last=part)
    assert first.outcome(measure) is None
    second = Sitting(first.kept, last=part)
    assert second.outcome(measure) is None
    rest = Sitting(second.kept)
    outcome = rest.outcome(measure)
    assert want is not None
    assert outcome is not None
    assert found(outcome) == found(want)
    assert first.count + second.count + rest.count == undisturbed.count


@pytest.mark.usefixtures("small_data")
def test_run_killed_after_a_caught_failure_of_training_resumes_to_the_same_outcome(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = ConvEBM.loss

    def nan_for_fresh_chains(model: ConvEBM, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        updated = bool(model.energy(batch).detach().any())  # before the first update every energy is 0
        return right(model, batch, generator) * (math.nan if updated and model.restart == 1 else 1)

    def measure() -> Outcome:
        return on_digits.measure(new_run(on_digits))

    monkeypatch.setattr(ConvEBM, "loss", nan_for_fresh_chains)
    undisturbed = Sitting()
    want = undisturbed.outcome(measure)
    assert want is not None
    assert "nan at step 2" in want.missing["frechet:fresh_short"]
    for last in range(1, undisturbed.count):
        killed = Sitting(last=last)
        assert killed.outcome(measure) is None
        outcome = Sitting(killed.kept).outcome(measure)
        assert outcome is not None
        assert found(outcome) == found(want)
        assert outcome.missing == want.missing


@pytest.mark.usefixtures("small_data")
def test_another_seed_is_another_result() -> None:
    first, again, other = (on_digits.measure(new_run(on_digits, seed)) for seed in (0, 0, 1))
    assert found(first) == found(again)
    assert first.estimates["frechet:replay_long"] != other.estimates["frechet:replay_long"]


@pytest.mark.usefixtures("small_data")
def test_the_classifier_that_judged_samples_is_named() -> None:
    assert on_digits.measure(new_run(on_digits)).classifiers == {"digits": "f" * 64}
