"""Learn F(x, y), the compatibility of an observation x with an answer y, and infer y* = argmin_y F(x, y).

LeCun, Chopra, Hadsell, Ranzato and Huang 2006, "A Tutorial on Energy-Based Learning" (in Predicting Structured Data):
training gives right answers lower energies than wrong ones, inference searches for the answer of lowest energy, and
exp(-F / T) / Z(x) is a distribution of answers. Two losses, neither of which needs Z(x):

- ranking noise contrast (Ma and Collins 2018, 1809.01812; the same loss is called InfoNCE by van den Oord et al.
  2018, 1807.03748): the right answer against those of all other rows of the batch. Its minimiser is
  F = log p(y) - log p(y | x) + c(x): the negative pointwise mutual information, the best test of right against wrong.
- denoising score matching in y (Vincent 2011, Neural Computation 23) at one noise level sigma. Its minimiser is
  F = -log p_sigma(y | x) + c(x) with the noised density p_sigma, whose wells are about sigma wide, as descent needs.

The sum is a compromise, which `weight` sets: the two minimisers differ by log p(y), so that a model with much denoising
ranks worse, and one with little has its least energy at a caricature, where y is surprising without x.

Answers are in the box [0, 1]^b: descent is projected on it, Langevin dynamics is reflected at its walls.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from replicate.model import Estimate, Family, Model
from replicate.resume import State, resumable
from replicate.sampling.langevin import check_settings, langevin_step, standard_normal_like
from replicate.score_based.matching import denoising_score_matching
from replicate.score_based.networks import score_of

#: wrong answers for observations: (x (n, a), generator) -> (n, k, b)
Distractors = Callable[[Tensor, torch.Generator], Tensor]


class PairEnergy(nn.Module):
    """An energy of pairs in nats, differentiable in y.

    The part that depends on x alone is computed once (`observe`); inference then changes y.
    """

    def observe(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the part of the computation that depends on x (n, a): tensors whose first dimension is n."""
        raise NotImplementedError

    def energy(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return F(x_i, y_ij) of k answers to each observation, y (n, k, b), shape (n, k)."""
        raise NotImplementedError

    def pairs(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Return F(x_i, y_j) of every observation and every answer y (m, b), shape (n, m)."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return F(x_i, y_i) of x (n, a) and y (n, b), shape (n,)."""
        return self.energy(self.observe(x), y.unsqueeze(1)).squeeze(1)


class ProductEnergy(PairEnergy):
    """The energy F(x, y) = U(y) - a(x)'b(y) / sqrt(rank), with networks a, b and U.

    a and b have a linear path beside the networks, and U a positive quadratic form: without the networks F is the
    energy of a Gaussian whose mean is linear in x. All pairs of n and m cost n + m evaluations.

    Args:
        of_x: network (.., a) -> (.., rank).
        of_y: network (.., b) -> (.., rank + 1); its last output is U without the quadratic form.
        observed, answer: a and b, numbers in x and in y.
        rank: width of a(x) and b(y).
    """

    def __init__(self, of_x: nn.Module, of_y: nn.Module, observed: int, answer: int, rank: int) -> None:
        super().__init__()
        self.of_x, self.of_y, self.rank = of_x, of_y, rank
        self.straight_x = nn.Linear(observed, rank, bias=False)
        self.straight_y = nn.Linear(answer, rank, bias=False)
        self.root = nn.Parameter(0.1 * torch.randn(answer, answer))
        self.raw_curvature = nn.Parameter(torch.tensor(2.0))

    def observe(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a(x) / sqrt(rank), (n, rank)."""
        return ((self.of_x(x) + self.straight_x(x)) / math.sqrt(self.rank),)

    def _answers(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return b(y) (.., rank) and U(y) (..) of y (.., b)."""
        out = self.of_y(y)
        curvature = nn.functional.softplus(self.raw_curvature)
        bowl = curvature * y.square().sum(-1) + (y @ self.root).square().sum(-1)
        return out[..., :-1] + self.straight_y(y), out[..., -1] + 0.5 * bowl

    def energy(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        answer, alone = self._answers(y)
        return alone - (answer @ seen[0].unsqueeze(-1)).squeeze(-1)

    def pairs(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        answer, alone = self._answers(y)
        return alone - seen[0] @ answer.T


class WellsEnergy(PairEnergy):
    """The energy F(x, y) = -log sum_z exp(-E(x, y, z)), E(x, y, z) = |y - c_z(x)|^2 / (2 width^2) + G_z(x).

    The free energy of a latent variable z with K values (LeCun et al. 2006; z summed out at temperature 1) has a well
    around each candidate answer c_z, as deep as z is likely.

    Args:
        width: standard deviation of a well, in units of y.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def candidates(self, x: Tensor) -> Tensor:
        """Return c_z(x) of x (n, a), shape (n, K, b)."""
        raise NotImplementedError

    def costs(self, x: Tensor) -> Tensor:
        """Return G_z(x) in nats of x (n, a), shape (n, K)."""
        raise NotImplementedError

    def observe(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return (c (n, K, b), G (n, K))."""
        return self.candidates(x), self.costs(x)

    def _summed_out(self, y: Tensor, products: Tensor, c: Tensor, costs: Tensor) -> Tensor:
        """Return F from y, y'c_z (n, k, K), c (n, K, b) and G (n, K), without a tensor (n, k, K, b)."""
        squared = y.square().sum(-1, keepdim=True) - 2 * products + c.square().sum(-1).unsqueeze(1)
        return -(-squared / (2 * self.width**2) - costs.unsqueeze(1)).logsumexp(-1)

    def energy(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        c, costs = seen
        return self._summed_out(y, y @ c.mT, c, costs)

    def pairs(self, seen: tuple[Tensor, ...], y: Tensor) -> Tensor:
        c, costs = seen
        return self._summed_out(y, (c.flatten(0, 1) @ y.T).view(*costs.shape, len(y)).mT, c, costs)


def ranking_loss(energies: Tensor, right: Tensor) -> Tensor:
    """Return the mean -log share of the right answer in exp(-F), nats, from energies (n, m) and its column (n,) int64.

    Example:
        Four equal energies share exp(-F) equally, and the loss is log 4:

        >>> round(float(ranking_loss(torch.zeros(2, 4), torch.tensor([0, 1]))), 3), round(math.log(4), 3)
        (1.386, 1.386)
    """
    return nn.functional.cross_entropy(-energies, right)


class ConditionalEnergy(Model):
    """A pair energy as a model that the suite can train: a row is x followed by y.

    Args:
        network: F.
        observed: number of columns of x.
        sigma: noise level of the denoising, in units of y.
        weight: of the denoising loss, added to the ranking loss.
        jitter: standard deviation of noise on both parts in the ranking and on x in the denoising.
        distractors: further wrong answers to rank against, added to those of the other rows.
    """

    family: ClassVar[Family] = "ebm"
    capabilities = frozenset({"energy"})

    def __init__(
        self,
        network: PairEnergy,
        observed: int,
        sigma: float,
        weight: float,
        jitter: float = 0.0,
        distractors: Distractors | None = None,
    ) -> None:
        super().__init__()
        self.network, self.observed = network, observed
        self.sigma, self.weight, self.jitter, self.distractors = sigma, weight, jitter, distractors

    def energy(self, x: Tensor) -> Tensor:
        """Return F of rows (n, a + b), nats, shape (n,)."""
        return self.network(x[:, : self.observed], x[:, self.observed :])

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        jittered = batch + self.jitter * standard_normal_like(batch, generator)
        x, y = jittered[:, : self.observed], batch[:, self.observed :]
        seen = self.network.observe(x)
        energies = self.network.pairs(seen, jittered[:, self.observed :])
        if self.distractors is not None:
            energies = torch.cat([energies, self.network.energy(seen, self.distractors(x, generator))], dim=1)
        ranking = ranking_loss(energies, torch.arange(len(batch), device=batch.device))
        if not self.weight:
            return ranking
        score = score_of(lambda at: self.network.energy(seen, at[:, None]))
        denoising = denoising_score_matching(score, y, self.sigma, standard_normal_like(y, generator))
        return ranking + self.weight * denoising.mean()


# -- inference


@dataclass(frozen=True)
class Inference:
    """The answers that descent found.

    Attributes:
        y: the answer of lowest energy over the starts, shape (n, b).
        energy: F there in nats, shape (n,).
        start: index of the start that led there, shape (n,).
        spread: standard deviation over the starts of the final energies in nats, shape (n,).
    """

    y: Tensor
    energy: Tensor
    start: Tensor
    spread: Tensor


@torch.no_grad()
def descend(network: PairEnergy, x: Tensor, starts: Tensor, steps: int, step_size: float) -> Inference:
    """Return argmin_y F(x, y) over the box by projected gradient descent from several starts; the lowest energy wins.

    Args:
        network: F.
        x, starts: observations, shape (n, a), and s answers for each, shape (n, s, b), within the box.
        steps: of each descent.
        step_size: in squared units of y; stable below 2 over the largest curvature.

    Example:
        One well of width 1 around y = x; the answer to x = 0.3 is 0.3, and to x = 2 the nearest point of the box:

        >>> class Well(WellsEnergy):
        ...     def candidates(self, x):
        ...         return x[:, None]
        ...     def costs(self, x):
        ...         return torch.zeros(len(x), 1)
        >>> found = descend(Well(1.0), torch.tensor([[0.3], [2.0]]), torch.zeros(2, 1, 1), 100, 0.5)
        >>> [round(y, 3) for y in found.y.flatten().tolist()]
        [0.3, 1.0]
    """
    seen = network.observe(x)
    score = score_of(lambda y: network.energy(seen, y))
    state: State = {"y": starts}
    for _ in resumable("descent", steps, state):
        state["y"] = (state["y"] + step_size * score(state["y"])).clamp(0, 1)
    energies = network.energy(seen, state["y"])
    energy, start = energies.min(1)
    y = state["y"][torch.arange(len(x), device=x.device), start]
    return Inference(y, energy, start, energies.std(1, unbiased=False))


def reflected(y: Tensor) -> Tensor:
    """Fold y into [0, 1] by reflection at 0 and 1."""
    return 1 - (1 - y % 2).abs()


@torch.no_grad()
def langevin_answers(
    network: PairEnergy,
    x: Tensor,
    starts: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Return answers (n, s, b) after Langevin steps for exp(-F(x, .) / T) on the box, reflected at its walls.

    y <- reflect(y - (eps / 2T) grad F + sqrt(eps) z), the suite's convention. Reflection leaves the uniform density
    of the box invariant, so that as eps goes to 0 the chain's law is exp(-F / T) restricted to the box.

    Args:
        network: F.
        x, starts: observations, shape (n, a), and s answers for each, shape (n, s, b).
        steps, step_size, temperature, generator: as for `replicate.sampling.langevin.ula`.

    Raises:
        ValueError: steps < 0, step_size <= 0 or temperature <= 0.

    Example:
        Energy y / 0.1 on [0, 1]: an exponential law of mean 0.1.

        >>> class Slope(PairEnergy):
        ...     def observe(self, x):
        ...         return ()
        ...     def energy(self, seen, y):
        ...         return 10 * y.squeeze(-1)
        >>> x, starts = torch.zeros(1, 1), torch.full((1, 2000, 1), 0.1)
        >>> answers = langevin_answers(Slope(), x, starts, 200, 1e-3, 1.0, torch.Generator().manual_seed(0))
        >>> round(float(answers.mean()), 1)
        0.1
    """
    check_settings(steps, step_size, temperature)
    seen = network.observe(x)
    score = score_of(lambda y: network.energy(seen, y))
    state: State = {"y": starts, "generator": generator}
    for _ in resumable("Langevin of answers", steps, state):
        y = state["y"]
        noise = standard_normal_like(y, generator)
        state["y"] = reflected(langevin_step(y, score(y), step_size, noise, temperature))
    return state["y"]


# -- right against wrong


def ranked_right(energies: Tensor, generator: torch.Generator) -> dict[str, Estimate]:
    """Measure the share of wrong pairs with a higher energy than the right one; a tie counts as a failure.

    Args:
        energies: F(x_i, y_j) of test cases, shape (n, n), right pairs on the diagonal.
        generator: chooses one wrong answer for each x.

    Returns:
        "random": share of x whose energy with one random other y is higher than with its own; "all": mean share over
        all other y, which "random" estimates; "first": share of x whose own y has the lowest energy of all n.

    Example:
        >>> found = ranked_right(1 - torch.eye(3), torch.Generator())
        >>> found["random"].value, found["all"].value, found["first"].value
        (1.0, 1.0, 1.0)
    """
    n = len(energies)
    above = energies > energies.diagonal()[:, None]
    other = (torch.arange(n) + 1 + torch.randint(n - 1, (n,), generator=generator)) % n
    shares = {
        "random": above[torch.arange(n), other],
        "all": above.double().sum(1) / (n - 1),
        "first": above.sum(1) == n - 1,
    }
    return {name: Estimate.mean_of(share.double(), "exact", "probability") for name, share in shares.items()}
