"""Score-based generative modeling through SDEs (Song et al. 2021, 2011.13456).

Replicated: samplers at equal numbers of score evaluations (table 1), likelihoods (table 2) and evaluations of the
probability flow by tolerance (figure 3), each with the exact score of a Gaussian mixture, where nothing but the
sampler errs, and with a network trained on the 8x8 digits; the sub-VP SDE's variance and the exactness of the
probability flow's likelihood as identities.

    P     predictor: reverse diffusion, N steps (algorithms 2 and 3)
    PC    predictor and one corrector step, N / 2 steps of the grid each
    C     corrector only, two steps at each of N / 2 noise levels

The corrector's r is the paper's 0.16 on digits; on the mixture, where it can be afforded, PC and C each take the best
of three r, as the paper searches r for the best FID, here on chains of their own. The Langevin convention is the
package's (see `replicate.sampling.predictor_corrector`, which converts the paper's).

Deviations: hundreds of evaluations in place of 2000 and a time grid that is even in (sigma / s)^(1/7), not in t; one
network stands behind all SDEs on digits, for its input is x / s(t) and log(sigma / s), the same for each of them; it
is a multilayer perceptron, a thousandth of the paper's training; on the mixture the Frechet distance is that of the
residuals from the nearest mode to the component that they belong to, which is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from replicate.experiments.image_scores import DIFFUSIONS, frechet_to_train
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.ode import ode_log_prob
from replicate.metrics.samples import mode_weight_error
from replicate.model import Estimate, Model
from replicate.runs.execute import run as run_spec
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import ModelRuns, Paper
from replicate.runs.spec import make_spec
from replicate.sampling.predictor_corrector import ScoreAt, predictor_corrector
from replicate.score_based.bound import variational_bound
from replicate.score_based.diffusion import DiffusionModel
from replicate.sde import SDE, VE, VP, SubVP
from replicate.tasks.base import Task
from replicate.tasks.densities import GaussianMixture, eight_gaussians, mixture

#: tolerances of figure 3 (absolute and relative) and the evaluations that it prints for CIFAR-10
TOLERANCES = {"1e-5": 1e-5, "1e-3": 1e-3, "1e-1": 1e-1}
PRINTED_NFE = {"1e-5": 548, "1e-3": 86, "1e-1": 14}
#: corrector signal-to-noise ratios among which PC and C take their best on the mixture, about the paper's 0.16
SNRS = (0.08, 0.16, 0.32)
SNR = 0.16


# -- exact scores


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
        """log p_t(x) in nats (n,) at x (n, D), t (n,)."""
        return self._joint(x, t)[0].logsumexp(-1)

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), shape (n, D)."""
        _, basis, centres, _ = self._parts[x.dtype]
        log_joint, w, scale, variance = self._joint(x, t)
        mean = scale * (log_joint.softmax(-1) @ centres)
        return ((mean - w) / variance) @ basis.T


# -- samplers (table 1)


@dataclass(frozen=True)
class Sampler:
    """One row of table 1 at `nfe` evaluations, the denoising one apart.

    Attributes:
        grid_share: steps of the time grid over evaluations.
        corrector_steps: at each noise level.
        predict: whether a predictor step leads to each level.
    """

    grid_share: float
    corrector_steps: int
    predict: bool

    def __call__(
        self, score_at: ScoreAt, sde: SDE, n: int, *, dim: int, nfe: int, snr: float, generator: torch.Generator
    ) -> Tensor:
        """n samples (n, D)."""
        steps = max(1, int(nfe * self.grid_share))
        chain = predictor_corrector(
            score_at, sde, n, dim, steps, self.corrector_steps, snr, generator, predict=self.predict
        )
        return chain.samples


SAMPLERS = {"p": Sampler(1.0, 0, True), "pc": Sampler(0.5, 1, True), "c": Sampler(0.5, 2, False)}


def mixture_distance(truth: GaussianMixture, x: Tensor) -> Estimate:
    """Frechet distance between residuals of x (n, D) from their modes, whitened, and N(0, I): 0 if the shape is right.

    |m|^2 + tr(C + I - 2 C^1/2) for the mean m and covariance C of the residuals. Biased upwards by about
    D / n + D (D + 1) / (8 n). The standard error is that of its first order.
    """
    x = x.double()
    centres = truth.means.to(x.device)[truth.mode_of(x)]
    factor = truth.factor.to(x.device)
    residual = torch.linalg.solve_triangular(factor, (x - centres).T, upper=False).T
    centred = residual - residual.mean(0)
    values, basis = torch.linalg.eigh(torch.cov(residual.T))
    root = values.clamp_min(0).sqrt()
    distance = residual.mean(0).square().sum() + (root - 1).square().sum()
    influence = 2 * centred @ residual.mean(0) + ((centred @ basis).square() * (1 - 1 / root)).sum(1)
    stderr = float(influence.std()) / math.sqrt(len(x))
    return Estimate(float(distance), stderr, "estimate", "squared standard deviations", len(x))


def mixture_samplers(truth: GaussianMixture, context: Context) -> tuple[dict[str, Estimate], Plot]:
    """P, PC and C on VE and VP with exact scores, over numbers of evaluations; the claim's number is `nfe`."""
    params, generator = context.params, context.streams.fresh("samplers")
    counts = [params["nfe"] // 4, params["nfe"]]
    estimates: dict[str, Estimate] = {}
    lines = []
    for sde_name, sde in exact_sdes().items():
        score_at = MixtureDiffusion(truth, sde, context.device).score_at
        for name, sampler in SAMPLERS.items():
            draw = partial(sampler, score_at, sde, dim=truth.dim, generator=generator)
            snr = best_snr(truth, draw, params) if sampler.corrector_steps else SNR
            x = draw(params["chains"], nfe=params["nfe"], snr=snr)
            key = f"{sde_name}-{name}"
            estimates[f"frechet:{key}"] = mixture_distance(truth, x)
            estimates[f"snr:{key}"] = Estimate.exact(snr, "ratio")
            estimates[f"mode_weight_error:{key}"] = mode_weight_error(truth.mode_of(x), truth.mode_weights())
            curve = [mixture_distance(truth, draw(params["chains"], nfe=n, snr=snr)).value for n in counts[:-1]]
            curve.append(estimates[f"frechet:{key}"].value)
            lines.append(Line(f"{sde_name.upper()}, {name.upper()}", counts, curve))
    exact = mixture_distance(truth, truth.sample(params["chains"], generator))
    estimates["frechet:truth"] = exact
    title, y_label = "Samplers with the exact score: distance of the modes' shape", "squared standard deviations"
    levels = {"exact samples": exact.value}
    plot = Plot("samplers", title, "score evaluations", y_label, tuple(lines), log_x=True, log_y=True, levels=levels)
    return estimates, plot


def best_snr(truth: GaussianMixture, draw: Callable[..., Tensor], params: Mapping[str, Any]) -> float:
    """The r whose samples are nearest, on chains of their own: what is reported later is not what was searched."""
    pilots = {r: draw(params["chains"] // len(SNRS), nfe=params["nfe"], snr=r) for r in SNRS}
    return min(SNRS, key=lambda r: mixture_distance(truth, pilots[r]).value)


def exact_sdes() -> dict[str, SDE]:
    """VE and VP over the range of noise that the paper uses, for data of unit scale."""
    return {"ve": VE(0.01, 50.0), "vp": VP(t_min=1e-3)}


# -- the probability flow under an adaptive solver (figure 3)


@torch.no_grad()
def adaptive_flow(score_at: ScoreAt, sde: SDE, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """The probability flow (eq. 13) from t_max to t_min by RK45, absolute and relative tolerance alike.

    As in the paper the batch is one system, whose error is a mean over it.

    Args:
        x: draws of the prior, shape (n, D).

    Returns:
        (states at t_min (n, D) in x's dtype, evaluations of the score).
    """

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).to(x).view_as(x)
        times = torch.tensor([t], dtype=torch.float64, device=x.device).expand(len(x))
        g = sde.diffusion(times)[:, None]
        dx = sde.drift(state.double(), times) - 0.5 * g.square() * score_at(state, times.to(x)).double()
        return cast(np.ndarray, dx.cpu().numpy().ravel())

    start = x.double().cpu().numpy().ravel()
    solution = solve_ivp(slope, (sde.t_max, sde.t_min), start, method="RK45", rtol=tolerance, atol=tolerance)
    return torch.from_numpy(solution.y[:, -1]).to(x).view_as(x), int(solution.nfev)


def tolerance_curve(
    score_at: ScoreAt, sde: SDE, x: Tensor, quality: Callable[[Tensor], Estimate]
) -> tuple[dict[str, Estimate], Plot]:
    """Evaluations, sample quality and displacement from the finest solution at each tolerance of figure 3."""
    estimates: dict[str, Estimate] = {}
    finest: Tensor | None = None
    for name, tolerance in TOLERANCES.items():
        samples, nfe = adaptive_flow(score_at, sde, x, tolerance)
        finest = samples if finest is None else finest
        moved = (samples - finest).double().square().mean(-1).sqrt()
        estimates[f"nfe:{name}"] = Estimate.exact(nfe, "score evaluations")
        estimates[f"frechet:{name}"] = quality(samples)
        estimates[f"displacement:{name}"] = Estimate.mean_of(moved, "estimate", "distance")
    x_axis = list(TOLERANCES.values())
    ours = Line("ours", x_axis, [estimates[f"nfe:{name}"].value for name in TOLERANCES])
    printed = Line("printed, CIFAR-10", x_axis, [float(n) for n in PRINTED_NFE.values()])
    title = "Evaluations of the probability flow by tolerance"
    plot = Plot("tolerance", title, "tolerance", "score evaluations", (ours, printed), log_x=True, log_y=True)
    return estimates, plot


# -- experiments


def exact_mixture(context: Context) -> Outcome:
    """Table 1 and figure 3 with the exact scores of a mixture of three correlated Gaussians."""
    truth = mixture(context.params["dim"])
    estimates, samplers = mixture_samplers(truth, context)
    sde = exact_sdes()["vp"]
    start = sde.prior_sample(context.params["ode_chains"], truth.dim, context.streams.fresh("latents"))
    exact = MixtureDiffusion(truth, sde, context.device)
    curve, plot = tolerance_curve(exact.score_at, sde, start, lambda x: mixture_distance(truth, x))
    return Outcome({**estimates, **curve}, (samplers, plot))


def trained_digits(context: Context) -> Outcome:
    """One training of the registered VP model serves tables 1 and 2 and figure 3."""
    params = context.params
    spec = make_spec("sde-vp", "digits", context.streams.seed, settings={"steps": params["steps"]})
    model, task, _, _ = run_spec(spec, context.device)
    model = cast(Preprocessed, model)
    estimates = digit_samplers(model, task, context) | likelihoods(model, task, context)
    inner = cast(DiffusionModel, model.inner)
    start = inner.sde.prior_sample(params["samples"], task.info.dim, context.streams.fresh("latents"))

    def quality(z: Tensor) -> Estimate:
        return frechet_to_train(task, model.transform.inverse(z))

    curve, plot = tolerance_curve(inner.score_at, inner.sde, start, quality)
    return Outcome({**estimates, **curve}, (plot,))


def digit_samplers(model: Preprocessed, task: Task, context: Context) -> dict[str, Estimate]:
    """P, PC and C on VE and VP with one trained network: Frechet distance to the training images."""
    params, inner = context.params, cast(DiffusionModel, model.inner)
    own: SDE = inner.sde
    low = float(own.log_ratio(torch.tensor(own.t_min, dtype=torch.float64)).exp())
    estimates = {}
    for sde_name, sde in {"ve": VE(low, 50.0), "vp": own}.items():
        score_at = on_sde(inner, sde).score_at
        for name, sampler in SAMPLERS.items():
            generator = context.streams.fresh(f"sample-{sde_name}-{name}")
            z = sampler(
                score_at, sde, params["samples"], dim=task.info.dim, nfe=params["nfe"], snr=SNR, generator=generator
            )
            estimates[f"frechet:{sde_name}-{name}"] = frechet_to_train(task, model.transform.inverse(z))
    return estimates


def on_sde(model: DiffusionModel, sde: SDE) -> DiffusionModel:
    """The same network behind another SDE; its noise levels must be among those that the network was trained on."""
    return DiffusionModel(model.net, model.dim, sde, model.proposal, model.weighting, model.sample_steps)


def likelihoods(model: Preprocessed, task: Task, context: Context) -> dict[str, Estimate]:
    """-log P of the test images by the flow and by the variational bound, on the same weights and the same noise."""
    params, inner = context.params, cast(DiffusionModel, model.inner)
    x = task.test[: params["test_images"]].to(context.device)
    generator = context.streams.fresh("evaluation")
    flow, bound = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for _ in range(params["draws"]):
        z, logdet = model.transform(x, generator)
        ode = ode_log_prob(inner, z, generator, steps=params["ode_steps"])
        elbo = variational_bound(inner, z, params["levels"], generator)
        flow += (ode.values + logdet).double() / params["draws"]
        bound += (elbo.values + logdet) / params["draws"]
    return {
        "nll:ode": Estimate.mean_of(-flow, "upper_bound", "nats"),
        "nll:elbo": Estimate.mean_of(-bound, "upper_bound", "nats"),
        "nll_gap": Estimate.mean_of(flow - bound, "estimate", "nats"),
        "solver_error": ode.details["solver_error"],
    }


def identities(context: Context) -> Outcome:
    """What the paper states as exact: sub-VP's variance, and the likelihood of the probability flow."""
    estimates, plot = variances(context.params["times"])
    return Outcome({**estimates, **flow_errors(context)}, (plot,))


def variances(count: int) -> tuple[dict[str, Estimate], Plot]:
    """The paper's variance equations (appendix B), integrated, against each other and against the SDE classes.

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
    lines = (Line("VP", grid.tolist(), of_vp[0].tolist()), Line("sub-VP", grid.tolist(), of_sub[0].tolist()))
    plot = Plot("variance", "Variance of the perturbation kernel", "t", "variance", lines)
    return {k: Estimate.exact(v, "variance", count) for k, v in found.items()}, plot


def flow_errors(context: Context) -> dict[str, Estimate]:
    """Largest |log p by the flow - log p| over a grid, with the exact score of eight Gaussians on a circle.

    The horizon is so long that the data are forgotten: what the paper's own horizon leaves is `horizon_error`.
    """
    params, truth = context.params, eight_gaussians()
    axis = torch.linspace(-6, 6, params["grid"], dtype=torch.float64, device=context.device)
    x = torch.cartesian_prod(axis, axis)
    long = {"ve": VE(0.01, 1e6), "vp": VP(beta_max=60.0, t_min=1e-3), "subvp": SubVP(beta_max=60.0, t_min=0.03)}
    cases = {f"log_prob_error:{k}": v for k, v in long.items()} | {"horizon_error:vp": VP(t_min=1e-3)}
    out = {}
    for name, sde in cases.items():
        exact = MixtureDiffusion(truth, sde, context.device)
        t = torch.full_like(x[:, 0], sde.t_min)
        scale, _ = sde.marginal(t)
        answer = exact.log_prob_at(scale[:, None] * x, t) + x.shape[1] * scale.log()
        flow = ode_log_prob(exact, x, context.streams.fresh("unused"), steps=params["steps"])
        worst = float((flow.values - answer).abs().max())
        out[name] = Estimate.exact(worst, "nats", len(x))
    return out


MIXTURE = Experiment(
    name="score-sde-mixture",
    about="predictor, corrector and adaptive ODE samplers with a mixture's exact score",
    family="score",
    run=exact_mixture,
    params={"dim": 8, "nfe": 200, "chains": 20_000, "ode_chains": 2_000},
    overrides={
        "smoke": {"nfe": 16, "chains": 200, "ode_chains": 100},
    },
)

DIGITS = Experiment(
    name="score-sde-digits",
    about="samplers, likelihood against its bound, and ODE tolerance with one trained network on digits",
    family="score",
    run=trained_digits,
    params={
        "steps": 1000,
        "samples": 1000,
        "nfe": 200,
        "test_images": 447,
        "draws": 8,
        "ode_steps": 12,
        "levels": 32,
    },
    seeds=3,
    tasks=("digits",),
    overrides={
        "smoke": {"steps": 10, "samples": 100, "nfe": 8, "test_images": 40, "draws": 1, "ode_steps": 4, "levels": 4},
    },
)

IDENTITIES = Experiment(
    name="score-sde-identities",
    about="sub-VP variance below VP's, and the probability flow's exact log p",
    family="score",
    run=identities,
    params={"times": 501, "grid": 13, "steps": 200},
    seeds=1,
    overrides={"smoke": {"times": 51, "grid": 5, "steps": 40}},
    precision="float64",
)

_SIBLINGS = (ModelRuns(("sde-vp", "sde-subvp"), ("digits",), 3),)

PAPER = Paper(
    "score_sde",
    Path(__file__).with_suffix(".toml"),
    experiments=(MIXTURE, DIGITS, IDENTITIES, *DIFFUSIONS),
    model_runs={"full": _SIBLINGS},
)
