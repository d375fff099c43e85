"""The sliced objectives: their mean over projections (eq. 7 and 8) and the cost of a training step (Fig. 2)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.experiments.operations import OperationCounter
from replicate.likelihood.enumeration import states
from replicate.model import Estimate, Kind
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
    """One training step on data from N(0, I), with what is random in the objective.

    Attributes:
        net: in whose parameters the step differentiates.
        x, v, z: data, projections and noise, each (n, D).
    """

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
