"""Linear independent component analysis with logistic sources: a density with a known constant."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import logsigmoid

#: standard deviation of a logistic source of scale 1
SOURCE_STD = math.pi / math.sqrt(3)


@dataclass(frozen=True)
class Ica:
    """The model with unmixing matrix W (D, D); only `log_prob` uses log Z."""

    w: Tensor

    def log_density(self, x: Tensor) -> Tensor:
        """Return f(x) = sum_i g(w_i x) at x (n, D), shape (n,): log p up to log Z, in nats."""
        u = x @ self.w.T
        return (logsigmoid(u) + logsigmoid(-u)).sum(-1)

    def score(self, x: Tensor) -> Tensor:
        """Return grad_x f(x) = W' psi with psi_i = -tanh(w_i x / 2), shape (n, D)."""
        return -torch.tanh(0.5 * (x @ self.w.T)) @ self.w

    def laplacian(self, x: Tensor) -> Tensor:
        """Return the trace of the Hessian of f, sum_i |w_i|^2 g''(w_i x), shape (n,)."""
        return 0.5 * (torch.tanh(0.5 * (x @ self.w.T)).square() - 1) @ self.w.square().sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log density in nats, shape (n,)."""
        return self.log_density(x) - self.log_z()

    def log_z(self) -> Tensor:
        """Return the exact log Z = -log|det W|, in nats."""
        return -torch.linalg.slogdet(self.w).logabsdet

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw x = W^-1 s with logistic s, shape (n, D)."""
        u = torch.rand(n, len(self.w), generator=generator, device=generator.device, dtype=self.w.dtype)
        return torch.linalg.solve(self.w, torch.logit(u, eps=1e-15).T).T


def draw_unmixing(dim: int, generator: torch.Generator, condition: float | None = None) -> Tensor:
    """Draw W (dim, dim), standard normal, its condition number below `condition`, or `dim` as in the released code."""
    while True:
        w = torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64)
        if torch.linalg.cond(w) < (condition or dim):
            return w


def whitening(x: Tensor) -> Tensor:
    """Return C^{-1/2} of the data x (n, D) with covariance C, shape (D, D)."""
    variance, basis = torch.linalg.eigh(torch.cov(x.T))
    return basis @ torch.diag(variance.rsqrt()) @ basis.T


def rotation(dim: int, generator: torch.Generator) -> Tensor:
    """Draw a uniformly distributed orthogonal matrix, shape (dim, dim)."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64))
    return q * r.diagonal().sign()


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor], start: Tensor, log_z: float, options: dict[str, float]
) -> tuple[Tensor, float, Tensor]:
    """Minimise a loss of a matrix (D, D) and of c = -log Z, which it may ignore, by scipy's L-BFGS-B in float64.

    The search begins at `start` and `log_z`; the options are scipy's, with "maxiter".

    Returns:
        (matrix and log Z at the minimum, path of the matrix from the start on, shape (1 + iterations, D, D)).
    """
    # allocated at once: matrices kept one by one, between large blocks that are freed again, fragment the memory,
    # and a long search in 50 dimensions then takes ten gigabytes
    path, taken = start.new_empty(1 + int(options["maxiter"]), *start.shape), 1
    path[0] = start

    def tensor(v: np.ndarray) -> Tensor:
        return torch.as_tensor(v, dtype=torch.float64, device=start.device).clone()

    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = tensor(v).requires_grad_(True)
        value = loss(theta[:-1].view_as(start), theta[-1])
        (grad,) = torch.autograd.grad(value, theta)
        return float(value.detach()), grad.cpu().numpy()

    def record(v: np.ndarray) -> None:
        nonlocal taken
        path[taken] = tensor(v)[:-1].view_as(start)
        taken += 1

    first = np.append(start.flatten().cpu().numpy(), -log_z)
    found = minimize(value_and_grad, first, jac=True, method="L-BFGS-B", callback=record, options=options)
    return tensor(found.x)[:-1].view_as(start), -float(found.x[-1]), path[:taken].clone()
