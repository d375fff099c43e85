"""Persistent and plain contrastive divergence at equal time, scored by exact likelihood."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Machine, binary_rows, hidden_log_weights
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.training import Stopwatch
from replicate.tasks.images import FILES


class Method(NamedTuple):
    """How negatives are made: k sweeps per update, from the data (CD) or from the last negatives (PCD)."""

    name: str
    k: int
    persistent: bool

    @property
    def products(self) -> int:
        """Products of a batch with the weights in one update."""
        return 2 * self.k + 4


METHODS = (Method("pcd", 1, True), Method("cd1", 1, False), Method("cd10", 10, False))
#: shares of the training after which the machines are kept for the plot
KEPT = (0.0625, 0.125, 0.25, 0.5, 1.0)


def learn(
    method: Method, rows: Tensor, rates: list[float], updates: int, hidden: int, batch: int, run: Run
) -> tuple[list[Machine], float]:
    """Train a machine for each learning rate, side by side (leading dimension), from one start on the same minibatches.

    Returns:
        The machines after each share `KEPT` of the updates, and the seconds of learning in all sessions.
    """
    watch, negatives = Stopwatch(), run.stream(f"negatives-{method.name}")
    one = 0.01 * torch.randn(rows.shape[1], hidden, generator=run.stream("weights"), device=rows.device)
    visible = torch.logit(rows.mean(0).clamp(0.01, 0.99)).repeat(len(rates), 1)
    machine = Machine(one.repeat(len(rates), 1, 1), visible, torch.zeros(len(rates), hidden, device=rows.device))
    batches = Minibatches(rows, batch, run.stream("minibatches"), whole=True)
    rate = torch.tensor(rates, device=rows.device)[:, None, None]
    stops = {round(share * updates) for share in KEPT}
    state: State = {"machine": tuple(machine), "chains": next(batches).expand(len(rates), -1, -1), "batches": batches}
    state |= {"negatives": negatives, "watch": watch, "kept": []}
    for i in resumable(f"learning by {method.name}", updates, state):
        machine, data = Machine(*state["machine"]), next(batches).expand(len(rates), -1, -1)
        chains = machine.gibbs(state["chains"] if method.persistent else data, method.k, negatives)
        step = machine.statistics(data).plus(machine.statistics(chains), -1.0)
        state |= {"machine": tuple(machine.plus(step, (1 - i / updates) * rate)), "chains": chains}
        if i + 1 in stops:
            state["kept"].append(state["machine"])
    return [Machine(*machine) for machine in state["kept"]], watch.seconds


def single(machines: Machine, index: int) -> Machine:
    """Return one of several machines side by side, in float64."""
    return machines.map(lambda part: part[index].double())


def nll(machine: Machine, *parts: Tensor) -> list[Estimate]:
    """Return the exact mean negative log-likelihood in nats of each part, rows of shape (n, D)."""
    log_z = torch.logsumexp(hidden_log_weights(machine), 0)
    return [Estimate.mean_of(machine.free_energy(rows.double()) + log_z, "exact", "nats") for rows in parts]


def equal_time(
    run: Run,
    *,
    data: str = "digits-binary",
    hidden: int = 16,
    updates: int = 4000,
    batch: int = 100,
    lowest_rate: float = 0.03,
    rate_ratio: float = 10**0.5,
    rates: int = 5,
) -> None:
    """Measure the exact test NLL of PCD, CD-1 and CD-10 after equally many products, each at its best learning rate."""
    train, valid, test = binary_rows(data, run.device)
    grid = [lowest_rate * rate_ratio**i for i in range(rates)]
    budget, curves = updates * METHODS[0].products, {}
    for method in METHODS:
        affordable = budget // method.products
        path, seconds = learn(method, train, grid, affordable, hidden, batch, run)
        valid_nll = [nll(single(path[-1], i), valid)[0] for i in range(rates)]
        best = min(range(rates), key=lambda i: valid_nll[i].value)
        test_nll, train_nll = zip(*(nll(single(machines, best), test, train) for machines in path), strict=True)
        curves[method.name] = [share * budget for share in KEPT], [e.value for e in test_nll]
        found = {"nll": test_nll[-1], "train_nll": train_nll[-1], "validation_nll": valid_nll[best]}
        found |= {"rate": Estimate.exact(grid[best], "learning rate"), "updates": Estimate.exact(affordable, "updates")}
        run.measure_all(found | {"train_seconds": Estimate.exact(seconds, "seconds")}, method.name)
    axes = "products of a batch with the weights", "test NLL in nats"
    run.curves("nll", "PCD and CD at equal time, exact likelihood", axes, curves, log="x")


_ABOUT = "PCD, CD-1 and CD-10 at equal time with exact likelihood"
_DIGITS, _MNIST = f"{_ABOUT}, 16 hidden units on thresholded digits", f"{_ABOUT}, 25 hidden units on static MNIST"
_LARGE = {"data": "mnist-static", "hidden": 25, "updates": 100_000}
_SMALL: dict[str, Any] = {"tasks": ("digits-binary",), "smoke": {"hidden": 8, "updates": 100, "rates": 2}}
_FULL: dict[str, Any] = {"profiles": ("full",), "files": FILES["mnist-static"], "cuda_minutes": 10}

on_digits = experiment("pcd-equal-time", about=_DIGITS, family="ebm", seeds=4, **_SMALL)(equal_time)
on_mnist = experiment("pcd-equal-time-mnist", about=_MNIST, family="ebm", settings=_LARGE, seeds=3, **_FULL)(equal_time)
