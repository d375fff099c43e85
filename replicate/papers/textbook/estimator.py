"""The suite's own dequantised estimator, on densities whose -log P is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.likelihood.dequantisation import DequantisedLogit, Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import DataInfo, Estimate, Model
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task


class DataDensity(Model):
    """A density of y = x + u on [0, levels)^D, as the suite's dequantise-logit preprocessing shows it to a model.

    Args:
        transform: that preprocessing, already fitted.
        log_density: y (n, D) -> log q(y) (n,).
    """

    family = "reference"
    capabilities = frozenset({"log_prob"})

    def __init__(self, transform: DequantisedLogit, log_density: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform, self.log_density = transform, log_density

    def log_prob(self, x: Tensor) -> Tensor:
        """Log q(y) + log |dy/dx| of standardised logits x (n, D), shape (n,)."""
        t = self.transform
        logit = x * t.std + t.mean
        y = t.levels * (torch.sigmoid(logit) - t.alpha) / (1 - 2 * t.alpha)
        log_slope = F.logsigmoid(logit) + F.logsigmoid(-logit) + math.log(t.levels / (1 - 2 * t.alpha)) + t.std.log()
        return self.log_density(y.clamp(0, t.levels)) + log_slope.sum(-1)


def suite_nll(run: Run, log_density: Callable[[Tensor], Tensor], data: Task, x: Tensor, draws: int) -> Tensor:
    """-log P of integers x (n, D) by the suite's log-mean-exp over noise draws, shape (n,), float64."""
    assert data.info.levels is not None
    transform = DequantisedLogit(data.info.dim, data.info.levels).double().to(run.device)
    noise = run.stream("evaluation")
    transform.fit(data.train.double().to(run.device), noise)
    model = Preprocessed(DataDensity(transform, log_density), data.info, "logit").to(run.device)
    model.transform = transform
    return -log_likelihood(model, x.double().to(run.device), Effort(dequantisation_draws=draws), noise).values


ABOUT = "the uniform distribution on digits through the suite's dequantised estimator"
ABOUT_CELLS = "the suite's dequantised estimator on a density that varies inside each cell"
EXACT: dict[str, Any] = {"family": "reference", "precision": "float64"}


@experiment("textbook-reference", about=ABOUT, **EXACT, seeds=1, tasks=("digits",))
def uniform_reference(run: Run, *, draws: int = 2) -> None:
    """Measure the uniform density over the cube: every image and every draw must give 64 ln 17."""
    task = load_task("digits")
    exact = task.info.dim * math.log(17)
    values = suite_nll(run, lambda y: torch.full_like(y[:, 0], -exact), task, task.test, draws)
    run.measure("nll_uniform", Estimate.exact(values.mean(), "nats", len(values)))
    run.measure("nll_uniform_error", Estimate.exact((values - exact).abs().max(), "nats", len(values)))


@experiment("textbook-cell-noise", about=ABOUT_CELLS, **EXACT)
def cell_noise(run: Run, *, draws: int = 5000) -> None:
    """Measure a density that falls linearly inside each cell: only noise over the whole cell finds its -log P.

    q(y) = 2 P(x) (1 - f) on y = x + f. Its mean over f ~ U[0, 1) is P(x); over U(0, 0.5] it is 1.5 P(x), so that an
    estimator with half the cell would be -ln 1.5 = -0.41 nats off.
    """
    levels = torch.arange(17, dtype=torch.float64, device=run.device)
    p = (-0.5 * ((levels - 6) / 4).square()).softmax(0)
    x = levels[:, None]
    data = Task("ramp", "one pixel of 17 levels", DataInfo(1, "levels", 17), x, x, x)

    def log_density(y: Tensor) -> Tensor:
        level = y.floor().clamp(max=16).squeeze(1)
        return p[level.long()].log() + math.log(2) + torch.log((1 - (y.squeeze(1) - level)).clamp_min(1e-12))

    excess = float((p * (suite_nll(run, log_density, data, data.test, draws) + p.log())).sum())
    run.measure("excess_over_entropy", Estimate(excess, math.nan, "estimate", "nats", draws))
