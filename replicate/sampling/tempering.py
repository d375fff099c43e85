"""Parallel tempering: Langevin chains at several temperatures that exchange their states.

Swendsen and Wang 1986, Phys. Rev. Lett. 57 (replica Monte Carlo) and Geyer 1991, Computing Science and Statistics 23
(Metropolis-coupled chains). Replica k samples p^(1/T_k); a hot one crosses between modes and passes its states
downwards. Neighbours i, i + 1 exchange states x_i, x_{i+1} with probability min(1, r),

    log r = (1/T_i - 1/T_{i+1}) (log p(x_{i+1}) - log p(x_i)),

which is the Metropolis ratio of the exchange under prod_k p(x_k)^(1/T_k). Even and odd pairs take turns
(Okabe et al. 2001, Chem. Phys. Lett. 335), so that a state can reach the coldest chain without a random walk.

Within a temperature the chain is `mala` with temperature T_k and step size eps T_k: a mode of p^(1/T) is sqrt(T) times
as wide. All replicas are one call of it: in y = x / sqrt(T) the law is q(y) ~ p(sqrt(T) y)^(1/T), whose score is
score(x) / sqrt(T), at temperature 1 and step size eps.

Departure: each round evaluates score and density at its first state again, which the count includes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from replicate.resume import State
from replicate.sampling.langevin import Chain, LogDensity, Score, check_settings, mala, path_of, recorded


@dataclass(frozen=True)
class Tempered:
    """The end of parallel tempering.

    Attributes:
        coldest: the chains at the first temperature; `nfe` counts the evaluations of all temperatures, `acceptance` is
            that of all Langevin proposals, and `path` has one state per recorded round.
        swaps: accepted share of the exchanges offered to each pair of neighbours, shape (K - 1,); nan if none was.
    """

    coldest: Chain
    swaps: Tensor


def exchange(
    x: Tensor, log_p: Tensor, temperatures: Tensor, first: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Offer an exchange to the pairs (first, first + 1), (first + 2, first + 3), ..

    Args:
        x: states, shape (K, n, D); not changed.
        log_p: their log p at temperature 1, up to a constant, shape (K, n). A pair with a nan is not exchanged.
        temperatures: shape (K,).
        first: 0 or 1.
        generator: on x's device; one uniform draw per pair and chain.

    Returns:
        (states afterwards, shape (K, n, D); whether each exchange was accepted, shape (pairs, n)).
    """
    colder = torch.arange(first, len(x) - 1, 2, device=x.device)
    hotter = colder + 1
    gain = (1 / temperatures[colder] - 1 / temperatures[hotter])[:, None] * (log_p[hotter] - log_p[colder])
    u = torch.rand(gain.shape, generator=generator, device=x.device, dtype=gain.dtype)
    accept = u.log() < gain
    out = x.clone()
    out[colder] = torch.where(accept[..., None], x[hotter], x[colder])
    out[hotter] = torch.where(accept[..., None], x[colder], x[hotter])
    return out, accept


@dataclass(frozen=True)
class Rounds:
    """The rounds of parallel tempering.

    Attributes:
        count: number of rounds.
        steps: Langevin steps per round.
        step_size: eps at temperature 1, in squared units of x; eps T at temperature T.
        record_every: rounds between two states of the coldest chain in `path`; 0 keeps none.
    """

    count: int
    steps: int
    step_size: float
    record_every: int = 0


@torch.no_grad()
def parallel_tempering(
    log_density: LogDensity, score: Score, x: Tensor, temperatures: Tensor, rounds: Rounds, generator: torch.Generator
) -> Tempered:
    """Run rounds of Langevin steps at every temperature and one offer of exchanges; all start from x.

    With the single temperature 1 this is `mala` with count * steps steps, bit for bit.

    Args:
        log_density, score, x, generator: as for `mala`.
        temperatures: increasing, shape (K,); the samples are those of the first.
        rounds: see `Rounds`.

    Raises:
        ValueError: the temperatures are not positive and increasing, or a setting is out of range.

    Example:
        Two modes at -5 and 5 of equal weight: all chains start in the left one, and half of them cross.

        >>> g = torch.Generator().manual_seed(0)
        >>> log_p = lambda x: torch.logaddexp(-0.5 * (x - 5) ** 2, -0.5 * (x + 5) ** 2).squeeze(-1)
        >>> score = lambda x: 5 * torch.tanh(5 * x) - x
        >>> start = torch.full((1000, 1), -5.0)
        >>> found = parallel_tempering(log_p, score, start, torch.tensor([1.0, 4.0, 16.0]), Rounds(40, 2, 1.0), g)
        >>> round(float((found.coldest.samples > 0).float().mean()), 1)
        0.5
    """
    values = [float(t) for t in temperatures]
    if not values or values[0] <= 0 or any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"temperatures must be positive and increasing; got {values}")
    if rounds.count < 0:
        raise ValueError(f"parallel tempering needs rounds >= 0; got {rounds.count}")
    check_settings(rounds.steps, rounds.step_size, values[0])
    k, (n, dim) = len(values), x.shape
    t = temperatures.to(x)
    root = t.sqrt().repeat_interleave(n)[:, None]
    row = t.repeat_interleave(n)
    swaps = torch.zeros(k - 1, dtype=torch.float64, device=x.device)
    state: State = {"x": x, "y": x.repeat(k, 1) / root, "accepted": 0.0, "swapped": swaps, "generator": generator}
    for r in recorded("parallel tempering", rounds.count, state, rounds.record_every):
        tempered_density, tempered_score = lambda y: log_density(y * root) / row, lambda y: score(y * root) / root
        moved = mala(tempered_density, tempered_score, state["y"], rounds.steps, rounds.step_size, generator)
        now = moved.samples * root
        if k > 1:
            log_p = log_density(now).detach()
            swapped, accept = exchange(now.view(k, n, dim), log_p.view(k, n), t, r % 2, generator)
            now = swapped.view(k * n, dim)
            state["swapped"][r % 2 :: 2] += accept.double().mean(1)
        state["x"], state["y"] = now[:n], now / root
        state["accepted"] += moved.acceptance or 0.0
    offered = torch.tensor([(rounds.count + 1 - i % 2) // 2 for i in range(k - 1)], device=x.device)
    acceptance = state["accepted"] / rounds.count if rounds.count and rounds.steps else math.nan
    nfe = k * rounds.count * (rounds.steps + 1)
    return Tempered(Chain((state["y"] * root)[:n], path_of(state), nfe, acceptance), state["swapped"] / offered)
