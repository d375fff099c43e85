"""The cells of table 1 and appendix D on MNIST: training by the released code's rule, and the bound on test bits."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.experiments import Experiment, Run
from replicate.experiments.image_rows import full_row
from replicate.likelihood.importance import iw_bound
from replicate.papers.burda.autoencoder import ImportanceWeightedAutoencoder
from replicate.resume import State, resumable
from replicate.tasks.images import FILES, TEST_BITS_SEED, binarise, grey_values, mnist_static

STAGES = 8
#: decay rates of Adam's moments
BETA1, BETA2 = 0.99, 0.999
#: per seed, if each of ten million steps takes 0.36 ms; not measured, and the launches of a step may take far longer
GPU_MINUTES = 60
#: rows for a CPU divide the epochs of every stage by this: 44 epochs are left
SHORTENED = 81
#: examples that the code holds out of MNIST's 60,000; nothing is selected on them
HELD_OUT = 400
#: latent and hidden widths from the data upwards, by number of stochastic layers
LATENTS: dict[int, tuple[int, ...]] = {1: (50,), 2: (100, 50)}
HIDDEN: dict[int, tuple[int, ...]] = {1: (200,), 2: (200, 100)}


@dataclass(frozen=True)
class Settings:
    """Settings of one cell.

    Attributes:
        weighted, draws, doubly, shortened, stages: as in `ImportanceWeightedAutoencoder` and `schedule`.
        layers: stochastic layers.
        dynamic: draw the training bits afresh for every batch, else take static bits.
        samples: importance samples of the test bound.
        rows: how many training and test images are used; 0 for all.
    """

    weighted: bool
    draws: int
    layers: int = 1
    dynamic: bool = True
    doubly: bool = False
    shortened: int = 1
    samples: int = 5000
    stages: int = STAGES
    batch_size: int = 20
    rows: int = 0


def training_and_test(dynamic: bool) -> tuple[Tensor, Tensor]:
    """Return training intensities, or static bits, (n, 784), and test bits (10000, 784)."""
    if not dynamic:
        task = mnist_static()
        return task.train, task.test
    train, test = (part.float() / 255 for part in grey_values("mnist"))
    return train[:-HELD_OUT], binarise(test, torch.Generator().manual_seed(TEST_BITS_SEED))


@torch.no_grad()
def code_adam_step(parameters: list[Tensor], first: list[Tensor], second: list[Tensor], number: int, lr: float) -> None:
    """Take a step of Adam as the released code has it, with eps = 1e-4 outside the bias correction.

    Args:
        first, second: moments, changed in place, which start at 0 and at 1.
        number: of the step; the first is 1.
        lr: before the bias correction.
    """
    rate = lr * math.sqrt(1 - BETA2**number) / (1 - BETA1**number)
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_lerp_(first, gradients, 1 - BETA1)
    torch._foreach_mul_(second, BETA2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - BETA2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_add_(scale, 1e-4)
    change = torch._foreach_mul(first, rate)
    torch._foreach_div_(change, scale)
    torch._foreach_sub_([*parameters], [*change])


def schedule(stages: int, shortened: int = 1) -> Iterator[tuple[int, float]]:
    """Yield (epochs, learning rate) of each stage: 3^i at 1e-3 * 10^(-i/7), the rate to two digits as in the code.

    `shortened` divides the epochs of every stage, of which at least one stays.
    """
    for i in range(stages):
        yield max(1, 3**i // shortened), 1e-4 * round(10 ** (1 - i / 7), 1)


def fit(model: ImportanceWeightedAutoencoder, train: Tensor, run: Run, s: Settings) -> list[float]:
    """Train through all stages, and return the mean training loss of every stage in nats."""
    noise, bits = run.stream("noise"), run.stream("bits")
    model.initialise(train, noise)
    parameters: list[Tensor] = list(model.parameters())
    batches = train.split(s.batch_size)
    # of every epoch: its stage's epochs and learning rate, and whether the stage ends with it
    plan = [(n, lr, i + 1 == n) for n, lr in schedule(s.stages, s.shortened) for i in range(n)]
    state: State = {"model": model, "noise": noise, "bits": bits}
    state |= {"first": [torch.zeros_like(p) for p in parameters], "second": [torch.ones_like(p) for p in parameters]}
    state |= {"total": torch.zeros((), device=train.device), "losses": []}
    # an epoch may take minutes, a batch does not
    for step in resumable("training", len(plan) * len(batches), state):
        epoch, i = divmod(step, len(batches))
        epochs, lr, last_of_stage = plan[epoch]
        model.zero_grad(set_to_none=True)
        loss = model.loss(binarise(batches[i], bits) if s.dynamic else batches[i], noise)
        loss.backward()
        code_adam_step(parameters, state["first"], state["second"], step + 1, lr)
        state["total"] += loss.detach()
        if last_of_stage and i + 1 == len(batches):
            state["losses"].append(float(state["total"]) / (epochs * len(train)))
            state["total"].zero_()
    losses: list[float] = state["losses"]
    return losses


def train_and_score(run: Run, s: Settings) -> None:
    """Train one cell of table 1, and bound -log p of the test bits with many importance samples."""
    train, test = (part[: s.rows or None].to(run.device) for part in training_and_test(s.dynamic))
    sizes = train.shape[1], LATENTS[s.layers], HIDDEN[s.layers]
    model = run.build(lambda: ImportanceWeightedAutoencoder(*sizes, s.draws, s.weighted, s.doubly))
    losses = fit(model, train, run, s)
    bound = iw_bound(model, test, s.samples, run.stream("evaluation"))
    run.measure_all({"nll": -bound.mean(), "negative_elbo": -bound.details["elbo"], "ess": bound.details["ess"]})
    epochs = list(itertools.accumulate(float(n) for n, _ in schedule(s.stages, s.shortened)))
    title = "mean training bound of each stage"
    run.curves("training", title, ("epochs", "nats"), {"training bound": (epochs, losses)}, log="x")
    run.keep_examples("mnist-dynamic" if s.dynamic else "mnist-static", bound)


def cell(s: Settings) -> Experiment:
    """Declare the experiment of one cell of the tables; a shortened one is for machines without a GPU."""
    kind, data = ("dreg" if s.doubly else "iwae") if s.weighted else "vae", "dynamic" if s.dynamic else "static"
    words = "IWAE by doubly reparameterised gradients" if s.doubly else kind.upper()
    name = f"burda-{kind}-{s.layers}-k{s.draws}-{data}"
    about, minutes = f"{words} with {s.layers} stochastic layer(s), k = {s.draws}, {data} bits of MNIST", GPU_MINUTES
    if s.shortened > 1:
        epochs = sum(n for n, _ in schedule(s.stages, s.shortened))
        name, about, minutes = f"{name}-short", f"{about}, {epochs} of the paper's 3280 epochs", 0
    return full_row(name, minutes, about, s, "vae", FILES[f"mnist-{data}"])(train_and_score)


_CELLS = ((True, 1), (False, 5), (False, 50), (True, 5), (True, 50))
_SHORT = ((True, 1, False), (False, 5, False), (True, 5, False), (True, 5, True))
ROWS = (
    *(cell(Settings(weighted, draws, layers)) for layers in (1, 2) for weighted, draws in _CELLS),
    *(cell(Settings(True, draws, dynamic=False)) for draws in (1, 5, 50)),
    *(cell(Settings(True, draws, doubly=True)) for draws in (1, 5, 50)),
    *(cell(Settings(w, k, doubly=d, shortened=SHORTENED, samples=500)) for w, k, d in _SHORT),
)
