"""A Gaussian and its log Z over sample sizes and noise ratios, and the contrastive gradient at the truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from replicate.experiments import Run, experiment
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.score_based.contrastive import data_term, noise_term

NEWTON_STEPS = 12
#: draws behind the theory's expectations
THEORY_DRAWS = 400_000
#: noises per datum
RATIOS = (1, 10, 100)
#: of the gradient at the truth: standard deviations of the noise, noises per datum, (location, scale) of the data
IDENTITY_CASES = ((1.0, 2.0, 5.0), (0.1, 1.0, 10.0), ((0.0, 1.0), (0.7, 0.5)))


@dataclass(frozen=True)
class Gaussian:
    """A zero-mean Gaussian of precision P (D, D), float64: log p = eta . features, the last feature being 1."""

    precision: Tensor

    @property
    def eta(self) -> Tensor:
        """The upper triangle of P row by row, then c = -log Z; shape (D (D + 1) / 2 + 1,)."""
        d = len(self.precision)
        rows, cols = torch.triu_indices(d, d, device=self.precision.device)
        return torch.cat([self.precision[rows, cols], -self.log_z()[None]])

    def log_z(self) -> Tensor:
        """Return log Z of exp(-x' P x / 2) in nats."""
        return 0.5 * (len(self.precision) * math.log(2 * math.pi) - torch.linalg.slogdet(self.precision).logabsdet)

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw x of shape (*shape, D)."""
        d = len(self.precision)
        z = torch.randn(*shape, d, generator=generator, device=self.precision.device, dtype=torch.float64)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(self.precision).T, z[..., None], upper=True)[..., 0]


def features(x: Tensor) -> Tensor:
    """Return d log p / d eta at x (.., D): -x_i^2 / 2, -x_i x_j for i < j, and 1; shape (.., D (D + 1) / 2 + 1)."""
    d = x.shape[-1]
    rows, cols = torch.triu_indices(d, d, device=x.device)
    weight = torch.where(rows == cols, 0.5, 1.0).to(x)
    return torch.cat([-weight * x[..., rows] * x[..., cols], torch.ones_like(x[..., :1])], -1)


def draw_precision(dim: int, condition: float, generator: torch.Generator) -> Tensor:
    """Draw P (dim, dim); its inverse has random eigenvectors and eigenvalues evenly spaced from 1 / condition to 1."""
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=generator.device, dtype=torch.float64))
    variance = torch.linspace(1 / condition, 1, dim, dtype=torch.float64, device=generator.device)
    return q @ torch.diag(1 / variance) @ q.T


def log_standard_normal(x: Tensor) -> Tensor:
    """Return log N(x; 0, I) at x (.., D), in nats."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))


def fit_gaussians(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """Find noise-contrastive estimates of eta from data x (r, n, D) and noises y (r, m, D) ~ N(0, I), shape (r, p).

    The log odds are linear in eta, so the loss is convex, and Newton's method ends at its one minimum. A step that does
    not lower a repetition's loss is halved.
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
    """Return the eta of maximum likelihood for data x (r, n, D), shape (r, p)."""
    return torch.stack([Gaussian(torch.linalg.inv(c)).eta for c in x.mT @ x / x.shape[1]])


def asymptotic_covariance(truth: Gaussian, nu: float, generator: torch.Generator) -> Tensor:
    """Return the limit of n times the covariance of eta's estimate (2012, Theorem 3), shape (p, p).

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
    """Return |error|^2 of each repetition's eta (r, p) by part, the precision's entries, log Z and all; shape (r,)."""
    square = (eta - truth.eta).square()
    return {"precision": square[:, :-1].sum(1), "log_z": square[:, -1], "all": square.sum(1)}


def slope(sizes: Sequence[int], mse: Sequence[float]) -> Estimate:
    """Fit the least-squares slope of log error against log size."""
    fitted = np.polyfit(np.log(sizes), np.log(mse), 1)[0]
    return Estimate(float(fitted), math.nan, "estimate", "power of the sample size", len(sizes))


def plot_errors(run: Run, title: str, sizes: Sequence[int], mse: Mapping[str, Sequence[float]], reference: str) -> None:
    """Draw mean squared errors over sample sizes, and the line 1 / n through the first error of the `reference`."""
    curves = {part: (sizes, values) for part, values in mse.items()}
    curves["1 / n"] = sizes, [mse[reference][0] * sizes[0] / n for n in sizes]
    run.curves("consistency", title, ("data (noises: as many)", "mean squared error"), curves, log="xy")


@experiment("nce-gaussian", family="ebm", smoke={"doublings": 1, "repetitions": 10}, precision="float64")
def consistency(
    run: Run, *, dim: int = 5, condition: float = 10.0, smallest: int = 500, doublings: int = 4, repetitions: int = 100
) -> None:
    """Gaussian precision and log Z by noise-contrastive estimation over sample sizes."""
    truth = Gaussian(draw_precision(dim, condition, run.stream("precision")).to(run.device))
    sizes = [smallest * 2**i for i in range(doublings + 1)]
    data, noise = run.stream("data"), run.stream("noise")
    state: State = {"data": data, "noise": noise, "eta": None, "mse": {"precision": [], "log_z": [], "all": []}}
    for i in resumable("sample sizes", len(sizes), state):
        x = truth.sample((repetitions, sizes[i]), data)
        y = torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype)
        state["eta"] = fit_gaussians(x, y, truth.eta)
        for part, values in squared_errors(state["eta"], truth).items():
            state["mse"][part].append(float(values.mean()))
    eta, largest = state["eta"], squared_errors(state["eta"], truth)
    mse = {part: state["mse"][part] for part in ("precision", "log_z")}
    predicted = float(asymptotic_covariance(truth, 1.0, run.stream("theory")).trace()) / sizes[-1]
    run.measure_all({f"slope:{part}": slope(sizes, values) for part, values in mse.items()})
    for part, values in largest.items():
        run.measure(f"squared_error:{part}", Estimate.mean_of(values, "estimate", "nats squared"))
    run.measure("log_z_bias", Estimate.mean_of(-eta[:, -1] - truth.log_z(), "estimate", "nats"))
    run.measure("error_over_theory", Estimate.mean_of(largest["all"] / predicted, "estimate", "ratio"))
    plot_errors(run, "Noise-contrastive estimates of a Gaussian", sizes, mse, "precision")


@experiment(
    "nce-noise-ratio", family="ebm", smoke={"examples": 200, "repetitions": 5}, profiles=("full",), precision="float64"
)
def noise_ratio(
    run: Run, *, dim: int = 5, condition: float = 10.0, examples: int = 4000, repetitions: int = 100, chunk: int = 5
) -> None:
    """1, 10 and 100 noises a datum, against maximum likelihood and the asymptotic covariance."""
    truth = Gaussian(draw_precision(dim, condition, run.stream("precision")).to(run.device))
    x = truth.sample((repetitions, examples), run.stream("sample"))
    errors = {"mle": squared_errors(likelihood_estimates(x), truth)["all"]}
    theory, chunks = {}, x.split(chunk)
    for nu in RATIOS:
        noise = run.stream("noise")
        state: State = {"noise": noise, "parts": []}
        for i in resumable(f"{nu} noises a datum", len(chunks), state):
            y = torch.randn((len(chunks[i]), nu * examples, dim), generator=noise, device=x.device, dtype=x.dtype)
            state["parts"].append(fit_gaussians(chunks[i], y, truth.eta))
        errors[f"nu-{nu}"] = squared_errors(torch.cat(state["parts"]), truth)["all"]
        theory[nu] = float(asymptotic_covariance(truth, float(nu), run.stream("theory")).trace()) / examples
    mean = {name: Estimate.mean_of(values, "estimate", "nats squared") for name, values in errors.items()}
    run.measure_all({f"squared_error:{name}": estimate for name, estimate in mean.items()})
    for nu in RATIOS:
        run.measure(
            f"error_over_theory:nu-{nu}", Estimate.mean_of(errors[f"nu-{nu}"] / theory[nu], "estimate", "ratio")
        )
    curves = {
        "measured": (RATIOS, [mean[f"nu-{nu}"].value for nu in RATIOS]),
        "theory": (RATIOS, list(theory.values())),
        "maximum likelihood": ((RATIOS[0], RATIOS[-1]), [mean["mle"].value] * 2),
    }
    run.curves("noise-ratio", "What more noise is worth", ("noises a datum", "mean squared error"), curves, log="xy")


def population_gradient(location: float, scale: float, log_z_error: float, noise_std: float, nu: float) -> Tensor:
    """Return the gradient (3,) of the population objective for a logistic density, at the truth but for `log_z_error`.

    It is by the trapezoidal rule on [-60, 60], which converges geometrically on integrands like these.
    """
    grid = torch.linspace(-60, 60, 24_001, dtype=torch.float64)[:, None]
    true = torch.tensor([location, scale, math.log(scale)], dtype=torch.float64)

    def log_logistic(x: Tensor, theta: Tensor) -> Tensor:
        u = (x[:, 0] - theta[0]) / theta[1]
        return logsigmoid(u) + logsigmoid(-u) - theta[2]

    log_noise = log_standard_normal(grid / noise_std) - math.log(noise_std)
    theta = (true + torch.tensor([0.0, 0.0, log_z_error], dtype=torch.float64)).requires_grad_(True)
    log_ratio = log_logistic(grid, theta) - log_noise
    data = log_logistic(grid, true).exp() * data_term(log_ratio, nu)
    noise = log_noise.exp() * noise_term(log_ratio, nu)
    loss = (data + nu * noise).sum() * (grid[1, 0] - grid[0, 0])
    (gradient,) = torch.autograd.grad(loss, theta)
    return gradient


ABOUT = "population gradient of the contrastive loss at the true density and log Z, by quadrature"


@experiment("nce-identity", about=ABOUT, family="ebm", seeds=1, precision="float64")
def vanishing_gradient(run: Run) -> None:
    """Measure the population gradient at the truth, log Z included, for several noises, ratios and data."""
    cases = list(product(*IDENTITY_CASES))
    at_truth, beside = (
        [float(population_gradient(*truth, error, std, nu).abs().max()) for std, nu, truth in cases]
        for error in (0.0, 0.1)
    )
    unit = "nats per unit of the parameter"
    run.measure("largest_gradient", Estimate.exact(max(at_truth), unit, len(cases)))
    run.measure("smallest_gradient_beside", Estimate.exact(min(beside), unit, len(cases)))
