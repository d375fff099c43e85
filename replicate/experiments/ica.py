"""Linear independent component analysis with logistic sources: a density with a known constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

#: standard deviation of a logistic source of scale 1
SOURCE_STD = math.pi / math.sqrt(3)


@dataclass(frozen=True)
class Ica:
    """The model with unmixing matrix W (D, D); all but `log_prob` is ignorant of log Z."""

    w: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """f(x) = sum_i g(w_i x) at x (n, D), shape (n,): log p up to log Z, in nats."""
        u = x @ self.w.T
        return (logsigmoid(u) + logsigmoid(-u)).sum(-1)

    def score(self, x: Tensor) -> Tensor:
        """grad_x f(x) = W' psi with psi_i = -tanh(w_i x / 2), shape (n, D)."""
        return -torch.tanh(0.5 * (x @ self.w.T)) @ self.w

    def laplacian(self, x: Tensor) -> Tensor:
        """tr of the Hessian of f, sum_i |w_i|^2 g''(w_i x), shape (n,)."""
        return 0.5 * (torch.tanh(0.5 * (x @ self.w.T)).square() - 1) @ self.w.square().sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density in nats, shape (n,)."""
        return self.log_density(x) - self.log_z()

    def log_z(self) -> Tensor:
        """Exact log Z = -log|det W|, in nats."""
        return -torch.linalg.slogdet(self.w).logabsdet

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """x = W^-1 s with logistic s, shape (n, D)."""
        u = torch.rand(n, len(self.w), generator=generator, device=generator.device, dtype=self.w.dtype)
        return torch.linalg.solve(self.w, torch.logit(u, eps=1e-15).T).T


def draw_unmixing(dim: int, generator: torch.Generator) -> Tensor:
    """W (dim, dim), standard normal with a condition number below `dim`, as in the released code."""
    while True:
        w = torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64)
        if torch.linalg.cond(w) < dim:
            return w


def whitening(x: Tensor) -> Tensor:
    """C^{-1/2} of the data x (n, D) with covariance C, shape (D, D)."""
    variance, basis = torch.linalg.eigh(torch.cov(x.T))
    return basis @ torch.diag(variance.rsqrt()) @ basis.T


def rotation(dim: int, generator: torch.Generator) -> Tensor:
    """A uniformly distributed orthogonal matrix, shape (dim, dim)."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64))
    return q * r.diagonal().sign()
