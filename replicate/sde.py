"""Diffusions with affine drift and their Gaussian perturbation kernels.

Follows Song et al. 2021 (2011.13456, section 3.4 and appendix B): variance exploding (VE), variance preserving
(VP) and sub-VP. All have dx = f(t) x dt + g(t) dw, so that x_t given x_0 is N(s(t) x_0, sigma(t)^2 I), and what
a kernel shows of the data depends on the noise-to-signal ratio rho = sigma / s alone (Karras et al. 2022,
2206.00364, appendix B). Solvers and networks use its logarithm as coordinate: `log_ratio`, with inverse `time_of`.

Deviation: the paper's VE kernel at time 0 has variance 0 by its equation (29) and sigma_min^2 in its code; here,
as in its code, the std is sigma(t) for every t: the data count as observed through noise sigma_min.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class SDE(ABC):
    """dx = f(t) x dt + g(t) dw for t in [t_min, t_max]; every method takes t (n,) and returns (n,) or (n, D).

    Attributes:
        t_min: the time of the data; above 0 where sigma(0) = 0.
        t_max: the horizon, where x_t is N(0, prior_std^2 I) for every practical purpose.
        prior_std: standard deviation of that Gaussian.
        dtype: of its samples, which are drawn in single precision.

    Example:
        The variance exploding SDE keeps the data and adds noise, here from 0.01 to 10 in geometric progression:

        >>> scale, std = VE(0.01, 10.0).marginal(torch.tensor([0.0, 0.5, 1.0]))
        >>> scale.tolist(), [round(s, 3) for s in std.tolist()]
        ([1.0, 1.0, 1.0], [0.01, 0.316, 10.0])
    """

    t_min: float
    t_max: float = 1.0
    prior_std: float = 1.0
    dtype: torch.dtype = torch.float32

    @abstractmethod
    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (s(t), sigma(t)): x_t = s x_0 + sigma z with z ~ N(0, I)."""

    @abstractmethod
    def drift_rate(self, t: Tensor) -> Tensor:
        """Return f(t) = d log s / dt."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """Return g(t); its square is d(sigma^2)/dt - 2 f sigma^2."""

    @abstractmethod
    def time_of(self, log_ratio: Tensor) -> Tensor:
        """Return the time t at which log(sigma / s) has the given value: the inverse of `log_ratio`."""

    def log_ratio(self, t: Tensor) -> Tensor:
        """Return log rho(t) = log(sigma / s), which increases with t."""
        scale, std = self.marginal(t)
        return std.log() - scale.log()

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Return f(t) x for x (n, D)."""
        return self.drift_rate(t)[:, None] * x

    def prior_sample(self, n: int, dim: int, generator: torch.Generator) -> Tensor:
        """Draw n samples (n, dim) of the distribution at t_max."""
        return (self.prior_std * torch.randn(n, dim, generator=generator, device=generator.device)).to(self.dtype)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Return the log density in nats (n,) of x (n, D) under the distribution at t_max."""
        norm = x.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return -0.5 * (x / self.prior_std).square().sum(-1) - norm


class VE(SDE):
    """Variance exploding: sigma(t) = sigma_min (sigma_max / sigma_min)^t and s = 1 (2011.13456, eq. 30)."""

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.t_min, self.prior_std = 0.0, sigma_max
        self._log_range = math.log(sigma_max / sigma_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.log_ratio(t).exp()

    def drift_rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.log_ratio(t).exp() * math.sqrt(2 * self._log_range)

    def log_ratio(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min) + t * self._log_range

    def time_of(self, log_ratio: Tensor) -> Tensor:
        return (log_ratio - math.log(self.sigma_min)) / self._log_range


class _LinearBeta(SDE):
    """The common part of VP and sub-VP: beta(t) linear in t, its integral B(t), and s = exp(-B / 2)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> None:
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def beta(self, t: Tensor) -> Tensor:
        """Return beta_min + t (beta_max - beta_min)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def beta_integral(self, t: Tensor) -> Tensor:
        """Return B(t), the integral of beta from 0 to t."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()

    def drift_rate(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def _time_of_integral(self, b: Tensor) -> Tensor:
        """Return the root t >= 0 of B(t) = b, in the form that does not cancel at small b."""
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())


class VP(_LinearBeta):
    """Variance preserving: sigma^2 = 1 - exp(-B) (2011.13456, eq. 32-33).

    Example:
        >>> scale, std = VP().marginal(torch.tensor([0.1, 0.5, 1.0]))
        >>> [round(v, 3) for v in (scale**2 + std**2).tolist()]
        [1.0, 1.0, 1.0]
    """

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self.beta_integral(t)
        return (-0.5 * b).exp(), (-torch.expm1(-b)).sqrt()

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def time_of(self, log_ratio: Tensor) -> Tensor:
        return self._time_of_integral(torch.nn.functional.softplus(2 * log_ratio))  # rho^2 = exp(B) - 1


class SubVP(_LinearBeta):
    """Sub-VP: sigma = 1 - exp(-B), so that the std is the square of VP's (2011.13456, eq. 27-29).

    sigma grows like beta_min t, not like its square root: t_min = 1e-2 means the same noise here as 1e-5 for VP.

    Example:
        >>> t = torch.tensor([0.1, 0.5, 1.0])
        >>> torch.allclose(SubVP().marginal(t)[1], VP().marginal(t)[1] ** 2)
        True
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-2) -> None:
        super().__init__(beta_min, beta_max, t_min)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = self.beta_integral(t)
        return (-0.5 * b).exp(), -torch.expm1(-b)

    def diffusion(self, t: Tensor) -> Tensor:
        return (-self.beta(t) * torch.expm1(-2 * self.beta_integral(t))).sqrt()

    def time_of(self, log_ratio: Tensor) -> Tensor:
        return self._time_of_integral(2 * torch.asinh(0.5 * log_ratio.exp()))  # rho = 2 sinh(B / 2)
