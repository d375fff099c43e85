"""Every method of the comparison, with the same optimizer, batches and number of updates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicate.energies.model import build_objective
from replicate.energies.objectives import Objective
from replicate.experiments import Run
from replicate.model import Estimate, Model, Training
from replicate.resume import State, resumable
from replicate.runs.training import Batches, learning_rate, make_optimizer, swap

#: methods of the comparison
VARIANTS = ("ml", "cd-1", "cd-5", "pcd", "pcd-jump", "short-run", "ism", "dsm", "ssm", "nce", "cnce", "ksd", "flow-nce")
#: points of a learning curve
STOPS = 10

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data, optimizer and the methods' own settings, as `build_objective` explains them; defaults are the plane's."""

    examples: int = 20_000
    test_examples: int = 5000
    updates: int = 400
    batch: int = 256
    lr: float = 1e-2
    move_step: float = 0.05
    pcd_k: int = 5
    jump_k: int = 2
    short_run_k: int = 10
    short_run_step: float = 0.02
    sigma: float = 0.05
    contrast: float = 0.5
    ratio: int = 2
    bandwidth: float = 0.03
    flow_couplings: int = 4
    flow_steps: int = 200


def objective_of(variant: str, dim: int, s: Settings) -> Objective:
    """Build the objective of a method, with its own settings."""
    names = ("sigma", "contrast", "ratio", "bandwidth", "flow_couplings", "flow_steps")
    own: dict[str, Any] = {name: getattr(s, name) for name in names}
    if variant == "short-run":
        own |= {"k": s.short_run_k, "move_step": s.short_run_step, "adjusted": False}
    else:
        k = {"cd-5": 5, "pcd": s.pcd_k, "pcd-jump": s.jump_k}.get(variant, 1)
        own |= {"k": k, "move_step": s.move_step, "chains": s.batch, "jumps": variant == "pcd-jump"}
    name = {"cd-1": "cd", "cd-5": "cd", "pcd-jump": "pcd"}.get(variant, variant)
    return build_objective(name, dim, **own)


def train(
    name: str, model: Model, data: Tensor, s: Settings, run: Run, value: Callable[[], float]
) -> tuple[Curve, Estimate]:
    """Train on data (N, D), in batches that all methods share; leave the moving average of the weights in the model.

    Returns:
        (curve of `STOPS` pairs of updates and the average's value, seconds of preparation and updates).
    """
    begin = time.perf_counter()
    model.initialise(data, run.stream(f"prepare-{name}"))
    prepared = time.perf_counter() - begin
    settings = Training(s.updates, s.batch, s.lr, betas=(0.9, 0.99), ema=0.99)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, generator = make_optimizer(parameters, settings), run.stream(f"noise-{name}")
    batches = Batches(len(data), s.batch, run.stream("batches"))
    average = [p.detach().clone() for p in parameters]
    state: State = {"model": model, "optimizer": optimizer, "batches": batches, "generator": generator}
    state |= {"average": average, "curve": [], "seconds": 0.0}
    for t in resumable(f"training by {name}", s.updates, state):
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(t, settings)
        optimizer.zero_grad(set_to_none=True)
        model.loss(data[batches.draw()], generator).backward()
        optimizer.step()
        torch._foreach_lerp_(state["average"], [p.data for p in parameters], 1 - min(settings.ema, (1 + t) / (10 + t)))
        state["seconds"] += time.perf_counter() - begin
        if (t + 1) % max(1, s.updates // STOPS) == 0:
            swap(parameters, state["average"])
            state["curve"].append((t + 1, value()))
            swap(parameters, state["average"])
    swap(parameters, state["average"])
    return state["curve"], Estimate(prepared + state["seconds"], math.nan, "estimate", "seconds", 1)


def report(run: Run, estimates: Mapping[str, Estimate], variant: str) -> None:
    """Measure a method; omit the numbers that its divergence left infinite."""
    for metric, estimate in estimates.items():
        if math.isfinite(estimate.value):
            run.measure(f"{metric}:{variant}", estimate)
        else:
            run.omit(f"{metric}:{variant}", f"the training diverged: it is {estimate.value}")


def draw_curves(run: Run, title: str, y_label: str, curves: Mapping[str, Curve]) -> None:
    """Draw learning curves on a logarithmic axis, cut below at 1e-5."""
    lines = {name: ([t for t, _ in curve], [max(v, 1e-5) for _, v in curve]) for name, curve in curves.items()}
    run.curves("curves", title, ("updates", y_label), lines, log="y")
