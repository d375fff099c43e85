"""Score models of one noise level: implicit, denoising and sliced score matching, free or as -grad of an energy.

Papers: Hyvarinen 2005 (JMLR 6); Vincent 2011 (Neural Computation 23); Song et al. 2019 (1905.07088). All but DSM
estimate the score of the data; DSM estimates that of the data plus N(0, sigma^2 I).

Deviations: those papers have no Langevin sampler; ours runs the unadjusted chain from N(0, 2^2 I) in standardised
units. Like that of any single-noise model, it cannot move weight between modes that are far apart.
"""

from typing import Any

import torch
from torch import Tensor

from replicate.model import DataInfo, Model
from replicate.sampling.langevin import ula
from replicate.score_based import matching
from replicate.score_based.networks import EnergyScore, FreeScore

#: start of every chain, in standard deviations of the data
START_STD = 2.0


class ScoreModel(Model):
    """A score network s(x), sampled by unadjusted Langevin dynamics; subclasses have the objective."""

    family = "score"
    capabilities = frozenset({"score", "sample"})
    network: type[FreeScore | EnergyScore] = FreeScore

    def __init__(self, net: FreeScore | EnergyScore, dim: int, langevin_steps: int, step_size: float) -> None:
        super().__init__()
        self.net = net
        self.dim, self.step_size = dim, step_size
        self.nfe = langevin_steps

    def score(self, x: Tensor) -> Tensor:
        return self.net(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        start = START_STD * torch.randn(n, self.dim, generator=generator, device=generator.device)
        start = start.to(next(self.net.parameters()).dtype)
        return ula(self.net, start, self.nfe, self.step_size, generator).samples


class ImplicitModel(ScoreModel):
    """Hyvarinen's implicit score matching with the exact trace."""

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return matching.implicit_score_matching(self.net, batch).mean()


class SlicedModel(ScoreModel):
    """Sliced score matching with one Rademacher projection per example."""

    objective = staticmethod(matching.sliced_score_matching)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective(self.net, batch, matching.rademacher(batch, generator)).mean()


class SlicedVRModel(SlicedModel):
    """Sliced score matching with variance reduction."""

    objective = staticmethod(matching.sliced_score_matching_vr)


class DenoisingModel(ScoreModel):
    """Denoising score matching at one noise level, in standard deviations of the data."""

    def __init__(self, net: FreeScore | EnergyScore, sigma: float, **sampler: Any) -> None:
        super().__init__(net, **sampler)
        self.sigma = sigma

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return matching.paired_denoising(self.net, batch, self.sigma, generator).mean()


class DenoisingEnergyModel(DenoisingModel):
    """Denoising score matching of s = -grad f: the score is conservative and f is an energy."""

    net: EnergyScore
    capabilities = frozenset({"energy", "score", "sample"})
    network = EnergyScore

    def energy(self, x: Tensor) -> Tensor:
        return self.net.energy(x)


def build(
    kind: type[ScoreModel], info: DataInfo, *, hidden: int, depth: int, activation: str, **rest: Any
) -> ScoreModel:
    """Build a model around the network of its kind; `rest` are its other arguments."""
    return kind(kind.network(info.dim, hidden, depth, activation), dim=info.dim, **rest)
