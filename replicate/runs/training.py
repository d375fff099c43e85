"""The one training loop of every gradient-trained model; a killed run resumes within it."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replicate.errors import ModelError, TrainingError
from replicate.model import Model, Training
from replicate.resume import State, abandon_loop, resumable
from replicate.runs.seeds import Streams


@dataclass(frozen=True)
class History:
    """What training leaves besides the weights.

    Attributes:
        train: (step, loss) pairs, the loss averaged since the pair before.
        valid: (step, validation loss) pairs.
        best_step: the step whose weights were kept.
        seconds: wall time of initialisation and training, over all sessions.
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
    """Make the optimizer that the settings name."""
    rate, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, betas=settings.betas, weight_decay=decay, fused=True)


class Stopwatch:
    """Wall seconds, those of earlier sessions included."""

    def __init__(self) -> None:
        self._before, self._start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds up to now."""
        return self._before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds up to now."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from an earlier session."""
        self._before, self._start = state["seconds"], time.perf_counter()


class Batches:
    """A source of index batches that walks through fresh permutations of n examples, without remainders lost."""

    def __init__(self, n: int, size: int, generator: torch.Generator) -> None:
        self.n, self.size, self.generator = n, size, generator
        self.queue = torch.empty(0, dtype=torch.int64, device=generator.device)

    def draw(self) -> Tensor:
        """Return the next `size` indices."""
        while self.queue.numel() < self.size:
            fresh = torch.randperm(self.n, generator=self.generator, device=self.generator.device)
            self.queue = torch.cat([self.queue, fresh])
        head, self.queue = self.queue[: self.size], self.queue[self.size :]
        return head

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of the permutation, and the generator."""
        return {"queue": self.queue, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.queue = state["queue"].to(self.generator.device)
        self.generator.set_state(state["generator"].cpu())


@torch.no_grad()
def validation_loss(model: Model, valid: Tensor, streams: Streams) -> float:
    """Mean validation loss over the whole split, with the same noise at every call."""
    generator, total = streams.fresh("validation"), 0.0
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
    redraw: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> History:
    """Train in place and leave the selected weights in the model; an interrupted run resumes within the loop.

    Selection: with `validate_every` the weights (their moving average where `ema` is on) with the lowest
    validation loss; otherwise the last ones. The test split is never seen here.

    Args:
        redraw: draws the model's input from rows of the training data, afresh for every batch (`Task.redraw`).

    Raises:
        TrainingError: the loss became nan or infinite, or no validation loss was a number.
        ModelError: the loss does not depend on the weights.
    """
    watch = Stopwatch()
    model.train()
    fresh = streams.get("redraw")
    draw = (lambda rows: rows) if redraw is None else (lambda rows: redraw(rows, fresh))
    model.initialise(draw(train_data), streams.get("initialise"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not (settings.steps and parameters):
        model.eval()
        return History([], [], 0, watch.seconds)
    optimizer, noise = make_optimizer(parameters, settings), streams.get("noise")
    batches = Batches(len(train_data), min(settings.batch_size, len(train_data)), streams.get("batches"))
    log_every = max(1, settings.steps // 50)
    average = [p.detach().clone() for p in parameters] if settings.ema else None
    running = torch.zeros((), device=train_data.device)
    state: State = {
        **{"model": model, "optimizer": optimizer, "batches": batches, "noise": noise, "redraw": fresh, "watch": watch},
        **{"average": average, "best": None, "best_value": math.inf, "best_step": settings.steps},
        **{"running": running, "counted": 0, "train": [], "valid": []},
    }
    for step in resumable("training", settings.steps, state):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model.loss(draw(train_data[batches.draw()]), noise)
        optimizer.zero_grad(set_to_none=True)
        _backward(model, loss, parameters if step == 0 else ())
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        model.after_step(noise)
        if state["average"] is not None:
            decay = min(settings.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(state["average"], [p.data for p in parameters], 1 - decay)
        state["running"] += loss.detach()
        state["counted"] += 1
        last = step + 1 == settings.steps
        if (step + 1) % log_every == 0 or last:
            _log(state, step + 1)
        if settings.validate_every and ((step + 1) % settings.validate_every == 0 or last):
            _select(state, step + 1, model, parameters, lambda: validation_loss(model, valid_data, streams))
        if last:
            if state["best"] is not None:
                model.load_state_dict(state["best"])
            elif settings.validate_every:
                abandon_loop()
                raise TrainingError(
                    "no validation loss was a finite number; lower lr, set grad_clip or look at the data"
                )
            else:
                swap(parameters, state["average"])
                state["best_step"] = settings.steps
            state |= {"optimizer": None, "average": None, "best": None}  # later checkpoints need not carry them
    model.eval()
    return History(state["train"], state["valid"], state["best_step"], watch.seconds)


def _backward(model: Model, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Differentiate the loss; with parameters, check that one of them has a gradient.

    Raises:
        ModelError: it does not depend on the weights, so that training would change nothing.
    """
    if loss.requires_grad:
        loss.backward()
        if not parameters or any(p.grad is not None for p in parameters):
            return
    abandon_loop()
    name = type(getattr(model, "inner", model)).__name__
    raise ModelError(
        f"{name}.loss returned a loss that does not depend on the weights; compute it without detach, "
        "no_grad and .data, from parameters that the model registers"
    )


def _log(state: State, step: int) -> None:
    """Note the mean loss since the last note.

    Raises:
        TrainingError: it is nan or infinite.
    """
    value = float(state["running"]) / state["counted"]
    if not math.isfinite(value):
        abandon_loop()
        raise TrainingError(f"the training loss is {value} at step {step}; lower lr or set grad_clip")
    state["train"].append((step, value))
    state["running"].zero_()
    state["counted"] = 0


def _select(
    state: State, step: int, model: Model, parameters: Sequence[nn.Parameter], validate: Callable[[], float]
) -> None:
    """Validate the weights, or their moving average, and keep them if they are the best.

    A loss that is no finite number says nothing about the weights: it is neither recorded nor selected.
    """
    model.eval()
    swap(parameters, state["average"])
    value = validate()
    if math.isfinite(value):
        state["valid"].append((step, value))
    else:
        print(f"the validation loss is {value} at step {step}: these weights are not selected", file=sys.stderr)
    if math.isfinite(value) and value < state["best_value"]:
        state["best_value"], state["best_step"] = value, step
        state["best"] = {k: v.clone() for k, v in model.state_dict().items()}
    swap(parameters, state["average"])
    model.train()


def swap(parameters: Sequence[Tensor], average: Sequence[Tensor] | None) -> None:
    """Exchange the weights with their moving average, if there is one."""
    if average is not None:
        for p, a in zip(parameters, average, strict=True):
            p.data, a.data = a.data, p.data
