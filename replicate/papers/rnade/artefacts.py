"""Copies of rows and rounded values: how much they add to a likelihood on the tables."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replicate.experiments import Experiment, Run, experiment
from replicate.likelihood.estimator import log_likelihood
from replicate.model import Estimate
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.subjects import build_model
from replicate.runs.training import train
from replicate.tasks import tables
from replicate.tasks.base import Task

TABLES = ("red-wine", "white-wine", "parkinsons")
SOURCES = {source.name: source for source in (tables.RED, tables.WHITE, tables.VOICES)}
#: columns in which rows must agree to be kept in one part: all, or those that a patient session's recordings share
TOGETHER = {"red-wine": slice(None), "white-wine": slice(None), "parkinsons": slice(3)}
#: the model that the experiments train, with its settings of this profile
MODEL, PROFILE = "made", "full"
#: seed of the noise on validation and test rows
NOISE_SEED = 13060187


def fold_of(run: Run) -> int:
    """Return the fold of this seed, as a run of the task has it."""
    return run.streams.seed % tables.FOLDS


def nll(run: Run, variant: str, steps: int, task: Task, *also: Task) -> list[Estimate]:
    """Train the model for `steps` at most, and return its exact mean NLL on the test rows of that task and of `also`.

    `variant` names the random streams; batches are the same for all variants.
    """
    own, device = run.streams, run.device
    streams = Streams(own.task, f"{own.model}/{variant}", own.seed, own.device)
    spec = make_spec(MODEL, task.name, fold_of(run), PROFILE, device.type)
    training = replace(spec.training, steps=min(spec.training.steps, steps))
    model = build_model(spec, task, streams).to(device)
    train(model, task.train.to(device), task.valid.to(device), training, streams, task.redraw)
    scored = (
        log_likelihood(model, t.test.to(device), spec.evaluation, streams.fresh("evaluation")) for t in (task, *also)
    )
    return [-found.mean() for found in scored]


# -- copies


def copies(run: Run, *, table: str, steps: int = 1_000_000) -> None:
    """Train the model with rows that belong together on one side of the split, and with rows cut at random."""
    source = SOURCES[table]
    rows = tables.read_rows(source)
    keys = {"together": rows[:, TOGETHER[source.name]], "random": np.arange(len(rows))[:, None]}
    found = {}
    for name, key in keys.items():
        parts = tables.parts_of(key, tables.FOLDS, tables.FOLD_SEED)
        task = tables.as_task(source.name, source.about, tables.cut(rows, fold_of(run), parts))
        (found[f"nll:{name}"],) = nll(run, name, steps, task)
    run.measure_all(found)
    run.measure("cost", replace(found["nll:together"] - found["nll:random"], stderr=math.nan))


# -- rounding


def rounding_steps(rows: Tensor) -> Tensor:
    """Return the median gap between a column's distinct values, (n, D) -> (D,)."""
    return torch.stack([column.unique().diff().median() for column in rows.T])


def through_noise(task: Task, steps: Tensor) -> Task:
    """Add uniform noise as wide as the rounding `steps` (D,) to a task's rows: drawn afresh in training, else once."""

    def noised(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + (torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 0.5) * steps.to(x.device)

    frozen = torch.Generator().manual_seed(NOISE_SEED)
    return replace(task, valid=noised(task.valid, frozen), test=noised(task.test, frozen), redraw=noised)


def rounding(run: Run, *, table: str, steps: int = 1_000_000) -> None:
    """Train the model on rows as they are and through noise that fills the rounding."""
    task = tables.load_table(SOURCES[table], fold_of(run))
    smooth = through_noise(task, rounding_steps(task.train))
    as_given, scored_through_noise = nll(run, "as-given", steps, task, smooth)
    (through,) = nll(run, "through-noise", steps, smooth)
    run.measure("nll:as-given", as_given)
    run.measure("nll:as-given-scored-through-noise", scored_through_noise)
    run.measure("nll:through-noise", through)
    # both are of the same rows, so the error of the difference is not that of independent numbers
    run.measure("spikes", replace(through - as_given, stderr=math.nan))


def on_table(name: str, about: str, function: Callable[..., None], table: str, seeds: int = 5) -> Experiment:
    """Declare one of the two experiments on one table."""
    full: dict[str, Any] = {"seeds": seeds, "profiles": ("full",), "files": (SOURCES[table].file,)}
    full |= {"family": "autoregressive", "settings": {"table": table}, "smoke": {"steps": 5}}
    return experiment(f"rnade-{name}-{table}", about=f"{about}, {table}", **full)(function)


#: all folds of wine, whose random cut is the printed protocol
COPIES = tuple(
    on_table("copies", "copies of rows kept together or cut at random", copies, table, 10 if "wine" in table else 5)
    for table in TABLES
)
ROUNDING = tuple(on_table("rounding", "spikes on rounded values", rounding, t) for t in TABLES[:2])
