"""The sliced objectives: mean over projections (eq. 7, 8), cost (Fig. 2), asymptotic covariances (corollary 1)."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.experiments.operations import OperationCounter
from replicate.likelihood.enumeration import states
from replicate.model import Estimate, Kind
from replicate.resume import State, resumable
from replicate.score_based import matching
from replicate.score_based.networks import EnergyScore, FreeScore

Sliced = Callable[[matching.Score, Tensor, Tensor], Tensor]
SLICED: Mapping[str, Sliced] = {"ssm": matching.sliced_score_matching, "ssm-vr": matching.sliced_score_matching_vr}
#: objectives of Fig. 2 and their labels
LABELS = {"sm": "exact score matching", "ssm": "sliced", "ssm-vr": "sliced, variance reduced", "dsm": "denoising"}
DSM_SIGMA = 0.1


def all_signs(objective: Sliced, score: matching.Score, x: Tensor) -> Tensor:
    """Return the sliced objective at each x (n, D) for each of the 2^D sign vectors v, shape (n, 2^D)."""
    n, dim = x.shape
    signs = 2 * states(dim, 2, 0, 2**dim, x.device).to(x.dtype) - 1
    return objective(score, x.repeat_interleave(len(signs), 0), signs.expand(n, -1, -1).reshape(-1, dim)).view(n, -1)


def flat_gradient(value: Tensor, net: nn.Module) -> Tensor:
    """Return the gradient of a scalar in all parameters of a network, one vector; 0 where it does not depend on one."""
    parts = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


@experiment("ssm-unbiased", family="score", seeds=3, precision="float64")
def unbiasedness(run: Run, *, dim: int = 6, hidden: int = 32, depth: int = 2, points: int = 32) -> None:
    """Sliced score matching averaged over all 2^D signs, against exact score matching."""
    noise = run.stream("points")
    with run.initialisation():
        kinds = {"free": FreeScore, "energy": EnergyScore}
        nets = {kind: make(dim, hidden, depth, "softplus").double() for kind, make in kinds.items()}
    for kind, net in nets.items():
        net = net.to(run.device)
        x = 1.5 * torch.randn(points, dim, generator=noise, device=run.device, dtype=torch.float64)
        exact = matching.implicit_score_matching(net, x)
        for name, objective in SLICED.items():
            sliced = all_signs(objective, net, x)
            slope = (flat_gradient(sliced.mean(), net) - flat_gradient(exact.mean(), net)).abs().max()
            found = {
                "largest_error": (sliced.mean(1) - exact).abs().max(),
                "largest_gradient_error": slope,
                "projection_spread": sliced.std(1, correction=0).mean(),
            }
            run.measure_all({m: Estimate.exact(v.item(), "nats", points) for m, v in found.items()}, f"{name}-{kind}")


class Step(NamedTuple):
    """One training step of a network on data x from N(0, I), with projections v and noise z, each (n, D)."""

    net: EnergyScore
    x: Tensor
    v: Tensor
    z: Tensor

    def loss(self, objective: str) -> Tensor:
        """Return the mean objective over the batch."""
        if objective == "sm":
            return matching.implicit_score_matching(self.net, self.x).mean()
        if objective == "dsm":
            return matching.denoising_score_matching(self.net, self.x, DSM_SIGMA, self.z).mean()
        return SLICED[objective](self.net, self.x, self.v).mean()

    def take(self, objective: str) -> None:
        """Compute the loss and its gradient."""
        self.net.zero_grad(set_to_none=True)
        self.loss(objective).backward()


def operations(step: Step, objective: str) -> int:
    """Count floating-point operations of the matrix products of one step, gradient included."""
    with OperationCounter() as counter:
        step.take(objective)
    return counter.total


def saved_bytes(step: Step, objective: str) -> int:
    """Count the bytes of all distinct tensors that autograd keeps for the gradient of one step."""
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
    """Return the median time of a step: processor time of this process on a CPU (one thread), else wall time."""
    cuda = step.x.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        step.take(objective)
        if cuda:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return median(taken[1:])  # the first step includes what is set up once


def power(dims: Sequence[int], cost: Sequence[float]) -> float:
    """Return the slope of log cost against log D, by least squares."""
    return float(np.polyfit(np.log(dims), np.log(cost), 1)[0])


def training_steps(run: Run, smallest: int, largest: int, hidden: int, depth: int, batch: int) -> dict[int, Step]:
    """Prepare a step at each dimension D, the powers of two from the smallest to the largest."""
    steps = {}
    for dim in (2**k for k in range(smallest.bit_length() - 1, largest.bit_length())):
        net = run.build(partial(EnergyScore, dim, hidden, depth, "softplus"))
        draws = run.stream(f"data-{dim}")
        x, z = (torch.randn(batch, dim, generator=draws, device=run.device) for _ in range(2))
        steps[dim] = Step(net, x, matching.rademacher(x, draws), z)
    return steps


Cost = Callable[[Step, str], float]


def measure_costs(
    run: Run, steps: Mapping[int, Step], metric: str, unit: str, cost: Cost, kind: Kind = "exact", n: int = 1
) -> None:
    """Measure each objective's cost at the largest D and its power of D, and plot it against the dimension."""
    dims = list(steps)
    table = {name: [float(cost(step, name)) for step in steps.values()] for name in LABELS}
    for name, row in table.items():
        run.measure(f"{metric}:{name}", Estimate(row[-1], math.nan, kind, unit, n))
        run.measure(f"{metric}_slope:{name}", Estimate(power(dims, row), math.nan, kind, "powers of D", len(dims)))
    title = f"{metric.replace('_', ' ').capitalize()} of a step against the dimension"
    curves = {LABELS[name]: (dims, row) for name, row in table.items()}
    run.curves(metric.replace("_", "-"), title, ("dimension D", unit), curves, log="xy")


@experiment("ssm-cost-counted", family="score", seeds=1)
def counted_costs(
    run: Run, *, smallest: int = 16, largest: int = 512, hidden: int = 128, depth: int = 2, batch: int = 32
) -> None:
    """Operations and memory of a training step against the dimension."""
    steps = training_steps(run, smallest, largest, hidden, depth, batch)
    measure_costs(run, steps, "operations", "floating-point operations", operations)
    measure_costs(run, steps, "saved_bytes", "bytes", saved_bytes)


@experiment("ssm-cost-timed", family="score", seeds=3)
def timed_costs(
    run: Run,
    *,
    smallest: int = 16,
    largest: int = 512,
    hidden: int = 128,
    depth: int = 2,
    batch: int = 32,
    repeats: int = 3,
) -> None:
    """Seconds of a training step against the dimension."""
    steps = training_steps(run, smallest, largest, hidden, depth, batch)
    measure_costs(run, steps, "time_seconds", "seconds", partial(seconds, repeats=repeats), "estimate", repeats)


PROJECTIONS = (1, 2, 4)
#: whether the projections of a law are Gaussian
LAWS = {"rademacher": False, "gaussian": True}


def precision_matrix(dim: int) -> Tensor:
    """Return the true precision K (D, D): correlated directions of unequal scale, so that no entry is special."""
    i = torch.arange(dim, dtype=torch.float64)
    scale = 1 + i / 2
    return scale[:, None] * scale * 0.5 ** (i[:, None] - i).abs()


def symmetric_basis(dim: int) -> Tensor:
    """Return E_a (p, D, D), p = D (D + 1) / 2, with K = sum_a theta_a E_a for theta the upper triangle of K."""
    row, column = torch.triu_indices(dim, dim)
    basis, a = torch.zeros(len(row), dim, dim, dtype=torch.float64), torch.arange(len(row))
    basis[a, row, column] = basis[a, column, row] = 1
    return basis


class Covariances(NamedTuple):
    """The terms of corollary 1, for sqrt(n) (theta_hat - theta), each (p, p), between H^-1 and H^-1.

    Exact score matching has sum_ij V_ij with V_ij = E[grad A_ii grad A_jj'], the diagonal sum_i V_ii, and off the
    diagonal it is sum_{i != j} W_ij with W_ij = E[grad A_ij grad A_ij'].
    """

    exact: Tensor
    off_diagonal: Tensor
    diagonal: Tensor

    def sliced(self, projections: float, gaussian: bool) -> Tensor:
        """Return corollary 1's covariance with M Rademacher or Gaussian projections per example."""
        extra = self.off_diagonal + self.diagonal if gaussian else self.off_diagonal
        return self.exact + 2 / projections * extra


def asymptotic_covariances(precision: Tensor) -> Covariances:
    """Evaluate corollary 1 for x ~ N(0, K^-1) and the score -Kx with every entry of K free.

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
    middles = (total, moments.sum((0, 1)) - diagonal, diagonal)
    return Covariances(*(inverse @ middle @ inverse for middle in middles))


#: G (R, p, p) and h (R, p) of R data sets
Equations = tuple[Tensor, Tensor]


def normal_equations(x: Tensor, v: Tensor) -> Equations:
    """Return G and h of R data sets x (R, n, D) with projections v of the same shape.

    For the score -Kx the sliced objective is -v'Kv + (v'Kx)^2 / 2 = -h'theta + (g'theta)^2 / 2, with g_a = v'E_a x and
    h_a = v'E_a v; its mean over the examples is least where G theta = h. Both come from moments of v and x, folded.
    """
    n, dim = x.shape[1:]
    fold = symmetric_basis(dim).to(x).flatten(1)
    products = (v[..., None] * x[..., None, :]).flatten(2)
    moments = products.transpose(1, 2) @ products / n
    directions = (v.transpose(1, 2) @ v / n).flatten(1)
    return fold @ moments @ fold.T, directions @ fold.T


def solution(equations: Iterable[Equations]) -> Tensor:
    """Return theta_hat (R, p) of the equations summed over projections."""
    return torch.linalg.solve(*reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), equations))


def exact_estimates(x: Tensor) -> Tensor:
    """Return score matching estimates (R, p) from x (R, n, D): the trace sums over the coordinate directions."""
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return solution(normal_equations(x, unit.expand_as(x)) for unit in units)


def sliced_estimates(x: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
    """Return sliced score matching estimates (R, p) from x (R, n, D), by law and number of projections.

    The Rademacher directions are the signs of the Gaussian ones: each law is exact, and their difference has less
    noise.
    """
    normals = [torch.randn(x.shape, generator=draws, dtype=x.dtype, device=x.device) for _ in range(PROJECTIONS[-1])]
    directions = {"rademacher": [v.sign() for v in normals], "gaussian": normals}
    equations = {law: [normal_equations(x, v) for v in vs] for law, vs in directions.items()}
    return {f"{law}-{m}": solution(equations[law][:m]) for m in PROJECTIONS for law in LAWS}


@experiment("ssm-covariance", family="score", precision="float64")
def covariance_simulation(
    run: Run, *, dim: int = 3, examples: int = 2000, datasets: int = 2400, chunk: int = 10
) -> None:
    """Covariance of precision estimates, simulated, against corollary 1."""
    precision = precision_matrix(dim).to(run.device)
    factor, draws = torch.linalg.cholesky(torch.linalg.inv(precision)), run.stream("data")
    state: State = {"draws": draws, "parts": {}}
    for i in resumable("data sets", math.ceil(datasets / chunk), state):
        shape = (min(chunk, datasets - i * chunk), examples, dim)
        x = torch.randn(shape, generator=draws, device=run.device, dtype=torch.float64) @ factor.T
        for name, found in {"sm": exact_estimates(x), **sliced_estimates(x, draws)}.items():
            state["parts"].setdefault(name, []).append(found)
    simulated = {name: examples * torch.cov(torch.cat(found).T) for name, found in state["parts"].items()}
    total = {name: float(value.trace()) for name, value in simulated.items()}

    theory = asymptotic_covariances(precision)
    predicted = {"sm": theory.exact}
    predicted |= {f"{law}-{m}": theory.sliced(m, gaussian) for law, gaussian in LAWS.items() for m in PROJECTIONS}
    ratios: dict[str, Tensor] = {}
    for name, value in simulated.items():
        ratios[f"covariance_ratio:{name}"] = total[name] / predicted[name].trace()
        ratios[f"entry_error:{name}"] = (value - predicted[name]).norm() / predicted[name].norm()
    for m in PROJECTIONS:
        signs, normal = total[f"rademacher-{m}"], total[f"gaussian-{m}"]
        ratios[f"off_diagonal_ratio:{m}"] = (signs - total["sm"]) / (2 / m * theory.off_diagonal.trace())
        ratios[f"diagonal_ratio:{m}"] = (normal - signs) / (2 / m * theory.diagonal.trace())
    run.measure_all({name: Estimate(float(r), math.nan, "estimate", "ratio", datasets) for name, r in ratios.items()})

    grid = torch.linspace(0, math.log(PROJECTIONS[-1]), 40).exp().tolist()
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for law, gaussian in LAWS.items():
        curves[f"{law}, theory"] = grid, [float(theory.sliced(m, gaussian).trace()) for m in grid]
        curves[f"{law}, simulated"] = PROJECTIONS, [total[f"{law}-{m}"] for m in PROJECTIONS]
    title = "Total asymptotic variance of sliced score matching"
    axes = "projections M", "n times the trace of the covariance"
    run.curves("variance", title, axes, curves, levels={"score matching": float(theory.exact.trace())})
