"""Preprocess data for continuous models, with the exact change of variables.

Discrete levels x in {0, .., L-1} become continuous by uniform noise on the whole bin, y = (x + u) / L with
u ~ U[0, 1). For any density q of y, E_u[log q(y)] + log-volume <= log P(x) (Theis et al. 2016, 1511.01844), and
log mean_k q(x + u_k) is a tighter bound of the same kind (Burda et al. 2016, 1509.00519). Noise on part of a bin
gives no bound: each dimension would gain -log(width).
"""

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from replicate.model import DataInfo, Model, Sampler

#: training rows whose levels are counted at a time
ROWS = 1_000


class _Standardising(nn.Module):
    """The mean and the standard deviation of each dimension, as buffers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor = nn.Buffer(torch.zeros(dim))
        self.std: Tensor = nn.Buffer(torch.ones(dim))


class Affine(_Standardising):
    """The map z = (x - mean) / std per dimension, fitted on the training split of continuous data.

    Example:
        >>> affine = Affine(1)
        >>> affine.fit(torch.tensor([[1.0], [3.0], [5.0]]), torch.Generator())
        >>> z, log_det = affine(torch.tensor([[5.0]]))
        >>> z.item(), round(log_det.item(), 4)  # log 1/2
        (1.0, -0.6931)
    """

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Set mean and standard deviation from train (n, D)."""
        self.mean.copy_(train.mean(0))
        self.std.copy_(train.std(0).clamp_min(1e-6))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (z (n, D), log |det dz/dx| (n,))."""
        z = (x - self.mean) / self.std
        return z, -self.std.log().sum().expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map z (n, D) to x (n, D)."""
        return z * self.std + self.mean


class DequantisedLogit(_Standardising):
    """The map of x + u on [0, L) to (alpha, 1 - alpha), then its logit, standardised per dimension."""

    def __init__(self, dim: int, levels: int, alpha: float = 1e-4) -> None:
        super().__init__(dim)
        self.levels, self.alpha = levels, alpha

    def _logit(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        y = (x.double() + u) / self.levels
        s = self.alpha + (1 - 2 * self.alpha) * y
        s = s.clamp(1e-12, 1 - 1e-12)
        logdet = math.log(1 - 2 * self.alpha) - math.log(self.levels) - s.log() - (-s).log1p()
        return s.log() - (-s).log1p(), logdet

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Set mean and standard deviation of the logits from train (n, D) with one noise draw."""
        z, _ = self._logit(train, generator)
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0))

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Map integers x (n, D) to (z (n, D), log |det dz/dx| (n,)) with a fresh noise draw."""
        z, logdet = self._logit(x, generator)
        std = self.std.double()
        z = (z - self.mean.double()) / std
        return z.to(x.dtype), (logdet - std.log()).sum(-1).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Map z (n, D) to integers 0..L-1 (n, D)."""
        s = torch.sigmoid(z.double() * self.std.double() + self.mean.double())
        y = (s - self.alpha) / (1 - 2 * self.alpha)
        return (y * self.levels).floor().clamp(0, self.levels - 1).to(z.dtype)


class DequantisedGaussian(nn.Module):
    """The map of x + u through each dimension's smoothed training distribution to a standard normal.

    z_d = Phi^-1(F_d(x_d + u_d)), where F_d is the piecewise linear distribution function of the dequantised
    training marginal with `smoothing` pseudo-counts per level. Under independence every z_d is exactly N(0, 1):
    a model has to learn the dependence alone.
    """

    def __init__(self, dim: int, levels: int, smoothing: float = 0.5) -> None:
        super().__init__()
        self.levels, self.smoothing = levels, smoothing
        uniform = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        self.cdf: Tensor = nn.Buffer(uniform.repeat(dim, 1))

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Set F_d from the level counts of train (n, D)."""
        dim = train.shape[1]
        first = self.levels * torch.arange(dim, device=train.device)
        counts = torch.full((dim * self.levels,), self.smoothing, dtype=torch.float64, device=train.device)
        for rows in train.split(ROWS):  # one-hot codes of all MNIST rows would be 80 gigabytes
            counts += torch.bincount((rows.long() + first).flatten(), minlength=len(counts))
        p = counts.view(dim, self.levels)
        p = p / p.sum(1, keepdim=True)
        self.cdf[:, 1:] = p.cumsum(1)
        self.cdf[:, -1] = 1.0

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Map integers x (n, D) to (z (n, D), log |det dz/dx| (n,)) with a fresh noise draw."""
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        level = x.long().T
        low = self.cdf.gather(1, level).T
        mass = self.cdf.gather(1, level + 1).T - low
        z = torch.special.ndtri((low + mass * u).clamp(1e-12, 1 - 1e-12))
        logdet = mass.log() + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
        return z.to(x.dtype), logdet.sum(-1).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Map z (n, D) to integers 0..L-1 (n, D)."""
        p = torch.special.ndtr(z.double()).T.contiguous()
        level = torch.searchsorted(self.cdf.contiguous(), p, right=True) - 1
        return level.clamp(0, self.levels - 1).T.to(z.dtype)


class Preprocessed(Model):
    """A continuous model behind the shared preprocessing.

    On continuous data the affine change of variables carries every capability over exactly. On discrete data the
    wrapper trains and samples alone: the likelihood is a bound that `replicate.likelihood` computes over noise draws.
    """

    DISCRETE: ClassVar[dict[str, type[DequantisedLogit] | type[DequantisedGaussian]]] = {
        "logit": DequantisedLogit,
        "gaussianise": DequantisedGaussian,
    }

    def __init__(self, inner: Model, info: DataInfo, transform: str = "logit") -> None:
        super().__init__()
        self.inner = inner
        self.family, self.nfe, self.costly_score = inner.family, inner.nfe, inner.costly_score  # type: ignore[misc]
        self.discrete = info.domain != "continuous"
        self.transform: Affine | DequantisedLogit | DequantisedGaussian
        if self.discrete:
            assert info.levels is not None
            self.transform = self.DISCRETE[transform](info.dim, info.levels)
        else:
            self.transform = Affine(info.dim)
        self.capabilities = inner.capabilities & {"sample"} if self.discrete else inner.capabilities

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.transform.fit(train, generator)
        self.inner.initialise(self.transform(train, generator)[0], generator)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.inner.loss(self.transform(batch, generator)[0], generator)

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.inner.validation_loss(self.transform(batch, generator)[0], generator)

    def after_step(self, generator: torch.Generator) -> None:
        self.inner.after_step(generator)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.transform, Affine):
            raise NotImplementedError("a continuous model of discrete data has no exact log p of its own")
        return self.transform(x)

    def log_prob(self, x: Tensor) -> Tensor:
        z, logdet = self._affine(x)
        return self.inner.log_prob(z) + logdet

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        z, logdet = self._affine(x)
        return self.inner.log_weights(z, k, generator) + logdet[:, None]

    def energy(self, x: Tensor) -> Tensor:
        z, logdet = self._affine(x)
        return self.inner.energy(z) - logdet

    def score(self, x: Tensor) -> Tensor:
        z, _ = self._affine(x)
        assert isinstance(self.transform, Affine)
        return self.inner.score(z) / self.transform.std

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self._to_data(self.inner.sample(n, generator))

    def samplers(self) -> dict[str, Sampler]:
        return {name: partial(self._sampled_by, sampler) for name, sampler in self.inner.samplers().items()}

    def _sampled_by(self, inner: Sampler, n: int, generator: torch.Generator) -> tuple[Tensor, int]:
        z, nfe = inner(n, generator)
        return self._to_data(z), nfe

    def _to_data(self, z: Tensor) -> Tensor:
        """Map z to data space; where a sampler diverged the result is nan, never a level."""
        return torch.where(z.isfinite(), self.transform.inverse(z), math.nan)
