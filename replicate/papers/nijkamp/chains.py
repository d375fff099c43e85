"""Short and long runs of two convolutional energies, and a tilted Gaussian with a bracket of log Z."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.conv_ebm import ConvEBM, ConvSettings, TiltedConvEBM
from baselines.ebm import GaussianMixture
from replicate.errors import TrainingError
from replicate.experiments import Plot, Run, experiment
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.metrics.features import feature_quality
from replicate.model import Estimate, LogLikelihood, Training
from replicate.runs.evaluate import task_features
from replicate.runs.experiment import MAX_PIXELS
from replicate.runs.training import train
from replicate.sampling.langevin import ula
from replicate.tasks.base import Task
from replicate.tasks.digits import digits
from replicate.tasks.images import FILES, mnist

METHODS = ("fresh", "replay")
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


@dataclass(frozen=True)
class Settings:
    """How the two energies, both of `ConvEBM`, are trained and sampled.

    `restart` is the probability that a replayed chain starts again from noise. The `steps` are K, Langevin steps before
    each update of the weights; `samples` of every kind take `long_run` further steps.
    """

    width: int = 8
    layers: int = 1
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.1
    ema: float = 0.99
    chains: int = 500
    langevin_sd: float = 0.01
    temperature: float = 1.0
    noise: float = 0.03
    penalty: float = 0.001
    restart: float = 0.05
    fresh_updates: int = 300
    fresh_steps: int = 20
    replay_updates: int = 600
    replay_steps: int = 10
    samples: int = 300
    long_run: int = 1000

    def method(self, name: str) -> tuple[int, int, float]:
        """Return updates, K and the probability of a restart of "fresh" or "replay"; fresh chains always restart."""
        if name == "fresh":
            return self.fresh_updates, self.fresh_steps, 1.0
        return self.replay_updates, self.replay_steps, self.restart


@dataclass(frozen=True)
class TiltedSettings(Settings):
    """On MNIST, also the tilted Gaussian, `TiltedConvEBM`, and the evaluation budget of its likelihood.

    A fresh update costs 50 evaluations of 128 images through 18 million multiplications, at about 1 ms each: 150 s for
    3000 of them, 120 s for 6000 of 20 steps, 130 s for the tilted model, a minute each for annealing and long runs.
    """

    width: int = 32
    layers: int = 3
    batch_size: int = 128
    lr: float = 3e-4
    chains: int = 1000
    fresh_updates: int = 3000
    fresh_steps: int = 50
    replay_updates: int = 6000
    replay_steps: int = 20
    samples: int = 1000
    long_run: int = 5000
    tilted_updates: int = 15_000
    tilted_chains: int = 256
    tilted_lr: float = 1e-3
    inflation: float = 1.02
    moves: int = 2
    annealing: int = 1000
    after: int = 500
    ais_chains: int = 128
    ais_steps: int = 5000
    draws: int = 16


def to_pixels(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Dequantise integers x (n, D) to [-1, 1]: 2 (x + u) / levels - 1 with u ~ U[0, 1)."""
    return 2 * (x + torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)) / levels - 1


def to_levels(y: Tensor, levels: int) -> Tensor:
    """Return the integer whose bin holds y (n, D); y outside [-1, 1] goes to the nearest end."""
    return ((y + 1) / 2 * levels).floor().clamp(0, levels - 1)


@torch.no_grad()
def energies(model: ConvEBM, x: Tensor) -> Tensor:
    """Return U (n,) of x (n, D), computed a thousand rows at a time."""
    return torch.cat([model.energy(part) for part in x.split(1000)])


class Study:
    """The images of one task, the classifier that judges samples, and the samples and long runs so far.

    At first the classifier is trained, and the scores of a perfect sampler and of a Gaussian are measured. `images` are
    in levels, by variant; `energies` by method, (steps, mean energy minus that of data in nats) along the long run.
    """

    def __init__(self, run: Run, s: Settings, task: Task) -> None:
        assert task.info.levels is not None
        self.run, self.s, self.task, self.levels = run, s, task, task.info.levels
        self.images: dict[str, Tensor] = {}
        self.energies: dict[str, tuple[list[float], list[float]]] = {}
        self.judge = task_features(task)
        self.real = self.judge.features(task.test)
        run.classifiers[task.name] = self.judge.sha256
        self.look("data", task.valid[: s.samples])
        self.look("gaussian", self.gaussian())

    def pixels(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Dequantise integers x (n, D) to [-1, 1]."""
        return to_pixels(x, self.levels, generator)

    def gaussian(self) -> Tensor:
        """Draw from the Gaussian with the mean and covariance of training pixels, in levels."""
        generator, device = self.run.stream("gaussian"), self.run.device
        base = GaussianMixture(self.task.info.dim, 1).to(device)
        base.fit(self.pixels(self.task.train.to(device), generator), generator, prior=0.0, inflation=1.0)
        return to_levels(base.sample(self.s.samples, generator), self.levels)

    def look(self, variant: str, images: Tensor) -> None:
        """Measure the quality of images (n, D) in levels, and the share of which the classifier is confident."""
        self.run.measure_all(feature_quality(self.judge.features(images), self.real), variant)
        sure = self.judge.probabilities(images).amax(1) >= CONFIDENT
        self.run.measure(f"confident:{variant}", Estimate.mean_of(sure, "estimate", "fraction"))
        self.images[variant] = images

    def chains(self, name: str) -> None:
        """Train one method, then measure its short and its long runs."""
        run, s = self.run, self.s
        try:
            model = self.trained(name)
        except TrainingError as error:
            for variant in (f"{name}_short", f"{name}_long"):
                run.omit(f"frechet:{variant}", f"training diverged: {error}")
            return
        short = model.sample(s.samples, run.stream(f"{name}-short")).detach()
        run.measure(f"nfe:{name}", Estimate.exact(model.nfe, "network evaluations"))
        every = max(1, s.long_run // STOPS)
        generator = run.stream(f"{name}-long")
        long = ula(model.score, short, s.long_run, model.step_size, generator, model.temperature, every)
        assert long.path is not None
        data = self.pixels(self.task.test.to(short), run.stream("data"))
        level = Estimate.mean_of(energies(model, data), "estimate", "nats")
        means = [float(energies(model, x).mean()) - level.value for x in long.path]
        self.energies[name] = [float(i * every) for i in range(len(means))], means
        for length, x in (("short", short), ("long", long.samples)):
            self.measure(f"{name}_{length}", model, x, level)

    def trained(self, name: str) -> ConvEBM:
        """Train the energy of one method.

        Raises:
            TrainingError: the loss became nan or infinite.
        """
        s, device = self.s, self.run.device
        updates, steps, restart = s.method(name)
        chains = (s.chains, steps, s.langevin_sd, restart, s.temperature, s.noise, s.penalty)
        model = self.run.build(lambda: ConvEBM(self.task.info, ConvSettings(s.width, s.layers, *chains)))
        settings = Training(updates, s.batch_size, s.lr, schedule="constant", weight_decay=s.weight_decay, ema=s.ema)
        data, valid = self.task.train.to(device), self.task.valid.to(device)
        train(model, data, valid, settings, self.run.streams, self.pixels)
        return model

    def measure(self, variant: str, model: ConvEBM, x: Tensor, level: Estimate) -> None:
        """Measure x (n, D) in [-1, 1]: its energy minus that of data, its share of pixels outside, its quality."""
        if not bool(x.isfinite().all()):
            self.run.omit(f"frechet:{variant}", "the chains diverged")
            return
        self.run.measure(f"energy:{variant}", Estimate.mean_of(energies(model, x), "estimate", "nats") - level)
        outside = (x.abs() > OUTSIDE).double().mean(1)
        self.run.measure(f"outside:{variant}", Estimate.mean_of(outside, "estimate", "fraction"))
        self.look(variant, to_levels(x, self.levels))

    def tilted(self, s: TiltedSettings) -> None:
        """Train the tilted Gaussian, bracket its log Z, and measure its samples."""
        run, task, device = self.run, self.task, self.run.device
        with run.initialisation():
            sampler = {"chains": s.tilted_chains, "moves": s.moves, "sweeps": (s.annealing, s.after)}
            inner = TiltedConvEBM(task.info, s.width, s.layers, inflation=s.inflation, **sampler)
            model = Preprocessed(inner, task.info, "gaussianise").to(device)
        updates, batch = s.tilted_updates, s.tilted_chains
        settings = Training(steps=updates, batch_size=batch, lr=s.tilted_lr, weight_decay=s.weight_decay, ema=s.ema)
        try:
            train(model, task.train.to(device), task.valid.to(device), settings, run.streams)
        except TrainingError as error:
            run.omit("bits_per_dim:tilted", f"training diverged: {error}")
            return
        effort = Effort(ais_chains=s.ais_chains, ais_steps=s.ais_steps, dequantisation_draws=s.draws)
        self.likelihood(log_likelihood(model, task.test.to(device), effort, run.stream("tilted-likelihood")))
        self.look("tilted", model.sample(s.samples, run.stream("tilted-samples")).detach())
        run.measure("nfe:tilted", Estimate.exact(model.nfe, "network evaluations"))

    def likelihood(self, log_p: LogLikelihood) -> None:
        """Measure the width of the bracket of log Z, and the likelihood of the test images if the width is small."""
        low, high = log_p.details["ais_log_z_forward"], log_p.details["ais_log_z_reverse"]
        gap, stderr = high.value - low.value, math.hypot(low.stderr, high.stderr)
        self.run.measure_all(log_p.details, "tilted")
        self.run.measure("ais_gap:tilted", Estimate(gap, stderr, "estimate", "nats", low.n))
        if abs(gap) > WIDEST:
            reason = f"the two ends of the bracket of log Z are {gap:.1f} nats apart, more than {WIDEST:.0f}"
            for metric in ("nll:tilted", "bits_per_dim:tilted"):
                self.run.omit(metric, reason)
            return
        nll = -log_p.mean()
        self.run.measure("nll:tilted", nll)
        self.run.measure("bits_per_dim:tilted", nll.times(1 / (self.task.info.dim * math.log(2)), "bits/dim"))
        self.run.keep_examples(self.task.name, log_p)

    def draw(self) -> None:
        """Draw a row of images of each kind, and the mean energy along the long runs, that of data at 0."""
        image, top = self.task.info.image, self.levels - 1
        assert image is not None
        most = min(ROW, MAX_PIXELS // self.task.info.dim)
        rows = [Plot.row_of_images(LABELS[k], x[:most].view(-1, *image) / top) for k, x in self.images.items()]
        self.run.plot(Plot("samples", "samples", "", "", tuple(rows), style="images", image=image))
        title = "energy of chains that go on after a short run"
        axes = "Langevin steps", "energy minus that of data, nats"
        self.run.curves("long-run-energy", title, axes, self.energies, levels={"data": 0.0})


ABOUT_DIGITS = "a convolutional energy of 8x8 digits from short-run chains, fresh and replayed, and its long runs"
ABOUT_MNIST = "a convolutional energy of MNIST from short-run chains, and a tilted Gaussian with log Z bracketed"
FULL: dict[str, Any] = {"family": "ebm", "seeds": 3, "profiles": ("full",)}


@experiment("conv-ebm-digits", about=ABOUT_DIGITS, **FULL, tasks=("digits",))
def on_digits(run: Run, s: Settings) -> None:
    """Measure fresh chains and replayed ones on the 8x8 digits."""
    study = Study(run, s, digits())
    for name in METHODS:
        study.chains(name)
    study.draw()


@experiment("conv-ebm-mnist", about=ABOUT_MNIST, **FULL, files=FILES["mnist"], cuda_minutes=9)
def on_mnist(run: Run, s: TiltedSettings) -> None:
    """Measure both on MNIST, and the tilted Gaussian with a bracket of log Z."""
    study = Study(run, s, mnist())
    for name in METHODS:
        study.chains(name)
    study.tilted(s)
    study.draw()
