"""Exact scores of a noised Gaussian mixture, and what the paper states as exact."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.likelihood.ode import ode_log_prob
from replicate.model import Estimate, Model
from replicate.sde import SDE, VE, VP, SubVP
from replicate.tasks.densities import GaussianMixture, eight_gaussians


class MixtureDiffusion(Model):
    """A Gaussian mixture noised by an SDE: p_t is a mixture too, sum_k w_k N(s mu_k, s^2 Sigma + sigma^2 I).

    Everything is computed in the eigenbasis of Sigma, in the dtype of x, and is differentiable.

    Args:
        truth: the mixture at time 0.
        sde: the forward process.
    """

    family = "score"
    capabilities = frozenset({"diffusion"})

    def __init__(self, truth: GaussianMixture, sde: SDE, device: torch.device) -> None:
        super().__init__()
        self.sde = sde
        variance, basis = torch.linalg.eigh(truth.covariance)
        parts = (variance, basis, truth.means @ basis, truth.weights.log())
        self._parts = {dtype: tuple(p.to(device, dtype) for p in parts) for dtype in (torch.float32, torch.float64)}

    def _joint(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log w_k N(x; k) (n, K), x in the basis (n, D), s (n or 1, 1), variances (n or 1, D)) at times t (n,)."""
        own_variance, basis, centres, log_weights = self._parts[x.dtype]
        t = t[:1] if t.stride(0) == 0 else t  # one time for all rows, expanded: its parameters are computed once
        scale, std = (v[:, None].to(x.dtype) for v in self.sde.marginal(t.double()))
        w = x @ basis
        variance = scale.square() * own_variance + std.square()
        square = (w.square() / variance).sum(-1, keepdim=True)
        cross = (w * (scale / variance)) @ centres.T
        own = (scale.square() / variance) @ centres.square().T
        log_norm = 0.5 * (2 * math.pi * variance).log().sum(-1, keepdim=True)
        return log_weights - 0.5 * (square - 2 * cross + own) - log_norm, w, scale, variance

    def log_prob_at(self, x: Tensor, t: Tensor) -> Tensor:
        """Log p_t(x) in nats (n,) at x (n, D), t (n,)."""
        return self._joint(x, t)[0].logsumexp(-1)

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        """Return grad log p_t(x), shape (n, D)."""
        _, basis, centres, _ = self._parts[x.dtype]
        log_joint, w, scale, variance = self._joint(x, t)
        return ((scale * (log_joint.softmax(-1) @ centres) - w) / variance) @ basis.T


def measure_variances(run: Run, count: int) -> None:
    """Compare the paper's variance equations (appendix B), integrated, with each other and with the SDE classes.

    dV/dt = beta (1 - V) for VP and dV/dt = beta (1 - exp(-2 B) - V) for sub-VP, from the same V(0); sub-VP <= VP for
    every V(0), and sub-VP = VP^2 for V(0) = 0.
    """
    vp, sub = VP(), SubVP()
    grid = np.linspace(0, 1, count)
    beta_min, slope = vp.beta_min, vp.beta_max - vp.beta_min

    def change(t: float, v: np.ndarray) -> np.ndarray:
        beta, integral = beta_min + slope * t, beta_min * t + 0.5 * slope * t**2
        half = len(v) // 2
        return beta * np.concatenate([1 - v[:half], -np.expm1(-2 * integral) - v[half:]])

    first = np.array([0.0, 0.5, 1.0, 4.0])
    solved = solve_ivp(change, (0, 1), np.tile(first, 2), method="DOP853", t_eval=grid, rtol=1e-12, atol=1e-14)
    of_vp, of_sub = solved.y[:4], solved.y[4:]
    t = torch.from_numpy(grid)
    kernel = [sde.marginal(t)[1].square().numpy() for sde in (vp, sub)]
    found = {
        "variance_excess": np.max(of_sub - of_vp),
        "square_error": np.max(np.abs(of_sub[0] - of_vp[0] ** 2)),
        "variance_error:vp": np.max(np.abs(kernel[0] - of_vp[0])),
        "variance_error:subvp": np.max(np.abs(kernel[1] - of_sub[0])),
    }
    run.measure_all({k: Estimate.exact(v, "variance", count) for k, v in found.items()})
    curves = {"VP": (grid.tolist(), of_vp[0].tolist()), "sub-VP": (grid.tolist(), of_sub[0].tolist())}
    run.curves("variance", "Variance of the perturbation kernel", ("t", "variance"), curves)


def measure_flow_errors(run: Run, grid: int, steps: int) -> None:
    """Measure the largest |log p by the flow - log p| over a grid, with the exact score of eight Gaussians on a circle.

    The horizon is so long that the data are forgotten: what the paper's own horizon leaves is `horizon_error`.
    """
    truth = eight_gaussians()
    axis = torch.linspace(-6, 6, grid, dtype=torch.float64, device=run.device)
    x = torch.cartesian_prod(axis, axis)
    long = {"ve": VE(0.01, 1e6), "vp": VP(beta_max=60.0, t_min=1e-3), "subvp": SubVP(beta_max=60.0, t_min=0.03)}
    cases = {f"log_prob_error:{k}": v for k, v in long.items()} | {"horizon_error:vp": VP(t_min=1e-3)}
    for name, sde in cases.items():
        exact = MixtureDiffusion(truth, sde, run.device)
        t = torch.full_like(x[:, 0], sde.t_min)
        scale, _ = sde.marginal(t)
        answer = exact.log_prob_at(scale[:, None] * x, t) + x.shape[1] * scale.log()
        flow = ode_log_prob(exact, x, run.stream("unused"), steps=steps)
        run.measure(name, Estimate.exact((flow.values - answer).abs().max(), "nats", len(x)))


@experiment(
    "score-sde-identities", family="score", seeds=1, precision="float64", smoke={"times": 51, "grid": 5, "steps": 40}
)
def identities(run: Run, *, times: int = 501, grid: int = 13, steps: int = 200) -> None:
    """sub-VP variance below VP's, and the probability flow's exact log p."""
    measure_variances(run, times)
    measure_flow_errors(run, grid, steps)
