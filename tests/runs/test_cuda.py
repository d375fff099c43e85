"""On a CUDA device every model runs, twice the same bits come out, and a recorded step is the eager one."""

from __future__ import annotations

import pytest
import torch
from replicate.runs.graph import Repeated
from torch import Tensor

from replicate.papers import burda
from replicate.registry import models
from replicate.runs.execute import execute, prepare_process
from replicate.runs.experiment import Context
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.sweeps.comparison import ONE_LEVEL
from replicate.tasks.loading import load_task, unsupported

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("task", ["two-gaussians", "digits"])
@pytest.mark.parametrize("model", sorted(models()))
def test_every_model_is_deterministic_on_the_device(model: str, task: str) -> None:
    if unsupported(models()[model], load_task(task)) or (task == "digits" and model in ONE_LEVEL):
        pytest.skip("not a pair of the comparison")
    spec = make_spec(model, task, profile="smoke", device="cuda")
    device = prepare_process("cuda")
    first, second = (execute(spec, None, device) for _ in range(2))
    assert first["weights_sha256"] == second["weights_sha256"]
    for a, b in zip(first["measurements"], second["measurements"], strict=True):
        if a["metric"].split(":")[0] not in {"train_seconds", "sample_ms", "evaluate_seconds", "peak_memory_mb"}:
            assert a == b


class Eager(Repeated):
    """The reference: never recorded."""

    def __call__(self, *inputs: Tensor | float) -> Tensor:
        return self.step(*inputs)


@pytest.mark.parametrize(("draws", "doubly", "dynamic"), [(1, False, True), (5, False, False), (5, True, True)])
def test_a_graph_of_the_training_step_does_what_the_eager_step_does(
    draws: int, doubly: bool, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and weights after four passes of fifty batches; other random numbers would move both."""
    device = prepare_process("cuda")
    rows = torch.rand(1000, 784, generator=torch.Generator().manual_seed(0)).round().to(device)

    def trained() -> tuple[list[float], list[Tensor]]:
        context = Context({"batch_size": 20, "stages": 2, "shortened": 1}, Streams("graph", "t", 0, "cuda"), device)
        with context.streams.initialisation():
            model = burda.ImportanceWeightedAutoencoder(784, (50,), (200,), draws, weighted=True, doubly=doubly)
        model = model.to(device)
        (losses,) = burda.fit([model], 0.25 + 0.5 * rows if dynamic else rows, dynamic, [context])
        return losses, [p.detach().clone() for p in model.parameters()]

    graphed = trained()
    monkeypatch.setattr(burda, "Repeated", Eager)
    eager = trained()
    assert graphed[0] == pytest.approx(eager[0], rel=1e-6)
    for a, b in zip(graphed[1], eager[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_seeds_trained_together_are_those_trained_alone() -> None:
    """Losses and weights of three seeds after four passes of fifty batches, one graph for all against one each."""
    device = prepare_process("cuda")
    rows = 0.25 + 0.5 * torch.rand(1000, 784, generator=torch.Generator().manual_seed(0)).round().to(device)

    def trained(seeds: list[int]) -> list[tuple[list[float], list[Tensor]]]:
        settings = {"batch_size": 20, "stages": 2, "shortened": 1}
        contexts = [Context(settings, Streams("together", "t", seed, "cuda"), device) for seed in seeds]
        models = []
        for context in contexts:
            with context.streams.initialisation():
                model = burda.ImportanceWeightedAutoencoder(784, (50,), (200,), 5, weighted=True)
            models.append(model.to(device))
        losses = burda.fit(models, rows, True, contexts)
        return [(loss, list(model.parameters())) for loss, model in zip(losses, models, strict=True)]

    for seed, (losses, weights) in enumerate(trained([0, 1, 2])):
        ((alone, single),) = trained([seed])
        assert losses == pytest.approx(alone, rel=1e-5)
        for a, b in zip(weights, single, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
