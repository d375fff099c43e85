"""Song and Ermon 2020, "Improved Techniques for Training Score-Based Generative Models", 2006.09011 (NCSNv2).

Replicated:

- technique 1 (figure 2): annealed Langevin dynamics with the exact score of the mixture centred on the CIFAR-10 test
  images, with the first noise level at 1 and at 50;
- technique 2: the number of noise levels that its equation gives at the printed C, and the C that the printed number
  implies;
- technique 4: the step size that its equation gives at the printed noise levels;
- the pattern of table 1: what the last denoising step is worth, on our own model of the digits.

Deviations. Technique 1: the ladder of figure 2 is in no text that we have read; we take the paper's CIFAR-10 sampler
(last level 0.01, ratio of the 232 levels from 50, T = 5, step size 6.2e-6) for both, so that the ladder from 1 is the
end of the one from 50, and as a variant NCSN's ten levels from 1 (T = 100, step size 2e-5). Table 1: 8x8 digits of 17
levels and the features of a small digit classifier stand for CIFAR-10 and Inception; both kinds of samples are the
same chains before and after the step.

Convention: the paper's step x + alpha s + sqrt(2 alpha) z is the suite's with step size 2 alpha; step sizes here are
the paper's and are doubled where the suite's sampler is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from replicate.likelihood.dequantisation import Preprocessed
from replicate.metrics.quality import frechet
from replicate.model import Estimate
from replicate.runs.evaluate import digit_features
from replicate.runs.execute import run
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.spec import make_spec
from replicate.sampling.annealed import annealed_langevin
from replicate.score_based.matching import tweedie
from replicate.score_based.ncsn import NCSN
from replicate.tasks.images import read_cifar


@dataclass(frozen=True)
class Setting:
    """The paper's settings for one image set (appendix B; the released configurations agree).

    Attributes:
        dim: D, numbers in an image.
        begin, end: first and last noise level, for pixels in [0, 1].
        levels: printed number of levels L.
        steps: Langevin steps T at each level.
        step_size: printed eps.
    """

    dim: int
    begin: float
    end: float
    levels: int
    steps: int
    step_size: float

    @property
    def ratio(self) -> float:
        """gamma, the ratio of neighbouring levels of the printed ladder."""
        return (self.begin / self.end) ** (1 / (self.levels - 1))


SETTINGS: Mapping[str, Setting] = {
    "cifar10": Setting(32 * 32 * 3, 50.0, 0.01, 232, 5, 6.2e-6),
    "celeba": Setting(64 * 64 * 3, 90.0, 0.01, 500, 5, 3.3e-6),
    "ffhq": Setting(256 * 256 * 3, 348.0, 0.01, 2311, 3, 0.9e-6),
}


# -- technique 2: the number of noise levels


def overlap(ratio: float, dim: int) -> float:
    """C: the mass of a level's shell of radii that lies within 3 standard deviations of the level above's.

    Phi(sqrt(2D)(gamma - 1) + 3 gamma) - Phi(sqrt(2D)(gamma - 1) - 3 gamma), falling from 0.997 at gamma = 1.
    """
    centre = math.sqrt(2 * dim) * (ratio - 1)
    return float(ndtr(centre + 3 * ratio) - ndtr(centre - 3 * ratio))


def ratio_at(target: float, dim: int) -> float:
    """The ratio gamma whose overlap is `target`, between 0 and 0.99."""
    return float(brentq(lambda ratio: overlap(ratio, dim) - target, 1.0, 3.0, xtol=1e-14))


def levels_at(target: float, setting: Setting) -> float:
    """L, not rounded: a geometric ladder of that overlap from the first level to the last."""
    return 1 + math.log(setting.begin / setting.end) / math.log(ratio_at(target, setting.dim))


def solve_levels(context: Context) -> Outcome:
    """L at the printed C and C at the printed L, for the paper's three image sets."""
    printed = context.params["overlap"]
    estimates, lines = {}, []
    overlaps = []
    axis = np.linspace(0.05, 0.95, 91).tolist()
    for name, setting in SETTINGS.items():
        overlaps.append(overlap(setting.ratio, setting.dim))
        estimates[f"levels:{name}"] = Estimate.exact(levels_at(printed, setting), "levels")
        estimates[f"overlap:{name}"] = Estimate.exact(overlaps[-1], "probability")
        lines.append(Line(name, axis, [levels_at(c, setting) for c in axis]))
    estimates["overlap_range"] = Estimate.exact(max(overlaps) - min(overlaps), "probability")
    marks = {f"{name}, printed": float(setting.levels) for name, setting in SETTINGS.items()}
    title = "Noise levels that technique 2 asks for"
    plot = Plot("levels", title, "C", "number of levels L", tuple(lines), log_y=True, levels=marks)
    return Outcome(estimates, (plot,))


# -- technique 4: the step size


def variance_ratio(fraction: float, ratio: float, steps: int) -> float:
    """Variance of the chain after T steps at a level, over that level's own, for fraction = eps / sigma_L^2.

    (1 - fraction)^(2T) (gamma^2 - b) + b, where b = 2 fraction / (1 - (1 - fraction)^2) is the chain's stationary
    variance; the chain comes from the level above, whose variance is gamma^2.
    """
    stationary = 1 / (1 - fraction / 2)
    return (1 - fraction) ** (2 * steps) * (ratio**2 - stationary) + stationary


def step_size_for(setting: Setting) -> float:
    """eps that brings the variance ratio nearest to 1, in squared pixel units.

    It never reaches 1, since gamma^2 and the stationary variance are both above it: nearest is least.
    """

    def distance(log_fraction: float) -> float:
        return abs(variance_ratio(math.exp(log_fraction), setting.ratio, setting.steps) - 1)

    found = minimize_scalar(
        distance, bounds=(math.log(1e-5), math.log(0.999)), method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(found.x) * setting.end**2


def solve_step_size(context: Context) -> Outcome:
    """The step size by technique 4 at each printed ladder, and what variance the printed one leaves."""
    estimates, lines = {}, []
    for name, setting in SETTINGS.items():
        unit = setting.end**2
        found = step_size_for(setting)
        best, printed = (variance_ratio(e / unit, setting.ratio, setting.steps) for e in (found, setting.step_size))
        estimates[f"step_size:{name}"] = Estimate.exact(found, "squared pixel units")
        estimates[f"variance_ratio:{name}"] = Estimate.exact(best, "ratio")
        estimates[f"variance_ratio_printed:{name}"] = Estimate.exact(printed, "ratio")
        axis = np.geomspace(0.1 * setting.step_size, 10 * setting.step_size, 100).tolist()
        values = [variance_ratio(e / unit, setting.ratio, setting.steps) for e in axis]
        lines.append(Line(f"{name}, T = {setting.steps}", axis, values))
    title = "Variance after T steps at a level, over that level's own"
    plot = Plot("variance", title, "step size (squared pixel units)", "ratio", tuple(lines), log_x=True)
    return Outcome(estimates, (plot,))


# -- technique 1: the first noise level, with exact scores

IMAGE_FILE = "cifar-10/test_batch.bin"
IMAGE_DIM = 32 * 32 * 3


def read_images() -> Tensor:
    """The 10,000 CIFAR-10 test images in [0, 1], shape (10000, 3072), from REPLICATE_DATA.

    Raises:
        UsageError: the folder is not set, the file is not there, or it is another file.
    """
    images, _ = read_cifar(IMAGE_FILE)
    return images.float() / 255


@dataclass(frozen=True)
class ImageMixture:
    """p_sigma(x) = 1/N sum_i N(x; x_i, sigma^2 I) and its exact score.

    Attributes:
        images: x_i, shape (N, D).
    """

    images: Tensor

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_sigma(x) at x (n, D), sigma (n,): (posterior mean of x_i - x) / sigma^2, shape (n, D)."""
        # |x - x_i|^2 / 2 without its first term, which is the same for all i
        logits = x @ self.images.T - 0.5 * self.images.square().sum(1)
        variance = sigma.square()[:, None]
        return ((logits / variance).softmax(1) @ self.images - x) / variance


def pairwise_distances(x: Tensor, block: int = 1000) -> Tensor:
    """Euclidean distances of all pairs of different rows of x (n, D), shape (n (n - 1) / 2,)."""
    parts = []
    for start in range(0, len(x), block):
        rows = torch.cdist(x[start : start + block], x)
        i, j = torch.triu_indices(len(rows), len(x), offset=start + 1, device=x.device)
        parts.append(rows[i, j])
    return torch.cat(parts)


def ladder(begin: float, end: float, levels: int) -> Tensor:
    """Geometric noise levels from `begin` down to `end`, shape (levels,)."""
    return torch.linspace(math.log(begin), math.log(end), levels, dtype=torch.float64).exp()


def sample_mixture(
    images: Tensor, sigmas: Tensor, n: int, steps: int, step_size: float, generator: torch.Generator
) -> Tensor:
    """n samples (n, D) of the mixture by annealed Langevin dynamics from uniform noise, denoised at the end.

    Args:
        images: (N, D), pixels in [0, 1].
        sigmas: noise levels, decreasing, shape (L,).
        steps: T at each level.
        step_size: eps in the paper's convention.
    """
    start = torch.rand(n, images.shape[1], generator=generator, device=images.device)
    centre = images.mean(0)  # rounding: logits of centred images are smaller
    mixture = ImageMixture(images - centre)
    chain = annealed_langevin(mixture.score, sigmas, start - centre, steps, 2 * step_size, generator, denoise=True)
    return chain.samples + centre


def first_level(images: Tensor, context: Context) -> Outcome:
    """Mean pairwise distance of images (N, D) and of samples whose ladder begins at a large and at a small level."""
    p = context.params
    end = p["sigma_end"]
    rungs = p["levels"] - 1
    short = 1 + round(rungs * math.log(p["sigma_small"] / end) / math.log(p["sigma_large"] / end))
    runs = {
        "large": (ladder(p["sigma_large"], end, p["levels"]), p["steps"], p["step_size"]),
        "small": (ladder(p["sigma_small"], end, short), p["steps"], p["step_size"]),
        "small-ncsn": (ladder(p["sigma_small"], end, p["ncsn_levels"]), p["ncsn_steps"], p["ncsn_step_size"]),
    }
    distances = {"data": pairwise_distances(images)}
    for name, (sigmas, steps, step_size) in runs.items():
        generator = context.streams.fresh(f"sample-{name}")
        distances[name] = pairwise_distances(sample_mixture(images, sigmas, p["samples"], steps, step_size, generator))
    estimates, lines = {}, []
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    for name, values in distances.items():
        pairs, n = len(values), len(images) if name == "data" else p["samples"]
        unit = "Euclidean distance of pixels in [0, 1]"
        estimates[f"pairwise_distance:{name}"] = Estimate(float(values.double().mean()), math.nan, "estimate", unit, n)
        ordered = values.sort().values[((pairs - 1) * share).long().to(values.device)]
        lines.append(Line(name, share.tolist(), ordered.tolist()))
    title = "Distances between pairs, by quantile"
    return Outcome(estimates, (Plot("distances", title, "share of pairs", "distance", tuple(lines)),))


def sample_from_images(context: Context) -> Outcome:
    """Technique 1 on the CIFAR-10 test images."""
    return first_level(read_images().to(context.device), context)


# -- table 1: the last denoising step


def denoising_step(context: Context) -> Outcome:
    """Frechet distance of the digits' NCSN with and without the last step, where the ladder ends at each level.

    "visible" is the level that is as many grey levels, over the pixels' mean standard deviation, as the paper's last
    level is of its images' 255: noise that rounding to grey levels does not hide.
    One ladder serves all: its step sizes are proportional to sigma^2, so its state after any level is the end of the
    shorter ladder.
    """
    p = context.params
    spec = make_spec(
        "ncsn", "digits", context.streams.seed, device=context.device.type, settings={"steps": p["training_steps"]}
    )
    model, task, _, _ = run(spec, context.device)
    assert isinstance(model, Preprocessed)
    ncsn = model.inner
    assert isinstance(ncsn, NCSN)
    plain, denoised = _ends(ncsn, p["samples"], context)
    features = digit_features(task)
    real = features.features(task.test)
    with torch.no_grad():
        scores = {
            name: [frechet(features.features(model.transform.inverse(x).cpu()), real) for x in ends]
            for name, ends in {"plain": plain, "denoised": denoised}.items()
        }
    sigmas = ncsn.sigmas.tolist()
    estimates = {f"frechet:{name}": values[-1] for name, values in scores.items()}
    visible = _nearest_level(sigmas, p["visible_steps"] / float(task.train.var(0).mean().sqrt()))
    estimates |= {f"frechet:{name}-visible": values[visible] for name, values in scores.items()}
    estimates["last_level:visible"] = Estimate.exact(sigmas[visible], "standard deviations")
    estimates["frechet:data"] = frechet(features.features(task.train), real)
    moved = (model.transform.inverse(plain[-1]) != model.transform.inverse(denoised[-1])).double().mean(1)
    estimates["pixels_changed"] = Estimate.mean_of(moved, "estimate", "fraction")
    shown = [i for i, s in enumerate(sigmas) if s <= p["largest_end"]]
    lines = tuple(
        Line(f"{name} samples", [sigmas[i] for i in shown], [values[i].value for i in shown])
        for name, values in scores.items()
    )
    title = "Frechet distance of the digits, with and without the last step"
    label = "last noise level (standard deviations of the data)"
    levels = {"training digits": estimates["frechet:data"].value}
    plot = Plot("last-step", title, label, "Frechet distance", lines, log_x=True, log_y=True, levels=levels)
    return Outcome(estimates, (plot,), classifiers={task.name: features.sha256})


def _nearest_level(sigmas: list[float], sigma: float) -> int:
    """Index of the level whose ratio to sigma is nearest to 1."""
    return min(range(len(sigmas)), key=lambda i: abs(math.log(sigmas[i] / sigma)))


def _ends(ncsn: NCSN, n: int, context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """The chain's state after each level, (n, D) each, and the same after Tweedie's step at that level."""
    generator = context.streams.fresh("sample")
    sigmas = ncsn.sigmas
    start = sigmas[0] * torch.randn(n, ncsn.dim, generator=generator, device=context.device)
    eps = ncsn.step_size * float(sigmas[-1]) ** 2
    every = ncsn.steps_per_level
    chain = annealed_langevin(
        ncsn.score_at_level, sigmas, start, every, eps, generator, denoise=False, record_every=every
    )
    assert chain.path is not None
    plain = list(chain.path[1:])
    with torch.no_grad():
        denoised = [tweedie(x, ncsn.score_at_level(x, s.expand(n)), s) for x, s in zip(plain, sigmas, strict=True)]
    return plain, denoised


LEVELS = Experiment(
    name="ncsnv2-levels",
    about="technique 2 solved: levels at the printed overlap, overlap at the printed levels",
    family="score",
    run=solve_levels,
    params={"overlap": 0.5},
    seeds=1,
    precision="float64",
)

STEP_SIZE = Experiment(
    name="ncsnv2-step-size",
    about="technique 4 solved: the Langevin step size at the printed noise levels",
    family="score",
    run=solve_step_size,
    seeds=1,
    precision="float64",
)

FIRST_LEVEL = Experiment(
    name="ncsnv2-first-level",
    about="technique 1: diversity of exact-score samples by the first noise level, on CIFAR-10 test images",
    family="score",
    run=sample_from_images,
    params={
        "samples": 64,
        "sigma_large": 50.0,
        "sigma_small": 1.0,
        "sigma_end": 0.01,
        "levels": 232,
        "steps": 5,
        "step_size": 6.2e-6,
        "ncsn_levels": 10,
        "ncsn_steps": 100,
        "ncsn_step_size": 2e-5,
    },
    seeds=3,
    profiles=("full",),
    files=(IMAGE_FILE,),
)

LAST_STEP = Experiment(
    name="ncsnv2-last-step",
    about="the last denoising step of annealed Langevin dynamics, on digits",
    family="score",
    run=denoising_step,
    params={"samples": 1000, "training_steps": 500, "largest_end": 1.0, "visible_steps": 2.55},
    overrides={"smoke": {"samples": 200, "training_steps": 25}},
    seeds=5,
    tasks=("digits",),
)

PAPER = Paper("ncsnv2", Path(__file__).with_suffix(".toml"), experiments=(LEVELS, STEP_SIZE, FIRST_LEVEL, LAST_STEP))
