"""The one training loop that every gradient-trained model goes through."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replicate.model import Model, Training
from replicate.runs.seeds import Streams


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a number."""


@dataclass(frozen=True)
class History:
    """What training left behind besides the weights.

    Attributes:
        train: (step, loss) pairs, the loss averaged since the pair before.
        valid: (step, validation loss) pairs.
        best_step: the step whose weights were kept.
        seconds: wall time of initialisation and training.
    """

    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    best_step: int
    seconds: float


def learning_rate(step: int, settings: Training) -> float:
    """Learning rate of step 0, 1, .. under linear warm-up and the schedule."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(parameters: Sequence[nn.Parameter], settings: Training) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def batches(n: int, size: int, generator: torch.Generator) -> Callable[[], Tensor]:
    """A source of index batches that walks through fresh permutations of n examples, without remainders lost."""
    queue = torch.empty(0, dtype=torch.int64, device=generator.device)

    def draw() -> Tensor:
        nonlocal queue
        while queue.numel() < size:
            queue = torch.cat([queue, torch.randperm(n, generator=generator, device=generator.device)])
        head, queue = queue[:size], queue[size:]
        return head

    return draw


@torch.no_grad()
def validation_loss(model: Model, valid: Tensor, streams: Streams) -> float:
    """Mean validation loss over the whole split, with the same noise at every call."""
    generator = streams.fresh("validation")
    total = 0.0
    for part in valid.split(1024):
        with torch.enable_grad():  # implicit score matching and energies differentiate in x
            total += float(model.validation_loss(part, generator).detach()) * len(part)
    return total / len(valid)


def train(
    model: Model,
    train_data: Tensor,
    valid_data: Tensor,
    settings: Training,
    streams: Streams,
    on_step: Callable[[int], None] | None = None,
) -> History:
    """Train in place and leave the selected weights in the model.

    Selection: with `validate_every` the weights (their moving average where `ema` is on) with the lowest
    validation loss; otherwise the last ones. The test split is never seen here.

    Raises:
        TrainingError: the loss became nan or infinite.
    """
    start = time.perf_counter()
    model.train()
    model.initialise(train_data, streams.get("initialise"))
    history_train: list[tuple[int, float]] = []
    history_valid: list[tuple[int, float]] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    best_step = 0
    if settings.steps and parameters:
        optimizer = make_optimizer(parameters, settings)
        average = copy.deepcopy(parameters) if settings.ema else None
        best: dict[str, Tensor] | None = None
        best_value = math.inf
        noise = streams.get("noise")
        draw = batches(len(train_data), min(settings.batch_size, len(train_data)), streams.get("batches"))
        log_every = max(1, settings.steps // 50)
        running, counted = torch.zeros((), device=train_data.device), 0
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            loss = model.loss(train_data[draw()], noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            model.after_step(noise)
            if average is not None:
                decay = min(settings.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_([a.data for a in average], [p.data for p in parameters], 1 - decay)
            running += loss.detach()
            counted += 1
            last = step + 1 == settings.steps
            if (step + 1) % log_every == 0 or last:
                value = float(running) / counted
                if not math.isfinite(value):
                    raise TrainingError(f"the training loss is {value} at step {step + 1}; lower lr or set grad_clip")
                history_train.append((step + 1, value))
                running.zero_()
                counted = 0
                if on_step:
                    on_step(step + 1)
            if settings.validate_every and ((step + 1) % settings.validate_every == 0 or last):
                model.eval()
                swap(parameters, average)
                value = validation_loss(model, valid_data, streams)
                history_valid.append((step + 1, value))
                if value < best_value:
                    best_value, best_step = value, step + 1
                    best = {k: v.clone() for k, v in model.state_dict().items()}
                swap(parameters, average)
                model.train()
        if best is not None:
            model.load_state_dict(best)
        else:
            swap(parameters, average)
            best_step = settings.steps
    model.eval()
    return History(history_train, history_valid, best_step, time.perf_counter() - start)


def swap(parameters: Sequence[Tensor], average: Sequence[Tensor] | None) -> None:
    """Exchange the weights with their moving average, where there is one."""
    if average is not None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data
