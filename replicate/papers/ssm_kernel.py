"""Deep kernel exponential families: Song, Garg, Shi, Ermon 2019, 1905.07088, section 5.1.1 and Fig. 1.

The model is Wenliang et al. 2019, 1811.08357: log p(x) = sum_m alpha_m k(x, z_m) + log q0(x) - log Z, with k a mixture
of Gaussian kernels on features that networks compute, inducing points z_m, and q0 = N(0, 4 I). For every objective here
the best alpha solves linear equations; kernels and inducing points are trained through that solution, by the loss on
examples that did not make it.

Derivatives in x are taken along directions only, by carrying second-order Taylor expansions through the networks; exact
score matching takes the D coordinate directions, sliced score matching one random one.

Deviations: the table is split so that equal rows stay together, by a permutation of each seed; the ridge is chosen at
the end on a grid of powers of ten, not by 1000 gradient steps; denoising score matching takes its noise level from a
grid by the exact validation loss; the validation loss is looked at every fifty steps; the log-likelihood takes log Z
from annealed importance sampling with the printed proposal N(0, 2 I). Curvature propagation and approximate
backpropagation are not here.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from replicate.data.files import contents, data_file
from replicate.likelihood.ais import ais, schedule
from replicate.model import Estimate, Model
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Outcome
from replicate.sampling.langevin import mala
from replicate.score_based.matching import rademacher
from replicate.score_based.networks import score_of
from replicate.tasks.densities import GaussianMixture

#: variance of q0, and of the released code's importance proposal
BASE_VARIANCE = 4.0
#: log10 of the kernels' squared length scales at the start
LOG_SCALES = (0.0, 0.5185, 1.0)


# --- the model -------------------------------------------------------------------------------------------------------


class Expansion(NamedTuple):
    """phi(x + t v) in t, for K directions v an example: to second order for the last C of them, to first for the rest.

    Attributes:
        value: phi (n, H).
        first: derivatives in t at 0, (n, K, H).
        second: second derivatives, (n, C, H).
    """

    value: Tensor
    first: Tensor
    second: Tensor

    @property
    def curved(self) -> Tensor:
        """First derivatives along the last C directions, (n, C, H)."""
        return self.first[:, self.first.shape[1] - self.second.shape[1] :]


def through_linear(e: Expansion, layer: nn.Linear) -> Expansion:
    """The expansion of W phi + b."""
    return Expansion(layer(e.value), e.first @ layer.weight.T, e.second @ layer.weight.T)


def through_softplus(e: Expansion) -> Expansion:
    """The expansion of log(1 + exp phi)."""
    gate = torch.sigmoid(e.value)[:, None]
    second = gate * e.second + gate * (1 - gate) * e.curved.square()
    return Expansion(nn.functional.softplus(e.value), gate * e.first, second)


class Features(nn.Module):
    """Two hidden softplus layers with a linear path beside them: x (n, D) -> phi (n, H)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)])
        self.skip = nn.Linear(dim, hidden, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=hidden**-0.5)

    def expand(self, x: Tensor, v: Tensor, curved: int) -> Expansion:
        """The expansion of phi at x (n, D) along v (n, K, D), to second order for the last `curved` directions."""
        start = Expansion(x, v, v.new_zeros(len(v), curved, v.shape[2]))
        first, second, third = self.layers
        deep = through_linear(through_softplus(through_linear(start, first)), second)  # type: ignore[arg-type]
        deep = through_linear(through_softplus(deep), third)  # type: ignore[arg-type]
        wide = through_linear(start, self.skip)
        return Expansion(*(a + b for a, b in zip(deep, wide, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(x, x.new_zeros(len(x), 0, x.shape[1]), 0).value


def gaussian_kernel(e: Expansion, centres: Tensor, width: Tensor) -> Expansion:
    """exp(-|phi(x) - c|^2 / (2 width)) for centres c (M, H) with its expansion; M takes the place of H."""
    # multiplied out: no (n, M, H) tensor is made; no distance is below zero but for rounding
    squares = e.value.square().sum(-1, keepdim=True) + centres.square().sum(-1)
    distance = (squares - 2 * e.value @ centres.T).clamp_min(0)

    def along(d: Tensor) -> Tensor:
        """<phi - c, d> for d (n, K, H), shape (n, K, M)."""
        return (e.value[:, None] * d).sum(-1, keepdim=True) - d @ centres.T

    k = torch.exp(-distance / (2 * width))
    slope, bend = along(e.first), along(e.second) + e.curved.square().sum(-1, keepdim=True)
    curved = slope[:, slope.shape[1] - bend.shape[1] :]
    return Expansion(k, -k[:, None] * slope / width, k[:, None] * (curved.square() / width - bend) / width)


class DeepKernelFamily(nn.Module):
    """log p(x) = sum_m alpha_m k(x, z_m) - |x|^2 / 8 up to log Z.

    Args:
        inducing: z at the start, shape (M, D).
        hidden: H, units of a layer and features of a kernel.
    """

    alpha: Tensor

    def __init__(self, inducing: Tensor, hidden: int) -> None:
        super().__init__()
        self.inducing = nn.Parameter(inducing.clone())
        self.features = nn.ModuleList(Features(inducing.shape[1], hidden) for _ in LOG_SCALES)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALES))
        self.mixing = nn.Parameter(torch.zeros(len(LOG_SCALES)))
        self.log_ridge = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("alpha", torch.zeros(len(inducing)))

    def kernels(self, x: Tensor, v: Tensor, curved: int) -> Expansion:
        """k(x, z_m) (n, M) and its derivatives along v (n, K, D), second ones along the last `curved` directions."""
        total: list[Tensor] = []
        for features, scale, weight in zip(self.features, self.log_scale, self.mixing.softmax(0), strict=True):
            assert isinstance(features, Features)
            part = gaussian_kernel(features.expand(x, v, curved), features(self.inducing), 10**scale)
            scaled = [weight * p for p in part]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return Expansion(*total)

    def log_density(self, x: Tensor) -> Tensor:
        """log p + log Z in nats of x (n, D), shape (n,)."""
        k = self.kernels(x, x.new_zeros(len(x), 0, x.shape[1]), 0).value
        return k @ self.alpha - 0.5 * x.square().sum(1) / BASE_VARIANCE

    def score(self, x: Tensor) -> Tensor:
        """grad_x log p (n, D)."""
        return self.kernels(x, coordinate_directions(x), 0).first @ self.alpha - x / BASE_VARIANCE


# --- objectives, as quadratic functions of alpha ---------------------------------------------------------------------


class Slices(NamedTuple):
    """sum_k fit_k (v_k's - target_k)^2 / 2 + v_k'(ds/dx)v_k over the last C, the form that all objectives share.

    Attributes:
        x: where the score is asked for, (n, D).
        v: directions, (n, K, D).
        fit: weights, (K,).
        curved: C, how many directions the second term takes.
        target: (n, K).
    """

    x: Tensor
    v: Tensor
    fit: Tensor
    curved: int
    target: Tensor


Objective = Callable[[Tensor, torch.Generator], Slices]


def coordinate_directions(x: Tensor) -> Tensor:
    """e_1 .. e_D for every example, (n, D, D)."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)


def exact(x: Tensor, draws: torch.Generator) -> Slices:
    """Implicit score matching: the trace is the sum over the coordinate directions."""
    ones = x.new_ones(x.shape[1])
    return Slices(x, coordinate_directions(x), ones, x.shape[1], torch.zeros_like(x))


def sliced(x: Tensor, draws: torch.Generator) -> Slices:
    """One Rademacher projection an example (eq. 7)."""
    return Slices(x, rademacher(x, draws)[:, None], x.new_ones(1), 1, x.new_zeros(len(x), 1))


def sliced_vr(x: Tensor, draws: torch.Generator) -> Slices:
    """The curvature along one Rademacher projection, the norm of the whole score (eq. 8)."""
    v = torch.cat([coordinate_directions(x), rademacher(x, draws)[:, None]], dim=1)
    fit = x.new_ones(v.shape[1])
    fit[-1] = 0
    return Slices(x, v, fit, 1, x.new_zeros(v.shape[:2]))


def denoising(sigma: float) -> Objective:
    """|sigma s(x + sigma z) + z|^2 / 2."""

    def objective(x: Tensor, draws: torch.Generator) -> Slices:
        z = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)
        ones = x.new_ones(x.shape[1])
        return Slices(x + sigma * z, coordinate_directions(x), sigma**2 * ones, 0, -z / sigma)

    return objective


#: noise levels that denoising score matching chooses from, in standard deviations of the data
SIGMAS = (0.05, 0.1, 0.2, 0.4)
OBJECTIVES: Mapping[str, tuple[Objective, ...]] = {
    "sm": (exact,),
    "ssm": (sliced,),
    "ssm-vr": (sliced_vr,),
    "dsm": tuple(denoising(sigma) for sigma in SIGMAS),
}


class Quadratic(NamedTuple):
    """alpha'G alpha / 2 + b'alpha + c: an objective's mean over examples."""

    g: Tensor
    b: Tensor
    c: Tensor

    def __call__(self, alpha: Tensor) -> Tensor:
        """Its value, a scalar."""
        return 0.5 * alpha @ self.g @ alpha + self.b @ alpha + self.c

    def minimiser(self, log_ridge: Tensor) -> Tensor:
        """The alpha of least value plus 10^log_ridge |alpha|^2 / 2."""
        eye = torch.eye(len(self.b), dtype=self.b.dtype, device=self.b.device)
        return torch.linalg.solve(self.g + 10**log_ridge * eye, -self.b)


def quadratic(model: DeepKernelFamily, slices: Slices) -> Quadratic:
    """The mean objective over the examples of `slices`, as a function of alpha."""
    n = len(slices.x)
    k = model.kernels(slices.x, slices.v, slices.curved)
    residual = -(slices.v @ slices.x[:, :, None]).squeeze(-1) / BASE_VARIANCE - slices.target
    base_bend = -slices.v[:, slices.v.shape[1] - slices.curved :].square().sum() / BASE_VARIANCE
    weighted = k.first * slices.fit[:, None]
    g = weighted.flatten(0, 1).T @ k.first.flatten(0, 1) / n
    b = ((weighted * residual[:, :, None]).sum((0, 1)) + k.second.sum((0, 1))) / n
    c = ((0.5 * slices.fit * residual.square()).sum() + base_bend) / n
    return Quadratic(g, b, c)


@torch.no_grad()
def quadratic_over(
    model: DeepKernelFamily, objective: Objective, x: Tensor, draws: torch.Generator, chunk: int = 500
) -> Quadratic:
    """As `quadratic`, over all rows of x (n, D), a chunk at a time."""
    parts = [(len(rows) / len(x), quadratic(model, objective(rows, draws))) for rows in x.split(chunk)]
    return Quadratic(*(sum((w * q[i] for w, q in parts[1:]), parts[0][0] * parts[0][1][i]) for i in range(3)))


# --- data ------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Whitened rows (n, D), float64."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Source(NamedTuple):
    """Where a table stands in REPLICATE_DATA/uci and which columns and steps it needs."""

    file: str
    delimiter: str
    columns: slice
    rounded: bool


SOURCES: Mapping[str, Source] = {
    "parkinsons": Source("parkinsons_updrs.data", ",", slice(3, None), rounded=False),
    "red-wine": Source("winequality-red.csv", ";", slice(None, -1), rounded=True),
    "white-wine": Source("winequality-white.csv", ";", slice(None, -1), rounded=True),
}
#: of each pair of columns that correlate more than this the first is dropped (where values are not rounded)
CORRELATED = 0.98
#: standard deviation of the noise on whitened rows
NOISE = 0.05


ORIGIN = "the UCI repository (archive.ics.uci.edu)"


def read_rows(source: Source) -> np.ndarray:
    """The numbers of a table, (n, columns).

    Raises:
        UsageError: the file is not there.
    """
    content = contents(data_file(f"uci/{source.file}", ORIGIN))
    return np.loadtxt(io.BytesIO(content), delimiter=source.delimiter, skiprows=1)[:, source.columns]


def without_correlated(rows: np.ndarray) -> np.ndarray:
    """Columns dropped one by one, the first of a pair with |correlation| > CORRELATED, until there is none."""
    while True:
        near = (np.abs(np.corrcoef(rows.T)) > CORRELATED).sum(1) > 1
        if not near.any():
            return rows
        rows = np.delete(rows, int(near.argmax()), axis=1)


def copies_last(rows: np.ndarray, share: float, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a random share and of the rest, equal rows on one side; `order` permutes the distinct rows."""
    _, copy_of = np.unique(rows, axis=0, return_inverse=True)
    held_out = order[: max(1, round(share * len(order)))]
    inside = np.isin(copy_of.reshape(-1), held_out)
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def load_table(name: str, draws: torch.Generator) -> Table:
    """A UCI table as in the released code: dequantised, whitened over all rows, blurred, split 81 : 9 : 10.

    Raises:
        UsageError: the file is not in REPLICATE_DATA/uci.
    """
    source = SOURCES[name]
    rows = read_rows(source)

    def permutation(n: int) -> np.ndarray:
        return torch.randperm(n, generator=draws, device=draws.device).cpu().numpy()

    def distinct(part: np.ndarray) -> int:
        return len(np.unique(part, axis=0))

    rest, test = copies_last(rows, 0.1, permutation(distinct(rows)))
    train, validation = copies_last(rows[rest], 0.1, permutation(distinct(rows[rest])))
    x = rows if source.rounded else without_correlated(rows)
    if source.rounded:
        gap = np.array([np.median(np.diff(np.unique(column))) for column in x.T])
        x = x + gap * (2 * torch.rand(x.shape, generator=draws, device=draws.device).cpu().numpy() - 1)
    whitened = torch.from_numpy(whiten(x))
    noise = torch.randn(whitened.shape, generator=draws, device=draws.device, dtype=torch.float64)
    whitened = whitened + NOISE * noise.cpu()
    return Table(whitened[rest[train]], whitened[rest[validation]], whitened[test])


def whiten(x: np.ndarray) -> np.ndarray:
    """Principal components of unit variance."""
    centred = x - x.mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    return centred @ (vt.T / s) * math.sqrt(len(x))


# --- training --------------------------------------------------------------------------------------------------------


def train(
    model: DeepKernelFamily, objective: Objective, table: Table, p: Mapping[str, Any], draws: torch.Generator
) -> float:
    """Kernels by gradient, alpha in closed form; the model keeps its best kernels and gets its alpha and ridge.

    Args:
        p: "steps" at most, "patience" (steps without a better validation loss), "batch", "lr", "validate_every".

    Returns:
        The exact score matching loss on the validation rows.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=p["lr"])
    state: State = {
        "model": model,
        "optimizer": optimizer,
        "draws": draws,
        "best": copy.deepcopy(model.state_dict()),
        "least": math.inf,
        "best_step": 0,
        "stopped": False,
    }
    for i in resumable("training", p["steps"], state):
        if state["stopped"]:
            continue
        step = i + 1
        rows = torch.randint(len(table.train), (p["batch"],), generator=draws, device=draws.device)
        fitted, judged = table.train[rows].chunk(2)
        alpha = quadratic(model, objective(fitted, draws)).minimiser(model.log_ridge)
        optimizer.zero_grad(set_to_none=True)
        quadratic(model, objective(judged, draws))(alpha).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        if step % p["validate_every"]:
            continue
        some = torch.randperm(len(table.train), generator=draws, device=draws.device)[:1000]
        alpha = quadratic_over(model, objective, table.train[some], draws).minimiser(model.log_ridge.detach())
        loss = float(quadratic_over(model, objective, table.validation, draws)(alpha))
        if loss < state["least"]:
            state |= {"best": copy.deepcopy(model.state_dict()), "least": loss, "best_step": step}
        else:
            state["stopped"] = step - state["best_step"] > p["patience"]
    model.load_state_dict(state["best"])
    return finish(model, objective, table, draws)


@torch.no_grad()
def finish(model: DeepKernelFamily, objective: Objective, table: Table, draws: torch.Generator) -> float:
    """alpha from all training rows with the ridge that the objective's validation loss likes best.

    Returns:
        The exact score matching loss on the validation rows.
    """
    whole = quadratic_over(model, objective, table.train, draws)
    judge = quadratic_over(model, objective, table.validation, draws)
    ridges = torch.arange(-8.0, 2.0, 0.5, dtype=whole.b.dtype, device=whole.b.device)
    fits = [whole.minimiser(ridge) for ridge in ridges]
    model.alpha.copy_(min(fits, key=lambda alpha: float(judge(alpha))))
    return float(quadratic_over(model, exact, table.validation, draws)(model.alpha))


# --- log Z -----------------------------------------------------------------------------------------------------------


class GaussianPath(Model):
    """A geometric path from N(0, variance I) to an unnormalised density, with Metropolis-adjusted Langevin steps.

    Args:
        dim: D.
        variance: of the proposal.
        log_density: log f, (n, D) -> (n,).
        density_score: its gradient, (n, D) -> (n, D).
        step_size: of the Langevin step, x + eps/2 score + sqrt(eps) z.
    """

    family = "ebm"
    capabilities = frozenset({"annealing"})

    def __init__(
        self,
        dim: int,
        variance: float,
        log_density: Callable[[Tensor], Tensor],
        density_score: Callable[[Tensor], Tensor],
        step_size: float,
    ) -> None:
        super().__init__()
        self.dim, self.variance, self.step_size = dim, variance, step_size
        self.log_density, self.density_score = log_density, density_score

    def base_log_z(self) -> float:
        return 0.5 * self.dim * math.log(2 * math.pi * self.variance)

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, self.dim, generator=generator, device=generator.device, dtype=torch.float64)
        return math.sqrt(self.variance) * z

    def base_log_density(self, x: Tensor) -> Tensor:
        """log of the unnormalised proposal, (n,)."""
        return -0.5 * x.square().sum(1) / self.variance

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        increment = (beta_next - beta) * (self.log_density(x) - self.base_log_density(x))

        def between(y: Tensor) -> Tensor:
            return beta_next * self.log_density(y) + (1 - beta_next) * self.base_log_density(y)

        def score(y: Tensor) -> Tensor:
            return beta_next * self.density_score(y) - (1 - beta_next) * y / self.variance

        return increment, mala(between, score, x, 1, self.step_size, generator).samples


class LogZ(NamedTuple):
    """log Z in nats and the effective sample size as a share of the draws."""

    value: float
    ess_share: float


def annealed_log_z(path: GaussianPath, chains: int, temperatures: int, draws: torch.Generator) -> LogZ:
    """By annealed importance sampling along the path."""
    run = ais(path, chains, schedule(temperatures), draws)
    return LogZ(run.log_z.value, run.ess.value / chains)


@torch.no_grad()
def importance_log_z(path: GaussianPath, samples: int, draws: torch.Generator, chunk: int = 10_000) -> LogZ:
    """By plain importance sampling from the path's proposal."""
    parts = []
    for start in range(0, samples, chunk):
        x = path.base_sample(min(chunk, samples - start), draws)
        parts.append(path.log_density(x) - path.base_log_density(x))
    log_w = torch.cat(parts)
    total = torch.logsumexp(log_w, 0)
    ess = torch.exp(2 * total - torch.logsumexp(2 * log_w, 0))
    return LogZ(float(total) - math.log(samples) + path.base_log_z(), float(ess) / samples)


# --- Fig. 1 ----------------------------------------------------------------------------------------------------------


def fitted_family(context: Context, table: Table, candidates: tuple[Objective, ...]) -> DeepKernelFamily:
    """The model trained by each candidate objective that has the least exact validation loss."""
    p = context.params
    found: list[tuple[float, DeepKernelFamily]] = []
    for objective in candidates:
        draws = context.streams.fresh("training")
        chosen = torch.randperm(len(table.train), generator=draws, device=draws.device)[: p["inducing"]]
        with context.streams.initialisation():
            model = DeepKernelFamily(table.train[chosen], p["hidden"]).double().to(context.device)
        found.append((train(model, objective, table, p, draws), model))
    return min(found, key=lambda pair: pair[0])[1]


def log_likelihood(model: DeepKernelFamily, x: Tensor, p: Mapping[str, Any], draws: torch.Generator) -> Estimate:
    """Mean log p of x (n, D) with log Z by annealed importance sampling from N(0, 2 I)."""
    gradient = score_of(lambda y: -model.log_density(y))  # one pass back, where `score` takes one for each direction
    path = GaussianPath(x.shape[1], 2.0, model.log_density, gradient, p["step_size"])
    run = ais(path, p["chains"], schedule(p["temperatures"]), draws)
    with torch.no_grad():
        mean = Estimate.mean_of(model.log_density(x), "estimate", "nats")
    stderr = math.hypot(mean.stderr, run.log_z.stderr)
    return Estimate(mean.value - run.log_z.value, stderr, "estimate", "nats", mean.n)


def figure_1(context: Context) -> Outcome:
    """Exact test score matching loss and log-likelihood by training objective."""
    raw = load_table(context.params["table"], context.streams.fresh("split"))
    table = Table(*(part.to(context.device) for part in raw))
    estimates: dict[str, Estimate] = {}
    for name, candidates in OBJECTIVES.items():
        model = fitted_family(context, table, candidates)
        test = context.streams.fresh("test")
        loss = float(quadratic_over(model, exact, table.test, test)(model.alpha))
        estimates[f"sm_loss:{name}"] = Estimate(loss, math.nan, "estimate", "score matching loss", len(table.test))
        estimates[f"log_likelihood:{name}"] = log_likelihood(model, table.test, context.params, test)
    why = "curvature propagation and approximate backpropagation are not implemented"
    return Outcome(estimates, missing={f"sm_loss:{name}": why for name in ("cp", "approximate-bp")})


_FIGURE_1 = {
    "inducing": 200,
    "hidden": 30,
    "steps": 11_000,
    "patience": 200,
    "batch": 200,
    "lr": 0.01,
    "validate_every": 50,
    "chains": 500,
    "temperatures": 1000,
    "step_size": 0.05,
}


def _figure_1(table: str, words: str) -> Experiment:
    return Experiment(
        name=f"ssm-dkef-{table}",
        about=f"deep kernel exponential family on {words} by training objective",
        family="ebm",
        run=figure_1,
        params={"table": table, **_FIGURE_1},
        seeds=15,
        profiles=("full",),
        files=(f"uci/{SOURCES[table].file}",),
        precision="float64",
    )


DKEF_PARKINSONS = _figure_1("parkinsons", "Parkinsons telemonitoring")
DKEF_RED_WINE = _figure_1("red-wine", "red wine quality")
DKEF_WHITE_WINE = _figure_1("white-wine", "white wine quality")


# --- as printed, as released: log Z ----------------------------------------------------------------------------------


def whitened_mixture(dim: int, components: int, draws: torch.Generator) -> GaussianMixture:
    """A normalised mixture of narrow Gaussians with mean 0 and covariance I, like a whitened table of several groups.

    Before whitening the means are standard normal and the variances within a component run from 0.01 to 1.
    """
    means = torch.randn(components, dim, generator=draws, device=draws.device, dtype=torch.float64).cpu()
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=draws, device=draws.device, dtype=torch.float64).cpu())
    within = (basis * torch.logspace(-2, 0, dim, dtype=torch.float64)) @ basis.T
    means = means - means.mean(0)
    total = within + means.T @ means / components
    whitening = torch.linalg.inv(torch.linalg.cholesky(total))
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    return GaussianMixture(means @ whitening.T, whitening @ within @ whitening.T, weights)


def partition_functions(context: Context) -> Outcome:
    """Error of log Z of a density whose Z is known, by estimator and proposal, at equal evaluations."""
    p = context.params
    density = whitened_mixture(p["dim"], p["components"], context.streams.fresh("density"))
    shift = p["log_z"]
    # an annealing step evaluates the density or its score five times
    evaluations = 5 * p["chains"] * p["temperatures"]
    estimates: dict[str, Estimate] = {}
    for variance in (2.0, 4.0):
        path = GaussianPath(
            p["dim"], variance, lambda x: density.log_prob(x) + shift, lambda x: density.score(x), p["step_size"]
        )
        draws = context.streams.fresh("log-z")
        found = {
            "annealed": (annealed_log_z(path, p["chains"], p["temperatures"], draws), p["chains"]),
            "importance": (importance_log_z(path, evaluations, draws), evaluations),
        }
        for method, (log_z, n) in found.items():
            name = f"{method}-{variance:.0f}"
            error = log_z.value - shift
            estimates[f"log_z_error:{name}"] = Estimate(error, math.nan, "estimate", "nats", n)
            estimates[f"log_z_absolute_error:{name}"] = Estimate(abs(error), math.nan, "estimate", "nats", n)
            estimates[f"ess_share:{name}"] = Estimate(log_z.ess_share, math.nan, "estimate", "ratio", n)
    return Outcome(estimates)


PARTITION = Experiment(
    name="ssm-partition",
    about="log Z of a known 11-dimensional density by annealing from N(0, 2I) and by importance sampling from N(0, 4I)",
    family="ebm",
    run=partition_functions,
    params={"dim": 11, "components": 3, "log_z": 3.0, "chains": 500, "temperatures": 400, "step_size": 0.05},
    seeds=5,
    precision="float64",
)
