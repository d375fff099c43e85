"""Noise-contrastive estimation: learn an unnormalised density by separating data from noise of known density.

Gutmann and Hyvarinen 2010 (AISTATS 9, 297-304) with as much noise as data; 2012 (JMLR 13, 307-361) with nu times as
much. The model is log p(x) = f(x) + c, where c replaces -log Z and is learned like any other parameter. With
h(x) = sigmoid(f(x) + c - log q(x) - log nu), the probability that x is a datum and not noise, the objective is

    -E_data log h(x) - nu E_noise log(1 - h(y)),

whose minimum over all functions f + c is the normalised log density of the data wherever the noise density q is
positive. The sign is that of a loss; the papers maximise. As nu grows the estimator approaches maximum likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


def data_term(log_ratio: Tensor, noise_ratio: float) -> Tensor:
    """Return -log h at data in nats, from log p - log q (n,) there and nu; shape (n,)."""
    return softplus(math.log(noise_ratio) - log_ratio)


def noise_term(log_ratio: Tensor, noise_ratio: float) -> Tensor:
    """Return -log(1 - h) at noise in nats, from log p - log q (m,) there and nu; shape (m,). Its weight is nu."""
    return softplus(log_ratio - math.log(noise_ratio))


def noise_contrastive(at_data: Tensor, at_noise: Tensor) -> Tensor:
    """Return the loss of the module's header in nats per example, a scalar.

    Args:
        at_data: f(x) + c - log q(x) at the data, shape (n,).
        at_noise: the same at the draws from q, shape (m,); their number sets nu = m / n.

    Example:
        With p = q and nu = 1 nobody can separate data from noise, and the loss is 2 log 2:

        >>> round(float(noise_contrastive(torch.zeros(5), torch.zeros(5))) / math.log(2), 6)
        2.0
    """
    nu = len(at_noise) / len(at_data)
    return data_term(at_data, nu).mean() + nu * noise_term(at_noise, nu).mean()


@dataclass(frozen=True)
class GaussianNoise:
    """Noise q = N(mean, L L').

    Attributes:
        mean: shape (D,).
        chol: lower triangular L, shape (D, D).
    """

    mean: Tensor
    chol: Tensor

    @classmethod
    def fit(cls, x: Tensor, diagonal: bool = False) -> GaussianNoise:
        """Fit mean and covariance to the data x (n, D), or mean and variances if `diagonal`."""
        cov = torch.atleast_2d(torch.cov(x.T))
        return cls(x.mean(0), torch.diag(cov.diagonal().sqrt()) if diagonal else torch.linalg.cholesky(cov))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q at x (n, D), shape (n,), in nats."""
        z = torch.linalg.solve_triangular(self.chol, (x - self.mean).T, upper=False)
        log_z = 0.5 * len(self.mean) * math.log(2 * math.pi) + self.chol.diagonal().log().sum()
        return -0.5 * z.square().sum(0) - log_z

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n samples, shape (n, D); the generator is on the device of `mean`."""
        z = torch.randn(n, len(self.mean), generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + z @ self.chol.T
