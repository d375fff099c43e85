"""Algorithms 2 and 1 of Song and Ermon 2019 (arXiv:1907.05600) on Gaussians, where the right answer is known.

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

from replicate.experiments.noise_schedules import ladder
from replicate.model import Estimate
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
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
        """Inverse covariance (D, D) after adding N(0, sigma^2 I)."""
        return torch.linalg.inv(self.covariance + sigma**2 * torch.eye(len(self.mean)).to(self.covariance))

    def conditional(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the rest given the observed part (known,)."""
        k = self.known
        gain = torch.linalg.solve(self.covariance[:k, :k], self.covariance[:k, k:]).T
        mean = self.mean[k:] + gain @ (observed - self.mean[:k])
        return mean, self.covariance[k:, k:] - gain @ self.covariance[:k, k:]


def image_like(dim: int, known: int, correlation: float, device: torch.device) -> Gaussian:
    """Mean 1/2, standard deviation 1/4, covariance correlation^|i - j| / 16."""
    index = torch.arange(dim, dtype=torch.float64, device=device)
    covariance = correlation ** (index[:, None] - index).abs() / 16
    return Gaussian(torch.full_like(index, 0.5), covariance, known)


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
    """Inpainting by annealed Langevin, alpha_i = eps (sigma_i / sigma_L)^2; last states (n, D).

    Args:
        density: whose noised scores are used.
        observed: the known part, shape (known,).
        sigmas: decreasing levels.
        steps: T, steps a level.
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
            score = (density.mean - x) @ precision
            x = langevin_step(x, score, alpha, standard_normal_like(x, generator))
            if rule == "once":
                x = paste(part)
    return x


def conditional_errors(samples: Tensor, mean: Tensor, covariance: Tensor) -> dict[str, Estimate]:
    """How far samples (n, d) are from N(mean, covariance), in the units of that distribution.

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


def inpainting(context: Context) -> Outcome:
    """N7: both paste rules against the exact conditional, from the same start."""
    p, streams, device = context.params, context.streams, context.device
    density = image_like(p["dim"], p["known"], p["correlation"], device)
    truth = torch.randn(p["dim"], generator=streams.fresh("truth"), dtype=torch.float64, device=device)
    observed = (density.mean + torch.linalg.cholesky(density.covariance) @ truth)[: p["known"]]
    mean, covariance = density.conditional(observed)
    shape = (p["chains"], p["dim"])
    start = torch.rand(shape, generator=streams.fresh("start"), dtype=torch.float64, device=device)
    sigmas = ladder(p["first"], p["last"]).tolist()

    estimates = {}
    at = list(range(p["known"], p["dim"]))
    lines = [Line("exact mean", at, mean.tolist()), Line("exact sd", at, covariance.diagonal().sqrt().tolist())]
    for rule in RULES:
        x = inpaint(density, observed, sigmas, p["steps"], p["eps"], rule, start, streams.fresh(rule))
        hidden = x[:, p["known"] :]
        for metric, error in conditional_errors(hidden, mean, covariance).items():
            estimates[f"{metric}:{rule}"] = error
        off = (x[:, : p["known"]] - observed).square().mean(1)
        squared = Estimate.mean_of(off, "estimate", "data units")
        rms = math.sqrt(squared.value)
        estimates[f"known_part_error:{rule}"] = Estimate(
            rms, squared.stderr / (2 * rms), "estimate", "data units", squared.n
        )
        lines += [
            Line(f"{rule}: mean", at, hidden.mean(0).tolist()),
            Line(f"{rule}: sd", at, hidden.std(0).tolist()),
        ]
    plot = Plot(
        "completion",
        "The hidden part given the known one, by paste rule",
        "coordinate",
        "mean and standard deviation",
        tuple(lines),
    )
    return Outcome(estimates, (plot,))


INPAINTING = Experiment(
    name="ncsn-inpainting",
    about="inpainting a Gaussian by annealed Langevin under two paste rules, against the exact conditional",
    family="score",
    run=inpainting,
    params={
        "dim": 8,
        "known": 4,
        "correlation": 0.9,
        "first": 1.0,
        "last": 0.01,
        "steps": 100,
        "eps": 2e-5,
        "chains": 4096,
    },
    overrides={"smoke": {"steps": 10, "chains": 256}},
    precision="float64",
)


def step_reading(context: Context) -> Outcome:
    """What the same printed alpha does under both readings of the step, where the step is largest for the density.

    At the last level the noised data are at least sigma_L wide in every direction; across a manifold they are just that
    wide. There alpha = eps = 0.2 sigma_L^2, and a step size of e sigma_L^2 leaves variance sigma_L^2 / (1 - e / 4).
    """
    p = context.params
    sigma = p["last"]
    shape = (p["chains"], p["dim"])
    start = sigma * torch.randn(
        shape, generator=context.streams.fresh("start"), dtype=torch.float64, device=context.device
    )
    estimates = {}
    lines = []
    for reading, factor in STEPS.items():
        chain = ula(
            lambda x: -x / sigma**2,
            start,
            p["steps"],
            factor * p["eps"],
            context.streams.fresh(reading),
            record_every=1,
        )
        assert chain.path is not None
        excess = chain.path.square().mean((1, 2)) / sigma**2 - 1
        n = start.numel()
        last = float(excess[-1])
        estimates[f"excess_variance:{reading}"] = Estimate(last, (1 + last) * math.sqrt(2 / n), "estimate", "ratio", n)
        lines.append(Line(reading, list(range(len(excess))), excess.tolist()))
    closed = {r: 1 / (1 - f * p["eps"] / (4 * sigma**2)) - 1 for r, f in STEPS.items()}
    plot = Plot(
        "step-bias",
        "Excess variance at the last level when the same alpha is read in two ways",
        "steps",
        "variance over sigma_L^2, minus 1",
        tuple(lines),
        levels={f"closed form, {reading}": value for reading, value in closed.items()},
    )
    return Outcome(estimates, (plot,))


STEP = Experiment(
    name="ncsn-step",
    about="bias of the last level's Langevin steps with Algorithm 1's step and with the released code's",
    family="score",
    run=step_reading,
    params={"chains": 2000, "dim": 50, "last": 0.01, "steps": 100, "eps": 2e-5},
    overrides={"smoke": {"chains": 200, "steps": 50}},
    precision="float64",
)
