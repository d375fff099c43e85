"""Techniques 1, 2 and 4, and the last denoising step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.noise_schedules import geometric_levels
from replicate.likelihood.dequantisation import Preprocessed
from replicate.metrics.quality import frechet
from replicate.model import Estimate
from replicate.runs.evaluate import digit_features
from replicate.runs.spec import make_spec
from replicate.runs.subjects import train_model
from replicate.sampling.annealed import annealed_langevin
from replicate.score_based.matching import tweedie
from replicate.score_based.ncsn import NCSN
from replicate.tasks.images import read_cifar


@dataclass(frozen=True)
class Setting:
    """The paper's settings for one image set (appendix B; the released configurations agree).

    D numbers in an image; first and last noise level, for pixels in [0, 1]; L levels, T Langevin steps at each, eps.
    """

    dim: int
    begin: float
    end: float
    levels: int
    steps: int
    step_size: float

    @property
    def ratio(self) -> float:
        """Gamma, the ratio of neighbouring printed levels."""
        return (self.begin / self.end) ** (1 / (self.levels - 1))


SETTINGS: Mapping[str, Setting] = {
    "cifar10": Setting(32 * 32 * 3, 50.0, 0.01, 232, 5, 6.2e-6),
    "celeba": Setting(64 * 64 * 3, 90.0, 0.01, 500, 5, 3.3e-6),
    "ffhq": Setting(256 * 256 * 3, 348.0, 0.01, 2311, 3, 0.9e-6),
}


def overlap_of(ratio: float, dim: int) -> float:
    """Return C, the mass of a level's shell of radii that is within 3 standard deviations of the level above's.

    Phi(sqrt(2D)(gamma - 1) + 3 gamma) - Phi(sqrt(2D)(gamma - 1) - 3 gamma), falling from 0.997 at gamma = 1.
    """
    centre = math.sqrt(2 * dim) * (ratio - 1)
    return float(ndtr(centre + 3 * ratio) - ndtr(centre - 3 * ratio))


def ratio_at(target: float, dim: int) -> float:
    """Return the ratio gamma whose overlap is `target`, between 0 and 0.99."""
    return float(brentq(lambda ratio: overlap_of(ratio, dim) - target, 1.0, 3.0, xtol=1e-14))


def levels_at(target: float, setting: Setting) -> float:
    """Return L, not rounded: geometric levels of that overlap from the first to the last."""
    return 1 + math.log(setting.begin / setting.end) / math.log(ratio_at(target, setting.dim))


@experiment("ncsnv2-levels", family="score", seeds=1, precision="float64")
def solve_levels(run: Run, *, overlap: float = 0.5) -> None:
    """Technique 2 solved: levels at the printed overlap, overlap at the printed levels."""
    axis = np.linspace(0.05, 0.95, 91).tolist()
    implied, curves = [], {}
    for name, setting in SETTINGS.items():
        implied.append(overlap_of(setting.ratio, setting.dim))
        run.measure(f"levels:{name}", Estimate.exact(levels_at(overlap, setting), "levels"))
        run.measure(f"overlap:{name}", Estimate.exact(implied[-1], "probability"))
        curves[name] = axis, [levels_at(c, setting) for c in axis]
    run.measure("overlap_range", Estimate.exact(max(implied) - min(implied), "probability"))
    printed = {f"{name}, printed": float(setting.levels) for name, setting in SETTINGS.items()}
    axes = "C", "number of levels L"
    run.curves("levels", "Noise levels that technique 2 asks for", axes, curves, log="y", levels=printed)


def variance_ratio(fraction: float, ratio: float, steps: int) -> float:
    """Return the chain's variance after T steps at a level, over that level's own, for fraction = eps / sigma_L^2.

    (1 - fraction)^(2T) (gamma^2 - b) + b, where b = 2 fraction / (1 - (1 - fraction)^2) is the chain's stationary
    variance; the chain comes from the level above, whose variance is gamma^2.
    """
    stationary = 1 / (1 - fraction / 2)
    return (1 - fraction) ** (2 * steps) * (ratio**2 - stationary) + stationary


def step_size_for(setting: Setting) -> float:
    """Return the eps that brings the variance ratio nearest to 1, in squared pixel units.

    The ratio never reaches 1, since gamma^2 and the stationary variance are both above it: nearest is least.
    """

    def distance(log_fraction: float) -> float:
        return abs(variance_ratio(math.exp(log_fraction), setting.ratio, setting.steps) - 1)

    bounds = math.log(1e-5), math.log(0.999)
    found = minimize_scalar(distance, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x) * setting.end**2


@experiment("ncsnv2-step-size", family="score", seeds=1, precision="float64")
def solve_step_size(run: Run) -> None:
    """Technique 4 solved: the Langevin step size at the printed noise levels.

    Measured is also the variance that the solved and the printed step size leave.
    """
    curves = {}
    for name, setting in SETTINGS.items():
        best = step_size_for(setting)
        axis = np.geomspace(0.1 * setting.step_size, 10 * setting.step_size, 100).tolist()
        fractions = [eps / setting.end**2 for eps in (best, setting.step_size, *axis)]
        at_best, at_printed, *ratios = (variance_ratio(f, setting.ratio, setting.steps) for f in fractions)
        run.measure(f"step_size:{name}", Estimate.exact(best, "squared pixel units"))
        run.measure(f"variance_ratio:{name}", Estimate.exact(at_best, "ratio"))
        run.measure(f"variance_ratio_printed:{name}", Estimate.exact(at_printed, "ratio"))
        curves[f"{name}, T = {setting.steps}"] = axis, ratios
    title = "Variance after T steps at a level, over that level's own"
    run.curves("variance", title, ("step size (squared pixel units)", "ratio"), curves, log="x")


IMAGE_FILE = "cifar-10/test_batch.bin"


def read_images() -> Tensor:
    """Read the 10,000 CIFAR-10 test images in [0, 1], shape (10000, 3072), from REPLICATE_DATA.

    Raises:
        UsageError: the folder is not set, the file is not there, or it is another file.
    """
    return read_cifar(IMAGE_FILE)[0].float() / 255


def mixture_score(images: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return grad log p_sigma, shape (n, D), at x (n, D) for sigma (n,), p_sigma(x) = 1/N sum_i N(x; x_i, sigma^2 I).

    It is (posterior mean of x_i - x) / sigma^2; the images x_i have shape (N, D).
    """
    # |x - x_i|^2 / 2 without its first term, which is the same for all i
    logits = x @ images.T - 0.5 * images.square().sum(1)
    variance = sigma.square()[:, None]
    return ((logits / variance).softmax(1) @ images - x) / variance


def pairwise_distances(x: Tensor, block: int = 1000) -> Tensor:
    """Return the Euclidean distances of all pairs of different rows of x (n, D), shape (n (n - 1) / 2,)."""
    parts = []
    for start in range(0, len(x), block):
        rows = torch.cdist(x[start : start + block], x)
        i, j = torch.triu_indices(len(rows), len(x), offset=start + 1, device=x.device)
        parts.append(rows[i, j])
    return torch.cat(parts)


def sample_mixture(
    images: Tensor, sigmas: Tensor, n: int, steps: int, step_size: float, generator: torch.Generator
) -> Tensor:
    """Draw n samples (n, D) of the mixture by annealed Langevin dynamics from uniform noise, denoised at the end.

    `images` (N, D) have pixels in [0, 1]; T = `steps` at each of the decreasing levels, eps in the paper's convention.
    """
    start = torch.rand(n, images.shape[1], generator=generator, device=images.device)
    centre = images.mean(0)  # rounding: logits of centred images are smaller
    score = partial(mixture_score, images - centre)
    chain = annealed_langevin(score, sigmas, start - centre, steps, 2 * step_size, generator, denoise=True)
    return chain.samples + centre


@dataclass(frozen=True)
class FirstLevelSettings:
    """Settings of ncsnv2-first-level: the paper's sampler from a large and a small first level, and NCSN's sampler."""

    samples: int = 64
    sigma_large: float = 50.0
    sigma_small: float = 1.0
    sigma_end: float = 0.01
    levels: int = 232
    steps: int = 5
    step_size: float = 6.2e-6
    ncsn_levels: int = 10
    ncsn_steps: int = 100
    ncsn_step_size: float = 2e-5


@experiment("ncsnv2-first-level", family="score", seeds=3, profiles=("full",), files=(IMAGE_FILE,))
def first_level(run: Run, s: FirstLevelSettings) -> None:
    """Technique 1: diversity of exact-score samples by the first noise level, on CIFAR-10 test images."""
    images = read_images().to(run.device)
    large, small = (math.log(first / s.sigma_end) for first in (s.sigma_large, s.sigma_small))
    short = 1 + round((s.levels - 1) * small / large)
    samplers = {
        "large": (s.sigma_large, s.levels, s.steps, s.step_size),
        "small": (s.sigma_small, short, s.steps, s.step_size),
        "small-ncsn": (s.sigma_small, s.ncsn_levels, s.ncsn_steps, s.ncsn_step_size),
    }
    distances = {"data": pairwise_distances(images)}
    for name, (first, levels, steps, step_size) in samplers.items():
        sigmas = geometric_levels(first, s.sigma_end, levels)
        x = sample_mixture(images, sigmas, s.samples, steps, step_size, run.stream(f"sample-{name}"))
        distances[name] = pairwise_distances(x)
    share, curves = torch.linspace(0, 1, 101, dtype=torch.float64), {}
    for name, values in distances.items():
        mean, n = float(values.double().mean()), len(images) if name == "data" else s.samples
        unit = "Euclidean distance of pixels in [0, 1]"
        run.measure(f"pairwise_distance:{name}", Estimate(mean, math.nan, "estimate", unit, n))
        quantiles = values.sort().values[((len(values) - 1) * share).long().to(values.device)]
        curves[name] = share.tolist(), quantiles.tolist()
    run.curves("distances", "Distances between pairs, by quantile", ("share of pairs", "distance"), curves)


ABOUT = "the last denoising step of annealed Langevin dynamics, on digits"
SMOKE = {"samples": 200, "training_steps": 25}


@experiment("ncsnv2-last-step", about=ABOUT, family="score", tasks=("digits",), smoke=SMOKE)
def last_step(
    run: Run, *, samples: int = 1000, training_steps: int = 500, largest_end: float = 1.0, visible_steps: float = 2.55
) -> None:
    """Measure Frechet distances of the digits' NCSN with and without the last step, by the level that ends the chain.

    "visible" is the level that is as many grey levels, over the pixels' mean standard deviation, as the paper's last
    level is of its images' 255: noise that rounding to grey levels does not hide.
    One chain serves all: its step sizes are proportional to sigma^2, so its state after any level is the end of the
    shorter schedule.
    """
    spec = make_spec("ncsn", "digits", run.streams.seed, device=run.device.type, settings={"steps": training_steps})
    model, task, _, _ = train_model(spec, run.device)
    assert isinstance(model, Preprocessed)
    ncsn = model.inner
    assert isinstance(ncsn, NCSN)
    plain, denoised = (list(map(model.transform.inverse, x)) for x in _ends(ncsn, samples, run.stream("sample")))
    features, chains = digit_features(task), {"plain": plain, "denoised": denoised}
    real = features.features(task.test)
    with torch.no_grad():
        distances = {k: [frechet(features.features(x.cpu()), real) for x in ends] for k, ends in chains.items()}
    sigmas = ncsn.sigmas.tolist()
    sigma = visible_steps / float(task.train.var(0).mean().sqrt())
    visible = min(range(len(sigmas)), key=lambda i: abs(math.log(sigmas[i] / sigma)))
    run.measure_all({f"frechet:{name}": values[-1] for name, values in distances.items()})
    run.measure_all({f"frechet:{name}-visible": values[visible] for name, values in distances.items()})
    run.measure("last_level:visible", Estimate.exact(sigmas[visible], "standard deviations"))
    data = frechet(features.features(task.train), real)
    run.measure("frechet:data", data)
    moved = (plain[-1] != denoised[-1]).double().mean(1)
    run.measure("pixels_changed", Estimate.mean_of(moved, "estimate", "fraction"))
    shown = [i for i, s in enumerate(sigmas) if s <= largest_end]
    at = [sigmas[i] for i in shown]
    curves = {f"{name} samples": (at, [values[i].value for i in shown]) for name, values in distances.items()}
    title = "Frechet distance of the digits, with and without the last step"
    axes = "last noise level (standard deviations of the data)", "Frechet distance"
    run.curves("last-step", title, axes, curves, log="xy", levels={"training digits": data.value})
    run.classifiers[task.name] = features.sha256


@torch.no_grad()
def _ends(ncsn: NCSN, n: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Return the chain's state after each level, (n, D) each, and the same after Tweedie's step at that level."""
    sigmas, every = ncsn.sigmas, ncsn.steps_per_level
    start = sigmas[0] * torch.randn(n, ncsn.dim, generator=generator, device=generator.device)
    eps = ncsn.step_size * float(sigmas[-1]) ** 2
    score = ncsn.score_at_level
    chain = annealed_langevin(score, sigmas, start, every, eps, generator, denoise=False, record_every=every)
    assert chain.path is not None
    plain = list(chain.path[1:])
    return plain, [tweedie(x, score(x, s.expand(n)), s) for x, s in zip(plain, sigmas, strict=True)]
