"""A row of a paper: one flow on dequantised images, its bound in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from replicate.experiments.image_rows import IN_A_ROW, in_bits, sheet, training
from replicate.likelihood.dequantisation import DequantisedGaussian, DequantisedLogit, Preprocessed
from replicate.model import DataInfo, Estimate, LogLikelihood, Model, ModelEntry
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Line, Outcome, Plot
from replicate.runs.seeds import Streams
from replicate.runs.training import History, train
from replicate.tasks.base import Task
from replicate.tasks.images import cifar_10, fashion_mnist, mirrored, mnist

TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "fashion-mnist": fashion_mnist, "cifar-10": cifar_10}


#: images that a flow scores at a time
CHUNK = 1_000


class PooledLogit(DequantisedLogit):
    """Logits standardised by one mean and one deviation of all pixels.

    Those of a pixel that is hardly ever inked would put a test image that inks it hundreds of deviations away.
    """

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        z, _ = self._logit(train, generator)
        self.mean.fill_(z.mean())
        self.std.fill_(z.std())


def preprocessed(inner: Model, info: DataInfo, name: str, alpha: float) -> Preprocessed:
    """A flow behind the transform of a name: "logit" (each pixel standardised), "pooled-logit" or "gaussianise".

    Args:
        alpha: logits are those of alpha + (1 - 2 alpha) x.
    """
    assert info.levels is not None
    model = Preprocessed(inner, info)
    if name == "gaussianise":
        model.transform = DequantisedGaussian(info.dim, info.levels)
    else:
        kind = {"logit": DequantisedLogit, "pooled-logit": PooledLogit}[name]
        model.transform = kind(info.dim, info.levels, alpha)
    return model


def fitted(model: Preprocessed, train_x: Tensor, valid_x: Tensor, p: Mapping[str, Any], streams: Streams) -> History:
    """Train on fresh noise for every batch or, with `noise_once`, on images that were dequantised once and for all."""
    if not p["noise_once"]:
        return train(model, train_x, valid_x, training(p), streams)
    noise = streams.fresh("dequantise")
    model.transform.fit(train_x, noise)
    train_z, valid_z = (model.transform(x, noise)[0] for x in (train_x, valid_x))
    return train(model.inner, train_z, valid_z, training(p), streams)


@torch.no_grad()
def by_draw(model: Preprocessed, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """log q(x + u) plus the log-volume in nats for every image and noise draw, float64 (n, draws).

    Each is the log of an unbiased estimate of the model's probability of x.
    """
    state: State = {"done": [], "generator": generator}
    for _ in resumable("noise draws", draws, state):
        z, log_volume = model.transform(x, state["generator"])
        log_q = torch.cat([model.inner.log_prob(part) for part in z.split(CHUNK)])
        state["done"].append(log_q.double() + log_volume.double())
    return torch.stack(state["done"], 1)


def bounds(log_p: Tensor) -> tuple[LogLikelihood, LogLikelihood]:
    """Lower bounds on log P(x): the mean over the draws, and the log of the mean density."""
    draws = log_p.shape[1]
    tight = log_p.logsumexp(1) - math.log(draws)
    return LogLikelihood(log_p.mean(1), "lower_bound", draws), LogLikelihood(tight, "lower_bound", draws)


def validation_curve(history: History, model: Preprocessed, valid: Tensor, generator: torch.Generator) -> Plot:
    """Bits per dimension on validation, one noise draw, against the step."""
    log_volume = float(model.transform(valid, generator)[1].mean())
    bits = [(loss - log_volume) / (valid.shape[1] * math.log(2)) for _, loss in history.valid]
    line = Line("validation", [step for step, _ in history.valid], bits)
    return Plot("validation", "Bound on validation", "optimizer step", "bits/dim", (line,))


def image_row(entry: ModelEntry, context: Context) -> Outcome:
    """Train one flow on dequantised images and bound the bits per dimension of the test images.

    Args:
        entry: of a model of continuous data; the settings give its parameters. With "mirror" the training images are
            there twice, once with left and right exchanged.
    """
    p, streams = context.params, context.streams
    task = TASKS[p["data"]]()
    info, rows = task.info, slice(p["rows"] or None)
    train_x, valid_x, test_x = (part[rows].to(context.device) for part in (task.train, task.valid, task.test))
    if p.get("mirror"):
        train_x = torch.cat([train_x, mirrored(train_x)])
    with streams.initialisation():
        inner = entry.build(info, **{name: p[name] for name in entry.params})
    model = preprocessed(inner, info, p["transform"], p["alpha"]).to(context.device)
    history = fitted(model, train_x, valid_x, p, streams)
    plain, tight = bounds(by_draw(model, test_x, p["draws"], streams.fresh("evaluation")))
    estimates = {
        **in_bits(plain, info.dim),
        **in_bits(tight, info.dim, ":iw_bound"),
        "train_seconds": Estimate.exact(history.seconds, "seconds"),
    }
    samples = model.sample(IN_A_ROW, streams.fresh("samples"))
    curve = validation_curve(history, model, valid_x, streams.fresh("volume"))
    images = sheet("samples", "Samples of the flow", {"data": test_x, "samples": samples}, info)
    return Outcome(estimates, (curve, images), examples={task.name: plain})


#: A coupling at 14 x 14 and one at 7 x 7 are 81 million multiply-adds an image together, eight such pairs 3.9 GFLOP
#: forth and back, a batch half a TFLOP: 28 ms a step at 18 TFLOP/s (30 % of a device's full float32), behind which the
#: launches of some 2,500 kernels hide. With validation and the test draws about 9 minutes.
AFFINE: dict[str, Any] = {
    "data": "mnist",
    "rows": 0,
    "transform": "pooled-logit",
    "alpha": 1e-6,
    "noise_once": False,
    "draws": 16,
    "scales": 2,
    "depth": 8,
    "hidden": 128,
    "blocks": 2,
    "dropout": 0.0,
    "positions": False,
    "bound": 4.0,
    "steps": 18_000,
    "batch_size": 128,
    "lr": 1e-3,
    "warmup": 500,
    "grad_clip": 200.0,
    "ema": 0.999,
    "validate_every": 1_000,
}
