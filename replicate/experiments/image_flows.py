"""A row of a paper: one flow of dequantised images, its bound in bits per dimension.

Uniform noise fills each pixel's bin; logits, the flow, and the test images under several noise draws follow.

For noise u the density q of x + u gives E_u[log q(x + u)] <= log P(x) (Theis et al. 2016, 1511.01844). The papers print
the left side, most of them by one draw; `nll` and `bits_per_dim` are that side here, averaged over the draws. The mean
of the densities bounds log P(x) more tightly, and is `:iw_bound`; no printed number compares with that one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.experiments.image_rows import IN_A_ROW, RowSettings, in_bits, sheet, splits
from replicate.likelihood.dequantisation import DequantisedGaussian, DequantisedLogit, Preprocessed
from replicate.model import DataInfo, Estimate, LogLikelihood, Model, ModelEntry
from replicate.resume import State, resumable
from replicate.runs.experiment import Run
from replicate.runs.seeds import Streams
from replicate.runs.training import History, train
from replicate.tasks.images import mirrored
from replicate.tasks.loading import task_entry

#: images that a flow scores at a time
CHUNK = 1_000


@dataclass(frozen=True, kw_only=True)
class FlowSettings(RowSettings):
    """Settings of a flow on dequantised images; further fields are parameters of the flow and fields of `Training`.

    Attributes:
        data: a task of images.
        transform: as in `preprocessed`.
        alpha: logits are those of alpha + (1 - 2 alpha) x.
        noise_once: dequantise the training and validation images once and for all, else afresh for every batch.
        draws: noise draws per test image.
    """

    data: str = "mnist"
    transform: str
    alpha: float = 1e-6
    noise_once: bool
    draws: int = 16


#: Eight couplings at 14 x 14 and at 7 x 7 are half a TFLOP per batch forth and back: 28 ms per step at 18 TFLOP/s (30 %
#: of a device's full float32), which hides the launches of 2,500 kernels. With validation and test draws 9 minutes.
@dataclass(frozen=True, kw_only=True)
class CouplingSettings(FlowSettings):
    """Settings of the multi-scale flows with affine couplings."""

    transform: str = "pooled-logit"
    noise_once: bool = False
    scales: int = 2
    depth: int = 8
    hidden: int = 128
    blocks: int = 2
    dropout: float = 0.0
    positions: bool = False
    bound: float = 4.0
    steps: int = 18_000
    batch_size: int = 128
    warmup: int = 500
    grad_clip: float = 200.0
    ema: float = 0.999
    validate_every: int = 1_000


class PooledLogit(DequantisedLogit):
    """Logits standardised by one mean and one deviation of all pixels.

    By those of a pixel that few training images ink, a test image that inks it would be hundreds of deviations away.
    """

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        z, _ = self._logit(train, generator)
        self.mean.fill_(z.mean())
        self.std.fill_(z.std())


def preprocessed(inner: Model, info: DataInfo, name: str, alpha: float) -> Preprocessed:
    """Put a flow behind "logit" (each pixel standardised) or "pooled-logit", as of `FlowSettings`, or "gaussianise"."""
    assert info.levels is not None
    model = Preprocessed(inner, info)
    if name == "gaussianise":
        model.transform = DequantisedGaussian(info.dim, info.levels)
    else:
        kind = {"logit": DequantisedLogit, "pooled-logit": PooledLogit}[name]
        model.transform = kind(info.dim, info.levels, alpha)
    return model


def fitted(model: Preprocessed, train_x: Tensor, valid_x: Tensor, s: FlowSettings, streams: Streams) -> History:
    """Train on fresh noise for every batch or, with `noise_once`, on images dequantised once and for all."""
    if not s.noise_once:
        return train(model, train_x, valid_x, s.training, streams)
    noise = streams.fresh("dequantise")
    model.transform.fit(train_x, noise)
    train_z, valid_z = (model.transform(x, noise)[0] for x in (train_x, valid_x))
    return train(model.inner, train_z, valid_z, s.training, streams)


@torch.no_grad()
def by_draw(model: Preprocessed, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return log q(x + u) plus the log-volume in nats for every image and noise draw, float64 (n, draws)."""
    state: State = {"done": [], "generator": generator}
    for _ in resumable("noise draws", draws, state):
        z, log_volume = model.transform(x, state["generator"])
        log_q = torch.cat([model.inner.log_prob(part) for part in z.split(CHUNK)])
        state["done"].append(log_q.double() + log_volume.double())
    return torch.stack(state["done"], 1)


def bounds(log_p: Tensor) -> tuple[LogLikelihood, LogLikelihood]:
    """Return two lower bounds on log P(x): the mean over the draws, and the log of the mean density."""
    draws = log_p.shape[1]
    tight = log_p.logsumexp(1) - math.log(draws)
    return LogLikelihood(log_p.mean(1), "lower_bound", draws), LogLikelihood(tight, "lower_bound", draws)


def image_row(run: Run, entry: ModelEntry, s: FlowSettings, mirror: bool = False) -> None:
    """Train one flow on dequantised images and bound the bits per dimension of the test images.

    Args:
        entry: of a model of continuous data; its parameters are among the settings.
        mirror: use each training image twice, once with left and right exchanged.
    """
    task = task_entry(s.data).load()
    train_x, valid_x, test_x = splits(task, s.rows, run.device)
    if mirror:
        train_x = torch.cat([train_x, mirrored(train_x)])
    with run.initialisation():
        inner = entry.build(task.info, **{name: getattr(s, name) for name in entry.params})
    model = preprocessed(inner, task.info, s.transform, s.alpha).to(run.device)
    history = fitted(model, train_x, valid_x, s, run.streams)
    plain, tight = bounds(by_draw(model, test_x, s.draws, run.stream("evaluation")))
    run.measure_all(in_bits(plain, task.info.dim))
    run.measure_all(in_bits(tight, task.info.dim, ":iw_bound"))
    run.measure("train_seconds", Estimate.exact(history.seconds, "seconds"))
    run.keep_examples(task.name, plain)
    samples = model.sample(IN_A_ROW, run.stream("samples"))
    # bits per dimension on validation, by one noise draw
    log_volume = float(model.transform(valid_x, run.stream("volume"))[1].mean())
    bits = [(loss - log_volume) / (task.info.dim * math.log(2)) for _, loss in history.valid]
    curve = [step for step, _ in history.valid], bits
    run.curves("validation", "Bound on validation", ("optimizer step", "bits/dim"), {"validation": curve})
    run.plot(sheet("samples", "Samples of the flow", {"data": test_x, "samples": samples}, task.info))
