"""Theorem 1 of Burda, Grosse, Salakhutdinov 2016 (1509.00519): more importance samples, a tighter bound.

log p(x) >= L_{k+1} >= L_k, measured where log p(x) is known: a linear Gaussian latent variable model with an
approximate posterior whose mean and width are wrong on purpose.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from replicate.experiments import Run, experiment
from replicate.likelihood.importance import iw_bound
from replicate.model import Estimate, Model


class LinearGaussian(Model):
    """z ~ N(0, I), x | z ~ N(W z, s^2 I), with q(z | x) of the right family and the wrong mean and width.

    Args:
        weights: W, shape (D, K).
        noise: s.
        shift: by how many posterior standard deviations q's mean is off in every direction.
        widening: factor on the posterior's standard deviation.
    """

    family = "vae"
    capabilities = frozenset({"importance_weights"})

    def __init__(self, weights: Tensor, noise: float, shift: float, widening: float) -> None:
        super().__init__()
        self.w, self.noise, self.shift, self.widening = weights, noise, shift, widening
        precision = torch.eye(weights.shape[1]).to(weights) + weights.T @ weights / noise**2
        self.root = torch.linalg.cholesky(torch.linalg.inv(precision))

    def exact_log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) of x (n, D), shape (n,), in closed form."""
        covariance = self.w @ self.w.T + self.noise**2 * torch.eye(len(self.w)).to(self.w)
        return MultivariateNormal(torch.zeros_like(x[0]), covariance).log_prob(x)

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Return log p(x, z) - log q(z | x) of k draws, shape (n, k)."""
        mean = x @ self.w @ (self.root @ self.root.T) / self.noise**2
        eps = torch.randn(len(x), k, self.w.shape[1], generator=generator, device=x.device, dtype=x.dtype)
        z = mean[:, None] + (self.shift + self.widening * eps) @ self.root.T
        log_det = self.root.diagonal().log().sum() + self.w.shape[1] * math.log(self.widening)
        log_q = Normal(0.0, 1.0).log_prob(eps).sum(-1) - log_det
        log_p = Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z @ self.w.T, self.noise).log_prob(x[:, None]).sum(-1)
        return log_p - log_q


@experiment("burda-bounds", family="vae", profiles=("smoke", "standard"), precision="float64", smoke={"points": 500})
def measure_gaps(
    run: Run,
    *,
    dim: int = 6,
    latent: int = 3,
    noise: float = 0.5,
    shift: float = 0.5,
    widening: float = 1.3,
    points: int = 2000,
) -> None:
    """Importance-weighted bounds of a linear Gaussian model whose log p(x) is known."""
    draw: dict[str, Any] = {"generator": run.stream("model"), "device": run.device, "dtype": torch.float64}
    w = torch.randn(dim, latent, **draw)
    model = LinearGaussian(w, noise, shift, widening)
    x = torch.randn(points, latent, **draw) @ w.T + noise * torch.randn(points, dim, **draw)
    exact = model.exact_log_prob(x)
    bounds = {k: iw_bound(model, x, k, run.stream(f"draws-{k}")).values for k in (1, 5, 50, 500)}
    gaps = {k: Estimate.mean_of(exact - bound, "estimate", "nats") for k, bound in bounds.items()}
    run.measure_all({f"gap:{k}": gap for k, gap in gaps.items()})
    title = "How far the importance-weighted bound lies below log p(x)"
    curve = list(gaps), [g.value for g in gaps.values()]
    run.curves("gap", title, ("k", "nats"), {"log p(x) - bound": curve}, log="xy")
