"""A training step lies on the model's device, all of it, and never waits for the device.

Shown without a CUDA device on torch's meta device, whose tensors have no content: what asks for a number, as a host
that waits would, or mixes a tensor of the host's with the model's, is an error there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from replicate.model import Model
from replicate.papers.burda.autoencoder import ImportanceWeightedAutoencoder
from replicate.papers.burda.rows import code_adam_step
from replicate.papers.salakhutdinov.annealing import Recipe
from replicate.papers.salakhutdinov.annealing import train as train_machine
from replicate.papers.tieleman.persistence import METHODS, learn
from replicate.registry import models
from replicate.runs.experiment import Run
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.subjects import build_model
from replicate.tasks.loading import load_task, unsupported

META = torch.device("meta")
#: the first that a model supports is its own
TASKS = ("digits", "digits-binary", "two-gaussians")
TRAINED = sorted(name for name, entry in models().items() if entry.training.steps)


class Nowhere(torch.Generator):
    """A generator of the meta device, which torch does not make: its draws have shapes only."""

    device = META


def steps(model: Model, x: Tensor) -> None:
    """Two training steps as `replicate.runs.training.train` makes them, without its optimizer's own state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        loss = model.loss(x, Nowhere())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.after_step(Nowhere())
        assert loss.device == META
        assert all(p.grad is None or p.grad.device == META for p in parameters)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_stays_on_the_device(name: str) -> None:
    task_name = next(t for t in TASKS if unsupported(models()[name], load_task(t)) is None)
    task, streams = load_task(task_name), Streams(task_name, name, 0)
    model = build_model(make_spec(name, task_name), task, streams)
    model.initialise(task.train, streams.get("initialise"))
    steps(model.to(META), task.train[:20].to(META))


@pytest.mark.parametrize("doubly", [False, True])
def test_so_does_a_step_of_an_importance_weighted_autoencoder(doubly: bool) -> None:
    model = ImportanceWeightedAutoencoder(9, (3,), (6,), 5, weighted=True, doubly=doubly).to(META)
    parameters = list(model.parameters())
    first, second = [torch.zeros_like(p) for p in parameters], [torch.ones_like(p) for p in parameters]
    model.loss(torch.ones(4, 9, device=META), Nowhere()).backward()
    code_adam_step(parameters, first, second, 1, 1e-3)
    assert all(p.device == META for p in model.parameters())


class NowhereStreams(Streams):
    """Every stream a generator of the meta device."""

    def fresh(self, stream: str) -> torch.Generator:
        return Nowhere()


def test_so_does_contrastive_divergence() -> None:
    run = Run({}, NowhereStreams("device", "t", 0), META)
    rows = torch.ones(30, 9, device=META)
    recipe = Recipe(hidden=5, epochs=2, batch=10, gibbs=2, ramp=True, nesterov=True, persistent=True)
    machine = train_machine(rows, recipe, run)
    assert all(part.device == META for part in machine)
    for machines in learn(METHODS[0], rows, [0.1, 0.2], 20, 5, 10, run)[0]:
        assert all(part.device == META for part in machines)


class Careless(Model):
    """A model whose loss is whatever is asked."""

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self._loss = nn.Parameter(torch.ones(3)), loss

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self._loss(batch * self.weight)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: x.sum() / float(x.detach().max()),  # waits for a number
        lambda x: x[x > 0].sum(),  # waits for a shape
        lambda x: (x + torch.ones(3)).sum(),  # brings a tensor of the host
        lambda x: (x + torch.randn(x.shape, generator=torch.Generator())).sum(),  # draws on the host
    ],
)
def test_a_step_that_waits_or_mixes_devices_is_found(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps(Careless(loss).to(META), torch.ones(5, 3, device=META))
