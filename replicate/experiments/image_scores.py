"""Score models of MNIST and Fashion-MNIST in two papers: score SDE (2011.13456) and ScoreFlow (2101.09258).

Both train one U-Net and measure what the weighting of denoising score matching, the SDE and the dequantiser do to
bits per dimension.

    likelihood   lambda(t) = g^2 with t drawn in proportion to g^2 / sigma^2: even in log(sigma / s)
    plain        lambda(t) = sigma^2 at uniform t: the mean of |eps - z|^2

Under the likelihood weighting the objective is the same for every SDE up to its end points (2101.09258, theorem 1 in
lambda = log(sigma / s); Kingma et al. 2021, 2107.00630, section 5.1), and the probability flow is too. So VP, sub-VP
and VE can differ there by their last noise level alone: the gap that table 2 has between VP and sub-VP comes from the
plain weighting.

A seed has the same first weights and batches in every experiment on one data set, so that the claims pair by seed; the
variational dequantiser belongs to the very weights that `score-mnist-vp` has.

Deviations: a U-Net of 1.5 million weights, not of 60 to 100 million, and 8,000 steps of 128 images, not 1.3 million;
SDEs from rho = 2e-4, see `replicate.score_based.images`; each image is noised by z and by -z; Runge-Kutta steps of a
fixed number with a step-halving error in place of RK45; one draw of u and one trace probe per image; samples by Heun's
method on the probability flow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from replicate.experiments import Experiment, Run, experiment
from replicate.experiments.image_rows import IN_A_ROW, in_bits, sheet, splits
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.metrics.features import image_features, sample_quality
from replicate.metrics.inception import WEIGHTS, inception, unavailable
from replicate.metrics.quality import frechet
from replicate.model import Estimate, LogLikelihood, Training
from replicate.resume import State, resumable
from replicate.runs.evaluate import digit_features
from replicate.runs.seeds import Streams
from replicate.runs.training import History, train
from replicate.score_based.bound import variational_bound
from replicate.score_based.diffusion import DiffusionModel, LevelProposal, UniformTime, Weighting
from replicate.score_based.images import SDES, DequantisedImages, build_diffusion, even_levels
from replicate.sde import SDE
from replicate.tasks.base import Task
from replicate.tasks.images import FILES
from replicate.tasks.loading import task_entry

#: images whose noise levels are computed at a time
CHUNK = 2_000


@dataclass(frozen=True)
class ImageSettings:
    """Settings of every score model of images: a task, the U-Net and its training, and what is judged.

    `rows` is the number of images of each part (0: all), `reference` that of training images to compare samples with.
    """

    data: str = "mnist"
    rows: int = 0
    channels: int = 32
    steps: int = 8_000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 500
    ema: float = 0.999
    samples: int = 2_000
    reference: int = 10_000

    def training(self, steps: int, lr: float) -> Training:
        """Adam with warm-up and a cosine; the averaged weights of the last step, with no selection."""
        warmup = min(self.warmup, steps // 2)
        return Training(steps, self.batch_size, lr, betas=(0.9, 0.99), warmup=warmup, ema=self.ema)


@dataclass(frozen=True)
class DiffusionSettings(ImageSettings):
    """Settings of a diffusion model: a name in `SDES`, weighting "likelihood" or "plain", and steps of evaluation."""

    sde: str = "vp"
    weighting: str = "likelihood"
    dequantiser: str = "uniform"
    ode_steps: int = 48
    bound_levels: int = 64
    sample_steps: int = 64


def load(run: Run, s: ImageSettings) -> Task:
    """Load the task that the settings name, its parts cut to `rows` and on the run's device."""
    task = task_entry(s.data).load()
    train, valid, test = splits(task, s.rows, run.device)
    return replace(task, train=train, valid=valid, test=test)


def shared_streams(run: Run, s: ImageSettings, owner: str) -> Streams:
    """Return generators that all experiments on one data set share; judged runs have others than designs."""
    stage = run.streams.task.rpartition("/")[0]
    return Streams(f"{stage}/score-{s.data}", owner, run.streams.seed, run.device.type)


def judge(run: Run, s: ImageSettings, samples: Mapping[str, Tensor]) -> None:
    """Measure the quality of the samples of every variant ("" or ":name"), and FID if Inception's weights exist."""
    task: Task = task_entry(s.data).load()
    image, reference = task.info.image, task.train[: s.reference]
    assert image is not None
    run.classifiers[s.data] = image_features(s.data).sha256
    for variant, x in samples.items():
        run.measure_all({f"{metric}{variant}": e for metric, e in sample_quality(x.cpu(), reference, s.data).items()})
    if why := unavailable():
        for variant in samples:
            run.omit(f"fid{variant}", why)
        return
    network = inception()
    run.classifiers["inception"] = network.sha256
    real = network.features(reference, image, run.device)
    for variant, x in samples.items():
        run.measure(f"fid{variant}", frechet(network.features(x.cpu(), image, run.device), real))


def frechet_to_train(task: Task, samples: Tensor) -> Estimate:
    """Frechet distance of samples (n, 64) to the training images, in the suite's digit features."""
    features = digit_features(task)
    return frechet(features.features(samples.cpu()), features.features(task.train))


def plot_training(run: Run, histories: Mapping[str, History]) -> None:
    """Draw the training objective of every network of the run."""
    curves = {name: ([s for s, _ in h.train], [v for _, v in h.train]) for name, h in histories.items()}
    run.curves("training", "Training objective", ("optimizer step", "objective of one image"), curves)


def proposal_of(sde: SDE, weighting: str) -> tuple[LevelProposal, Weighting]:
    """Return training levels and their weights under a weighting, "likelihood" or "plain"."""
    return (even_levels(sde), "likelihood") if weighting == "likelihood" else (UniformTime(sde), "proposal")


def train_diffusion(run: Run, s: DiffusionSettings, task: Task) -> tuple[DequantisedImages, History]:
    """Train the model that the settings name, on uniformly dequantised images."""
    sde, streams = SDES[s.sde], shared_streams(run, s, "unet")
    with streams.initialisation():
        inner = build_diffusion(task.info, sde, *proposal_of(sde, s.weighting), s.sample_steps, channels=s.channels)
    model = DequantisedImages(inner, task.info).to(run.device)
    return model, train(model, task.train, task.valid, s.training(s.steps, s.lr), streams)


@torch.no_grad()
def bound_likelihood(run: Run, s: DiffusionSettings, model: DequantisedImages, x: Tensor) -> LogLikelihood:
    """Lower bound on log P(x) by the variational bound, with the same draws of u as the probability flow's."""
    y, log_volume = model.transform(x, run.stream("evaluation"))
    inner, parts = cast(DiffusionModel, model.inner), y.split(CHUNK)
    state: State = {"done": [], "generator": run.stream("bound")}
    for i in resumable("variational bound", len(parts), state):
        state["done"].append(variational_bound(inner, parts[i], s.bound_levels, state["generator"]).values)
    return LogLikelihood(torch.cat(state["done"]) + log_volume.double(), "lower_bound")


def measure_diffusion(
    run: Run, s: DiffusionSettings, task: Task, model: DequantisedImages, histories: Mapping[str, History]
) -> None:
    """Measure a trained model: its likelihood of the test images by flow and by bound, and its samples."""
    with torch.no_grad():
        log_p = log_likelihood(model, task.test, Effort(ode_draws=1, ode_steps=s.ode_steps), run.stream("evaluation"))
    run.keep_examples(task.name, log_p)
    run.measure_all({**in_bits(log_p, task.info.dim), **log_p.details})
    run.measure_all(in_bits(bound_likelihood(run, s, model, task.test), task.info.dim, ":elbo"))
    run.measure("nfe", Estimate.exact(model.nfe, "network evaluations"))
    run.measure("train_seconds", Estimate.exact(sum(h.seconds for h in histories.values()), "seconds"))
    samples = model.sample(s.samples, run.stream("sample"))
    judge(run, s, {"": samples})
    rows = {"data": task.test, **{f"samples {i + 1}": samples[IN_A_ROW * i :] for i in range(4)}}
    run.plot(sheet("samples", "Samples of the probability flow", rows, task.info))
    plot_training(run, histories)


def likelihoods(run: Run, s: DiffusionSettings) -> None:
    """Train one diffusion model; measure its likelihood of the test images by flow and by bound, and its samples."""
    task = load(run, s)
    model, history = train_diffusion(run, s, task)
    measure_diffusion(run, s, task, model, {"score": history})


def on_images(
    name: str, about: str, minutes: int, settings: ImageSettings, measure: Callable[..., None] = likelihoods
) -> Experiment:
    """Declare an experiment on the images that the settings name; `minutes` per seed on a CUDA device."""
    reads: dict[str, Any] = {"files": FILES[settings.data], "optional_files": (WEIGHTS,), "cuda_minutes": minutes}
    declared = experiment(name, family="score", about=about, settings=settings, seeds=3, profiles=("full",), **reads)
    return declared(measure)
