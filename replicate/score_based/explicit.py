"""Explicit score matching: regression on the true score, which only a benchmark knows.

It is the ceiling for the other score matching objectives: the same network, the same data, and the target itself
(Hyvarinen 2005, JMLR 6, eq. 2).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from replicate.likelihood.dequantisation import Affine
from replicate.score_based.entries import SM_IMPLICIT
from replicate.score_based.matching import explicit_score_matching
from replicate.score_based.networks import FreeScore
from replicate.score_based.single import ScoreModel, build
from replicate.tasks.base import Density


class ExplicitModel(ScoreModel):
    """A free score network in standardised coordinates z, fitted to the density's own score there."""

    def __init__(self, net: FreeScore, density: Density, dim: int, **sampler: Any) -> None:
        super().__init__(net, dim=dim, **sampler)
        self.density = density
        self.affine = Affine(dim)

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.affine.fit(train, generator)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        target = self.density.score(batch) * self.affine.std  # grad_z log p(x(z))
        return explicit_score_matching(self.net, lambda _: target, self.affine(batch)[0]).mean()

    def score(self, x: Tensor) -> Tensor:
        return self.net(self.affine(x)[0]) / self.affine.std

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.affine.inverse(super().sample(n, generator))


SM_EXPLICIT = replace(
    SM_IMPLICIT,
    about="explicit score matching against the true score",
    build=partial(build, ExplicitModel),
    domains=frozenset(),  # none without its density
    needs_density=True,
)
