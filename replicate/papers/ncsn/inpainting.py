"""Algorithms 2 and 1 on Gaussians, where the right answer is known.

Inpainting by annealed Langevin (Algorithm 2, App B.3): at each level the known part is replaced by itself plus noise
of that level. As printed and in the code of that paper the noise is drawn once per level and pasted after every step;
in the code of its sequel (Song and Ermon 2020, arXiv:2006.09011) it is redrawn at every step and pasted before it.

Step size: Algorithm 1 prints x <- x + (alpha / 2) s + sqrt(alpha) z, which is the suite's convention with step size
alpha; the released image code takes x <- x + alpha s + sqrt(2 alpha) z, which is step size 2 alpha.

Deviations: x is a Gaussian vector with an image's scale (mean 1/2, standard deviation 1/4, neighbouring correlation
0.9) and the score is that of x + N(0, sigma^2 I) in closed form. Levels, T and eps are those of the paper's images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.noise_schedules import geometric_levels
from replicate.model import Estimate
from replicate.sampling.langevin import langevin_step, standard_normal_like, ula

#: the paste rules, by when the known part's noise is drawn
RULES = ("once", "redrawn")
#: the suite's step size for a printed alpha of 1
STEPS = {"printed": 1.0, "released": 2.0}


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) whose first `known` coordinates are observed.

    Attributes:
        mean: (D,).
        covariance: (D, D).
        known: number of observed coordinates.
    """

    mean: Tensor
    covariance: Tensor
    known: int

    def noised_precision(self, sigma: float) -> Tensor:
        """Return the inverse covariance (D, D) after adding N(0, sigma^2 I)."""
        return torch.linalg.inv(self.covariance + sigma**2 * torch.eye(len(self.mean)).to(self.covariance))

    def conditional(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the hidden part given the observed one (known,)."""
        k = self.known
        gain = torch.linalg.solve(self.covariance[:k, :k], self.covariance[:k, k:]).T
        mean = self.mean[k:] + gain @ (observed - self.mean[:k])
        return mean, self.covariance[k:, k:] - gain @ self.covariance[:k, k:]


def image_like(dim: int, known: int, correlation: float, device: torch.device) -> Gaussian:
    """Return a Gaussian of mean 1/2, standard deviation 1/4 and covariance correlation^|i - j| / 16."""
    index = torch.arange(dim, dtype=torch.float64, device=device)
    return Gaussian(torch.full_like(index, 0.5), correlation ** (index[:, None] - index).abs() / 16, known)


def inpaint(
    density: Gaussian,
    observed: Tensor,
    sigmas: list[float],
    steps: int,
    eps: float,
    rule: str,
    x: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Inpaint by annealed Langevin, alpha_i = eps (sigma_i / sigma_L)^2; return the last states (n, D).

    Args:
        density: whose noised scores are used.
        observed: the known part, shape (known,).
        sigmas: decreasing levels.
        steps: T, steps per level.
        eps: step size at the last level, as printed.
        rule: "once" (pasted after every step) or "redrawn" (pasted before it).
        x: starting states, shape (n, D).
        generator: on x's device.
    """
    k = density.known

    def noisy(sigma: float) -> Tensor:
        return observed + sigma * standard_normal_like(x[:, :k], generator)

    def paste(part: Tensor) -> Tensor:
        return torch.cat([part, x[:, k:]], dim=1)

    for sigma in sigmas:
        alpha = eps * (sigma / sigmas[-1]) ** 2
        precision = density.noised_precision(sigma)
        part = noisy(sigma)
        x = paste(part)
        for _ in range(steps):
            if rule == "redrawn":
                x = paste(noisy(sigma))
            x = langevin_step(x, (density.mean - x) @ precision, alpha, standard_normal_like(x, generator))
            if rule == "once":
                x = paste(part)
    return x


def conditional_errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, Estimate]:
    """Measure how far samples (n, d) are from N(mean, covariance), in the units of that distribution.

    With y = L^-1 (x - mean), LL' = covariance: the root mean square of y's mean (conditional standard deviations), and
    the root mean square eigenvalue of y's covariance minus I (relative error of the variance over directions). The
    standard errors are those that exact samples would show.
    """
    n, d = samples.shape
    y = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (samples - mean).T, upper=False).T
    shift = float(y.mean(0).square().mean().sqrt())
    excess = float((torch.cov(y.T) - torch.eye(d).to(y)).norm() / math.sqrt(d))
    return {
        "mean_error": Estimate(shift, math.sqrt(1 / n), "estimate", "conditional standard deviations", n),
        "covariance_error": Estimate(excess, math.sqrt((d + 1) / n), "estimate", "ratio", n),
    }


@dataclass(frozen=True)
class InpaintingSettings:
    """Settings of ncsn-inpainting: the Gaussian, the noise levels and the chains."""

    dim: int = 8
    known: int = 4
    correlation: float = 0.9
    first: float = 1.0
    last: float = 0.01
    steps: int = 100
    eps: float = 2e-5
    chains: int = 4096


@experiment("ncsn-inpainting", family="score", precision="float64", smoke={"steps": 10, "chains": 256})
def compare_rules(run: Run, s: InpaintingSettings) -> None:
    """Inpainting a Gaussian by annealed Langevin under two paste rules, against the exact conditional."""
    density = image_like(s.dim, s.known, s.correlation, run.device)
    truth = torch.randn(s.dim, generator=run.stream("truth"), dtype=torch.float64, device=run.device)
    observed = (density.mean + torch.linalg.cholesky(density.covariance) @ truth)[: s.known]
    mean, covariance = density.conditional(observed)
    start = torch.rand(s.chains, s.dim, generator=run.stream("start"), dtype=torch.float64, device=run.device)
    sigmas = geometric_levels(s.first, s.last).tolist()
    at = range(s.known, s.dim)
    curves = {"exact mean": (at, mean.tolist()), "exact sd": (at, covariance.diagonal().sqrt().tolist())}
    for rule in RULES:
        x = inpaint(density, observed, sigmas, s.steps, s.eps, rule, start, run.stream(rule))
        hidden = x[:, s.known :]
        run.measure_all(conditional_errors(hidden, mean, covariance), rule)
        squared = Estimate.mean_of((x[:, : s.known] - observed).square().mean(1), "estimate", "data units")
        rms = math.sqrt(squared.value)
        error = Estimate(rms, squared.stderr / (2 * rms), "estimate", "data units", squared.n)
        run.measure(f"known_part_error:{rule}", error)
        curves |= {f"{rule}: mean": (at, hidden.mean(0).tolist()), f"{rule}: sd": (at, hidden.std(0).tolist())}
    axes = "coordinate", "mean and standard deviation"
    run.curves("completion", "The hidden part given the known one, by paste rule", axes, curves)


@experiment("ncsn-step", family="score", precision="float64", smoke={"chains": 200, "steps": 50})
def step_readings(
    run: Run, *, chains: int = 2000, dim: int = 50, last: float = 0.01, steps: int = 100, eps: float = 2e-5
) -> None:
    """Bias of the last level's Langevin steps with Algorithm 1's step and with the released code's.

    At the last level the noised data are at least sigma_L wide in every direction; across a manifold they are just that
    wide. There alpha = eps = 0.2 sigma_L^2, and a step size of e sigma_L^2 leaves variance sigma_L^2 / (1 - e / 4).
    """
    start = last * torch.randn(chains, dim, generator=run.stream("start"), dtype=torch.float64, device=run.device)
    curves, n = {}, start.numel()
    for reading, factor in STEPS.items():
        chain = ula(lambda x: -x / last**2, start, steps, factor * eps, run.stream(reading), record_every=1)
        assert chain.path is not None
        excess = (chain.path.square().mean((1, 2)) / last**2 - 1).tolist()
        error = Estimate(excess[-1], (1 + excess[-1]) * math.sqrt(2 / n), "estimate", "ratio", n)
        run.measure(f"excess_variance:{reading}", error)
        curves[reading] = range(len(excess)), excess
    levels = {f"closed form, {name}": 1 / (1 - f * eps / (4 * last**2)) - 1 for name, f in STEPS.items()}
    title = "Excess variance at the last level when the same alpha is read in two ways"
    run.curves("step-bias", title, ("steps", "variance over sigma_L^2, minus 1"), curves, levels=levels)
