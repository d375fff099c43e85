"""Sliced score matching: Song, Garg, Shi, Ermon 2019, 1905.07088.

Replicated here: that the sliced objectives average to the exact one (eq. 7 and 8), the cost of a step against the
dimension (Fig. 2), and the asymptotic covariances of theorem 3 and corollary 1. The two density models of the paper are
in `ssm_nice` (Table 1) and `ssm_kernel` (Fig. 1).

Deviations: the cost is measured on an energy MLP, not on the deep kernel exponential family, since what the figure
shows is the number of passes that an objective asks of its model; on the CPU, time is processor time. The paper prints
no simulation of its asymptotic covariances: the simulated case, a Gaussian of unknown precision, is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments.operations import OperationCounter
from replicate.likelihood.enumeration import states
from replicate.model import Estimate, Kind
from replicate.papers.ssm_kernel import DKEF_PARKINSONS, DKEF_RED_WINE, DKEF_WHITE_WINE, PARTITION
from replicate.papers.ssm_nice import LEARNING_RATE, NICE_MNIST
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.score_based import matching
from replicate.score_based.networks import EnergyScore, FreeScore

Sliced = Callable[[matching.Score, Tensor, Tensor], Tensor]
SLICED: Mapping[str, Sliced] = {
    "ssm": matching.sliced_score_matching,
    "ssm-vr": matching.sliced_score_matching_vr,
}


# --- the mean over projections is exact score matching ---------------------------------------------------------------


def all_signs(objective: Sliced, score: matching.Score, x: Tensor) -> Tensor:
    """The sliced objective at each x (n, D) for each of the 2^D sign vectors v, shape (n, 2^D)."""
    n, dim = x.shape
    signs = 2 * states(dim, 2, 0, 2**dim, x.device).to(x.dtype) - 1
    every_v = signs.expand(n, -1, -1).reshape(-1, dim)
    return objective(score, x.repeat_interleave(len(signs), 0), every_v).view(n, -1)


def flat_gradient(value: Tensor, net: nn.Module) -> Tensor:
    """The gradient of a scalar in all parameters of a network, one vector (0 where it does not depend on one)."""
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def unbiasedness(context: Context) -> Outcome:
    """Largest difference between the mean over all signs and the exact objective, in values and in gradients."""
    p = context.params
    noise = context.streams.fresh("points")
    with context.streams.initialisation():
        nets = {
            "free": FreeScore(p["dim"], p["hidden"], p["depth"], "softplus"),
            "energy": EnergyScore(p["dim"], p["hidden"], p["depth"], "softplus"),
        }
    estimates = {}
    for kind, net in nets.items():
        net = net.double().to(context.device)
        x = 1.5 * torch.randn(p["points"], p["dim"], generator=noise, device=context.device, dtype=torch.float64)
        exact = matching.implicit_score_matching(net, x)
        for name, objective in SLICED.items():
            sliced = all_signs(objective, net, x)
            error = (sliced.mean(1) - exact).abs().max()
            slope = (flat_gradient(sliced.mean(), net) - flat_gradient(exact.mean(), net)).abs().max()
            spread = sliced.std(1, correction=0).mean()
            found = {"largest_error": error, "largest_gradient_error": slope, "projection_spread": spread}
            for metric, value in found.items():
                estimates[f"{metric}:{name}-{kind}"] = Estimate.exact(value.item(), "nats", p["points"])
    return Outcome(estimates)


UNBIASED = Experiment(
    name="ssm-unbiased",
    about="sliced score matching averaged over all 2^D signs, against exact score matching",
    family="score",
    run=unbiasedness,
    params={"dim": 6, "hidden": 32, "depth": 2, "points": 32},
    seeds=3,
    precision="float64",
)


# --- cost of a step against the dimension (Fig. 2) -------------------------------------------------------------------

OBJECTIVES = ("sm", "ssm", "ssm-vr", "dsm")
LABELS = {"sm": "exact score matching", "ssm": "sliced", "ssm-vr": "sliced, variance reduced", "dsm": "denoising"}
DSM_SIGMA = 0.1


class Step(NamedTuple):
    """One training step: a network, data N(0, I) and what is random in the objective.

    Attributes:
        net: whose parameters the step differentiates in.
        x, v, z: data, projections and noise, each (n, D).
    """

    net: EnergyScore
    x: Tensor
    v: Tensor
    z: Tensor

    def loss(self, objective: str) -> Tensor:
        """The mean objective over the batch."""
        if objective == "sm":
            return matching.implicit_score_matching(self.net, self.x).mean()
        if objective == "dsm":
            return matching.denoising_score_matching(self.net, self.x, DSM_SIGMA, self.z).mean()
        return SLICED[objective](self.net, self.x, self.v).mean()

    def run(self, objective: str) -> None:
        """The loss and its gradient."""
        self.net.zero_grad(set_to_none=True)
        self.loss(objective).backward()


def prepare_step(context: Context, dim: int) -> Step:
    """A step at dimension D with the context's network size and batch."""
    p, streams = context.params, context.streams
    with streams.initialisation():
        net = EnergyScore(dim, p["hidden"], p["depth"], "softplus").to(context.device)
    shape, draws = (p["batch"], dim), streams.fresh(f"data-{dim}")
    x, z = (torch.randn(shape, generator=draws, device=context.device) for _ in range(2))
    return Step(net, x, matching.rademacher(x, draws), z)


def operations(step: Step, objective: str) -> int:
    """Floating-point operations of the matrix products of one step, gradient included."""
    with OperationCounter() as counter:
        step.run(objective)
    return counter.total


def saved_bytes(step: Step, objective: str) -> int:
    """Bytes of all distinct tensors that autograd keeps for the gradient of one step."""
    held: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss(objective)
    del loss
    return sum(storage.nbytes() for storage in held.values())


def seconds(step: Step, objective: str, repeats: int) -> float:
    """Median time of a step: of the processor on a CPU (one thread, not other programs' share), else of the clock."""
    cuda = step.x.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        step.run(objective)
        if cuda:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return median(taken[1:])  # the first step pays for what is set up once


def power(dims: Sequence[int], cost: Sequence[float]) -> float:
    """The slope of log cost against log D, by least squares."""
    return float(np.polyfit(np.log(dims), np.log(cost), 1)[0])


def dimensions(context: Context) -> list[int]:
    """Powers of two from the smallest to the largest dimension of the context."""
    low, high = context.params["smallest"], context.params["largest"]
    return [2**k for k in range(round(math.log2(low)), round(math.log2(high)) + 1)]


def costs(context: Context, metric: str, unit: str, kind: Kind, cost: Callable[[Step, str], float], n: int) -> Outcome:
    """Cost by objective and dimension: the value at the largest D, the power of D, and a plot."""
    dims = dimensions(context)
    table: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for dim in dims:
        step = prepare_step(context, dim)
        for name in OBJECTIVES:
            table[name].append(float(cost(step, name)))
    estimates = {}
    for name, row in table.items():
        estimates[f"{metric}:{name}"] = Estimate(row[-1], math.nan, kind, unit, n)
        estimates[f"{metric}_slope:{name}"] = Estimate(power(dims, row), math.nan, kind, "powers of D", len(dims))
    title = f"{metric.replace('_', ' ').capitalize()} of a step against the dimension"
    lines = tuple(Line(LABELS[name], dims, row) for name, row in table.items())
    plot = Plot(metric.replace("_", "-"), title, "dimension D", unit, lines, log_x=True, log_y=True)
    return Outcome(estimates, (plot,))


def counted_costs(context: Context) -> Outcome:
    """Operations and saved bytes: counts, the same on every machine."""
    by_work = costs(context, "operations", "floating-point operations", "exact", operations, 1)
    by_memory = costs(context, "saved_bytes", "bytes", "exact", saved_bytes, 1)
    return Outcome({**by_work.estimates, **by_memory.estimates}, by_work.plots + by_memory.plots)


def timed_costs(context: Context) -> Outcome:
    """Seconds a step."""
    repeats = context.params["repeats"]
    return costs(context, "time_seconds", "seconds", "estimate", lambda s, name: seconds(s, name, repeats), repeats)


_STEP = {"smallest": 16, "largest": 512, "hidden": 128, "depth": 2, "batch": 32}

COUNTED = Experiment(
    name="ssm-cost-counted",
    about="operations and memory of a training step against the dimension",
    family="score",
    run=counted_costs,
    params=_STEP,
    seeds=1,
)

TIMED = Experiment(
    name="ssm-cost-timed",
    about="seconds of a training step against the dimension",
    family="score",
    run=timed_costs,
    params={**_STEP, "repeats": 3},
    seeds=3,
)


# --- asymptotic covariances (theorem 3, corollary 1) -----------------------------------------------------------------


PROJECTIONS = (1, 2, 4)
LAWS = {"rademacher": False, "gaussian": True}


def precision_matrix(dim: int) -> Tensor:
    """The true precision K (D, D): correlated directions of unequal scale, so that no entry is special."""
    i = torch.arange(dim, dtype=torch.float64)
    scale = 1 + i / 2
    return scale[:, None] * scale * 0.5 ** (i[:, None] - i).abs()


def symmetric_basis(dim: int) -> Tensor:
    """E_a (p, D, D), p = D (D + 1) / 2, with K = sum_a theta_a E_a for theta the upper triangle of K."""
    row, column = torch.triu_indices(dim, dim)
    basis = torch.zeros(len(row), dim, dim, dtype=torch.float64)
    a = torch.arange(len(row))
    basis[a, row, column] = 1
    basis[a, column, row] = 1
    return basis


class Covariances(NamedTuple):
    """What corollary 1 is made of, for sqrt(n) (theta_hat - theta), each (p, p).

    Attributes:
        exact: of score matching, H^-1 (sum_ij V_ij) H^-1 with V_ij = E[grad A_ii grad A_jj'].
        off_diagonal: H^-1 (sum_{i != j} W_ij) H^-1 with W_ij = E[grad A_ij grad A_ij'].
        diagonal: H^-1 (sum_i V_ii) H^-1.
    """

    exact: Tensor
    off_diagonal: Tensor
    diagonal: Tensor

    def sliced(self, projections: int, gaussian: bool) -> Tensor:
        """Corollary 1: of sliced score matching with M Rademacher or Gaussian projections an example."""
        extra = self.off_diagonal + self.diagonal if gaussian else self.off_diagonal
        return self.exact + 2 / projections * extra


def asymptotic_covariances(precision: Tensor) -> Covariances:
    """Corollary 1 for x ~ N(0, K^-1) and the score -Kx with every entry of K free.

    The sliced objective is v'Av with A_ij = d_i s_j + s_i s_j / 2 = -K_ij + (Kx)_i (Kx)_j / 2. Its derivative in
    theta_a is x'Q x - (E_a)_ij with Q the symmetric part of (E_a,i K_j' + K_i E_a,j') / 2, rows taken as columns. It
    has mean zero at the truth, so that E[.^2] is the covariance of quadratic forms, 2 tr(Q S R S), S = K^-1.
    """
    basis, cov = symmetric_basis(len(precision)).to(precision), torch.linalg.inv(precision)
    q = 0.5 * (torch.einsum("aik,jl->aijkl", basis, precision) + torch.einsum("ik,ajl->aijkl", precision, basis))
    q = 0.5 * (q + q.transpose(-1, -2))
    qs = q @ cov
    moments = 2 * torch.einsum("aijkl,bijlk->ijab", qs, qs)
    diagonal = moments.diagonal().sum(-1)
    trace = torch.einsum("aiikl->akl", qs)
    total = 2 * torch.einsum("akl,blk->ab", trace, trace)
    inverse = torch.linalg.inv(torch.einsum("aij,bjk,ki->ab", basis, basis, cov))

    def sandwich(middle: Tensor) -> Tensor:
        return inverse @ middle @ inverse

    return Covariances(sandwich(total), sandwich(moments.sum((0, 1)) - diagonal), sandwich(diagonal))


def normal_equations(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """G (R, p, p) and h (R, p) of R data sets x (R, n, D) with projections v of the same shape.

    For the score -Kx the sliced objective is -v'Kv + (v'Kx)^2 / 2 = -h'theta + (g'theta)^2 / 2, with g_a = v'E_a x and
    h_a = v'E_a v; its mean over the examples is least where G theta = h. Both come from moments of v and x, folded.
    """
    n, dim = x.shape[1:]
    fold = symmetric_basis(dim).to(x).flatten(1)
    products = (v[..., None] * x[..., None, :]).flatten(2)
    moments = products.transpose(1, 2) @ products / n
    directions = (v.transpose(1, 2) @ v / n).flatten(1)
    return fold @ moments @ fold.T, directions @ fold.T


class Equations:
    """Normal equations summed over projections."""

    def __init__(self) -> None:
        self.g: Tensor | float = 0.0
        self.h: Tensor | float = 0.0

    def add(self, x: Tensor, v: Tensor) -> Equations:
        """One more projection v of every example x, both (R, n, D)."""
        g, h = normal_equations(x, v)
        self.g, self.h = self.g + g, self.h + h
        return self

    def solution(self) -> Tensor:
        """theta_hat (R, p)."""
        return torch.linalg.solve(torch.as_tensor(self.g), torch.as_tensor(self.h))


def exact_estimates(x: Tensor) -> Tensor:
    """Score matching estimates (R, p) from x (R, n, D): the trace is the sum over the coordinate directions."""
    equations = Equations()
    for unit in torch.eye(x.shape[-1], dtype=x.dtype, device=x.device):
        equations.add(x, unit.expand_as(x))
    return equations.solution()


def sliced_estimates(x: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    """Sliced score matching estimates (R, p) from x (R, n, D), by law and number of projections.

    The Rademacher directions are the signs of the Gaussian ones: each law is exact, and what differs between them is
    seen with less noise.
    """
    rademacher, gaussian = Equations(), Equations()
    found: dict[str, Tensor] = {}
    for m in range(1, PROJECTIONS[-1] + 1):
        normal = torch.randn(x.shape, generator=draws, dtype=x.dtype, device=x.device)
        rademacher.add(x, normal.sign())
        gaussian.add(x, normal)
        if m in PROJECTIONS:
            found |= {f"rademacher-{m}": rademacher.solution(), f"gaussian-{m}": gaussian.solution()}
    return found


def simulate(context: Context, precision: Tensor) -> dict[str, Tensor]:
    """n times the covariance (p, p) of the estimates over many data sets, by estimator."""
    p = context.params
    draws = context.streams.fresh("data")
    factor = torch.linalg.cholesky(torch.linalg.inv(precision))
    state: State = {"draws": draws, "parts": {}}
    for i in resumable("data sets", math.ceil(p["datasets"] / p["chunk"]), state):
        count = min(p["chunk"], p["datasets"] - i * p["chunk"])
        shape = (count, p["examples"], p["dim"])
        x = torch.randn(shape, generator=draws, device=context.device, dtype=torch.float64) @ factor.T
        for name, found in {"sm": exact_estimates(x), **sliced_estimates(x, draws)}.items():
            state["parts"].setdefault(name, []).append(found)
    return {name: p["examples"] * torch.cov(torch.cat(found).T) for name, found in state["parts"].items()}


def covariance_plot(theory: Covariances, found: Mapping[str, float]) -> Plot:
    """Total variance against the number of projections: theory as lines with the simulated values on them."""
    curve = torch.linspace(0, math.log(PROJECTIONS[-1]), 40).exp().tolist()
    lines = []
    for law, gaussian in LAWS.items():
        extra = theory.off_diagonal + (theory.diagonal if gaussian else torch.zeros_like(theory.diagonal))
        predicted = [float((theory.exact + 2 / m * extra).trace()) for m in curve]
        lines.append(Line(f"{law}, theory", curve, predicted))
        lines.append(Line(f"{law}, simulated", PROJECTIONS, [found[f"{law}-{m}"] for m in PROJECTIONS]))
    title = "Total asymptotic variance of sliced score matching"
    levels = {"score matching": float(theory.exact.trace())}
    return Plot("variance", title, "projections M", "n times the trace of the covariance", tuple(lines), levels=levels)


def covariance_simulation(context: Context) -> Outcome:
    """Simulated covariances over the theory's, and what each projection law adds over what it should add."""
    precision = precision_matrix(context.params["dim"]).to(context.device)
    theory = asymptotic_covariances(precision)
    simulated = simulate(context, precision)
    predicted = {"sm": theory.exact}
    predicted |= {f"{law}-{m}": theory.sliced(m, gaussian) for law, gaussian in LAWS.items() for m in PROJECTIONS}
    total = {name: float(value.trace()) for name, value in simulated.items()}
    ratios: dict[str, Tensor | float] = {}
    for name, value in simulated.items():
        ratios[f"covariance_ratio:{name}"] = total[name] / predicted[name].trace()
        ratios[f"entry_error:{name}"] = (value - predicted[name]).norm() / predicted[name].norm()
    for m in PROJECTIONS:
        signs, normal = total[f"rademacher-{m}"], total[f"gaussian-{m}"]
        ratios[f"off_diagonal_ratio:{m}"] = (signs - total["sm"]) / (2 / m * theory.off_diagonal.trace())
        ratios[f"diagonal_ratio:{m}"] = (normal - signs) / (2 / m * theory.diagonal.trace())
    n = context.params["datasets"]
    estimates = {name: Estimate(float(value), math.nan, "estimate", "ratio", n) for name, value in ratios.items()}
    return Outcome(estimates, (covariance_plot(theory, total),))


COVARIANCE = Experiment(
    name="ssm-covariance",
    about="covariance of precision estimates, simulated, against corollary 1",
    family="score",
    run=covariance_simulation,
    params={"dim": 3, "examples": 2000, "datasets": 2400, "chunk": 10},
    seeds=5,
    precision="float64",
)


PAPER = Paper(
    "ssm",
    Path(__file__).with_suffix(".toml"),
    experiments=(
        UNBIASED,
        COUNTED,
        TIMED,
        COVARIANCE,
        NICE_MNIST,
        LEARNING_RATE,
        DKEF_PARKINSONS,
        DKEF_RED_WINE,
        DKEF_WHITE_WINE,
        PARTITION,
    ),
)
