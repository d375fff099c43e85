"""log Z of an unnormalised density, by annealed and by plain importance sampling: as printed, as released."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.likelihood.ais import ais, schedule
from replicate.model import Estimate, Model
from replicate.sampling.langevin import mala
from replicate.tasks.densities import GaussianMixture

#: draws of plain importance sampling at a time
CHUNK = 10_000


class GaussianPath(Model):
    """A geometric path from N(0, variance I) to an unnormalised density, with Metropolis-adjusted Langevin steps.

    Args:
        dim: D.
        variance: of the proposal.
        log_density: log f, (n, D) -> (n,).
        density_score: its gradient, (n, D) -> (n, D).
        step_size: of the Langevin step, x + eps/2 score + sqrt(eps) z.
    """

    family = "ebm"
    capabilities = frozenset({"annealing"})

    def __init__(
        self,
        dim: int,
        variance: float,
        log_density: Callable[[Tensor], Tensor],
        density_score: Callable[[Tensor], Tensor],
        step_size: float,
    ) -> None:
        super().__init__()
        self.dim, self.variance, self.step_size = dim, variance, step_size
        self.log_density, self.density_score = log_density, density_score

    def base_log_z(self) -> float:
        return 0.5 * self.dim * math.log(2 * math.pi * self.variance)

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, device=generator.device, dtype=torch.float64)
        return math.sqrt(self.variance) * z

    def base_log_density(self, x: Tensor) -> Tensor:
        """Return log of the unnormalised proposal, (n,)."""
        return -0.5 * x.square().sum(1) / self.variance

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        increment = (beta_next - beta) * (self.log_density(x) - self.base_log_density(x))

        def between(y: Tensor) -> Tensor:
            return beta_next * self.log_density(y) + (1 - beta_next) * self.base_log_density(y)

        def score(y: Tensor) -> Tensor:
            return beta_next * self.density_score(y) - (1 - beta_next) * y / self.variance

        return increment, mala(between, score, x, 1, self.step_size, generator).samples


@torch.no_grad()
def importance_log_z(path: GaussianPath, samples: int, draws: torch.Generator) -> tuple[float, float]:
    """Estimate log Z in nats by sampling from the path's proposal; return it and the effective share of the draws."""
    parts = []
    for start in range(0, samples, CHUNK):
        x = path.base_sample(min(CHUNK, samples - start), draws)
        parts.append(path.log_density(x) - path.base_log_density(x))
    log_w = torch.cat(parts)
    total = torch.logsumexp(log_w, 0)
    ess = torch.exp(2 * total - torch.logsumexp(2 * log_w, 0))
    return float(total) - math.log(samples) + path.base_log_z(), float(ess) / samples


def whitened_mixture(dim: int, components: int, draws: torch.Generator) -> GaussianMixture:
    """Draw a normalised mixture of narrow Gaussians with mean 0 and covariance I, like a whitened table with groups.

    Before whitening the means are standard normal and the variances within a component run from 0.01 to 1.
    """
    means = torch.randn(components, dim, generator=draws, device=draws.device, dtype=torch.float64).cpu()
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=draws, device=draws.device, dtype=torch.float64).cpu())
    within = (basis * torch.logspace(-2, 0, dim, dtype=torch.float64)) @ basis.T
    means = means - means.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(within + means.T @ means / components))
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    return GaussianMixture(means @ whitening.T, whitening @ within @ whitening.T, weights)


@experiment("ssm-partition", family="ebm", precision="float64")
def partition_functions(
    run: Run,
    *,
    dim: int = 11,
    components: int = 3,
    log_z: float = 3.0,
    chains: int = 500,
    temperatures: int = 400,
    step_size: float = 0.05,
) -> None:
    """Log Z of a known 11-dimensional density by annealing from N(0, 2I) and by importance sampling from N(0, 4I)."""
    density = whitened_mixture(dim, components, run.stream("density"))
    evaluations = 5 * chains * temperatures  # an annealing step evaluates the density or its score five times
    for variance in (2.0, 4.0):
        path = GaussianPath(dim, variance, lambda x: density.log_prob(x) + log_z, density.score, step_size)
        draws = run.stream("log-z")
        annealed = ais(path, chains, schedule(temperatures), draws)
        found = {
            "annealed": (annealed.log_z.value, annealed.ess.value / chains, chains),
            "importance": (*importance_log_z(path, evaluations, draws), evaluations),
        }
        for method, (value, ess_share, n) in found.items():
            errors = {"log_z_error": value - log_z, "log_z_absolute_error": abs(value - log_z)}
            run.measure_all(
                {m: Estimate(e, math.nan, "estimate", "nats", n) for m, e in errors.items()}, f"{method}-{variance:.0f}"
            )
            run.measure(f"ess_share:{method}-{variance:.0f}", Estimate(ess_share, math.nan, "estimate", "ratio", n))
