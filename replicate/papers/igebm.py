"""At what temperature implicit generation samples: one lambda as printed, two constants as released.

Du and Mordatch 2019, arXiv:1903.08689, equation 1, draws from p(x) proportional to exp(-E(x)) by

    x <- x - (lambda / 2) grad E(x) + omega,    omega ~ N(0, lambda I),

with one lambda before the gradient and in the noise. The released code has two constants: a step before the gradient
(10 in its commands for CIFAR-10 and ImageNet 32, 100 for ImageNet 128, 500 for dSprites) and noise of standard
deviation 0.005. Any step `a` before the gradient with noise of standard deviation `s` samples exp(-E / T) with

    T = s^2 / (2 a),

in the suite's convention a step size of s^2 at temperature T: 1.25e-6 for a step of 10, 2.5e-8 for 500.

Both are run here on energies that are known: a Gaussian, where the variance that either sampler ends at has a closed
form, and the ring of eight Gaussians. Both take the released step of 10 before the gradient, so that only the noise
differs, and both start at exact samples, so that what they lose is the sampler's doing.

Deviations: no network and no images. The energies are stretched (standard deviation sqrt(500) in each Gaussian) until
a step of 10 is stable; the temperature does not depend on that. The released code also clips the gradient's components
at 0.01 and the state to the unit box; neither is done here (at the released temperature the gradient's standard
deviation on the Gaussian is 5e-5, so that its clip would do nothing once the chain has settled). The sampler alone is
measured: a network trained with it may adapt its scale, and exp(-E / T) is then its density.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.sampling.langevin import Score, ula
from replicate.tasks.densities import eight_gaussians


def temperature(step: float, noise: float) -> float:
    """T of x <- x - step grad E(x) + noise z, dimensionless: noise^2 / (2 step)."""
    return noise**2 / (2 * step)


def noise_of(step: float) -> float:
    """The noise's standard deviation that one lambda = 2 step asks for."""
    return math.sqrt(2 * step)


def sampled_variance(step: float, noise: float, variance: float) -> float:
    """Variance at which x <- x - step x / variance + noise z ends, of a Gaussian energy's coordinate.

    The fixed point of v = (1 - step / variance)^2 v + noise^2.

    Raises:
        ValueError: the chain diverges.
    """
    kept = (1 - step / variance) ** 2
    if kept >= 1:
        raise ValueError(f"a step of {step} diverges on a variance of {variance}; it must be under twice the variance")
    return noise**2 / (1 - kept)


def implicit_generation(
    score: Score, x: Tensor, step: float, noise: float, steps: int, generator: torch.Generator
) -> Tensor:
    """The update with two constants, x <- x + step score(x) + noise z, in the suite's convention; (n, D)."""
    return ula(score, x, steps, noise**2, generator, temperature(step, noise)).samples


def samplers(step: float, noise: float) -> dict[str, float]:
    """Standard deviation of the noise by sampler: as printed and as released."""
    return {"one_lambda": noise_of(step), "released": noise}


def sample_gaussian(context: Context, variance: float) -> dict[str, Estimate]:
    """Variance of samples over that of the energy |x|^2 / (2 variance), and the closed form of this ratio."""
    p, streams = context.params, context.streams
    estimates = {}
    for name, noise in samplers(p["step"], p["noise"]).items():
        generator = streams.fresh(f"gaussian-{name}")
        start = torch.randn(
            p["chains"], p["dim"], generator=generator, dtype=torch.float64, device=generator.device
        ) * math.sqrt(variance)
        x = implicit_generation(lambda x: -x / variance, start, p["step"], noise, p["steps"], generator)
        ratio = Estimate.mean_of(x.square() / variance, "estimate", "ratio")
        closed = sampled_variance(p["step"], noise, variance) / variance
        estimates[f"variance_ratio:{name}"] = ratio
        estimates[f"variance_ratio:{name}_closed_form"] = Estimate.exact(closed, "ratio")
        estimates[f"temperature:{name}"] = Estimate.exact(temperature(p["step"], noise), "ratio")
    largest = temperature(p["largest_step"], p["noise"])
    estimates["temperature:released_largest_step"] = Estimate.exact(largest, "ratio")
    return estimates


def sample_ring(context: Context, variance: float) -> tuple[dict[str, Estimate], dict[str, Tensor]]:
    """Spread within the Gaussians over that of the data, and samples in the data's own scale, by sampler."""
    p, streams = context.params, context.streams
    density = eight_gaussians()
    stretch = math.sqrt(variance / density.covariance[0, 0].item())
    clouds = {"data": density.sample(p["chains"], streams.fresh("ring")).double()}
    for name, noise in samplers(p["step"], p["noise"]).items():
        generator = streams.fresh(f"ring-{name}")
        x = implicit_generation(
            lambda x: density.score(x / stretch) / stretch,
            stretch * clouds["data"],
            p["step"],
            noise,
            p["steps"],
            generator,
        )
        clouds[name] = x / stretch
    estimates = {}
    for name, x in clouds.items():
        offset = x - density.means.to(x.device)[density.mode_of(x)]
        squared = offset.square().sum(1) / density.covariance.trace().item()
        estimates[f"mode_spread:{name}"] = Estimate.mean_of(squared, "estimate", "ratio")
    return estimates, clouds


def compare(context: Context) -> Outcome:
    """Both samplers on the Gaussian and on the ring."""
    variance = context.params["variance"]
    gaussian = sample_gaussian(context, variance)
    ring, clouds = sample_ring(context, variance)
    lines = tuple(Line(name, x[:400, 0].tolist(), x[:400, 1].tolist()) for name, x in clouds.items())
    plot = Plot("samples", "one lambda as printed, two constants as released", "x", "y", lines, style="points")
    return Outcome({**gaussian, **ring}, (plot,))


TEMPERATURE = Experiment(
    name="igebm-temperature",
    about="Langevin with one lambda, and with the released step and noise, on energies that are known",
    family="ebm",
    run=compare,
    params={
        "step": 10.0,
        "noise": 0.005,
        "largest_step": 500.0,
        "variance": 500.0,
        "dim": 16,
        "chains": 2000,
        "steps": 1500,
    },
    seeds=3,
    overrides={"smoke": {"chains": 200, "steps": 800}},
    precision="float64",
)

PAPER = Paper("igebm", Path(__file__).with_suffix(".toml"), experiments=(TEMPERATURE,))
