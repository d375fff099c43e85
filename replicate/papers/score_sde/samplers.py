"""Tables 1 and 2 and figure 3, with the exact score of a mixture and with one network on the 8x8 digits; identities."""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.image_scores import frechet_to_train
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.ode import ode_log_prob
from replicate.metrics.samples import mode_weight_error
from replicate.model import Estimate, Model
from replicate.runs.spec import make_spec
from replicate.runs.subjects import train_model
from replicate.sampling.predictor_corrector import Corrector, ScoreAt, predictor_corrector
from replicate.score_based.bound import variational_bound
from replicate.score_based.diffusion import DiffusionModel
from replicate.sde import SDE, VE, VP, SubVP
from replicate.tasks.densities import GaussianMixture, eight_gaussians, mixture


class MixtureDiffusion(Model):
    """A Gaussian mixture noised by an SDE: p_t is a mixture too, sum_k w_k N(s mu_k, s^2 Sigma + sigma^2 I).

    Everything is computed in the eigenbasis of Sigma, in the dtype of x, and is differentiable.
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
    truth, axis = eight_gaussians(), torch.linspace(-6, 6, grid, dtype=torch.float64, device=run.device)
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


#: tolerances of figure 3 (absolute and relative) and the evaluations that it prints for CIFAR-10
PRINTED_NFE = {"1e-5": 548, "1e-3": 86, "1e-1": 14}
#: VE and VP over the range of noise that the paper uses, for data of unit scale
EXACT_SDES: dict[str, SDE] = {"ve": VE(0.01, 50.0), "vp": VP(t_min=1e-3)}
#: rows of table 1: time steps per evaluation, corrector steps per noise level, whether a predictor leads to each level
SAMPLERS = {"p": (1.0, 0, True), "pc": (0.5, 1, True), "c": (0.5, 2, False)}
#: corrector signal-to-noise ratios among which PC and C take their best on the mixture, about the paper's 0.16
SNRS = (0.08, 0.16, 0.32)
SNR = 0.16


def sample(
    name: str, score_at: ScoreAt, sde: SDE, n: int, *, dim: int, nfe: int, snr: float, generator: torch.Generator
) -> Tensor:
    """Draw n samples (n, D) by a row of table 1 with `nfe` evaluations and a last one that denoises."""
    share, corrector_steps, predict = SAMPLERS[name]
    steps, corrector = max(1, int(nfe * share)), Corrector(corrector_steps, snr, predict)
    return predictor_corrector(score_at, sde, (n, dim), steps, corrector, generator).samples


@torch.no_grad()
def adaptive_flow(score_at: ScoreAt, sde: SDE, x: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Solve the probability flow (eq. 13) from t_max to t_min by RK45, absolute and relative tolerance alike.

    As in the paper the batch x (n, D) of draws of the prior is one system, whose error is a mean over it.

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


def measure_tolerances(run: Run, score_at: ScoreAt, sde: SDE, x: Tensor, quality: Callable[[Tensor], Estimate]) -> None:
    """Measure evaluations, sample quality and displacement from the finest solution at each tolerance of figure 3."""
    finest: Tensor | None = None
    for name in PRINTED_NFE:
        samples, nfe = adaptive_flow(score_at, sde, x, float(name))
        finest = samples if finest is None else finest
        moved = (samples - finest).double().square().mean(-1).sqrt()
        run.measure(f"nfe:{name}", Estimate.exact(nfe, "score evaluations"))
        run.measure(f"frechet:{name}", quality(samples))
        run.measure(f"displacement:{name}", Estimate.mean_of(moved, "estimate", "distance"))
    ours, x_axis = [run.estimates[f"nfe:{name}"].value for name in PRINTED_NFE], [float(name) for name in PRINTED_NFE]
    curves = {"ours": (x_axis, ours), "printed, CIFAR-10": (x_axis, [float(nfe) for nfe in PRINTED_NFE.values()])}
    title = "Evaluations of the probability flow by tolerance"
    run.curves("tolerance", title, ("tolerance", "score evaluations"), curves, log="xy")


def mixture_distance(truth: GaussianMixture, x: Tensor) -> Estimate:
    """Frechet distance between residuals of x (n, D) from their modes, whitened, and N(0, I): 0 if the shape is right.

    |m|^2 + tr(C + I - 2 C^1/2) for the mean m and covariance C of the residuals. Biased upwards by about
    D / n + D (D + 1) / (8 n). The standard error is that of its first order.
    """
    x = x.double()
    centres, factor = truth.means.to(x.device)[truth.mode_of(x)], truth.factor.to(x.device)
    residual = torch.linalg.solve_triangular(factor, (x - centres).T, upper=False).T
    centred = residual - residual.mean(0)
    values, basis = torch.linalg.eigh(torch.cov(residual.T))
    root = values.clamp_min(0).sqrt()
    distance = residual.mean(0).square().sum() + (root - 1).square().sum()
    influence = 2 * centred @ residual.mean(0) + ((centred @ basis).square() * (1 - 1 / root)).sum(1)
    stderr = float(influence.std()) / math.sqrt(len(x))
    return Estimate(float(distance), stderr, "estimate", "squared standard deviations", len(x))


def measure_samplers(run: Run, truth: GaussianMixture, nfe: int, chains: int) -> None:
    """Compare P, PC and C on VE and VP with exact scores, at `nfe` evaluations and at a quarter of them."""
    generator = run.stream("samplers")
    curves = {}
    for sde_name, sde in EXACT_SDES.items():
        score_at = MixtureDiffusion(truth, sde, run.device).score_at
        for name in SAMPLERS:
            draw, snr = partial(sample, name, score_at, sde, dim=truth.dim, generator=generator), SNR
            if name != "p":  # the r whose samples are nearest, on chains of their own and not the reported ones
                pilots = [mixture_distance(truth, draw(chains // len(SNRS), nfe=nfe, snr=r)).value for r in SNRS]
                snr = SNRS[pilots.index(min(pilots))]
            x = draw(chains, nfe=nfe, snr=snr)
            key, distance = f"{sde_name}-{name}", mixture_distance(truth, x)
            run.measure(f"frechet:{key}", distance)
            run.measure(f"snr:{key}", Estimate.exact(snr, "ratio"))
            run.measure(f"mode_weight_error:{key}", mode_weight_error(truth.mode_of(x), truth.mode_weights()))
            coarse = mixture_distance(truth, draw(chains, nfe=nfe // 4, snr=snr))
            curves[f"{sde_name.upper()}, {name.upper()}"] = [nfe // 4, nfe], [coarse.value, distance.value]
    exact = mixture_distance(truth, truth.sample(chains, generator))
    run.measure("frechet:truth", exact)
    title, axes = "Samplers with the exact score: distance of the modes' shape", ("score evaluations", exact.unit)
    run.curves("samplers", title, axes, curves, log="xy", levels={"exact samples": exact.value})


@experiment("score-sde-mixture", family="score", smoke={"nfe": 16, "chains": 200, "ode_chains": 100})
def exact_mixture(run: Run, *, dim: int = 8, nfe: int = 200, chains: int = 20_000, ode_chains: int = 2_000) -> None:
    """Predictor, corrector and adaptive ODE samplers with a mixture's exact score."""
    truth, sde = mixture(dim), EXACT_SDES["vp"]
    measure_samplers(run, truth, nfe, chains)
    start = sde.prior_sample(ode_chains, dim, run.stream("latents"))
    exact = MixtureDiffusion(truth, sde, run.device)
    measure_tolerances(run, exact.score_at, sde, start, lambda x: mixture_distance(truth, x))


def on_sde(model: DiffusionModel, sde: SDE) -> DiffusionModel:
    """Return the same network on another SDE, whose noise levels must be among those that it was trained on."""
    return DiffusionModel(model.net, model.dim, sde, model.proposal, model.weighting, model.sample_steps)


def measure_likelihoods(run: Run, model: Preprocessed, x: Tensor, draws: int, ode_steps: int, levels: int) -> None:
    """Measure -log P of images x (n, D) by the flow and by the variational bound, with one set of noise draws."""
    inner, generator = cast(DiffusionModel, model.inner), run.stream("evaluation")
    flow, bound = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for _ in range(draws):
        z, logdet = model.transform(x, generator)
        ode = ode_log_prob(inner, z, generator, steps=ode_steps)
        elbo = variational_bound(inner, z, levels, generator)
        flow += (ode.values + logdet).double() / draws
        bound += (elbo.values + logdet) / draws
    run.measure("nll:ode", Estimate.mean_of(-flow, "upper_bound", "nats"))
    run.measure("nll:elbo", Estimate.mean_of(-bound, "upper_bound", "nats"))
    run.measure("nll_gap", Estimate.mean_of(flow - bound, "estimate", "nats"))
    run.measure("solver_error", ode.details["solver_error"])


SMOKE = {"steps": 10, "samples": 100, "nfe": 8, "test_images": 40, "draws": 1, "ode_steps": 4, "levels": 4}


@experiment("score-sde-digits", family="score", seeds=3, tasks=("digits",), smoke=SMOKE)
def trained_digits(
    run: Run,
    *,
    steps: int = 1000,
    samples: int = 1000,
    nfe: int = 200,
    test_images: int = 447,
    draws: int = 8,
    ode_steps: int = 12,
    levels: int = 32,
) -> None:
    """Samplers, likelihood against its bound, and ODE tolerance with one trained network on digits."""
    spec = make_spec("sde-vp", "digits", run.streams.seed, settings={"steps": steps})
    trained, task, _, _ = train_model(spec, run.device)
    model = cast(Preprocessed, trained)
    inner = cast(DiffusionModel, model.inner)
    vp: SDE = inner.sde

    def quality(z: Tensor) -> Estimate:
        return frechet_to_train(task, model.transform.inverse(z))

    lowest = float(vp.log_ratio(torch.tensor(vp.t_min, dtype=torch.float64)).exp())
    for sde_name, sde in {"ve": VE(lowest, 50.0), "vp": vp}.items():
        score_at = on_sde(inner, sde).score_at
        for name in SAMPLERS:
            generator = run.stream(f"sample-{sde_name}-{name}")
            z = sample(name, score_at, sde, samples, dim=task.info.dim, nfe=nfe, snr=SNR, generator=generator)
            run.measure(f"frechet:{sde_name}-{name}", quality(z))
    measure_likelihoods(run, model, task.test[:test_images].to(run.device), draws, ode_steps, levels)
    measure_tolerances(run, inner.score_at, vp, vp.prior_sample(samples, task.info.dim, run.stream("latents")), quality)
