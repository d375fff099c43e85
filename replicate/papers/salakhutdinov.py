"""Salakhutdinov & Murray (2008), On the quantitative analysis of deep belief networks, ICML.

Annealed importance sampling (AIS) gives log Z of restricted Boltzmann machines with an error bar. Replicated here: on
machines small enough to enumerate, the estimate agrees with the exact log Z within its own error, from below and from
above; and, where the fixed binarisation of MNIST is at hand, the test log-likelihood of 500 hidden units trained by
CD-1, CD-3, CD-25 and persistent CD-25; and by centred gradients and persistent CD-3, a recipe that a CPU carries out in
half an hour, since the others' long chains wait for a GPU.

Deviations: Larochelle's fixed bits (50,000 training rows) instead of the authors' own binarisation; reverse annealing
runs (Grosse et al. 2015, 1511.02543) beside the authors' forward ones; float64 throughout the annealing. The
enumerable machines model the suite's thresholded 8x8 digits, and their schedule keeps the paper's three densities of
temperatures with every tenth temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Machine, doubled, exact_samples, hidden_log_weights
from replicate.likelihood.ais import Bracket, ais, bracket, reverse_ais
from replicate.model import Estimate, LogLikelihood
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES, mnist_static
from replicate.tasks.loading import load_task


def paper_betas(thinning: int = 1) -> Tensor:
    """The paper's 14,500 steps, 0:1e-3:0.5, 0.5:1e-4:0.9, 0.9:1e-5:1, or every `thinning`-th temperature; float64.

    Integers are divided once, so that no rounding error accumulates.
    """
    parts = ((0, 50_000, 100), (50_000, 90_000, 10), (90_000, 100_000, 1))
    whole = torch.cat([torch.arange(a, b, step * thinning) for a, b, step in parts])
    return torch.cat([whole, torch.tensor([100_000])]).double() / 100_000


#: share of a step's mean in the moving average of the hidden units
SLIDING = 0.01


@dataclass(frozen=True)
class Recipe:
    """How a machine is trained by stochastic gradient ascent.

    Attributes:
        epochs, batch: passes over the data, rows a step.
        rate, last_rate: learning rate of the first and the last epoch, linear between them.
        momentum, late_momentum: in the first five epochs and after them.
        weight_cost: L2 decay of the weights (not the biases), inside the gradient.
        gibbs: k, sweeps of each negative phase.
        ramp: k = ceil(epoch / 10) and learning rate / k instead; `gibbs` is where that ends.
        persistent: negatives go on from the last step's (100 chains, or one a row of the batch).
        nesterov: Nesterov's momentum instead of the classical one.
        scale: standard deviation of the first weights.
        centred: the gradient is that of the energy in v - mu and h - lambda, with mu the mean of the data and lambda
            that of the hidden units on them, a moving average (Melchior, Fischer and Wiskott 2016, How to center deep
            Boltzmann machines, JMLR 17(99)); visible biases start at the base rates.
    """

    epochs: int = 250
    batch: int = 100
    rate: float = 0.05
    last_rate: float = 0.05
    momentum: float = 0.5
    late_momentum: float = 0.9
    weight_cost: float = 2e-4
    gibbs: int = 1
    ramp: bool = False
    persistent: bool = False
    nesterov: bool = False
    scale: float = 0.01
    centred: bool = False

    @staticmethod
    def of(params: Mapping[str, Any]) -> Recipe:
        """The recipe among an experiment's settings."""
        return Recipe(**{f.name: params[f.name] for f in fields(Recipe) if f.name in params})

    def at(self, epoch: int) -> tuple[int, float, float]:
        """(k, learning rate, momentum) in an epoch, counted from 1."""
        done = (epoch - 1) / max(self.epochs - 1, 1)
        rate = self.rate + done * (self.last_rate - self.rate)
        momentum = self.momentum if epoch <= 5 else self.late_momentum
        if not self.ramp:
            return self.gibbs, rate, momentum
        k = min(math.ceil(epoch / 10), self.gibbs)
        return k, rate / k, momentum


def new_machine(dim: int, hidden: int, scale: float, generator: torch.Generator) -> Machine:
    """Weights N(0, scale^2), biases 0."""
    device = generator.device
    weights = scale * torch.randn(dim, hidden, generator=generator, device=device)
    return Machine(weights, torch.zeros(dim, device=device), torch.zeros(hidden, device=device))


def centred(step: Machine, visible: Tensor, hidden: Tensor) -> Machine:
    """A step of the plain machine as that of one whose energy is in v - visible and h - hidden, written as a plain one.

    Args:
        step: difference of statistics, with the weight cost, if any, taken off its weights.
        visible, hidden: the offsets mu (D,) and lambda (H,).
    """
    weights = step.weights - torch.outer(visible, step.hidden) - torch.outer(step.visible, hidden)
    return Machine(weights, step.visible - weights @ hidden, step.hidden - visible @ weights)


def train(rows: Tensor, hidden: int, recipe: Recipe, context: Context) -> Machine:
    """A machine trained on bits (n, D) by (persistent) contrastive divergence."""
    g = context.streams.fresh("training")
    machine = new_machine(rows.shape[1], hidden, recipe.scale, context.streams.fresh("weights"))
    mean = rows.mean(0)
    if recipe.centred:
        machine = machine._replace(visible=torch.logit(mean.clamp(1e-3, 1 - 1e-3)))
    velocity = Machine(*(torch.zeros_like(part) for part in machine))
    chains = rows[torch.randperm(len(rows), generator=g, device=g.device)[: recipe.batch]]
    batches = Minibatches(rows, recipe.batch, g)
    state: State = {
        "machine": tuple(machine),
        "velocity": tuple(velocity),
        "chains": chains,
        "offset": torch.full_like(machine.hidden, 0.5),
        "batches": batches,  # and with them their generator, which is that of the chains
    }
    for i in resumable("contrastive divergence", recipe.epochs * len(batches), state):
        k, rate, momentum = recipe.at(1 + i // len(batches))
        machine, velocity = Machine(*state["machine"]), Machine(*state["velocity"])
        batch = next(batches)
        ahead = machine.plus(velocity, momentum) if recipe.nesterov else machine
        chains = ahead.gibbs(state["chains"] if recipe.persistent else batch, k, g)
        positive = ahead.statistics(batch)
        step = positive.plus(ahead.statistics(chains), -1.0)
        step = step._replace(weights=step.weights - recipe.weight_cost * ahead.weights)
        if recipe.centred:
            state["offset"] = (1 - SLIDING) * state["offset"] + SLIDING * positive.hidden
            step = centred(step, mean, state["offset"])
        velocity = Machine(*(momentum * old + rate * new for old, new in zip(velocity, step, strict=True)))
        state |= {"machine": tuple(machine.plus(velocity)), "velocity": tuple(velocity), "chains": chains}
    return Machine(*state["machine"])


def anneal(
    machine: Machine, rows: Tensor, chains: int, betas: Tensor, context: Context, start: Tensor | None = None
) -> Bracket:
    """Forward and reverse annealing between the base rates of `rows` and the machine, in float64.

    Args:
        start: model samples (chains, D) for the reverse run; by default those of a long run of the model's own sampler.
    """
    g = context.streams.fresh(f"annealing-{len(machine.hidden)}")
    with context.streams.initialisation():
        model = doubled(machine).model(rows.double(), g)
    if start is None:
        return bracket(model, chains, betas, g)
    return Bracket(ais(model, chains, betas, g), reverse_ais(model, start, betas, g))


def against_enumeration(context: Context) -> Outcome:
    """AIS and its reversal against the enumerated log Z of trained machines with few hidden units."""
    p = context.params
    rows = load_task("digits-binary").train.to(context.device)
    betas = paper_betas(p["thinning"])
    sizes = [int(size) for size in str(p["sizes"]).split()]
    estimates: dict[str, Estimate] = {}
    low, high = [], []
    for hidden in sizes:
        machine = train(rows, hidden, Recipe.of(p), context)
        log_weights = hidden_log_weights(machine)
        exact = float(torch.logsumexp(log_weights, 0))
        start = exact_samples(machine, log_weights, p["chains"], context.streams.fresh(f"exact-{hidden}"))
        both = anneal(machine, rows, p["chains"], betas, context, start)
        estimates |= {f"{name}:{hidden}": e for name, e in compared(both, exact).items()}
        low.append(both.forward.log_z.value - exact)
        high.append(both.reverse.log_z.value - exact)
    for name in ("error", "bracket_excess"):
        estimates[f"{name}:worst"] = max((estimates[f"{name}:{size}"] for size in sizes), key=lambda e: e.value)
    lines = (Line("forward AIS", sizes, low), Line("reverse AIS", sizes, high))
    title, y = "AIS against the enumerated log Z", "estimate minus exact log Z in nats"
    return Outcome(estimates, (Plot("error", title, "hidden units", y, lines, levels={"exact": 0.0}),))


def compared(both: Bracket, exact: float) -> dict[str, Estimate]:
    """How a bracket stands to the exact log Z.

    error_in_stderr: |forward - exact| in the forward run's own standard errors; error: the same in nats;
    bracket_excess: the larger of forward - exact and exact - reverse, in the standard errors of the run concerned
    (negative where the bracket contains the exact value).
    """
    f, r = both.forward.log_z, both.reverse.log_z
    n, error = f.n, f.value - exact
    return {
        "log_z": Estimate.exact(exact, "nats"),
        "log_z_forward": f,
        "log_z_reverse": r,
        "error": Estimate(abs(error), f.stderr, "estimate", "nats", n),
        "error_in_stderr": Estimate(abs(error) / f.stderr, math.nan, "estimate", "standard errors", n),
        "bracket_excess": Estimate(
            max(error / f.stderr, (exact - r.value) / r.stderr), math.nan, "estimate", "standard errors", n
        ),
    }


def annealed_nll(free: Estimate, both: Bracket) -> dict[str, Estimate]:
    """Test NLL in nats with log Z from the forward run (the paper's), the reverse run and the bracket's middle."""
    found = {"free_energy": replace(free, kind="estimate"), **both.details()}
    for name, log_z in (("forward", both.forward.log_z), ("reverse", both.reverse.log_z), ("middle", both.log_z)):
        stderr = math.hypot(free.stderr, log_z.stderr)
        found[f"nll:{name}"] = Estimate(free.value + log_z.value, stderr, log_z.kind, "nats", free.n)
    return found


def trained_rbm(rows: Tensor, test: Tensor, context: Context) -> Outcome:
    """Train a machine on bits (n, D) by the experiment's recipe; its test NLL with the AIS bracket.

    log p of each example stands at the bracket's middle.
    """
    p = context.params
    rows, test = rows.to(context.device), test.to(context.device)
    machine = train(rows, p["hidden"], Recipe.of(p), context)
    both = anneal(machine, rows, p["chains"], paper_betas(p["thinning"]), context)
    free = torch.cat([doubled(machine).free_energy(rows.double()) for rows in test.split(1000)])
    log_p = LogLikelihood(-free - both.log_z.value, both.log_z.kind, shared_stderr=both.log_z.stderr)
    found = annealed_nll(Estimate.mean_of(free, "exact", "nats"), both)
    return Outcome(found, examples={"mnist-static": log_p})


def static_rbm(context: Context) -> Outcome:
    """`trained_rbm` on the fixed binarisation of MNIST."""
    bits = mnist_static()
    return trained_rbm(bits.train, bits.test, context)


def _static(name: str, about: str, cuda_minutes: float = 0.0, **params: Any) -> Experiment:
    return Experiment(
        name=name,
        about=f"RBM with 500 hidden units on static MNIST, {about}",
        family="ebm",
        run=static_rbm,
        params={"hidden": 500, "epochs": 250, "chains": 100, "thinning": 1, **params},
        seeds=3,
        profiles=("full",),
        files=FILES["mnist-static"],
        cuda_minutes=cuda_minutes,
    )


ENUMERATION = Experiment(
    name="ais-against-enumeration",
    about="AIS and its reversal against the enumerated log Z of RBMs with 10, 15 and 20 hidden units",
    family="ebm",
    run=against_enumeration,
    params={"sizes": "10 15 20", "epochs": 100, "gibbs": 1, "chains": 100, "thinning": 10},
    tasks=("digits-binary",),
    overrides={"smoke": {"sizes": "10", "epochs": 5, "thinning": 100}},
    precision="float64",
)

CD_1 = _static("static-rbm-cd1", "CD-1", gibbs=1)
CD_3 = _static("static-rbm-cd3", "CD-3", 2, gibbs=3)
CD_25 = _static("static-rbm-cd25", "CD-k with k rising from 1 to 25", 4, gibbs=25, ramp=True)
_PCD: dict[str, Any] = {
    "gibbs": 25,
    "persistent": True,
    "nesterov": True,
    "rate": 0.01,
    "last_rate": 0.001,
    "momentum": 0.9,
}
PCD_25 = _static("static-rbm-pcd25", "PCD-25", 6, **_PCD)
CENTRED = _static(
    "static-rbm-centred",
    "PCD-3 by centred gradients",
    epochs=200,
    gibbs=3,
    persistent=True,
    centred=True,
    rate=0.2,
    last_rate=0.0003,
    momentum=0.0,
    late_momentum=0.0,
    weight_cost=1e-3,
)
PCD_25_LONG = _static("static-rbm-pcd25-long", "PCD-25, 1000 epochs", 24, **{**_PCD, "epochs": 1000})

PAPER = Paper(
    "salakhutdinov",
    Path(__file__).with_suffix(".toml"),
    experiments=(ENUMERATION, CD_1, CENTRED, CD_3, CD_25, PCD_25, PCD_25_LONG),
)
