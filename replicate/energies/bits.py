"""What training an energy on bits needs beside `objectives`: moves, noise and matching that have no gradient in x.

- `block_gibbs`: the transition of a restricted Boltzmann machine, which leaves its distribution invariant (Hinton 2002,
  Neural Computation 14);
- `FactorisedBernoulli`: independent bits at the data's base rates, where chains start and what data are told from;
- `BitFlipContrastive`: conditional noise contrast (Ceylan and Gutmann 2018, 1806.03664) with independent bit flips for
  the Gaussian kernel. Flips are symmetric too, so that log Z and the kernel's density cancel;
- `RatioMatching`: score matching's sibling for bits (Hyvarinen 2007, Some extensions of score matching, CSDA 51).

Exact log Z by enumeration is in `replicate.likelihood.enumeration`. Left out: the kernelised Stein discrepancy on bits
(Yang et al. 2018, ICML), whose difference operator asks for the same D neighbours as ratio matching and for a kernel
between bit strings besides.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from replicate.energies.objectives import EnergyFunction, Move, Noise, Objective, conditional_contrast


class HasGibbs(Protocol):
    """An energy with hidden units, such as `baselines.ebm.RBM`."""

    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """x (n, D) after that many draws of the hidden units given x and of x given them."""


def block_gibbs(machine: HasGibbs) -> Move:
    """One Gibbs sweep of the machine, whatever function of it stands for the energy."""
    return lambda energy, x, generator: machine.gibbs_sweeps(x, 1, generator)


class FactorisedBernoulli(Noise):
    """Independent bits at the base rates of the data, with half a count on either side."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.empty(0))

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        self.rates = (train.sum(0) + 0.5) / (len(train) + 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(self.rates.expand(n, -1), generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return x @ self.rates.log() + (1 - x) @ (-self.rates).log1p()


def flipped(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Bits x (n, D), each turned over with probability `rate` by itself."""
    return (x - torch.bernoulli(torch.full_like(x, rate), generator=generator)).abs()


def neighbours(x: Tensor) -> Tensor:
    """The D bit strings at one flip from each of x (n, D), shape (n, D, D); [:, i] has bit i turned over."""
    return (x[:, None, :] - torch.eye(x.shape[1], device=x.device, dtype=x.dtype)).abs()


class BitFlipContrastive(Objective):
    """Conditional noise contrast between the data and what bit flips make of them.

    Args:
        rate: probability that a bit is turned over; below 1/D most draws change nothing and tell nothing.
        ratio: noise draws an example.
    """

    def __init__(self, rate: float, ratio: int = 2) -> None:
        super().__init__()
        self.rate, self.ratio = rate, ratio

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        values = energy(torch.cat([batch, flipped(batch.repeat(self.ratio, 1), self.rate, generator)]))
        return conditional_contrast(values[: len(batch)], values[len(batch) :])


class RatioMatching(Objective):
    """Ratio matching: E_data sum_i sigmoid(f(x) - f(x with bit i turned over))^2.

    Up to a constant this is the mean squared distance between the data's and the model's p(x) / p(x with bit i turned
    over), each through g(u) = 1 / (1 + u) (Hyvarinen 2007). No log Z and no noise, at D + 1 energies an example.
    """

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        n, dim = batch.shape
        values = energy(torch.cat([batch, neighbours(batch).flatten(0, 1)]))
        return torch.sigmoid(values[:n, None] - values[n:].view(n, dim)).square().sum(1).mean()
