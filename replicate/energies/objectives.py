"""Every way to train an unnormalised density exp(-f), without a word about what f is.

Song and Kingma 2021, "How to train your energy-based models" (2101.03288), sort the ways by what they do about log Z:

- maximum likelihood, E_data f + log Z, with log Z by quadrature (`MaximumLikelihood`) or with its gradient
  -E_model grad f estimated from Markov chains: started at the data (`ContrastiveDivergence`, Hinton 2002, Neural
  Computation 14), going on from update to update (`PersistentCD`, Tieleman 2008, ICML) or started at noise and kept
  short (`ShortRun`, Nijkamp et al. 2019, 1904.09770);
- score matching, in which Z has no part: implicit, denoising and sliced (`replicate.score_based.matching` has the
  papers), and by a kernelised Stein discrepancy (`MinimumKSD`; Liu, Lee and Jordan 2016, 1602.03253; Chwialkowski,
  Strathmann and Gretton 2016, 1602.02964; as an estimator Barp et al. 2019, 1906.08283);
- noise contrast, in which Z is one more parameter (`NoiseContrastive`, Gutmann and Hyvarinen 2010, AISTATS 9) or
  cancels (`ConditionalNoiseContrastive`, Ceylan and Gutmann 2018, 1806.03664); with the noise of a flow fitted to the
  data `FlowContrastive` (Gao et al. 2020, 1912.00589).

Deviations: contrastive divergence and persistent chains move by Metropolis-adjusted Langevin in place of Gibbs
sampling, since a general f has no conditionals; `FlowContrastive` fits its flow by maximum likelihood once and keeps
it, where Gao et al. go on to update it against the energy. That second part makes a better flow, not a more consistent
energy, and the method without it has a fixed objective whose gradient can be checked.

An objective is a module so that a checkpoint carries what it owns: chains, the fitted noise, a learned log Z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from replicate.likelihood.quadrature import grid
from replicate.metrics.samples import median_distance
from replicate.model import Model
from replicate.resume import State, resumable
from replicate.sampling.langevin import mala, ula
from replicate.score_based import matching
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive
from replicate.score_based.networks import score_of

#: f: (n, D) -> (n,) in nats, differentiable in x and in its parameters
EnergyFunction = Callable[[Tensor], Tensor]
#: one Markov transition (n, D) -> (n, D) for the density exp(-f) / Z
Move = Callable[[EnergyFunction, Tensor, torch.Generator], Tensor]

#: examples from which the kernel's bandwidth is read
BANDWIDTH_EXAMPLES = 1000


# -- what the methods share


class LogDensity:
    """-f and its gradient, evaluated together: MALA asks for both at the same point."""

    def __init__(self, energy: EnergyFunction) -> None:
        self.energy = energy
        self._x: Tensor | None = None
        self._value = self._grad = torch.empty(0)

    def _evaluate(self, x: Tensor) -> None:
        if x is not self._x:
            with torch.enable_grad():
                at = x.detach().requires_grad_(True)
                value = -self.energy(at)
                (self._grad,) = torch.autograd.grad(value.sum(), at)
            self._x, self._value = x, value.detach()

    def value(self, x: Tensor) -> Tensor:
        """-f(x), shape (n,), without a graph."""
        self._evaluate(x)
        return self._value

    def score(self, x: Tensor) -> Tensor:
        """-grad f(x), shape (n, D), without a graph."""
        self._evaluate(x)
        return self._grad


def langevin_move(step_size: float, adjusted: bool = True) -> Move:
    """One Langevin step at temperature 1; `adjusted` leaves exp(-f) invariant, unadjusted does so to first order.

    Args:
        step_size: eps of `replicate.sampling.langevin`, in squared units of x.
        adjusted: accept or reject (MALA, at two gradients a move) or not (ULA, at one).
    """

    def move(energy: EnergyFunction, x: Tensor, generator: torch.Generator) -> Tensor:
        target = LogDensity(energy)
        if adjusted:
            return mala(target.value, target.score, x, 1, step_size, generator).samples
        return ula(target.score, x, 1, step_size, generator).samples

    return move


def jump(energy: EnergyFunction, noise: Noise, x: Tensor, generator: torch.Generator) -> Tensor:
    """A Metropolis-Hastings step of exp(-f) whose proposals are independent draws of the noise; (n, D) -> (n, D)."""
    with torch.no_grad():
        both = torch.cat([x, noise.sample(len(x), generator)])
        log_weight = -energy(both) - noise.log_prob(both)
        now, proposed = log_weight.chunk(2)
        u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        return torch.where((u.log() < proposed - now)[:, None], both[len(x) :], x)


def jumping(move: Move, noise: Noise) -> Move:
    """`move` after a `jump`: mass crosses where no local move goes. Whoever starts chains from the noise fits it."""
    return lambda energy, x, generator: move(energy, jump(energy, noise, x, generator), generator)


class Quadrature(nn.Module):
    """log Z of an energy in the plane, differentiable in its parameters: the midpoint rule on a centred square.

    Args:
        half_width: of the square, which must hold all but a negligible part of exp(-f).
        points: per axis.
    """

    nodes: Tensor

    def __init__(self, half_width: float, points: int) -> None:
        super().__init__()
        nodes, self.log_cell = grid(half_width, points, 2)
        self.register_buffer("nodes", nodes, persistent=False)

    def forward(self, energy: EnergyFunction) -> Tensor:
        """log Z in nats, a scalar."""
        return torch.logsumexp(-energy(self.nodes), 0) + self.log_cell


class Owner(nn.Module):
    """A module whose buffers take their size from the data: loading a state gives them the size that was saved."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Noise(Owner):
    """A distribution that is fitted to the data and drawn from: where chains start, or what data are told from."""

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Take what is needed from the training data (n, D); called once."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, shape (n, D), without a graph."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density in nats at x (n, D), shape (n,); chains that only start here do not ask for it."""
        raise NotImplementedError


class FittedGaussian(Noise):
    """The Gaussian of the data's mean and covariance."""

    mean: Tensor
    chol: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.empty(0))
        self.register_buffer("chol", torch.empty(0, 0))

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        found = GaussianNoise.fit(train)
        self.mean, self.chol = found.mean, found.chol

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return GaussianNoise(self.mean, self.chol).sample(n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return GaussianNoise(self.mean, self.chol).log_prob(x)


class FlowNoise(Noise):
    """One of the suite's flows, fitted by maximum likelihood (Adam, rate to 0 along a cosine) and then frozen.

    Args:
        flow: an untrained model with `log_prob` and `sample`.
        steps: of the fit.
        batch: examples a step.
        lr: first learning rate.
    """

    def __init__(self, flow: Model, steps: int, batch: int = 256, lr: float = 5e-3) -> None:
        super().__init__()
        self.flow, self.steps, self.batch, self.lr = flow.requires_grad_(False), steps, batch, lr

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        flow = self.flow.to(train.dtype)
        flow.initialise(train, generator)
        flow.requires_grad_(True)
        optimizer = torch.optim.Adam(flow.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps))
        state: State = {"flow": flow, "optimizer": optimizer, "schedule": schedule, "generator": generator}
        for _ in resumable("fitting the noise", self.steps, state):
            chosen = torch.randint(len(train), (self.batch,), generator=generator, device=train.device)
            optimizer.zero_grad()
            flow.loss(train[chosen], generator).backward()
            optimizer.step()
            schedule.step()
        flow.requires_grad_(False).eval()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.flow.sample(n, generator).detach()

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)


class Objective(Owner):
    """A way to train an energy: `prepare` once, then follow the gradient of `loss`."""

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        """Fit noise and start chains from the training data (n, D); called once, before the first update."""

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient in the parameters is the method's update, from the data `batch` (n, D)."""
        raise NotImplementedError


# -- maximum likelihood, exact and from chains


class MaximumLikelihood(Objective):
    """Mean negative log-likelihood E_data f + log Z, in nats.

    Args:
        log_z: of an energy, differentiable in its parameters: `Quadrature`, or enumeration for bits.
    """

    def __init__(self, log_z: Callable[[EnergyFunction], Tensor]) -> None:
        super().__init__()
        self.log_z = log_z

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy(batch).mean() + self.log_z(energy)


def energy_gap(energy: EnergyFunction, batch: Tensor, negatives: Tensor) -> Tensor:
    """E_data f - E_negatives f: with negatives from the model its gradient is that of maximum likelihood."""
    at_data, at_negatives = energy(torch.cat([batch, negatives])).split([len(batch), len(negatives)])
    return at_data.mean() - at_negatives.mean()


class _Chains(Objective):
    """The energy gap to what `k` moves make of a start, which subclasses name."""

    def __init__(self, move: Move, k: int) -> None:
        super().__init__()
        self.move, self.k = move, k

    def run(self, energy: EnergyFunction, x: Tensor, generator: torch.Generator) -> Tensor:
        """x (n, D) after k moves."""
        for _ in range(self.k):
            x = self.move(energy, x, generator)
        return x.detach()


class ContrastiveDivergence(_Chains):
    """CD-k: chains of k moves from the data of the batch. Its mean update is not the gradient of any likelihood."""

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy_gap(energy, batch, self.run(energy, batch, generator))


class PersistentCD(_Chains):
    """Persistent CD: the chains go on from update to update, and follow the model while it changes slowly.

    Args:
        move: one transition.
        k: moves an update.
        chains: how many; all of them move.
        start: what they are drawn from at first; the data's Gaussian by default.
    """

    state: Tensor

    def __init__(self, move: Move, k: int, chains: int, start: Noise | None = None) -> None:
        super().__init__(move, k)
        self.chains, self.start = chains, start or FittedGaussian()
        self.register_buffer("state", torch.empty(0, 0))

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.start.fit(train, generator)
        self.state = self.start.sample(self.chains, generator)

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.state = self.run(energy, self.state, generator)
        return energy_gap(energy, batch, self.state)


class ShortRun(_Chains):
    """Short-run chains from noise: k moves from a fresh draw each update, as many chains as data.

    The energy learns to make these chains end at the data, which is not to be their steady state's energy.

    Args:
        move: one transition.
        k: moves an update.
        start: the noise; the data's Gaussian by default.
    """

    def __init__(self, move: Move, k: int, start: Noise | None = None) -> None:
        super().__init__(move, k)
        self.start = start or FittedGaussian()

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.start.fit(train, generator)

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy_gap(energy, batch, self.run(energy, self.start.sample(len(batch), generator), generator))


# -- score matching


class ImplicitScoreMatching(Objective):
    """Hyvarinen's objective with the exact trace: D + 1 passes through the energy's gradient."""

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return matching.implicit_score_matching(score_of(energy), batch).mean()


class DenoisingScoreMatching(Objective):
    """Denoising score matching: what it learns is the energy of the data plus N(0, sigma^2 I).

    Each example is noised by z and by -z, so that most of the target's noise cancels within the pair.

    Args:
        sigma: noise level, in units of x.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        z = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
        pairs, noise = torch.cat([batch, batch]), torch.cat([z, -z])
        return matching.denoising_score_matching(score_of(energy), pairs, self.sigma, noise).mean()


class SlicedScoreMatching(Objective):
    """Sliced score matching with reduced variance, one sign vector an example."""

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        signs = matching.rademacher(batch, generator)
        return matching.sliced_score_matching_vr(score_of(energy), batch, signs).mean()


def kernel_stein_discrepancy(score: Tensor, x: Tensor, bandwidth: float | Tensor) -> Tensor:
    """Squared kernelised Stein discrepancy between the sample x and the model with this score: a U-statistic.

    With k(x, y) = (c^2 + |x - y|^2)^(-1/2) the mean over pairs i != j of (Liu et al. 2016, eq. 14)

        s_i's_j k + s_i' grad_y k + s_j' grad_x k + tr(grad_x grad_y k).

    Args:
        score: of the model at x, shape (n, D).
        x: shape (n, D), n >= 2.
        bandwidth: c, in units of x.

    Returns:
        A scalar; unbiased, so it may be negative.
    """
    n, dim = x.shape
    cross = score @ x.T
    own = cross.diagonal()
    projected = own[:, None] + own[None, :] - cross - cross.T  # (s_i - s_j)'(x_i - x_j)
    gram = x @ x.T
    norms = gram.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    inverse = 1 / (bandwidth**2 + squared)
    k = inverse.sqrt()
    terms = k * (score @ score.T + inverse * (projected + dim - 3 * squared * inverse))
    return (terms.sum() - terms.diagonal().sum()) / (n * (n - 1))


class MinimumKSD(Objective):
    """Minimum kernelised Stein discrepancy within the batch; needs the score alone, at one gradient an example.

    Args:
        bandwidth: c of the kernel, in median distances of the training data.
    """

    scale: Tensor

    def __init__(self, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.register_buffer("scale", torch.ones(()))

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.scale = train.new_tensor(self.bandwidth * median_distance(train[:BANDWIDTH_EXAMPLES]))

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return kernel_stein_discrepancy(score_of(energy)(batch), batch.detach(), self.scale)


# -- contrast with noise


class NoiseContrastive(Objective):
    """Noise-contrastive estimation with a learned log Z.

    Args:
        noise: its log density is known; fitted in `prepare`.
        ratio: noise draws an example.
    """

    def __init__(self, noise: Noise, ratio: int = 1) -> None:
        super().__init__()
        self.noise, self.ratio = noise, ratio
        self.log_z = nn.Parameter(torch.zeros(()))

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.log_z.data = self.log_z.data.to(train)
        self.noise.fit(train, generator)

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        both = torch.cat([batch, self.noise.sample(self.ratio * len(batch), generator)])
        log_ratio = -energy(both) - self.log_z - self.noise.log_prob(both)
        return noise_contrastive(log_ratio[: len(batch)], log_ratio[len(batch) :])


class FlowContrastive(NoiseContrastive):
    """Noise contrast with a flow that was fitted to the data: noise that is hard to tell from them.

    Args:
        flow: an untrained flow.
        steps: of its fit by maximum likelihood.
        ratio: noise draws an example.
    """

    def __init__(self, flow: Model, steps: int, ratio: int = 1) -> None:
        super().__init__(FlowNoise(flow, steps), ratio)


def conditional_contrast(at_data: Tensor, at_noise: Tensor) -> Tensor:
    """Ceylan and Gutmann 2018, eq. 9, for a symmetric kernel: 2 E log(1 + exp(f(x) - f(x'))), in nats.

    Args:
        at_data: f at the data, shape (n,).
        at_noise: f at what the kernel made of them, shape (r n,), r blocks in the order of the data.
    """
    return 2 * softplus(at_data.repeat(len(at_noise) // len(at_data)) - at_noise).mean()


class ConditionalNoiseContrastive(Objective):
    """Conditional noise contrast with x' = x + sigma z: the kernel is symmetric, so that log Z and its density cancel.

    Args:
        sigma: of the kernel, in units of x; as it goes to 0 the objective becomes score matching.
        ratio: noise draws an example; with an even number half of them are the others' reflections.
    """

    def __init__(self, sigma: float, ratio: int = 2) -> None:
        super().__init__()
        self.sigma, self.ratio = sigma, ratio

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        mirrored = self.ratio % 2 == 0
        draws = self.ratio // 2 if mirrored else self.ratio
        shape = (draws * len(batch), batch.shape[1])
        z = torch.randn(shape, generator=generator, device=batch.device, dtype=batch.dtype)
        z = torch.cat([z, -z]) if mirrored else z
        values = energy(torch.cat([batch, batch.repeat(self.ratio, 1) + self.sigma * z]))
        return conditional_contrast(values[: len(batch)], values[len(batch) :])


# -- what is known of them


@dataclass(frozen=True)
class Method:
    """A training method in words.

    Attributes:
        name: in full.
        about: what it minimises or follows.
        paper: author and year, with arXiv number or place.
        consistent: whether its minimum is the truth as the data grow, where the energy can be the truth.
        needs: what it asks of the energy or the data beside the values f(x) at the data.
        caveat: what is left to be said of its consistency; may be empty.
    """

    name: str
    about: str
    paper: str
    consistent: bool
    needs: str
    caveat: str = ""


METHODS: dict[str, Method] = {
    "ml": Method(
        "maximum likelihood",
        "E_data f + log Z",
        "Song and Kingma 2021, 2101.03288",
        True,
        "log Z and its gradient",
    ),
    "cd": Method(
        "contrastive divergence",
        "E_data f - E_chain f, chains of k moves from the data",
        "Hinton 2002, Neural Computation 14",
        False,
        "a Markov chain",
        "stationary at the truth, yet blind to mass that k moves from the data do not reach",
    ),
    "pcd": Method(
        "persistent contrastive divergence",
        "E_data f - E_chain f, chains that go on from update to update",
        "Tieleman 2008, ICML",
        True,
        "a Markov chain that mixes",
        "as long as the chains keep up with the model",
    ),
    "short-run": Method(
        "short-run chains from noise",
        "E_data f - E_chain f, chains of k moves from noise",
        "Nijkamp et al. 2019, 1904.09770",
        False,
        "a Markov chain",
        "the chains' end, not exp(-f), comes to match the data",
    ),
    "ism": Method(
        "implicit score matching",
        "1/2 |s|^2 + tr(ds/dx) at data",
        "Hyvarinen 2005, JMLR 6",
        True,
        "second derivatives, D of them",
        "blind to the weights of modes far apart",
    ),
    "dsm": Method(
        "denoising score matching",
        "1/2 |sigma s + z|^2 at noised data",
        "Vincent 2011, Neural Computation 23",
        True,
        "the score",
        "for the data plus N(0, sigma^2 I), not for the data",
    ),
    "ssm": Method(
        "sliced score matching",
        "1/2 |s|^2 + v'(ds/dx)v at data",
        "Song et al. 2019, 1905.07088",
        True,
        "one directional second derivative",
        "blind to the weights of modes far apart",
    ),
    "nce": Method(
        "noise-contrastive estimation",
        "data told from noise by f + log Z against log q",
        "Gutmann and Hyvarinen 2010, AISTATS 9",
        True,
        "noise of known density",
    ),
    "cnce": Method(
        "conditional noise-contrastive estimation",
        "data told from themselves plus sigma z by f(x) against f(x')",
        "Ceylan and Gutmann 2018, 1806.03664",
        True,
        "a symmetric kernel",
        "blind to the weights of modes many sigma apart",
    ),
    "ksd": Method(
        "minimum kernelised Stein discrepancy",
        "the Stein discrepancy of a batch, k = (c^2 + |x - y|^2)^(-1/2)",
        "Barp et al. 2019, 1906.08283",
        True,
        "the score",
        "blind to the weights of modes far apart",
    ),
    "flow-nce": Method(
        "flow-contrastive estimation",
        "noise contrast with a flow fitted to the data",
        "Gao et al. 2020, 1912.00589",
        True,
        "a normalizing flow",
    ),
}
