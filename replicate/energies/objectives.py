"""Train an unnormalised density exp(-f) by any objective, whatever f is.

Song and Kingma 2021, "How to train your energy-based models" (2101.03288), sort the objectives by their use of log Z:

- maximum likelihood, E_data f + log Z, with log Z by quadrature (`MaximumLikelihood`) or with its gradient
  -E_model grad f estimated from Markov chains: started at the data (`ContrastiveDivergence`, Hinton 2002, Neural
  Computation 14), continued from update to update (`PersistentCD`, Tieleman 2008, ICML) or started at noise and kept
  short (`ShortRun`, Nijkamp et al. 2019, 1904.09770);
- score matching, which does not use Z: implicit, denoising and sliced (`replicate.score_based.matching` has the
  papers), and by a kernelised Stein discrepancy (`MinimumKSD`; Liu, Lee and Jordan 2016, 1602.03253; Chwialkowski,
  Strathmann and Gretton 2016, 1602.02964; as an estimator Barp et al. 2019, 1906.08283);
- noise contrast, where Z is one more parameter (`NoiseContrastive`, Gutmann and Hyvarinen 2010, AISTATS 9) or
  cancels (`ConditionalNoiseContrastive`, Ceylan and Gutmann 2018, 1806.03664); with the noise of a flow fitted to the
  data `FlowContrastive` (Gao et al. 2020, 1912.00589).

As the data grow all of them are minimal at the truth, but for `ContrastiveDivergence`, which is stationary there yet
blind to mass that k steps from the data do not reach, and `ShortRun`, where the end of the chains and not exp(-f)
matches the data. `PersistentCD` requires chains that follow the model, denoising finds the density of the data plus
N(0, sigma^2 I), and the other score matching objectives and the Stein discrepancy are blind to the weights of modes far
apart, as conditional contrast is to those many sigma apart.

Deviations: contrastive divergence and persistent chains use Metropolis-adjusted Langevin steps in place of Gibbs
sampling, since a general f has no conditionals; `FlowContrastive` fits its flow by maximum likelihood once, whereas Gao
et al. also update it against the energy, which makes a better flow, not a more consistent energy.

An objective is a module so that a checkpoint has its state: chains, the fitted noise, a learned log Z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from replicate.fitting import fit
from replicate.likelihood.quadrature import grid
from replicate.metrics.samples import median_distance
from replicate.model import Model
from replicate.sampling.langevin import mala, standard_normal_like, ula
from replicate.score_based import matching
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive
from replicate.score_based.networks import score_of

#: f: (n, D) -> (n,) in nats, differentiable in x and in its parameters
EnergyFunction = Callable[[Tensor], Tensor]
#: MCMC kernel: one transition (n, D) -> (n, D) for the density exp(-f) / Z
Kernel = Callable[[EnergyFunction, Tensor, torch.Generator], Tensor]

#: names of the objectives that `replicate.energies.model.build_objective` knows
METHODS = ("ml", "cd", "pcd", "short-run", "ism", "dsm", "ssm", "nce", "cnce", "ksd", "flow-nce")
#: examples that set the Stein kernel's bandwidth
BANDWIDTH_EXAMPLES = 1000


# -- energies, kernels and noise


class LogDensity:
    """The log density -f and its gradient, evaluated together: MALA needs both at the same point."""

    def __init__(self, energy: EnergyFunction) -> None:
        self.energy = energy
        self._x: Tensor | None = None
        self._value = self._grad = torch.empty(0)

    def _at(self, x: Tensor) -> LogDensity:
        if x is not self._x:
            with torch.enable_grad():
                at = x.detach().requires_grad_(True)
                value = -self.energy(at)
                (self._grad,) = torch.autograd.grad(value.sum(), at)
            self._x, self._value = x, value.detach()
        return self

    def value(self, x: Tensor) -> Tensor:
        """Return -f(x), shape (n,), without a graph."""
        return self._at(x)._value

    def score(self, x: Tensor) -> Tensor:
        """Return -grad f(x), shape (n, D), without a graph."""
        return self._at(x)._grad


def langevin_move(step_size: float, adjusted: bool = True) -> Kernel:
    """Return one Langevin step at temperature 1: adjusted it leaves exp(-f) invariant, unadjusted to first order.

    Args:
        step_size: eps of `replicate.sampling.langevin`, in squared units of x.
        adjusted: accept or reject (MALA, at two gradients per step) or not (ULA, at one).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> kernel, x = langevin_move(1.0), torch.zeros(5000, 1)
        >>> for _ in range(20):
        ...     x = kernel(lambda x: 0.5 * x.square().sum(1), x, g)
        >>> round(float(x.var()), 1)
        1.0
    """

    def step(energy: EnergyFunction, x: Tensor, generator: torch.Generator) -> Tensor:
        target = LogDensity(energy)
        if adjusted:
            return mala(target.value, target.score, x, 1, step_size, generator).samples
        return ula(target.score, x, 1, step_size, generator).samples

    return step


def independence_step(energy: EnergyFunction, noise: Noise, x: Tensor, generator: torch.Generator) -> Tensor:
    """Take a Metropolis-Hastings step of exp(-f) from x (n, D) with independence proposals, drawn from the noise."""
    with torch.no_grad():
        both = torch.cat([x, noise.sample(len(x), generator)])
        log_weight = -energy(both) - noise.log_prob(both)
        now, proposed = log_weight.chunk(2)
        u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        return torch.where((u.log() < proposed - now)[:, None], both[len(x) :], x)


def with_independence(kernel: Kernel, noise: Noise) -> Kernel:
    """Return `kernel` after an `independence_step`, which crosses where local steps cannot; the caller fits noise."""
    return lambda energy, x, generator: kernel(energy, independence_step(energy, noise, x, generator), generator)


class Quadrature(nn.Module):
    """Differentiable log Z of an energy in the plane: the midpoint rule on a centred square.

    Args:
        half_width: of the square, which must hold all but a negligible part of exp(-f).
        points: per axis.

    Example:
        >>> log_z = Quadrature(8.0, 80)(lambda x: 0.5 * x.square().sum(1))
        >>> round(float(log_z.exp() / torch.pi), 4)
        2.0
    """

    def __init__(self, half_width: float, points: int) -> None:
        super().__init__()
        nodes, self.log_cell = grid(half_width, points, 2)
        self.nodes: Tensor = nn.Buffer(nodes, persistent=False)

    def forward(self, energy: EnergyFunction) -> Tensor:
        """Return log Z in nats, a scalar."""
        return torch.logsumexp(-energy(self.nodes), 0) + self.log_cell


class Owner(nn.Module):
    """A module whose buffers have a size that depends on the data: loading a state gives them the saved size."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Noise(Owner):
    """A distribution fitted to the data: the start of chains, or the noise that data are contrasted with."""

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Fit the distribution to the training data (n, D); called once."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n samples, shape (n, D), without a graph."""
        raise NotImplementedError

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log density in nats at x (n, D), shape (n,); the start of chains does not need it."""
        raise NotImplementedError


class FittedGaussian(Noise):
    """The Gaussian with the data's mean and covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor = nn.Buffer(torch.empty(0))
        self.chol: Tensor = nn.Buffer(torch.empty(0, 0))

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        fitted = GaussianNoise.fit(train)
        self.mean, self.chol = fitted.mean, fitted.chol

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return GaussianNoise(self.mean, self.chol).sample(n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return GaussianNoise(self.mean, self.chol).log_prob(x)


class FlowNoise(Noise):
    """A flow of the suite, fitted by maximum likelihood (Adam, rate to 0 along a cosine) and then frozen.

    Args:
        flow: an untrained model with `log_prob` and `sample`.
        steps: of the fit, each of 256 examples; the first rate is 0.005.
    """

    def __init__(self, flow: Model, steps: int) -> None:
        super().__init__()
        self.flow, self.steps = flow.requires_grad_(False), steps

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        flow = self.flow.to(train.dtype)
        flow.initialise(train, generator)
        flow.requires_grad_(True)
        optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, self.steps))

        def loss() -> Tensor:
            chosen = torch.randint(len(train), (256,), generator=generator, device=train.device)
            return flow.loss(train[chosen], generator)

        fit(flow, loss, optimizer, self.steps, {"generator": generator}, schedule=schedule, name="fitting the noise")
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
        """Return a scalar whose gradient in the parameters is the update, from the data `batch` (n, D)."""
        raise NotImplementedError


# -- maximum likelihood, exact and from chains


class MaximumLikelihood(Objective):
    """Mean negative log-likelihood E_data f + log Z, in nats.

    Args:
        log_z: of an energy, differentiable in its parameters: `Quadrature`, or enumeration for bits.

    Example:
        At 0 a standard normal in the plane has -log p = log(2 pi) = 1.838:

        >>> objective = MaximumLikelihood(Quadrature(8.0, 80))
        >>> loss = objective.loss(lambda x: 0.5 * x.square().sum(1), torch.zeros(4, 2), torch.Generator())
        >>> round(float(loss), 3)
        1.838
    """

    def __init__(self, log_z: Callable[[EnergyFunction], Tensor]) -> None:
        super().__init__()
        self.log_z = log_z

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy(batch).mean() + self.log_z(energy)


def energy_gap(energy: EnergyFunction, batch: Tensor, negatives: Tensor) -> Tensor:
    """Return E_data f - E_negatives f; with negatives from the model its gradient is that of maximum likelihood.

    Example:
        >>> float(energy_gap(lambda x: x.sum(1), torch.ones(3, 2), torch.zeros(5, 2)))
        2.0
    """
    at_data, at_negatives = energy(torch.cat([batch, negatives])).split([len(batch), len(negatives)])
    return at_data.mean() - at_negatives.mean()


class _Chains(Objective):
    """The energy gap to the end of chains of `k` steps; subclasses set their start."""

    def __init__(self, kernel: Kernel, k: int) -> None:
        super().__init__()
        self.kernel, self.k = kernel, k

    def run(self, energy: EnergyFunction, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return x (n, D) after k steps."""
        for _ in range(self.k):
            x = self.kernel(energy, x, generator)
        return x.detach()


class ContrastiveDivergence(_Chains):
    """CD-k: chains of k steps from the data of the batch. Its mean update is not the gradient of any likelihood.

    Args:
        kernel: one transition.
        k: steps per update.

    Example:
        Data at 3 under the energy x^2 / 2: one step lowers the energy, so the gap is positive.

        >>> objective, g = ContrastiveDivergence(langevin_move(0.1), 1), torch.Generator().manual_seed(0)
        >>> float(objective.loss(lambda x: 0.5 * x.square().sum(1), torch.full((500, 1), 3.0), g)) > 0
        True
    """

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy_gap(energy, batch, self.run(energy, batch, generator))


class PersistentCD(_Chains):
    """Persistent CD: the chains continue from update to update, and follow the model while it changes slowly.

    Args:
        kernel: one transition.
        k: steps per update.
        chains: number of chains; each update runs all of them.
        start: distribution of their first states; the data's Gaussian by default.

    Example:
        >>> objective, g = PersistentCD(langevin_move(0.1), 1, chains=10), torch.Generator().manual_seed(0)
        >>> data = torch.randn(500, 2, generator=g)
        >>> objective.prepare(data, g)
        >>> before = objective.state
        >>> _ = objective.loss(lambda x: 0.5 * x.square().sum(1), data, g)
        >>> objective.state.shape, torch.equal(objective.state, before)
        (torch.Size([10, 2]), False)
    """

    def __init__(self, kernel: Kernel, k: int, chains: int, start: Noise | None = None) -> None:
        super().__init__(kernel, k)
        self.chains, self.start = chains, start or FittedGaussian()
        self.state: Tensor = nn.Buffer(torch.empty(0, 0))

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.start.fit(train, generator)
        self.state = self.start.sample(self.chains, generator)

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        self.state = self.run(energy, self.state, generator)
        return energy_gap(energy, batch, self.state)


class ShortRun(_Chains):
    """Short-run chains from noise: k steps from a fresh draw per update, as many chains as data.

    The energy learns to make these chains end at the data; their stationary distribution need not match the data.

    Args:
        kernel: one transition.
        k: steps per update.
        start: the noise; the data's Gaussian by default.

    Example:
        Chains that start at the data's Gaussian, which is the model, stay there: the gap is about 0.

        >>> objective, g = ShortRun(langevin_move(0.1), 3), torch.Generator().manual_seed(0)
        >>> data = torch.randn(5000, 1, generator=g)
        >>> objective.prepare(data, g)
        >>> abs(round(float(objective.loss(lambda x: 0.5 * x.square().sum(1), data, g)), 1))
        0.0
    """

    def __init__(self, kernel: Kernel, k: int, start: Noise | None = None) -> None:
        super().__init__(kernel, k)
        self.start = start or FittedGaussian()

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.start.fit(train, generator)

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return energy_gap(energy, batch, self.run(energy, self.start.sample(len(batch), generator), generator))


# -- score matching


class ImplicitScoreMatching(Objective):
    """Hyvarinen's objective with the exact trace: D + 1 passes through the energy's gradient.

    Example:
        >>> batch = torch.tensor([[3.0, 4.0]])
        >>> ImplicitScoreMatching().loss(lambda x: 0.5 * x.square().sum(1), batch, torch.Generator()).item()
        10.5
    """

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return matching.implicit_score_matching(score_of(energy), batch).mean()


class DenoisingScoreMatching(Objective):
    """Denoising score matching: the energy of the data plus N(0, sigma^2 I), from noise in pairs z, -z.

    Args:
        sigma: noise level, in units of x.

    Example:
        Data that are all 0, noised by N(0, 1/4), have energy 2 x^2, where the loss is 0:

        >>> objective = DenoisingScoreMatching(0.5)
        >>> round(objective.loss(lambda x: 2 * x.square().sum(1), torch.zeros(9, 2), torch.Generator()).item(), 6)
        0.0
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return matching.paired_denoising(score_of(energy), batch, self.sigma, generator).mean()


class SlicedScoreMatching(Objective):
    """Sliced score matching with reduced variance, one sign vector per example.

    Example:
        >>> batch = torch.tensor([[3.0, 4.0]])
        >>> SlicedScoreMatching().loss(lambda x: 0.5 * x.square().sum(1), batch, torch.Generator()).item()
        10.5
    """

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        signs = matching.rademacher(batch, generator)
        return matching.sliced_score_matching_vr(score_of(energy), batch, signs).mean()


def kernel_stein_discrepancy(score: Tensor, x: Tensor, bandwidth: float | Tensor) -> Tensor:
    """Return the squared kernelised Stein discrepancy of the sample x from the model with this score: a U-statistic.

    With k(x, y) = (c^2 + |x - y|^2)^(-1/2) the mean over pairs i != j of (Liu et al. 2016, eq. 14)

        s_i's_j k + s_i' grad_y k + s_j' grad_x k + tr(grad_x grad_y k).

    Args:
        score: of the model at x, shape (n, D).
        x: shape (n, D), n >= 2.
        bandwidth: c, in units of x.

    Returns:
        A scalar; unbiased, so it may be negative.

    Example:
        A sample of the model is near 0, a shifted one is not:

        >>> x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> [float(kernel_stein_discrepancy(-y, y, 1.0)) > 0.1 for y in (x, x + 2)]
        [False, True]
    """
    n, dim = x.shape
    cross, gram = score @ x.T, x @ x.T
    own, norms = cross.diagonal(), gram.diagonal()
    projected = own[:, None] + own[None, :] - cross - cross.T  # (s_i - s_j)'(x_i - x_j)
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    inverse = 1 / (bandwidth**2 + squared)
    k = inverse.sqrt()
    terms = k * (score @ score.T + inverse * (projected + dim - 3 * squared * inverse))
    return (terms.sum() - terms.diagonal().sum()) / (n * (n - 1))


class MinimumKSD(Objective):
    """Minimum kernelised Stein discrepancy within the batch; it needs the score alone, at one gradient per example.

    Args:
        bandwidth: c of the kernel, in median distances of the training data.

    Example:
        >>> objective, x = MinimumKSD(), torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> objective.prepare(x, torch.Generator())
        >>> abs(round(objective.loss(lambda x: 0.5 * x.square().sum(1), x, torch.Generator()).item(), 1))
        0.0
    """

    def __init__(self, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.scale: Tensor = nn.Buffer(torch.ones(()))

    def prepare(self, train: Tensor, generator: torch.Generator) -> None:
        self.scale = train.new_tensor(self.bandwidth * median_distance(train[:BANDWIDTH_EXAMPLES]))

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        return kernel_stein_discrepancy(score_of(energy)(batch), batch.detach(), self.scale)


# -- contrast with noise


class NoiseContrastive(Objective):
    """Noise-contrastive estimation with a learned log Z.

    Args:
        noise: with known log density; fitted in `prepare`.
        ratio: noise draws per example.

    Example:
        With the noise itself as model nobody can separate data from noise, and the loss is 2 log 2:

        >>> objective, x = NoiseContrastive(FittedGaussian()), torch.randn(50, 1)
        >>> objective.prepare(x, torch.Generator())
        >>> loss = objective.loss(lambda x: -objective.noise.log_prob(x), x, torch.Generator())
        >>> round((loss / torch.tensor(2.0).log()).item(), 4)
        2.0
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
    """Noise contrast with a flow fitted to the data: noise that is hard to separate from them.

    Args:
        flow: an untrained flow.
        steps: of its fit by maximum likelihood.
        ratio: noise draws per example.
    """

    def __init__(self, flow: Model, steps: int, ratio: int = 1) -> None:
        super().__init__(FlowNoise(flow, steps), ratio)


def conditional_contrast(at_data: Tensor, at_noise: Tensor) -> Tensor:
    """Return 2 E log(1 + exp(f(x) - f(x'))) in nats: Ceylan and Gutmann 2018, eq. 9, for a symmetric kernel.

    Args:
        at_data: f at the data, shape (n,).
        at_noise: f at the kernel's draws from them, shape (r n,), r blocks in the order of the data.

    Example:
        >>> round(float(conditional_contrast(torch.zeros(3), torch.zeros(6)) / torch.tensor(2.0).log()), 6)
        2.0
    """
    return 2 * softplus(at_data.repeat(len(at_noise) // len(at_data)) - at_noise).mean()


class ConditionalNoiseContrastive(Objective):
    """Conditional noise contrast with x' = x + sigma z: log Z and the density of the symmetric kernel cancel.

    Args:
        sigma: of the kernel, in units of x; as it goes to 0 the objective becomes score matching.
        ratio: noise draws per example; with an even number half of them are reflections of the other half.

    Example:
        >>> objective, g = ConditionalNoiseContrastive(0.5), torch.Generator().manual_seed(0)
        >>> loss = objective.loss(lambda x: torch.zeros(len(x)), torch.zeros(4, 2), g)
        >>> round(float(loss / torch.tensor(2.0).log()), 6)
        2.0
    """

    def __init__(self, sigma: float, ratio: int = 2) -> None:
        super().__init__()
        self.sigma, self.ratio = sigma, ratio

    def loss(self, energy: EnergyFunction, batch: Tensor, generator: torch.Generator) -> Tensor:
        mirrored = self.ratio % 2 == 0
        z = standard_normal_like(batch.repeat(self.ratio // 2 if mirrored else self.ratio, 1), generator)
        z = torch.cat([z, -z]) if mirrored else z
        values = energy(torch.cat([batch, batch.repeat(self.ratio, 1) + self.sigma * z]))
        return conditional_contrast(values[: len(batch)], values[len(batch) :])
