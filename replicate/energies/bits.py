"""Train an energy on bits, where x has no gradient: a kernel, noise and objectives beside those of `objectives`.

- `block_gibbs`: the transition of a restricted Boltzmann machine, which leaves its distribution invariant (Hinton 2002,
  Neural Computation 14);
- `FactorisedBernoulli`: independent bits at the data's base rates, the start of chains and the noise of contrasts;
- `BitFlipContrastive`: conditional noise contrast (Ceylan and Gutmann 2018, 1806.03664) with independent bit flips in
  place of the Gaussian kernel. Flips are symmetric too, so that log Z and the kernel's density cancel;
- `RatioMatching`: score matching's counterpart for bits (Hyvarinen 2007, Some extensions of score matching, CSDA 51).

Exact log Z by enumeration is in `replicate.likelihood.enumeration`. The kernelised Stein discrepancy on bits (Yang et
al. 2018, ICML) is missing: its difference operator requires the D neighbours of ratio matching, and a kernel between
bit strings as well.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from replicate.energies.objectives import EnergyFunction, Kernel, Noise, Objective, conditional_contrast


class HasGibbs(Protocol):
    """An energy with hidden units, such as `baselines.ebm.RBM`."""

    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """Return x (n, D) after that many draws of the hidden units given x and of x given them."""


def block_gibbs(machine: HasGibbs) -> Kernel:
    """Return one Gibbs sweep of the machine as a kernel; it ignores the energy function, which is the machine's."""
    return lambda energy, x, generator: machine.gibbs_sweeps(x, 1, generator)


class FactorisedBernoulli(Noise):
    """Independent bits at the base rates of the data, with half a count for each value."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: Tensor = nn.Buffer(torch.empty(0))

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        self.rates = (train.sum(0) + 0.5) / (len(train) + 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(self.rates.expand(n, -1), generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return x @ self.rates.log() + (1 - x) @ (-self.rates).log1p()


def flipped(x: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Flip each of the bits x (n, D) independently with probability `rate`."""
    return (x - torch.bernoulli(torch.full_like(x, rate), generator=generator)).abs()


def neighbours(x: Tensor) -> Tensor:
    """Return the D bit strings at one flip from each of x (n, D), shape (n, D, D); [:, i] has bit i flipped."""
    return (x[:, None, :] - torch.eye(x.shape[1], device=x.device, dtype=x.dtype)).abs()


class BitFlipContrastive(Objective):
    """Conditional noise contrast between the data and copies of them with flipped bits.

    Args:
        rate: probability of a flip; below 1/D most draws change nothing and carry no information.
        ratio: noise draws per example.

    Example:
        A constant energy separates nothing, and the loss is 2 log 2:

        >>> x = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> loss = BitFlipContrastive(0.5).loss(lambda x: torch.zeros(len(x)), x, torch.Generator())
        >>> round(float(loss / torch.tensor(2.0).log()), 6)
        2.0
    """

    def __init__(self, rate: float, ratio: int = 2) -> None:
        super().__init__()
        self.rate, self.ratio = rate, ratio

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        values = energy(torch.cat([batch, flipped(batch.repeat(self.ratio, 1), self.rate, generator)]))
        return conditional_contrast(values[: len(batch)], values[len(batch) :])


class RatioMatching(Objective):
    """Ratio matching: E_data sum_i sigmoid(f(x) - f(x with bit i flipped))^2.

    Up to a constant this is the mean squared distance between the data's and the model's p(x) / p(x with bit i
    flipped), each through g(u) = 1 / (1 + u) (Hyvarinen 2007). No log Z and no noise, at D + 1 energies per example.

    Example:
        With a constant energy every ratio is 1, and each of 3 bits costs 1/4:

        >>> float(RatioMatching().loss(lambda x: torch.zeros(len(x)), torch.zeros(5, 3), torch.Generator()))
        0.75
    """

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        n, dim = batch.shape
        values = energy(torch.cat([batch, neighbours(batch).flatten(0, 1)]))
        return torch.sigmoid(values[:n, None] - values[n:].view(n, dim)).square().sum(1).mean()
