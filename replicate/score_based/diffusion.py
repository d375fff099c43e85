"""Score-based models through stochastic differential equations (Song et al. 2021, 2011.13456).

The network predicts the noise in data coordinates, y = x_t / s(t) with noise level rho = sigma / s, so one network
serves VE, VP and sub-VP. With lambda = log rho the likelihood weighting of Song et al. 2021 (2101.09258, eq. 7) is
the same for each of them: the bound on -log p(x) is a constant plus the integral of E|eps - z|^2 over lambda.

Levels are draws of a truncated logistic distribution of lambda mixed with a uniform one, stratified over the batch
(Kingma et al. 2021, 2107.00630, appendix I.1). `weighting`: "likelihood" corrects for the proposal, so that the loss is
the bound; "proposal" does not, as in Karras et al. 2022 (2206.00364, table 1).

Deviations: each example is noised by z and by -z, which cancels most of the target's noise at small rho; the network
is an MLP preconditioned by the data's Gaussian fit; samples come from the probability-flow ODE.
"""

import math
from copy import copy
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from replicate.model import DataInfo, Model, Sampler
from replicate.sampling.langevin import standard_normal_like
from replicate.sampling.predictor_corrector import Corrector, predictor_corrector
from replicate.sampling.probability_flow import probability_flow
from replicate.score_based.networks import NoiseNet
from replicate.sde import SDE

#: the corrector's signal-to-noise ratio, the paper's for CIFAR-10 (2011.13456, appendix G)
CORRECTOR_SNR = 0.16

Weighting = Literal["likelihood", "proposal"]


class LevelProposal:
    """Random noise levels lambda = log rho in [low, high] and their density.

    A mixture: a share `uniform` of it is uniform, the rest logistic with location and scale, cut off at the ends.
    """

    def __init__(self, low: float, high: float, location: float, scale: float, uniform: float) -> None:
        self.low, self.high = low, high
        self.location, self.scale, self.uniform = location, scale, uniform
        self._cdf_low, self._cdf_high = (1 / (1 + math.exp(-(v - location) / scale)) for v in (low, high))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n levels (n,), stratified: their quantiles are even up to one shared random shift."""
        draws = torch.rand(2, max(n, 1), generator=generator, device=generator.device, dtype=torch.float64)
        u = (draws[0, :1] + torch.arange(n, device=generator.device) / n) % 1
        logistic = self.location + self.scale * torch.logit(self._cdf_low + u * (self._cdf_high - self._cdf_low))
        flat = self.low + u * (self.high - self.low)
        return torch.where(draws[1, :n] < self.uniform, flat, logistic)

    def density(self, level: Tensor) -> Tensor:
        """Return the probability density of each level (n,)."""
        inside = torch.sigmoid((level - self.location) / self.scale)
        logistic = inside * (1 - inside) / (self.scale * (self._cdf_high - self._cdf_low))
        return self.uniform / (self.high - self.low) + (1 - self.uniform) * logistic


def level_range(sde: SDE) -> tuple[float, float]:
    """Return the lowest and highest noise level lambda of an SDE, at t_min and t_max."""
    low, high = sde.log_ratio(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).tolist()
    return low, high


class UniformTime(LevelProposal):
    """t ~ U[t_min, t_max], independent draws, as noise levels lambda = log(sigma / s)."""

    def __init__(self, sde: SDE) -> None:
        super().__init__(*level_range(sde), location=0.0, scale=1.0, uniform=1.0)
        self.sde = sde

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return self.sde.log_ratio(self.sde.t_min + u * (self.sde.t_max - self.sde.t_min))

    def density(self, level: Tensor) -> Tensor:
        """Return p(t) dt / d lambda, with d lambda / dt = g^2 / (2 sigma^2)."""
        t = self.sde.time_of(level.double())
        _, std = self.sde.marginal(t)
        rate = self.sde.diffusion(t).square() / (2 * std.square())
        return (1 / (rate * (self.sde.t_max - self.sde.t_min))).to(level)


class DiffusionModel(Model):
    """The score of the data along an SDE.

    Args:
        net: predicts the noise from (y (n, D), log rho (n,)).
        dim: D.
        sde: the forward process.
        proposal: of the training levels.
        weighting: "likelihood" or "proposal".
        sample_steps: Heun steps of the probability-flow sampler, two evaluations each.
    """

    family = "score"
    capabilities = frozenset({"diffusion", "score", "sample"})

    def __init__(
        self, net: NoiseNet, dim: int, sde: SDE, proposal: LevelProposal, weighting: Weighting, sample_steps: int
    ) -> None:
        super().__init__()
        self.net, self.dim, self.sde = net, dim, sde
        self.proposal, self.weighting, self.sample_steps = proposal, weighting, sample_steps
        self.nfe = 2 * sample_steps + 1  # the last is the denoising step

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.net.gaussian.fit(train)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self._objective(batch, generator, self.weighting)

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return the likelihood-weighted objective, whatever the weighting in training."""
        return self._objective(batch, generator, "likelihood")

    def _objective(self, batch: Tensor, generator: torch.Generator, weighting: Weighting) -> Tensor:
        level = self.proposal.sample(len(batch), generator).to(batch)
        z = standard_normal_like(batch, generator)
        step = level.exp()[:, None] * z
        eps = self.net(torch.cat([batch + step, batch - step]), torch.cat([level, level]), generator)
        error = (eps - torch.cat([z, -z])).square().sum(-1).view(2, -1).mean(0)
        if weighting == "likelihood":
            error = error / self.proposal.density(level)
        return error.mean()

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        """Return grad log p_t(x) of the noised data, x (n, D), t (n,) -> (n, D)."""
        scale, std = self.sde.marginal(t)
        return -self.net(x / scale[:, None], self.sde.log_ratio(t)) / std[:, None]

    def score(self, x: Tensor) -> Tensor:
        """Return the score at data x (n, D) under the noise of t_min."""
        t = torch.full_like(x[:, 0], self.sde.t_min)
        scale, _ = self.sde.marginal(t)
        return scale[:, None] * self.score_at(scale[:, None] * x, t)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        chain = probability_flow(self.score_at, self._sde(), n, self.dim, self.sample_steps, generator, denoise=True)
        return chain.samples

    def _sde(self) -> SDE:
        """Return the SDE, whose prior samples have the dtype of the weights."""
        sde = copy(self.sde)
        sde.dtype = next(self.net.parameters()).dtype
        return sde

    def samplers(self) -> dict[str, Sampler]:
        """Return predictor-corrector sampling (2011.13456, algorithm 1) at about the same number of evaluations."""

        def corrected(n: int, generator: torch.Generator) -> tuple[Tensor, int]:
            corrector = Corrector(1, CORRECTOR_SNR)
            shape, sde = (n, self.dim), self._sde()
            chain = predictor_corrector(self.score_at, sde, shape, self.sample_steps, corrector, generator)
            return chain.samples, chain.nfe

        return {"pc": corrected}


def build(
    kind: type[SDE], info: DataInfo, *, weighting: Weighting, sample_steps: int, **settings: Any
) -> DiffusionModel:
    """Build a diffusion model from the scalar settings of its SDE, its `LevelProposal` and its `NoiseNet`."""
    sde = kind(**{name: settings.pop(name) for name in signature(kind).parameters})
    levels = {name: settings.pop(name) for name in ("location", "scale", "uniform")}
    proposal = LevelProposal(*level_range(sde), **levels)
    return DiffusionModel(NoiseNet(info.dim, **settings), info.dim, sde, proposal, weighting, sample_steps)
