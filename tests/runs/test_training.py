"""The training loop: selection on validation, moving averages, schedules, and an end when the loss is no number."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from replicate.errors import TrainingError
from replicate.model import Family, Model, Training
from replicate.runs.seeds import Streams
from replicate.runs.training import Batches, learning_rate, train


class Mean(Model):
    """log p = N(theta, 1): the likelihood's maximum is the sample mean."""

    family: ClassVar[Family] = "reference"

    def __init__(self, break_at: int | None = None) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2))
        self.calls, self.break_at = 0, break_at

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        if self.training:
            self.calls += 1
        if self.calls == self.break_at:
            return self.theta.sum() * math.nan
        return 0.5 * (batch - self.theta).square().sum(1).mean()


DATA = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([3.0, -2.0])


def fit(model: Mean, settings: Training, valid: Tensor = DATA) -> Mean:
    train(model, DATA, valid, settings, Streams("t", "mean", 0))
    return model


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("ema", [0.0, 0.99])
def test_maximum_likelihood_finds_the_sample_mean(optimizer: str, ema: float) -> None:
    settings = Training(steps=1500, batch_size=500, lr=0.05, optimizer=optimizer, ema=ema)  # type: ignore[arg-type]
    torch.testing.assert_close(fit(Mean(), settings).theta.detach(), DATA.mean(0), atol=2e-3, rtol=0)


def test_the_weights_kept_are_those_with_the_lowest_validation_loss() -> None:
    elsewhere = DATA.mean(0) / 2 + torch.zeros(50, 2)  # training passes this point on its way
    model = Mean()
    history = train(
        model,
        DATA,
        elsewhere,
        Training(steps=400, lr=0.05, schedule="constant", validate_every=5),
        Streams("t", "m", 0),
    )
    assert 0 < history.best_step < 400
    assert history.best_step == min(history.valid, key=lambda pair: pair[1])[0]
    assert float((model.theta.detach() - elsewhere[0]).norm()) < 0.5  # the end of training is 1.8 away


def test_loss_that_is_not_a_number_ends_training_and_names_the_step() -> None:
    with pytest.raises(TrainingError, match="nan at step 4"):
        fit(Mean(break_at=4), Training(steps=50))


def test_same_streams_give_the_same_bits_and_another_seed_does_not() -> None:
    settings = Training(steps=20, batch_size=32)
    a, b = (fit(Mean(), settings).theta.detach() for _ in range(2))
    other = Mean()
    train(other, DATA, DATA, settings, Streams("t", "mean", 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, other.theta.detach())


def test_validating_more_often_does_not_change_the_course_of_training() -> None:
    def losses(every: int) -> list[tuple[int, float]]:
        model = Mean()
        settings = Training(steps=50, batch_size=16, validate_every=every)
        return train(model, DATA, DATA, settings, Streams("t", "mean", 0)).train

    assert losses(1) == losses(50)


def test_every_example_comes_once_before_any_comes_twice() -> None:
    batches = Batches(10, 4, torch.Generator().manual_seed(0))
    seen = torch.cat([batches.draw() for _ in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:20].tolist()) == list(range(10))


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    settings = Training(steps=110, warmup=10, lr=1.0)
    assert learning_rate(0, settings) == pytest.approx(0.1)
    assert learning_rate(10, settings) == pytest.approx(1.0)
    assert learning_rate(60, settings) == pytest.approx(0.5)
    assert learning_rate(109, settings) < 1e-3
