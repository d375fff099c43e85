"""A general training loop: minimise a loss; optionally keep the best weights and stop early.

The suite's registered models train through `replicate.runs.training.train`, which adds schedules, moving averages and
the selection on validation that the comparison demands.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replicate.resume import State, resumable


@dataclass(frozen=True)
class Check:
    """Look at a model while it trains.

    Attributes:
        every: optimizer steps between two looks.
        value: what is looked at; smaller is better.
        keep_best: leave the weights of the smallest value in the model at the end.
        patience: stop after more than this many looks in a row without a smaller value; None never stops.
    """

    every: int
    value: Callable[[], float]
    keep_best: bool = True
    patience: int | None = None


@dataclass(frozen=True)
class Fit:
    """What training left besides the weights.

    Attributes:
        losses: training loss of each step, shape (steps taken,), float64 on the CPU.
        checks: (step, value) of each look of `Check`.
    """

    losses: Tensor
    checks: list[tuple[int, float]]


def fit(
    module: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    state: Mapping[str, Any],
    check: Check | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    name: str = "training",
) -> Fit:
    """Follow the gradient of a loss; an interrupted run resumes within the loop.

    Args:
        module: holds all weights that are trained or kept.
        loss: draws the next batch and returns its loss, a scalar.
        optimizer: of the module's weights.
        steps: at most.
        state: all else that `loss` changes: generators, sources of batches, chains.
        check: looks at the model on the way.
        schedule: of the learning rate, stepped after every optimizer step.
        name: of the loop.

    Returns:
        Losses and looks; with `check.keep_best` the module has its best weights, otherwise its last.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> optimizer = torch.optim.Adam(line.parameters(), lr=0.1)
        >>> found = fit(line, lambda: (line(x) - 2 * x).square().mean(), optimizer, 300, {})
        >>> round(float(line.weight), 3)
        2.0
    """
    best = copy.deepcopy(module.state_dict()) if check and check.keep_best else None
    losses = torch.zeros(steps, device=next(module.parameters()).device)
    inner: State = {
        **{"module": module, "optimizer": optimizer, "schedule": schedule},
        **state,
        **{"losses": losses, "checks": [], "best": best, "least": math.inf, "waited": 0, "taken": 0},
    }
    for i in resumable(name, steps, inner):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        inner["losses"][i], inner["taken"] = value.detach(), i + 1
        stop = i + 1 == steps
        if check is not None and (i + 1) % check.every == 0:
            stop = _look(check, module, inner, i + 1) or stop
        if stop:
            if inner["best"] is not None:
                module.load_state_dict(inner["best"])
            inner |= {"optimizer": None, "schedule": None, "best": None}  # what later checkpoints need not carry
            break
    return Fit(inner["losses"][: inner["taken"]].double().cpu(), inner["checks"])


def _look(check: Check, module: nn.Module, state: State, step: int) -> bool:
    """Look at the model after a step, keep its weights if they are the best; return whether patience has run out."""
    value = check.value()
    state["checks"].append((step, value))
    if value < state["least"]:
        state["least"], state["waited"] = value, 0
        if check.keep_best:
            state["best"] = copy.deepcopy(module.state_dict())
    else:
        state["waited"] += 1
    return check.patience is not None and state["waited"] > check.patience
