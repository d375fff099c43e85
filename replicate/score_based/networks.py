"""Score networks: free vector fields, gradients of a scalar energy, and noise-conditional networks.

The noise-conditional network predicts the noise, eps(y, rho) = -rho grad log q_rho(y), where q_rho is the data
density convolved with N(0, rho^2 I). It is the exact answer for the data's Gaussian fit plus a learned residual,
which is Karras et al.'s preconditioning (2022, 2206.00364, section 5) with a full covariance in place of one
sigma_data: at large rho, where the data look Gaussian, there is nothing to learn.

Input Fourier features follow Tancik et al. 2020 (2006.10739); deviation: each is damped by its expectation under
the noise, exp(-(rho |w|)^2 / 2), so that frequencies that the noise has erased do not act as noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from replicate.score_based.matching import Score

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "softplus": nn.Softplus}


def mlp(sizes: list[int], activation: str = "silu") -> nn.Sequential:
    """Return linear layers of the given sizes with a smooth activation between them.

    Raises:
        KeyError: the activation is neither "silu" nor "softplus".
    """
    layers = [part for a, b in pairwise(sizes) for part in (_ACTIVATIONS[activation](), nn.Linear(a, b))]
    return nn.Sequential(*layers[1:])


def score_of(energy: Callable[[Tensor], Tensor]) -> Score:
    """Return the score -grad f of an energy f (n, D) -> (n,); differentiable again where gradients are on.

    Example:
        >>> score_of(lambda x: 0.5 * x.square().sum(1))(torch.tensor([[1.0, -2.0]])).tolist()
        [[-1.0, 2.0]]
    """

    def score(x: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)
        return -grad

    return score


class FreeScore(nn.Module):
    """The unconstrained vector field s(x) = MLP(x): x (n, D) -> (n, D)."""

    def __init__(self, dim: int, hidden: int, depth: int, activation: str = "silu") -> None:
        super().__init__()
        self.net = mlp([dim, *[hidden] * depth, dim], activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class EnergyScore(nn.Module):
    """The conservative field s(x) = -grad f(x) of a scalar MLP f, whose energy is known.

    f is the network plus a quadratic bowl |x|^2 / (2 bowl^2), so that exp(-f) can be normalised whatever the network
    does far from the data (it grows at most linearly there).
    """

    def __init__(self, dim: int, hidden: int, depth: int, activation: str = "silu", bowl: float = 3.0) -> None:
        super().__init__()
        self.net = mlp([dim, *[hidden] * depth, 1], activation)
        self.bowl = bowl

    def energy(self, x: Tensor) -> Tensor:
        """Return f(x), shape (n,), in nats up to a constant."""
        return self.net(x).squeeze(-1) + 0.5 * (x / self.bowl).square().sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return -grad f, shape (n, D); differentiable again where gradients are on."""
        return score_of(self.energy)(x)


class GaussianFit(nn.Module):
    """The data's Gaussian fit N(m, U diag(l) U'), kept in its eigenbasis, and its exact noise prediction."""

    def __init__(self, dim: int, shrinkage: float = 0.0) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.mean: Tensor = nn.Buffer(torch.zeros(dim))
        self.basis: Tensor = nn.Buffer(torch.eye(dim))
        self.variance: Tensor = nn.Buffer(torch.ones(dim))

    def fit(self, x: Tensor) -> None:
        """Fit the moments of x (n, D); the covariance is shrunk towards its diagonal."""
        x64 = x.double()
        centred = x64 - x64.mean(0)
        cov = centred.T @ centred / len(x)
        cov = (1 - self.shrinkage) * cov + self.shrinkage * cov.diagonal().diag()
        variance, basis = torch.linalg.eigh(cov)
        self.mean.copy_(x64.mean(0))
        self.basis.copy_(basis)
        self.variance.copy_(variance.clamp_min(1e-6))

    def to_basis(self, y: Tensor) -> Tensor:
        """Return U'(y - m) of y (n, D)."""
        return (y - self.mean) @ self.basis

    def from_basis(self, w: Tensor) -> Tensor:
        """Return U w of a vector w (n, D) in eigen-coordinates."""
        return w @ self.basis.T


class InputFeatures(nn.Module):
    """Fourier features: sin and cos of random projections of y, damped by their expectation under noise of size rho."""

    def __init__(self, dim: int, count: int, max_frequency: float) -> None:
        super().__init__()
        direction = nn.functional.normalize(torch.randn(dim, count), dim=0)
        magnitude = torch.linspace(math.log(0.5), math.log(max_frequency), count).exp()
        self.frequencies: Tensor = nn.Buffer(direction * magnitude)

    def forward(self, y: Tensor, rho: Tensor) -> Tensor:
        """Map y (n, D) and rho (n, 1) to features (n, 2 count)."""
        phase = y @ self.frequencies
        damping = (-0.5 * (rho * self.frequencies.norm(dim=0)).square()).exp()
        return torch.cat([phase.sin() * damping, phase.cos() * damping], dim=-1)


class LevelFeatures(nn.Module):
    """Gaussian bumps along log rho, from invisible noise to nothing but noise."""

    COUNT = 16

    def __init__(self) -> None:
        super().__init__()
        self.centres: Tensor = nn.Buffer(torch.linspace(-8.0, 5.0, self.COUNT))

    def forward(self, log_rho: Tensor) -> Tensor:
        """Map log_rho (n,) to features (n, COUNT)."""
        spacing = 13.0 / (self.COUNT - 1)
        return (-0.5 * ((log_rho[:, None] - self.centres) / spacing).square()).exp()


@dataclass(frozen=True)
class NoiseNetSettings:
    """The settings of a `NoiseNet` beside its width.

    Attributes:
        depth: hidden layers.
        features: number of random input frequencies; 0 for none.
        max_frequency: the largest of them, in radians per unit of y.
        width: the finest structure expected, in units of y.
        shrinkage: of the Gaussian fit's covariance.
        dropout: probability with which a hidden unit is dropped in training.
        reach: r, where F sees r tanh(w / (r sqrt(v))): beyond r standard deviations F answers as at r, so that far from
            the data the Gaussian fit decides and not the continuation of F; 0 for F as it is.
    """

    depth: int = 3
    features: int = 0
    max_frequency: float = 12.0
    width: float = 0.1
    shrinkage: float = 0.0
    dropout: float = 0.0
    reach: float = 0.0


class NoiseNet(nn.Module):
    """The noise eps(y, log rho) in y = x + rho z, predicted by the Gaussian fit plus an MLP.

    In the fit's eigenbasis, with w = U'(y - m) and total variance v = l + rho^2,

        eps = (rho / v) w + sqrt(l / v) rho / sqrt(rho^2 + width^2) F(w / sqrt(v), features(y), log rho)

    where F is the MLP. The factor sqrt(l / v) is Karras et al.'s c_out / sigma; the last one, which is theirs with a
    second length in place of sigma_data, expects no structure finer than `width`: below it the correction is a score
    times rho.

    Args:
        dim: D.
        hidden: units per layer.
        settings: the fields of `NoiseNetSettings`.
    """

    def __init__(self, dim: int, hidden: int = 128, **settings: Any) -> None:
        super().__init__()
        chosen = NoiseNetSettings(**settings)
        self.width, self.dropout, self.reach = chosen.width, chosen.dropout, chosen.reach
        self.gaussian = GaussianFit(dim, chosen.shrinkage)
        self.features = InputFeatures(dim, chosen.features, chosen.max_frequency) if chosen.features else None
        self.level = LevelFeatures()
        self.first = nn.Linear(dim + 2 * chosen.features, hidden)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(chosen.depth - 1))
        self.shifts = nn.ModuleList(nn.Linear(LevelFeatures.COUNT, hidden, bias=False) for _ in range(chosen.depth))
        self.last = nn.Linear(hidden, dim)
        nn.init.zeros_(self.last.weight)  # training starts at the Gaussian fit
        nn.init.zeros_(self.last.bias)

    def forward(self, y: Tensor, log_rho: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map y (n, D) and log_rho (n,) to eps (n, D); the generator draws dropout masks, None drops nothing."""
        rho = log_rho.exp()[:, None]
        w = self.gaussian.to_basis(y)
        variance = self.gaussian.variance
        total = variance + rho.square()
        gain = (variance / total).sqrt() * rho / torch.hypot(rho, rho.new_tensor(self.width))
        inputs = w / total.sqrt()
        if self.reach:
            inputs = self.reach * torch.tanh(inputs / self.reach)
        if self.features is not None:
            inputs = torch.cat([inputs, self.features(y, rho)], dim=-1)
        residual = self._mlp(inputs, self.level(log_rho), generator)
        return self.gaussian.from_basis(rho / total * w + gain * residual)

    def _mlp(self, inputs: Tensor, level: Tensor, generator: torch.Generator | None) -> Tensor:
        h = nn.functional.silu(self.first(inputs) + self.shifts[0](level))
        for layer, shift in zip(self.hidden, self.shifts[1:], strict=True):
            h = nn.functional.silu(layer(self._drop(h, generator)) + shift(level))
        return self.last(self._drop(h, generator))

    def _drop(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.dropout or not self.training:
            return h
        keep = 1 - self.dropout
        return h * torch.empty_like(h).bernoulli_(keep, generator=generator) / keep
