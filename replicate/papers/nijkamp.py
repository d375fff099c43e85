"""Short-run chains of a convolutional energy look right, and the energy they leave behind is no density.

Nijkamp, Hill, Zhu and Wu 2019, arXiv:1904.09770: at every update K Langevin steps from uniform noise, whose ends are
taken for samples of the model. Du and Mordatch 2019, arXiv:1903.08689: the same with a buffer of chains that go on
from update to update, a share of them starting again. Both are `baselines.conv_ebm.ConvEBM`, told apart by the
probability of a restart, and are called `fresh` and `replay` here. Each is sampled as it was trained (short run: as
many steps as its chains are old on average) and then goes on for many times as long (long run).

The third model has a likelihood: `tilted`, a convolutional energy that tilts a Gaussian (`TiltedConvEBM`) behind the
suite's dequantisation, with log Z annealed both ways. Its bits per dimension are given only where the two ends of that
bracket are at most 10 nats apart; the width itself is always given. Short-run energies have no such number: along a
long run they fall without end, so that exp(-U) has no finite integral to estimate.

Quality is told in the features of a classifier that the suite trains on the task's training part. It is no judge of
what is no digit (that of the 8x8 digits is confident of 57 in 100 images of uniform noise), so that the share of
confident answers stands beside the distance and not in its place.

Deviations: MNIST and 8x8 digits in place of CIFAR-10, CelebA and LSUN; a few thousand updates in place of 100,000 to
200,000; the network of the released minimal code with SiLU, its last layer at zero; weights are an exponential moving
average; a weak penalty on squared energies in both methods. Images are dequantised and scaled to [-1, 1], where the
step's noise of 0.01 is the released one. On the digits K and the number of updates are what a minute of one CPU
affords, chosen on seeds that are not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.conv_ebm import ConvEBM, TiltedConvEBM
from baselines.ebm import GaussianMixture
from replicate.errors import TrainingError
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.metrics.features import FeatureClassifier, feature_quality
from replicate.model import Estimate, LogLikelihood, Training
from replicate.runs.evaluate import task_features
from replicate.runs.experiment import MAX_PIXELS, Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.training import train
from replicate.sampling.langevin import ula
from replicate.tasks.base import Task
from replicate.tasks.digits import digits
from replicate.tasks.images import FILES, mnist

METHODS = ("fresh", "replay")
#: settings of `ConvEBM` that both methods share
SHARED = ("width", "layers", "chains", "langevin_sd", "temperature", "noise", "penalty")
#: rows of the plot of images
LABELS = {
    "data": "validation images",
    "gaussian": "fitted Gaussian",
    "fresh_short": "fresh, short run",
    "fresh_long": "fresh, long run",
    "replay_short": "replay, short run",
    "replay_long": "replay, long run",
    "tilted": "tilted Gaussian",
}
#: above this probability of a class the classifier counts as confident
CONFIDENT = 0.9
#: pixels farther out than this are outside the data, whose range is [-1, 1]; noise in training has deviation 0.03
OUTSIDE = 1.1
#: width in nats above which a bracket of log Z gives no likelihood
WIDEST = 10.0
#: times at which long-run chains are read, and images of a row that the report draws
STOPS, ROW = 20, 20


def to_pixels(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Dequantised: 2 (x + u) / levels - 1 with u ~ U[0, 1), from integers x (n, D) to [-1, 1]."""
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return 2 * (x + u) / levels - 1


def to_levels(y: Tensor, levels: int) -> Tensor:
    """The integer whose bin holds y (n, D); what is outside [-1, 1] goes to the nearest end."""
    return ((y + 1) / 2 * levels).floor().clamp(0, levels - 1)


@dataclass(frozen=True)
class Method:
    """How chains are run in training.

    Attributes:
        updates: of the weights.
        steps: K, Langevin steps before each.
        restart: probability that a chain starts again from noise.
    """

    updates: int
    steps: int
    restart: float


def method_of(name: str, params: Mapping[str, Any]) -> Method:
    """The settings of "fresh" or "replay" from an experiment's flat ones; fresh chains always start again."""
    restart = params["restart"] if name == "replay" else 1.0
    return Method(params[f"{name}_updates"], params[f"{name}_steps"], restart)


@dataclass
class Findings:
    """Estimates by metric, reasons for those that could not be had, images in levels by variant, and long runs.

    Attributes:
        energies: by method, (steps, mean energy minus that of data in nats) along the long run.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    energies: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    examples: dict[str, LogLikelihood] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One task's images, the classifier that judges them, and the number of samples of every kind."""

    context: Context
    task: Task
    judge: FeatureClassifier
    real: Tensor
    found: Findings

    @staticmethod
    def of(context: Context, task: Task) -> Study:
        """Train the classifier, and measure what a perfect sampler and a Gaussian would get."""
        judge = task_features(task)
        study = Study(context, task, judge, judge.features(task.test), Findings())
        study.look("data", task.valid[: context.params["samples"]])
        study.look("gaussian", study.gaussian())
        return study

    @property
    def levels(self) -> int:
        """Grey levels of the images."""
        assert self.task.info.levels is not None
        return self.task.info.levels

    def pixels(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Integers x (n, D) -> dequantised [-1, 1]."""
        return to_pixels(x, self.levels, generator)

    def gaussian(self) -> Tensor:
        """Samples of the Gaussian with the mean and covariance of training pixels, in levels."""
        generator, device = self.context.streams.fresh("gaussian"), self.context.device
        base = GaussianMixture(self.task.info.dim, 1).to(device)
        base.fit(self.pixels(self.task.train.to(device), generator), generator, prior=0.0, inflation=1.0)
        return to_levels(base.sample(self.context.params["samples"], generator), self.levels)

    def look(self, variant: str, images: Tensor) -> None:
        """Quality of images (n, D) in levels, and the share of which the classifier is confident."""
        quality = feature_quality(self.judge.features(images), self.real)
        self.found.estimates |= {f"{metric}:{variant}": e for metric, e in quality.items()}
        sure = self.judge.probabilities(images).amax(1) >= CONFIDENT
        self.found.estimates[f"confident:{variant}"] = Estimate.mean_of(sure, "estimate", "fraction")
        self.found.images[variant] = images

    def chains(self, name: str) -> None:
        """Train one method, then measure its short and its long runs."""
        try:
            model = self.trained(name)
        except TrainingError as error:
            variants = (f"{name}_short", f"{name}_long")
            self.found.missing |= {f"frechet:{variant}": f"training diverged: {error}" for variant in variants}
            return
        streams, p = self.context.streams, self.context.params
        short = model.sample(p["samples"], streams.fresh(f"{name}-short")).detach()
        self.found.estimates[f"nfe:{name}"] = Estimate.exact(model.nfe, "network evaluations")
        every = max(1, p["long_run"] // STOPS)
        generator = streams.fresh(f"{name}-long")
        long = ula(model.score, short, p["long_run"], model.step_size, generator, model.temperature, every)
        assert long.path is not None
        data = self.pixels(self.task.test.to(short), streams.fresh("data"))
        level = Estimate.mean_of(energies(model, data), "estimate", "nats")
        means = [float(energies(model, x).mean()) - level.value for x in long.path]
        self.found.energies[name] = ([float(i * every) for i in range(len(means))], means)
        for run, x in (("short", short), ("long", long.samples)):
            self.measure(f"{name}_{run}", model, x, level)

    def trained(self, name: str) -> ConvEBM:
        """The energy after its training.

        Raises:
            TrainingError: the loss became nan or infinite.
        """
        p, device, method = self.context.params, self.context.device, method_of(name, self.context.params)
        shared = {key: p[key] for key in SHARED}
        with self.context.streams.initialisation():
            model = ConvEBM(self.task.info, steps=method.steps, restart=method.restart, **shared).to(device)
        settings = Training(
            steps=method.updates,
            batch_size=p["batch_size"],
            lr=p["lr"],
            schedule="constant",
            weight_decay=p["weight_decay"],
            ema=p["ema"],
        )
        data, valid = self.task.train.to(device), self.task.valid.to(device)
        train(model, data, valid, settings, self.context.streams, self.pixels)
        return model

    def measure(self, variant: str, model: ConvEBM, x: Tensor, level: Estimate) -> None:
        """Energy against that of data, share of pixels outside the data's range, and quality of x (n, D) in [-1, 1]."""
        if not bool(x.isfinite().all()):
            self.found.missing[f"frechet:{variant}"] = "the chains diverged"
            return
        mean = Estimate.mean_of(energies(model, x), "estimate", "nats")
        stderr = math.hypot(mean.stderr, level.stderr)
        self.found.estimates |= {
            f"energy:{variant}": Estimate(mean.value - level.value, stderr, "estimate", "nats", mean.n),
            f"outside:{variant}": Estimate.mean_of((x.abs() > OUTSIDE).double().mean(1), "estimate", "fraction"),
        }
        self.look(variant, to_levels(x, self.levels))

    def tilted(self) -> None:
        """Train the tilted Gaussian, bracket its log Z, and measure its samples."""
        p, streams, device, task = self.context.params, self.context.streams, self.context.device, self.task
        with streams.initialisation():
            inner = TiltedConvEBM(
                task.info,
                p["width"],
                p["layers"],
                inflation=p["inflation"],
                chains=p["tilted_chains"],
                moves=p["moves"],
                sweeps=(p["annealing"], p["after"]),
            )
            model = Preprocessed(inner, task.info, "gaussianise").to(device)
        settings = Training(
            steps=p["tilted_updates"],
            batch_size=p["tilted_chains"],
            lr=p["tilted_lr"],
            weight_decay=p["weight_decay"],
            ema=p["ema"],
        )
        try:
            train(model, task.train.to(device), task.valid.to(device), settings, streams)
        except TrainingError as error:
            self.found.missing["bits_per_dim:tilted"] = f"training diverged: {error}"
            return
        effort = Effort(ais_chains=p["ais_chains"], ais_steps=p["ais_steps"], dequantisation_draws=p["draws"])
        log_p = log_likelihood(model, task.test.to(device), effort, streams.fresh("tilted-likelihood"))
        self.likelihood(log_p)
        self.look("tilted", model.sample(p["samples"], streams.fresh("tilted-samples")).detach())
        self.found.estimates["nfe:tilted"] = Estimate.exact(model.nfe, "network evaluations")

    def likelihood(self, log_p: LogLikelihood) -> None:
        """The width of the bracket round log Z, and the likelihood of the test images where that is small enough."""
        low, high = log_p.details["ais_log_z_forward"], log_p.details["ais_log_z_reverse"]
        gap = high.value - low.value
        stderr = math.hypot(low.stderr, high.stderr)
        self.found.estimates |= {f"{metric}:tilted": e for metric, e in log_p.details.items()}
        self.found.estimates["ais_gap:tilted"] = Estimate(gap, stderr, "estimate", "nats", low.n)
        if abs(gap) > WIDEST:
            reason = f"the two ends of the bracket of log Z are {gap:.1f} nats apart, more than {WIDEST:.0f}"
            self.found.missing |= {"nll:tilted": reason, "bits_per_dim:tilted": reason}
            return
        nll = -log_p.mean()
        bits = nll.times(1 / (self.task.info.dim * math.log(2)), "bits/dim")
        self.found.estimates |= {"nll:tilted": nll, "bits_per_dim:tilted": bits}
        self.found.examples[self.task.name] = log_p

    def outcome(self) -> Outcome:
        """All that was found, with plots of the images and of the energy along the long runs."""
        found = self.found
        plots = (self.images_plot(), energy_plot(found.energies))
        classifiers = {self.task.name: self.judge.sha256}
        return Outcome(found.estimates, plots, found.missing, found.examples, classifiers)

    def images_plot(self) -> Plot:
        """A row of images of each kind."""
        image, top = self.task.info.image, self.levels - 1
        assert image is not None
        most = min(ROW, MAX_PIXELS // self.task.info.dim)
        kinds = self.found.images.items()
        rows = [Plot.row_of_images(LABELS[kind], x[:most].view(-1, *image) / top) for kind, x in kinds]
        return Plot("samples", "samples", "", "", tuple(rows), style="images", image=image)


@torch.no_grad()
def energies(model: ConvEBM, x: Tensor) -> Tensor:
    """U (n,) of x (n, D), a thousand rows at a time."""
    return torch.cat([model.energy(part) for part in x.split(1000)])


def energy_plot(series: Mapping[str, tuple[list[float], list[float]]]) -> Plot:
    """Mean energy of chains along their long run, that of data at 0."""
    lines = tuple(Line(name, x, y) for name, (x, y) in series.items())
    title = "energy of chains that go on after a short run"
    return Plot(
        "long-run-energy", title, "Langevin steps", "energy minus that of data, nats", lines, levels={"data": 0.0}
    )


def both_ways(context: Context) -> Outcome:
    """Fresh chains and replayed ones on the 8x8 digits."""
    study = Study.of(context, digits())
    for name in METHODS:
        study.chains(name)
    return study.outcome()


def with_likelihood(context: Context) -> Outcome:
    """Both on MNIST, and the tilted Gaussian with a bracket of log Z."""
    study = Study.of(context, mnist())
    for name in METHODS:
        study.chains(name)
    study.tilted()
    return study.outcome()


DIGITS = Experiment(
    name="conv-ebm-digits",
    about="a convolutional energy of 8x8 digits from short-run chains, fresh and replayed, and its long runs",
    family="ebm",
    run=both_ways,
    params={
        "width": 8,
        "layers": 1,
        "batch_size": 64,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "ema": 0.99,
        "chains": 500,
        "langevin_sd": 0.01,
        "temperature": 1.0,
        "noise": 0.03,
        "penalty": 0.001,
        "restart": 0.05,
        "fresh_updates": 300,
        "fresh_steps": 20,
        "replay_updates": 600,
        "replay_steps": 10,
        "samples": 300,
        "long_run": 1000,
    },
    seeds=3,
    tasks=("digits",),
    profiles=("full",),
)

#: a fresh update costs 50 evaluations of 128 images through 18 million multiplications, at about 1 ms each: 150 s for
#: 3000 of them, 120 s for 6000 of 20 steps, 130 s for the tilted model, a minute each for annealing and long runs
IMAGES = Experiment(
    name="conv-ebm-mnist",
    about="a convolutional energy of MNIST from short-run chains, and a tilted Gaussian with log Z bracketed",
    family="ebm",
    run=with_likelihood,
    params={
        "width": 32,
        "layers": 3,
        "batch_size": 128,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "ema": 0.99,
        "chains": 1000,
        "langevin_sd": 0.01,
        "temperature": 1.0,
        "noise": 0.03,
        "penalty": 0.001,
        "restart": 0.05,
        "fresh_updates": 3000,
        "fresh_steps": 50,
        "replay_updates": 6000,
        "replay_steps": 20,
        "samples": 1000,
        "long_run": 5000,
        "tilted_updates": 15_000,
        "tilted_chains": 256,
        "tilted_lr": 1e-3,
        "inflation": 1.02,
        "moves": 2,
        "annealing": 1000,
        "after": 500,
        "ais_chains": 128,
        "ais_steps": 5000,
        "draws": 16,
    },
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    cuda_minutes=9,
)

PAPER = Paper("nijkamp", Path(__file__).with_suffix(".toml"), experiments=(DIGITS, IMAGES))
