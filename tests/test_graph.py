"""Repeated steps: what a recording replays is the eager step, number by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from image_data import bits
from torch import Tensor

from replicate.papers import burda
from replicate.runs.experiment import Context
from replicate.runs.graph import WARM_UP, Repeated, Step
from replicate.runs.seeds import Streams

CPU = torch.device("cpu")


class Recorder:
    """Stands in for a CUDA graph: a replay does the step again on the recorded inputs and in the recorded result."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, step: Step, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        result = torch.zeros(())

        def again() -> None:
            self.replays += 1
            result.copy_(step(*inputs))

        return again, result


def test_elsewhere_than_on_cuda_the_step_is_called_as_it_is() -> None:
    seen = []

    def step(x: Tensor, rate: float) -> Tensor:
        seen.append((x, rate))
        return x

    repeated, x = Repeated(step, CPU), torch.ones(2)
    for i in range(WARM_UP + 2):
        assert repeated(x, float(i)) is x
    assert all(given is x for given, _ in seen)
    assert [rate for _, rate in seen] == [float(i) for i in range(WARM_UP + 2)]


def test_every_call_sees_its_own_inputs_and_a_short_batch_is_no_loss() -> None:
    total = torch.zeros(())

    def step(x: Tensor, rate: Tensor | float) -> Tensor:
        total.add_(x.sum() * rate)
        return total.clone()

    recorder = Recorder()
    repeated = Repeated(step, CPU, record=recorder)
    calls = [(torch.full((1 if i == 7 else 2,), float(i)), 0.5 + i) for i in range(10)]
    expected = 0.0
    for x, rate in calls:
        expected += float(x.sum()) * rate
        assert float(repeated(x, rate)) == expected
    assert (recorder.recordings, recorder.replays) == (1, 10 - WARM_UP - 1)


def trained(draws: int, doubly: bool, dynamic: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of an autoencoder after two stages on ten batches, the last of them a short one."""
    params = {"batch_size": 5, "stages": 2, "shortened": 1}
    context = Context(params, Streams("graph", "t", 0), CPU)
    with context.streams.initialisation():
        model = burda.ImportanceWeightedAutoencoder(9, (3,), (6,), draws, weighted=True, doubly=doubly)
    rows = bits(48, 9)
    (losses,) = burda.fit([model], 0.25 + 0.5 * rows if dynamic else rows, dynamic, [context])
    return model.state_dict(), losses


@pytest.mark.parametrize(("draws", "doubly", "dynamic"), [(1, False, True), (3, False, False), (3, True, True)])
def test_an_autoencoder_trained_by_replays_is_the_eager_one(
    draws: int, doubly: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: a product sums in another order where a batch lies at another place in memory."""
    weights, losses = trained(draws, doubly, dynamic)
    recorder = Recorder()
    monkeypatch.setattr(burda, "Repeated", partial(Repeated, record=recorder))
    replayed, replayed_losses = trained(draws, doubly, dynamic)
    assert recorder.replays == 40 - WARM_UP - 4  # four passes of ten batches, each with a short one
    assert replayed_losses == pytest.approx(losses, rel=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-5, atol=1e-7)
