"""Implicit generation (Du and Mordatch 2019, arXiv:1903.08689): the temperature at which its sampler draws.

Equation 1 draws from p(x) proportional to exp(-E(x)) by

    x <- x - (lambda / 2) grad E(x) + omega,    omega ~ N(0, lambda I),

with one lambda before the gradient and in the noise. The released code has two constants: a step before the gradient
(10 in its commands for CIFAR-10 and ImageNet 32, 100 for ImageNet 128, 500 for dSprites) and noise of standard
deviation 0.005. Any step `a` before the gradient with noise of standard deviation `s` samples exp(-E / T) with

    T = s^2 / (2 a),

in the suite's convention a step size of s^2 at temperature T: 1.25e-6 for a step of 10, 2.5e-8 for 500.

Both samplers run here on energies that are known: a Gaussian, where the variance that either ends at has a closed form,
and the ring of eight Gaussians. Both take the released step of 10 before the gradient, so that only the noise differs,
and both start at exact samples, so that the sampler alone causes every loss.

Deviations: no network and no images. The energies are stretched (standard deviation sqrt(500) in each Gaussian) until
a step of 10 is stable; the temperature does not depend on that. The released code also clips the gradient's components
at 0.01 and the state to the unit box; neither is done here (at the released temperature the gradient's standard
deviation on the Gaussian is 5e-5, so that its clip would do nothing once the chain has settled). The sampler alone is
measured: a network trained with it may adapt its scale, and exp(-E / T) is then its density.
"""

import math

import torch
from torch import Tensor

from replicate.experiments import Paper, Run, experiment
from replicate.experiments.planar import spread
from replicate.model import Estimate
from replicate.sampling.langevin import Score, ula
from replicate.tasks.densities import eight_gaussians


def temperature(step: float, noise: float) -> float:
    """T of x <- x - step grad E(x) + noise z, dimensionless: noise^2 / (2 step)."""
    return noise**2 / (2 * step)


def noise_of(step: float) -> float:
    """Return the noise's standard deviation that one lambda = 2 step implies."""
    return math.sqrt(2 * step)


def sampled_variance(step: float, noise: float, variance: float) -> float:
    """Solve v = (1 - step / variance)^2 v + noise^2: the variance of x <- x - step x / variance + noise z in the end.

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
    """Take steps x <- x + step score(x) + noise z, in the suite's convention; (n, D)."""
    return ula(score, x, steps, noise**2, generator, temperature(step, noise)).samples


@experiment("igebm-temperature", family="ebm", seeds=3, precision="float64", smoke={"chains": 200, "steps": 800})
def compare(
    run: Run,
    *,
    step: float = 10.0,
    noise: float = 0.005,
    largest_step: float = 500.0,
    variance: float = 500.0,
    dim: int = 16,
    chains: int = 2000,
    steps: int = 1500,
) -> None:
    """Langevin with one lambda, and with the released step and noise, on energies that are known.

    On |x|^2 / (2 variance): the samples' variance over that of the energy, and the closed form of this ratio. On the
    ring: the spread within the Gaussians over that of the data, and samples in the data's own scale.
    """
    noises = {"one_lambda": noise_of(step), "released": noise}
    for name, sd in noises.items():
        generator = run.stream(f"gaussian-{name}")
        z = torch.randn(chains, dim, generator=generator, dtype=torch.float64, device=generator.device)
        x = implicit_generation(lambda x: -x / variance, z * math.sqrt(variance), step, sd, steps, generator)
        closed = sampled_variance(step, sd, variance) / variance
        run.measure(f"variance_ratio:{name}", Estimate.mean_of(x.square() / variance, "estimate", "ratio"))
        run.measure(f"variance_ratio:{name}_closed_form", Estimate.exact(closed, "ratio"))
        run.measure(f"temperature:{name}", Estimate.exact(temperature(step, sd), "ratio"))
    run.measure("temperature:released_largest_step", Estimate.exact(temperature(largest_step, noise), "ratio"))
    density = eight_gaussians()
    stretch = math.sqrt(variance / density.covariance[0, 0].item())

    def score(x: Tensor) -> Tensor:
        return density.score(x / stretch) / stretch

    clouds = {"data": density.sample(chains, run.stream("ring")).double()}
    for name, sd in noises.items():
        start, generator = stretch * clouds["data"], run.stream(f"ring-{name}")
        clouds[name] = implicit_generation(score, start, step, sd, steps, generator) / stretch
    for name, x in clouds.items():
        run.measure(f"mode_spread:{name}", spread(density, x))
    shown = {name: x[:400] for name, x in clouds.items()}
    run.scatter("samples", "one lambda as printed, two constants as released", shown, ("x", "y"))


PAPER = Paper("igebm", __file__, experiments=(compare,))
