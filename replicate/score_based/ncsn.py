"""Noise-conditional score network (Song and Ermon 2019, 1907.05600), for vectors.

Geometric noise levels, the sigma^2-weighted denoising objective (their eq. 6 with lambda(sigma) = sigma^2) and
annealed Langevin sampling (algorithm 1).

Deviations: the network is an MLP conditioned on log sigma whose output is divided by sigma (Song and Ermon 2020,
2006.09011, technique 3) and preconditioned by the data's Gaussian fit; the largest level is about the largest
distance between data (technique 1); sampling ends with a denoising step by default (Jolicoeur-Martineau et al. 2020,
2009.05475).
"""

import math
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from replicate.model import DataInfo, Model, Sampler
from replicate.sampling.annealed import annealed_langevin
from replicate.sampling.langevin import standard_normal_like
from replicate.score_based.networks import NoiseNet


class NCSN(Model):
    """Scores of the data at geometric noise levels.

    Args:
        net: predicts the noise from (y (n, D), log sigma (n,)).
        dim: D.
        sigma_max, sigma_min: first and last level, in standard deviations of the data.
        levels: number of levels L.
        steps_per_level: Langevin steps at each.
        step_size: the paper's eps in units of sigma_L^2: step sizes are step_size * sigma_i^2.
        denoise: whether sampling ends with Tweedie's mean.
    """

    family = "score"
    capabilities = frozenset({"score", "sample"})

    def __init__(
        self,
        net: NoiseNet,
        dim: int,
        sigma_max: float,
        sigma_min: float,
        levels: int,
        steps_per_level: int,
        step_size: float,
        denoise: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.dim = net, dim
        self.steps_per_level, self.step_size, self.denoise = steps_per_level, step_size, denoise
        self.nfe = levels * steps_per_level + int(denoise)
        sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), levels, dtype=torch.float64).exp()
        self.sigmas: Tensor = nn.Buffer(sigmas.float())

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.net.gaussian.fit(train)

    def score_at_level(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the score (n, D) of the data noised by sigma (n,) at x (n, D)."""
        return -self.net(x, sigma.log()) / sigma[:, None]

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        level = torch.randint(len(self.sigmas), (len(batch),), generator=generator, device=batch.device)
        sigma = self.sigmas[level]
        z = standard_normal_like(batch, generator)
        # sigma s + z = z - eps: the sigma^2-weighted objective without a quotient
        error = z - self.net(batch + sigma[:, None] * z, sigma.log())
        return 0.5 * error.square().sum(-1).mean()

    def score(self, x: Tensor) -> Tensor:
        """Return the score at the last level."""
        return self.score_at_level(x, self.sigmas[-1].to(x).expand(len(x)))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self._annealed(n, generator, self.denoise)[0]

    def samplers(self) -> dict[str, Sampler]:
        """Return the same chain with the other last step, denoised or not: that alone can decide a comparison."""
        other = "annealed-no-denoise" if self.denoise else "annealed-denoise"
        return {other: lambda n, generator: self._annealed(n, generator, not self.denoise)}

    def _annealed(self, n: int, generator: torch.Generator, denoise: bool) -> tuple[Tensor, int]:
        start = self.sigmas[0] * torch.randn(n, self.dim, generator=generator, device=generator.device)
        start = start.to(self.sigmas.dtype)
        eps = self.step_size * float(self.sigmas[-1]) ** 2
        chain = annealed_langevin(
            self.score_at_level, self.sigmas, start, self.steps_per_level, eps, generator, denoise
        )
        return chain.samples, chain.nfe


def build_ncsn(info: DataInfo, **settings: Any) -> NCSN:
    """Build an NCSN from its settings and those of its `NoiseNet`."""
    own = {name: settings.pop(name) for name in signature(NCSN).parameters if name not in ("net", "dim")}
    return NCSN(NoiseNet(info.dim, **settings), info.dim, **own)
