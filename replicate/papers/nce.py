"""Noise-contrastive estimation: consistency, the learned log Z, and what more noise is worth.

Gutmann and Hyvarinen 2010, "Noise-contrastive estimation: a new estimation principle for unnormalized statistical
models" (AISTATS 9, 297-304), and 2012, "Noise-contrastive estimation of unnormalized statistical models, with
applications to natural image statistics" (JMLR 13, 307-361). Two models whose log Z is known and withheld:

- the zero-mean Gaussian, f(x) = -x' P x / 2 with precision P, in 5 dimensions;
- linear ICA with Laplacian sources of unit variance, f(x) = -sqrt(2) sum_i |w_i x|, in 4 dimensions.

Both learn c = -log Z beside their parameters, from n data and nu n noises.

Deviations: the papers' texts could not be read while this was written; dimensions and condition numbers are as widely
quoted. The noise is N(0, I) for the Gaussian, N(0, C) with the data's covariance C for ICA. The Gaussian's objective
is convex and solved by Newton's method to machine accuracy for all repetitions at once; ICA's starts near the truth,
so that its error is that of estimation and not of a search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import logsigmoid

from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.score_based.contrastive import GaussianNoise, data_term, noise_contrastive, noise_term

NEWTON_STEPS = 12
#: draws behind the theory's expectations
THEORY_DRAWS = 400_000


@dataclass(frozen=True)
class Gaussian:
    """A zero-mean Gaussian as an exponential family: log p = eta . features, the last feature being 1.

    Attributes:
        precision: P, shape (D, D), float64.
    """

    precision: Tensor

    @property
    def eta(self) -> Tensor:
        """Upper triangle of P row by row, then c = -log Z; shape (D (D + 1) / 2 + 1,)."""
        d = len(self.precision)
        rows, cols = torch.triu_indices(d, d, device=self.precision.device)
        return torch.cat([self.precision[rows, cols], -self.log_z()[None]])

    def log_z(self) -> Tensor:
        """log Z of exp(-x' P x / 2) in nats."""
        return 0.5 * (len(self.precision) * math.log(2 * math.pi) - torch.linalg.slogdet(self.precision).logabsdet)

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws of shape (*shape, D)."""
        d = len(self.precision)
        z = torch.randn(*shape, d, generator=generator, device=self.precision.device, dtype=torch.float64)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.precision).T, z[..., None], upper=True)[..., 0]


def features(x: Tensor) -> Tensor:
    """d log p / d eta at x (..., D): -x_i^2 / 2, -x_i x_j for i < j, and 1; shape (..., D (D + 1) / 2 + 1)."""
    d = x.shape[-1]
    rows, cols = torch.triu_indices(d, d, device=x.device)
    weight = torch.where(rows == cols, 0.5, 1.0).to(x)
    return torch.cat([-weight * x[..., rows] * x[..., cols], torch.ones_like(x[..., :1])], -1)


def draw_precision(dim: int, condition: float, generator: torch.Generator) -> Tensor:
    """P whose inverse has eigenvalues evenly spaced from 1 / condition to 1, in random directions; (dim, dim)."""
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64))
    variance = torch.linspace(1 / condition, 1, dim, dtype=torch.float64, device=generator.device)
    return q @ torch.diag(1 / variance) @ q.T


def log_standard_normal(x: Tensor) -> Tensor:
    """log N(x; 0, I) at x (..., D), in nats."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))


def fit_gaussians(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """Noise-contrastive estimates of eta from data x (r, n, D) and noises y (r, m, D) ~ N(0, I), shape (r, p).

    log odds are linear in eta, so the loss is that of a logistic regression: convex, and Newton's method ends at its
    one minimum. A step that does not lower a repetition's loss is halved.
    """
    nu = y.shape[1] / x.shape[1]
    phi = torch.cat([features(x), features(y)], 1)
    log_noise = torch.cat([log_standard_normal(x), log_standard_normal(y)], 1)
    n = x.shape[1]

    def losses(eta: Tensor) -> Tensor:
        log_ratio = (phi @ eta[..., None])[..., 0] - log_noise
        return (data_term(log_ratio[:, :n], nu).sum(1) + noise_term(log_ratio[:, n:], nu).sum(1)) / n

    eta = start.expand(len(x), -1).clone()
    value = losses(eta)
    for _ in range(NEWTON_STEPS):
        h = torch.sigmoid((phi @ eta[..., None])[..., 0] - log_noise - math.log(nu))
        residual = torch.cat([h[:, :n] - 1, h[:, n:]], 1)
        grad = (phi.mT @ residual[..., None])[..., 0] / n
        hessian = phi.mT @ (phi * (h * (1 - h))[..., None]) / n
        step = torch.linalg.solve(hessian, grad)
        scale = torch.ones_like(value)
        for _ in range(10):
            moved = losses(eta - scale[:, None] * step)
            worse = moved > value + 1e-12
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        eta, value = eta - scale[:, None] * step, moved
        if step.abs().max() < 1e-6:  # the next would be about its square
            break
    return eta


def likelihood_estimates(x: Tensor) -> Tensor:
    """Maximum likelihood's eta from data x (r, n, D), in closed form, shape (r, p)."""
    return torch.stack([Gaussian(torch.linalg.inv(c)).eta for c in x.mT @ x / x.shape[1]])


def asymptotic_covariance(truth: Gaussian, nu: float, generator: torch.Generator) -> Tensor:
    """Limit of n times the covariance of eta's estimate (2012, Theorem 3), shape (p, p).

    With g = d log p / d eta and w = nu q / (p + nu q), all at the truth,
    I^-1 - (1 + 1/nu) I^-1 m m' I^-1 for I = E_p[w g g'] and m = E_p[w g]; expectations over THEORY_DRAWS data.
    """
    x = truth.sample((THEORY_DRAWS,), generator)
    g = features(x)
    w = torch.sigmoid(log_standard_normal(x) + math.log(nu) - g @ truth.eta)
    inverse = torch.linalg.inv((g * w[:, None]).T @ g / len(x))
    m = inverse @ (w @ g / len(x))
    return inverse - (1 + 1 / nu) * torch.outer(m, m)


def squared_errors(eta: Tensor, truth: Gaussian) -> dict[str, Tensor]:
    """|error|^2 of each repetition's eta (r, p), by part: the precision's entries, log Z, and all; shape (r,)."""
    square = (eta - truth.eta).square()
    return {"precision": square[:, :-1].sum(1), "log_z": square[:, -1], "all": square.sum(1)}


def slope(sizes: Sequence[int], mse: Sequence[float]) -> Estimate:
    """Least-squares slope of log error against log size."""
    fitted = np.polyfit(np.log(sizes), np.log(mse), 1)[0]
    return Estimate(float(fitted), math.nan, "estimate", "power of the sample size", len(sizes))


def gaussian_consistency(context: Context) -> Outcome:
    """Squared error of the Gaussian's precision and log Z over doubling sample sizes, beside the theory's number."""
    params, streams = context.params, context.streams
    truth = Gaussian(draw_precision(params["dim"], params["condition"], streams.fresh("precision")).to(context.device))
    sizes = [params["smallest"] * 2**i for i in range(params["doublings"] + 1)]
    data, noise = streams.fresh("data"), streams.fresh("noise")
    state: State = {"data": data, "noise": noise, "eta": None, "mse": {"precision": [], "log_z": [], "all": []}}
    for i in resumable("sample sizes", len(sizes), state):
        x = truth.sample((params["repetitions"], sizes[i]), data)
        y = torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype)
        state["eta"] = fit_gaussians(x, y, truth.eta)
        for part, values in squared_errors(state["eta"], truth).items():
            state["mse"][part].append(float(values.mean()))
    eta, mse = state["eta"], state["mse"]
    largest = squared_errors(eta, truth)
    log_z_error = Estimate.mean_of(-eta[:, -1] - truth.log_z(), "estimate", "nats")
    predicted = float(asymptotic_covariance(truth, 1.0, streams.fresh("theory")).trace()) / sizes[-1]
    efficiency = Estimate.mean_of(largest["all"] / predicted, "estimate", "ratio")
    estimates = {f"slope:{part}": slope(sizes, mse[part]) for part in ("precision", "log_z")}
    estimates |= {f"squared_error:{part}": Estimate.mean_of(largest[part], "estimate", "nats squared") for part in mse}
    estimates |= {"log_z_bias": log_z_error, "error_over_theory": efficiency}
    lines = [Line(part, sizes, mse[part]) for part in ("precision", "log_z")]
    lines.append(Line("1 / n", sizes, [mse["precision"][0] * sizes[0] / n for n in sizes]))
    plot = error_plot("consistency", "Noise-contrastive estimates of a Gaussian", "data (noises: as many)", lines)
    return Outcome(estimates, (plot,))


def error_plot(name: str, title: str, x_label: str, lines: Sequence[Line]) -> Plot:
    """Mean squared errors on logarithmic axes."""
    return Plot(name, title, x_label, "mean squared error", tuple(lines), log_x=True, log_y=True)


def noise_ratio(context: Context) -> Outcome:
    """Squared error on the same data with 1, 10, 100 noises a datum, beside maximum likelihood's and the theory's."""
    params, streams = context.params, context.streams
    truth = Gaussian(draw_precision(params["dim"], params["condition"], streams.fresh("precision")).to(context.device))
    x = truth.sample((params["repetitions"], params["examples"]), streams.fresh("sample"))
    errors = {"mle": squared_errors(likelihood_estimates(x), truth)["all"]}
    ratios, theory = (1, 10, 100), {}
    for nu in ratios:
        noise, chunks = streams.fresh("noise"), x.split(params["chunk"])
        state: State = {"noise": noise, "parts": []}
        for i in resumable(f"{nu} noises a datum", len(chunks), state):
            shape = (len(chunks[i]), nu * x.shape[1], x.shape[2])
            y = torch.randn(shape, generator=noise, device=x.device, dtype=x.dtype)
            state["parts"].append(fit_gaussians(chunks[i], y, truth.eta))
        errors[f"nu-{nu}"] = squared_errors(torch.cat(state["parts"]), truth)["all"]
        covariance = asymptotic_covariance(truth, float(nu), streams.fresh("theory"))
        theory[nu] = float(covariance.trace()) / x.shape[1]
    estimates = {
        f"squared_error:{name}": Estimate.mean_of(values, "estimate", "nats squared") for name, values in errors.items()
    }
    for nu in ratios:
        estimates[f"error_over_theory:nu-{nu}"] = Estimate.mean_of(errors[f"nu-{nu}"] / theory[nu], "estimate", "ratio")
    measured = [estimates[f"squared_error:nu-{nu}"].value for nu in ratios]
    likelihood = estimates["squared_error:mle"].value
    lines = (
        Line("measured", ratios, measured),
        Line("theory", ratios, [theory[nu] for nu in ratios]),
        Line("maximum likelihood", (ratios[0], ratios[-1]), (likelihood, likelihood)),
    )
    return Outcome(estimates, (error_plot("noise-ratio", "What more noise is worth", "noises a datum", lines),))


def population_gradient(location: float, scale: float, log_z_error: float, noise_std: float, nu: float) -> Tensor:
    """Gradient of the population objective for a logistic density, at its truth but for `log_z_error`; shape (3,).

    By the trapezoidal rule on [-60, 60], which converges geometrically on integrands like these.
    """
    grid = torch.linspace(-60, 60, 24_001, dtype=torch.float64)[:, None]
    true = torch.tensor([location, scale, math.log(scale)], dtype=torch.float64)

    def log_logistic(x: Tensor, theta: Tensor) -> Tensor:
        u = (x[:, 0] - theta[0]) / theta[1]
        return logsigmoid(u) + logsigmoid(-u) - theta[2]

    def log_noise(x: Tensor) -> Tensor:
        return log_standard_normal(x / noise_std) - math.log(noise_std)

    theta = (true + torch.tensor([0.0, 0.0, log_z_error], dtype=torch.float64)).requires_grad_(True)
    log_ratio = log_logistic(grid, theta) - log_noise(grid)
    data = log_logistic(grid, true).exp() * data_term(log_ratio, nu)
    noise = log_noise(grid).exp() * noise_term(log_ratio, nu)
    loss = (data + nu * noise).sum() * (grid[1, 0] - grid[0, 0])
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient


def vanishing_gradient(context: Context) -> Outcome:
    """The population gradient at the truth, log Z included, for several noises, ratios and data."""
    noises, ratios, truths = (1.0, 2.0, 5.0), (0.1, 1.0, 10.0), ((0.0, 1.0), (0.7, 0.5))
    largest, control = 0.0, math.inf
    for std in noises:
        for nu in ratios:
            for location, scale in truths:
                at_truth = population_gradient(location, scale, 0.0, std, nu).abs().max()
                beside = population_gradient(location, scale, 0.1, std, nu).abs().max()
                largest, control = max(largest, float(at_truth)), min(control, float(beside))
    n = len(noises) * len(ratios) * len(truths)
    return Outcome(
        {
            "largest_gradient": Estimate.exact(largest, "nats per unit of the parameter", n),
            "smallest_gradient_beside": Estimate.exact(control, "nats per unit of the parameter", n),
        }
    )


def laplace_log_density(x: Tensor, w: Tensor) -> Tensor:
    """f(x) = -sqrt(2) sum_i |w_i x| at x (n, D), shape (n,); Z = 2^{D/2} / |det W|."""
    return -math.sqrt(2) * (x @ w.T).abs().sum(-1)


def laplace_log_z(w: Tensor) -> Tensor:
    """log Z = D/2 log 2 - log |det W|, in nats."""
    return 0.5 * len(w) * math.log(2) - torch.linalg.slogdet(w).logabsdet


def fit_laplace(x: Tensor, y: Tensor, noise: GaussianNoise, start: Tensor) -> tuple[Tensor, float]:
    """W (D, D) and log Z by L-BFGS on the contrastive loss of data x against noises y, from `start` and its log Z."""
    d = len(start)
    log_q_x, log_q_y = noise.log_prob(x), noise.log_prob(y)

    def unpack(v: np.ndarray) -> Tensor:
        return torch.as_tensor(v, dtype=torch.float64, device=x.device).clone()

    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = unpack(v).requires_grad_(True)
        w, c = theta[:-1].view(d, d), theta[-1]
        loss = noise_contrastive(laplace_log_density(x, w) + c - log_q_x, laplace_log_density(y, w) + c - log_q_y)
        (grad,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), grad.cpu().numpy()

    first = np.append(start.flatten().cpu().numpy(), -float(laplace_log_z(start)))
    found = minimize(value_and_grad, first, jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-6})
    return unpack(found.x)[:-1].view(d, d), -float(found.x[-1])


def laplace_consistency(context: Context) -> Outcome:
    """Squared error of ICA's unmixing matrix and log Z over doubling sample sizes, in repetitions of all of it."""
    params, streams = context.params, context.streams
    d, sizes = params["dim"], [params["smallest"] * 2**i for i in range(params["doublings"] + 1)]
    mixing, data, contrast = streams.fresh("mixing"), streams.fresh("data"), streams.fresh("noise")
    none = torch.zeros(len(sizes), params["repetitions"], dtype=torch.float64)
    state: State = {
        "mixing": mixing,
        "data": data,
        "contrast": contrast,
        "unmixing": none.clone(),
        "log_z": none.clone(),
    }
    for r in resumable("repetitions", params["repetitions"], state):
        w = draw_unmixing(d, params["condition"], mixing)
        for i, n in enumerate(sizes):
            x = sample_laplace(w, n, data)
            noise = GaussianNoise.fit(x)
            near = w * (1 + 0.05 * torch.randn(d, d, generator=data, device=w.device, dtype=w.dtype))
            found, log_z = fit_laplace(x, noise.sample(n, contrast), noise, near)
            state["unmixing"][i, r] = (found - w).square().sum() / w.square().sum()
            state["log_z"][i, r] = log_z - float(laplace_log_z(w))
    unmixing_errors, log_z_errors = state["unmixing"], state["log_z"]
    mse = {"unmixing": unmixing_errors.mean(1).tolist(), "log_z": log_z_errors.square().mean(1).tolist()}
    estimates = {f"slope:{part}": slope(sizes, values) for part, values in mse.items()}
    estimates["squared_error:unmixing"] = Estimate.mean_of(unmixing_errors[-1], "estimate", "ratio")
    estimates["squared_error:log_z"] = Estimate.mean_of(log_z_errors[-1].square(), "estimate", "nats squared")
    estimates["log_z_bias"] = Estimate.mean_of(log_z_errors[-1], "estimate", "nats")
    lines = [Line(part, sizes, values) for part, values in mse.items()]
    lines.append(Line("1 / n", sizes, [mse["log_z"][0] * sizes[0] / n for n in sizes]))
    plot = error_plot("consistency", "Noise-contrastive estimates of ICA", "data (noises: as many)", lines)
    return Outcome(estimates, (plot,))


def draw_unmixing(dim: int, condition: float, generator: torch.Generator) -> Tensor:
    """The inverse of a standard normal mixing matrix whose condition number is below `condition`, (dim, dim)."""
    while True:
        a = torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64)
        if torch.linalg.cond(a) < condition:
            return torch.linalg.inv(a)


def sample_laplace(w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """x = W^-1 s with Laplacian s of unit variance, shape (n, D)."""
    u = torch.rand(n, len(w), generator=generator, device=w.device, dtype=w.dtype) - 0.5
    s = -u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)
    return torch.linalg.solve(w, s.T).T


GAUSSIAN = Experiment(
    name="nce-gaussian",
    about="Gaussian precision and log Z by noise-contrastive estimation over sample sizes",
    family="ebm",
    run=gaussian_consistency,
    params={"dim": 5, "condition": 10.0, "smallest": 500, "doublings": 4, "repetitions": 100},
    overrides={"smoke": {"doublings": 1, "repetitions": 10}},
    precision="float64",
)
NOISE_RATIO = Experiment(
    name="nce-noise-ratio",
    about="1, 10 and 100 noises a datum, against maximum likelihood and the asymptotic covariance",
    family="ebm",
    run=noise_ratio,
    params={"dim": 5, "condition": 10.0, "examples": 4000, "repetitions": 100, "chunk": 5},
    overrides={"smoke": {"examples": 200, "repetitions": 5}},
    profiles=("full",),
    precision="float64",
)
IDENTITY = Experiment(
    name="nce-identity",
    about="population gradient of the contrastive loss at the true density and log Z, by quadrature",
    family="ebm",
    run=vanishing_gradient,
    seeds=1,
    precision="float64",
)
ICA = Experiment(
    name="nce-ica",
    about="ICA with Laplacian sources and its log Z by noise-contrastive estimation over sample sizes",
    family="ebm",
    run=laplace_consistency,
    params={"dim": 4, "condition": 10.0, "smallest": 500, "doublings": 5, "repetitions": 100},
    overrides={"smoke": {"doublings": 1, "repetitions": 3}},
    profiles=("full",),
    precision="float64",
)

PAPER = Paper("nce", Path(__file__).with_suffix(".toml"), experiments=(GAUSSIAN, NOISE_RATIO, IDENTITY, ICA))
