"""Tieleman (2008), Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML.

Persistent contrastive divergence (PCD) goes on with the negatives of the last update instead of starting them at the
data. Replicated here: with few hidden units, where the likelihood is exact, and at equal time, PCD gives a better test
likelihood than CD-1 and CD-10.

Equal time is counted, not clocked, so that the result does not depend on the machine's load: an update of CD-k costs
2k + 4 products of a batch with the weights (two a sweep, the hidden means of both phases, two outer products), PCD with
one sweep as much as CD-1. The seconds of training stand beside. As in the paper: plain stochastic gradient ascent
without momentum or weight decay, minibatches of 100, as many chains, a learning rate that falls linearly to zero and
whose start is chosen on the validation split, for each method by itself, from one grid.

Deviations: the suite's thresholded 8x8 digits (1000 training rows) and 16 hidden units instead of MNIST and 25, in the
standard profile; the full profile has MNIST's fixed binarisation and 25 hidden units.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Machine, bits, doubled, hidden_log_weights
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.training import Stopwatch
from replicate.tasks.images import FILES


class Method(NamedTuple):
    """How negatives are made: k sweeps an update, from the data (CD) or from the last negatives (PCD)."""

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


def minibatches(rows: Tensor, size: int, generator: torch.Generator) -> Minibatches:
    """Full minibatches (size, D) without end, each pass in a new order."""
    return Minibatches(rows, size, generator, whole=True)


def learn(
    method: Method,
    rows: Tensor,
    rates: list[float],
    updates: int,
    hidden: int,
    context: Context,
    watch: Stopwatch | None = None,
) -> list[Machine]:
    """Machines, one for each learning rate side by side (leading dimension), after each share `KEPT` of the updates.

    All methods and rates start from the same weights and see the same minibatches.

    Args:
        watch: counts the seconds of learning; where learning is interrupted, those of every sitting.
    """
    size = context.params["batch"]
    start, g = context.streams.fresh("weights"), context.streams.fresh(f"negatives-{method.name}")
    one = 0.01 * torch.randn(rows.shape[1], hidden, generator=start, device=rows.device)
    machine = Machine(
        one.repeat(len(rates), 1, 1),
        torch.logit(rows.mean(0).clamp(0.01, 0.99)).repeat(len(rates), 1),
        torch.zeros(len(rates), hidden, device=rows.device),
    )
    batches = minibatches(rows, size, context.streams.fresh("minibatches"))
    rate = torch.tensor(rates, device=rows.device)[:, None, None]
    stops = {round(share * updates) for share in KEPT}
    state: State = {
        "machine": tuple(machine),
        "chains": next(batches).expand(len(rates), -1, -1),
        "batches": batches,
        "negatives": g,
        "watch": watch,
        "kept": [],
    }
    for i in resumable(f"learning by {method.name}", updates, state):
        machine = Machine(*state["machine"])
        batch = next(batches).expand(len(rates), -1, -1)
        chains = machine.gibbs(state["chains"] if method.persistent else batch, method.k, g)
        step = machine.statistics(batch).plus(machine.statistics(chains), -1.0)
        state |= {"machine": tuple(machine.plus(step, (1 - i / updates) * rate)), "chains": chains}
        if i + 1 in stops:
            state["kept"].append(state["machine"])
    return [Machine(*machine) for machine in state["kept"]]


def single(machines: Machine, index: int) -> Machine:
    """One of several machines side by side, in float64."""
    return doubled(Machine(*(part[index] for part in machines)))


def nll(machine: Machine, *parts: Tensor) -> list[Estimate]:
    """Exact mean negative log-likelihood in nats of each part, rows of shape (n, D)."""
    log_z = torch.logsumexp(hidden_log_weights(machine), 0)
    return [Estimate.mean_of(machine.free_energy(rows.double()) + log_z, "exact", "nats") for rows in parts]


def equal_time(context: Context) -> Outcome:
    """Exact test NLL of PCD, CD-1 and CD-10 after equally many products, each at its best learning rate."""
    p = context.params
    data = bits(p["data"], context.device)
    rates = [p["lowest_rate"] * p["rate_ratio"] ** i for i in range(p["rates"])]
    budget = p["updates"] * METHODS[0].products
    estimates: dict[str, Estimate] = {}
    lines = []
    for method in METHODS:
        # the budget counts updates, which a run that was interrupted does not do twice; the clock stands beside
        updates, watch = budget // method.products, Stopwatch()
        path = learn(method, data.train, rates, updates, p["hidden"], context, watch)
        seconds = watch.seconds
        valid = [nll(single(path[-1], i), data.valid)[0] for i in range(len(rates))]
        best = min(range(len(rates)), key=lambda i: valid[i].value)
        curve = [nll(single(machines, best), data.test, data.train) for machines in path]
        lines.append(Line(method.name, [share * budget for share in KEPT], [test.value for test, _ in curve]))
        estimates |= {
            f"nll:{method.name}": curve[-1][0],
            f"train_nll:{method.name}": curve[-1][1],
            f"validation_nll:{method.name}": valid[best],
            f"rate:{method.name}": Estimate.exact(rates[best], "learning rate"),
            f"updates:{method.name}": Estimate.exact(updates, "updates"),
            f"train_seconds:{method.name}": Estimate.exact(seconds, "seconds"),
        }
    title = "PCD and CD at equal time, exact likelihood"
    plot = Plot("nll", title, "products of a batch with the weights", "test NLL in nats", tuple(lines), log_x=True)
    return Outcome(estimates, (plot,))


EQUAL_TIME = Experiment(
    name="pcd-equal-time",
    about="PCD, CD-1 and CD-10 at equal time with exact likelihood, 16 hidden units on thresholded digits",
    family="ebm",
    run=equal_time,
    params={
        "data": "digits-binary",
        "hidden": 16,
        "updates": 4000,
        "batch": 100,
        "lowest_rate": 0.03,
        "rate_ratio": 10**0.5,
        "rates": 5,
    },
    seeds=4,
    tasks=("digits-binary",),
    overrides={"smoke": {"hidden": 8, "updates": 100, "rates": 2}},
)

EQUAL_TIME_MNIST = Experiment(
    name="pcd-equal-time-mnist",
    about="PCD, CD-1 and CD-10 at equal time with exact likelihood, 25 hidden units on static MNIST",
    family="ebm",
    run=equal_time,
    params={**EQUAL_TIME.params, "data": "mnist-static", "hidden": 25, "updates": 100_000},
    seeds=3,
    profiles=("full",),
    files=FILES["mnist-static"],
    cuda_minutes=10,
)

PAPER = Paper("tieleman", Path(__file__).with_suffix(".toml"), experiments=(EQUAL_TIME, EQUAL_TIME_MNIST))
