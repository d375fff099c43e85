"""Uria, Murray, Larochelle 2013: RNADE, the real-valued neural autoregressive density-estimator, 1306.0186.

Compared: the mean test log-likelihood of a mixture of Gaussians and of an autoregressive density with mixtures of
Gaussians as conditionals, on red wine, white wine and Parkinsons by the paper's protocol (`replicate.tasks.tables`),
ten folds; and, claims with ids DN-, what the order-agnostic deep NADE of the same authors (1310.1757) reaches there and
on the bits of mushrooms and dna. All are runs of registered models: gaussian-mixture, causal-conv (one order, as
RNADE), eonade (every order, a mean density over many), made (sets of masks, a mean density over them), which reaches
most on validation rows.

Deviations: copies of a row stand in one fold. The folds are ours. causal-conv shares its weights by convolution, where
RNADE has one hidden layer of 50 units; both models choose their step on validation and are trained by Adam. The paper
prints log-likelihoods, the suite measures NLL.

Two experiments say what such likelihoods are worth, with the best model:

- `rnade-copies`: the printed protocol's random cut, where copies of a test row may be trained on, against the cut of
  the task. On Parkinsons, which has no copies, the cut that keeps a session's recordings together, all of which have
  the same time and UPDRS scores.
- `rnade-rounding`: wine's columns are rounded, so that a density can put spikes on the values that occur and its
  likelihood has no upper limit. The same model, trained and scored on rows with uniform noise of one rounding step,
  bounds the log-probability of the rounded row from below and gains nothing from a spike. The step of a column is the
  median gap between its distinct values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from replicate.likelihood.estimator import log_likelihood
from replicate.model import Estimate
from replicate.runs.execute import build_model
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.runs.paper import ModelRuns, Paper
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.training import train
from replicate.tasks import tables
from replicate.tasks.base import Task

TABLES = ("red-wine", "white-wine", "parkinsons")
SOURCES = {source.name: source for source in (tables.RED, tables.WHITE, tables.VOICES)}
#: columns in which rows must agree to stand in one part: all, or those that a session's recordings share
TOGETHER = {"red-wine": slice(None), "white-wine": slice(None), "parkinsons": slice(3)}
#: whose settings of the full profile the experiments take over
MODEL, PROFILE = "made", "full"
#: seed of the noise on validation and test rows
NOISE_SEED = 13060187


def fold_of(context: Context) -> int:
    """The fold of this seed, as a run of the task has it."""
    return context.streams.seed % tables.FOLDS


def nll(context: Context, variant: str, task: Task, *also: Task) -> list[Estimate]:
    """Exact mean NLL of the model trained on a task, on its test rows and on those of further tasks.

    Args:
        variant: names the random streams; batches are the same for all variants.
    """
    own = context.streams
    streams = Streams(own.task, f"{own.model}/{variant}", own.seed, own.device)
    spec = make_spec(MODEL, context.params["table"], fold_of(context), PROFILE, context.device.type)
    training = replace(spec.training, steps=min(spec.training.steps, context.params["steps"]))
    model = build_model(spec, task, streams).to(context.device)
    train(model, task.train.to(context.device), task.valid.to(context.device), training, streams, task.redraw)
    scored = (
        log_likelihood(model, t.test.to(context.device), spec.evaluation, streams.fresh("evaluation"))
        for t in (task, *also)
    )
    return [-found.mean() for found in scored]


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two exact numbers on one test part or two, in nats."""
    return Estimate(a.value - b.value, math.nan, "exact", "nats", min(a.n, b.n))


# -- copies


def copies(context: Context) -> Outcome:
    """The model with what belongs together on one side of the split, and with rows cut at random."""
    source = SOURCES[context.params["table"]]
    rows = tables.read_rows(source)
    keys = {"together": rows[:, TOGETHER[source.name]], "random": np.arange(len(rows))[:, None]}
    found = {}
    for name, key in keys.items():
        parts = tables.parts_of(key, tables.FOLDS, tables.FOLD_SEED)
        task = tables.as_task(source.name, source.about, tables.cut(rows, fold_of(context), parts))
        (found[f"nll:{name}"],) = nll(context, name, task)
    found["cost"] = difference(found["nll:together"], found["nll:random"])
    return Outcome(found)


# -- rounding


def rounding_steps(rows: Tensor) -> Tensor:
    """The median gap between a column's distinct values, (n, D) -> (D,)."""
    return torch.stack([column.unique().diff().median() for column in rows.T])


def through_noise(task: Task, steps: Tensor) -> Task:
    """The task with uniform noise, a rounding step wide, on every row: drawn afresh in training, once elsewhere.

    Args:
        steps: in the task's units, shape (D,).
    """

    def noised(x: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x + (u - 0.5) * steps.to(x.device)

    frozen = torch.Generator().manual_seed(NOISE_SEED)
    return replace(task, valid=noised(task.valid, frozen), test=noised(task.test, frozen), redraw=noised)


def rounding(context: Context) -> Outcome:
    """The model on rows as they are and through noise that fills the rounding."""
    task = tables.load_table(SOURCES[context.params["table"]], fold_of(context))
    smooth = through_noise(task, rounding_steps(task.train))
    as_given, scored_through_noise = nll(context, "as-given", task, smooth)
    (through,) = nll(context, "through-noise", smooth)
    found = {"as-given": as_given, "as-given-scored-through-noise": scored_through_noise, "through-noise": through}
    return Outcome({**{f"nll:{k}": v for k, v in found.items()}, "spikes": difference(through, as_given)})


def on_table(name: str, about: str, run: Callable[[Context], Outcome], table: str, seeds: int = 5) -> Experiment:
    """One of the two experiments on one table."""
    return Experiment(
        f"rnade-{name}-{table}",
        f"{about}, {table}",
        "autoregressive",
        run,
        {"table": table, "steps": 1_000_000},
        seeds=seeds,
        overrides={"smoke": {"steps": 5}},
        profiles=("full",),
        files=(SOURCES[table].file,),
    )


#: all folds of wine, whose random cut is the printed protocol
COPIES = tuple(
    on_table("copies", "copies of rows kept together or cut at random", copies, table, 10 if "wine" in table else 5)
    for table in TABLES
)
ROUNDING = tuple(on_table("rounding", "spikes on rounded values", rounding, t) for t in TABLES[:2])

PAPER = Paper(
    "rnade",
    Path(__file__).with_suffix(".toml"),
    experiments=(*COPIES, *ROUNDING),
    model_runs={
        "full": (
            ModelRuns(("gaussian-mixture", "causal-conv", "eonade", "made"), TABLES, 10),
            ModelRuns(("eonade",), ("mushrooms", "dna"), 3),
            ModelRuns(("made",), ("mushrooms",), 3),
            ModelRuns(("causal-conv",), ("dna",), 3),
        )
    },
)
