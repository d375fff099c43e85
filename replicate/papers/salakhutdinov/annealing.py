"""Machines trained by contrastive divergence, and annealed importance sampling of their log Z."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replicate.experiments import Experiment, Run, experiment
from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Machine, binary_rows, exact_samples, hidden_log_weights, to_float64
from replicate.likelihood.ais import Bracket, ais, bracket, reverse_ais
from replicate.model import Estimate, LogLikelihood
from replicate.resume import State, resumable
from replicate.tasks.images import FILES

#: share of a step's mean in the moving average of the hidden units
SLIDING = 0.01


@dataclass(frozen=True)
class Recipe:
    """A machine, how it is trained by stochastic gradient ascent, and how it is annealed after that.

    Attributes:
        hidden: hidden units.
        epochs, batch: passes over the data, rows per step.
        chains, thinning: of annealing, which uses every `thinning`-th temperature of the paper.
        gibbs: k, sweeps of each negative phase.
        ramp: k = ceil(epoch / 10) up to `gibbs`, and the learning rate divided by k.
        rate, last_rate: learning rate of the first and the last epoch, linear between them.
        momentum, late_momentum: in the first five epochs and after them.
        weight_cost: L2 decay of the weights (not the biases), inside the gradient.
        persistent: the negatives of the last step continue (100 chains, or one per row of the batch).
        nesterov: Nesterov's momentum instead of the classical one.
        scale: standard deviation of the first weights.
        centred: the gradient is that of the energy in v - mu and h - lambda, with mu the mean of the data and lambda
            that of the hidden units on them, a moving average (Melchior, Fischer and Wiskott 2016, How to center deep
            Boltzmann machines, JMLR 17(99)); visible biases start at the base rates.
    """

    hidden: int = 500
    epochs: int = 250
    batch: int = 100
    chains: int = 100
    thinning: int = 1
    gibbs: int = 1
    ramp: bool = False
    rate: float = 0.05
    last_rate: float = 0.05
    momentum: float = 0.5
    late_momentum: float = 0.9
    weight_cost: float = 2e-4
    persistent: bool = False
    nesterov: bool = False
    scale: float = 0.01
    centred: bool = False

    def at(self, epoch: int) -> tuple[int, float, float]:
        """Return k, the learning rate and the momentum of an epoch, counted from 1."""
        done = (epoch - 1) / max(self.epochs - 1, 1)
        rate = self.rate + done * (self.last_rate - self.rate)
        momentum = self.momentum if epoch <= 5 else self.late_momentum
        if not self.ramp:
            return self.gibbs, rate, momentum
        k = min(math.ceil(epoch / 10), self.gibbs)
        return k, rate / k, momentum


def centred(step: Machine, visible: Tensor, hidden: Tensor) -> Machine:
    """Return the step of the machine whose energy is in v - visible and h - hidden, for the plain machine's parameters.

    The step is a difference of statistics, minus any weight cost; the offsets are mu (D,) and lambda (H,).
    """
    weights = step.weights - torch.outer(visible, step.hidden) - torch.outer(step.visible, hidden)
    return Machine(weights, step.visible - weights @ hidden, step.hidden - visible @ weights)


def train(rows: Tensor, recipe: Recipe, run: Run) -> Machine:
    """Train a machine on bits (n, D) by (persistent) contrastive divergence."""
    g, start = run.stream("training"), run.stream("weights")
    mean = rows.mean(0)
    weights = recipe.scale * torch.randn(rows.shape[1], recipe.hidden, generator=start, device=start.device)
    visible = torch.logit(mean.clamp(1e-3, 1 - 1e-3)) if recipe.centred else torch.zeros_like(mean)
    machine = Machine(weights, visible, torch.zeros_like(weights[0]))
    chains = rows[torch.randperm(len(rows), generator=g, device=g.device)[: recipe.batch]]
    batches = Minibatches(rows, recipe.batch, g)
    # with the batches their generator, which is that of the chains
    state: State = {"machine": tuple(machine), "chains": chains, "batches": batches}
    state |= {"velocity": tuple(machine.map(torch.zeros_like)), "offset": torch.full_like(machine.hidden, 0.5)}
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


def paper_betas(thinning: int = 1) -> Tensor:
    """Return the paper's 14,500 steps, 0:1e-3:0.5, 0.5:1e-4:0.9, 0.9:1e-5:1, or every `thinning`-th of them; float64.

    Integers are divided once, so that no rounding error accumulates.
    """
    parts = ((0, 50_000, 100), (50_000, 90_000, 10), (90_000, 100_000, 1))
    whole = torch.cat([torch.arange(a, b, step * thinning) for a, b, step in parts])
    return torch.cat([whole, torch.tensor([100_000])]).double() / 100_000


def anneal(
    machine: Machine, rows: Tensor, chains: int, betas: Tensor, run: Run, start: Tensor | None = None
) -> Bracket:
    """Anneal forward and in reverse between the base rates of `rows` and the machine, in float64.

    The reverse run starts at the model samples `start` (chains, D), by default those of the model's own long run.
    """
    g = run.stream(f"annealing-{len(machine.hidden)}")
    with run.initialisation():
        model = to_float64(machine).model(rows.double(), g)
    if start is None:
        return bracket(model, chains, betas, g)
    return Bracket(ais(model, chains, betas, g), reverse_ais(model, start, betas, g))


def compared(both: Bracket, exact: float) -> dict[str, Estimate]:
    """Compare a bracket with the exact log Z.

    Returns:
        error_in_stderr: |forward - exact| in the forward run's own standard errors; error: the same in nats;
        bracket_excess: the larger of forward - exact and exact - reverse, in the standard errors of the run concerned
        (negative where the bracket contains the exact value).
    """
    f, r = both.forward.log_z, both.reverse.log_z
    n, error = f.n, f.value - exact
    excess = max(error / f.stderr, (exact - r.value) / r.stderr)
    return {
        "log_z": Estimate.exact(exact, "nats"),
        "log_z_forward": f,
        "log_z_reverse": r,
        "error": Estimate(abs(error), f.stderr, "estimate", "nats", n),
        "error_in_stderr": Estimate(abs(error) / f.stderr, math.nan, "estimate", "standard errors", n),
        "bracket_excess": Estimate(excess, math.nan, "estimate", "standard errors", n),
    }


SMOKE = {"sizes": "10", "epochs": 5, "thinning": 100}


@experiment("ais-against-enumeration", family="ebm", tasks=("digits-binary",), precision="float64", smoke=SMOKE)
def against_enumeration(
    run: Run, *, sizes: str = "10 15 20", epochs: int = 100, gibbs: int = 1, chains: int = 100, thinning: int = 10
) -> None:
    """AIS and its reversal against the enumerated log Z of RBMs with 10, 15 and 20 hidden units."""
    rows = binary_rows("digits-binary", run.device).train
    found, low, high = {}, [], []
    for hidden in map(int, sizes.split()):
        machine = train(rows, Recipe(hidden, epochs, gibbs=gibbs), run)
        log_weights = hidden_log_weights(machine)
        exact = float(torch.logsumexp(log_weights, 0))
        start = exact_samples(machine, log_weights, chains, run.stream(f"exact-{hidden}"))
        both = anneal(machine, rows, chains, paper_betas(thinning), run, start)
        found[hidden] = compared(both, exact)
        run.measure_all(found[hidden], str(hidden))
        low.append(both.forward.log_z.value - exact)
        high.append(both.reverse.log_z.value - exact)
    for name in ("error", "bracket_excess"):
        run.measure(f"{name}:worst", max((e[name] for e in found.values()), key=lambda e: e.value))
    axes = "hidden units", "estimate minus exact log Z in nats"
    curves = {"forward AIS": (list(found), low), "reverse AIS": (list(found), high)}
    run.curves("error", "AIS against the enumerated log Z", axes, curves, levels={"exact": 0.0})


def annealed_nll(free: Estimate, both: Bracket) -> dict[str, Estimate]:
    """Return the test NLL in nats with log Z from the forward run (the paper's), the reverse run and the middle."""
    found = {"free_energy": replace(free, kind="estimate"), **both.details()}
    for name, log_z in (("forward", both.forward.log_z), ("reverse", both.reverse.log_z), ("middle", both.log_z)):
        stderr = math.hypot(free.stderr, log_z.stderr)
        found[f"nll:{name}"] = Estimate(free.value + log_z.value, stderr, log_z.kind, "nats", free.n)
    return found


def measure_rbm(run: Run, recipe: Recipe, rows: Tensor, test: Tensor) -> None:
    """Train a machine on bits (n, D) and measure its test NLL with the AIS bracket.

    log p of each example is that at the bracket's middle.
    """
    machine = train(rows, recipe, run)
    both = anneal(machine, rows, recipe.chains, paper_betas(recipe.thinning), run)
    free = torch.cat([to_float64(machine).free_energy(part.double()) for part in test.split(1000)])
    log_z = both.log_z
    run.keep_examples("mnist-static", LogLikelihood(-free - log_z.value, log_z.kind, shared_stderr=log_z.stderr))
    run.measure_all(annealed_nll(Estimate.mean_of(free, "exact", "nats"), both))


def static_rbm(run: Run) -> None:
    """Measure a machine on static MNIST; the settings are the fields of its recipe that the experiment names."""
    rows = binary_rows("mnist-static", run.device)
    measure_rbm(run, Recipe(**run.settings), rows.train, rows.test)


def _static(name: str, about: str, cuda_minutes: float = 0.0, **settings: Any) -> Experiment:
    about, full = f"RBM with 500 hidden units on static MNIST, {about}", {"seeds": 3, "profiles": ("full",)}
    settings = {"hidden": 500, "epochs": 250, "chains": 100, "thinning": 1, **settings}
    reads: dict[str, Any] = {"files": FILES["mnist-static"], "cuda_minutes": cuda_minutes, **full}
    return Experiment(name, about, "ebm", static_rbm, settings, **reads)


_PCD = {"gibbs": 25, "persistent": True, "nesterov": True, "rate": 0.01, "last_rate": 0.001, "momentum": 0.9}
_CENTRED = {"epochs": 200, "gibbs": 3, "persistent": True, "centred": True, "weight_cost": 1e-3}
_CENTRED |= {"rate": 0.2, "last_rate": 0.0003, "momentum": 0.0, "late_momentum": 0.0}

STATIC = (
    _static("static-rbm-cd1", "CD-1", gibbs=1),
    _static("static-rbm-centred", "PCD-3 by centred gradients", **_CENTRED),
    _static("static-rbm-cd3", "CD-3", 2, gibbs=3),
    _static("static-rbm-cd25", "CD-k with k rising from 1 to 25", 4, gibbs=25, ramp=True),
    _static("static-rbm-pcd25", "PCD-25", 6, **_PCD),
    _static("static-rbm-pcd25-long", "PCD-25, 1000 epochs", 24, **_PCD, epochs=1000),
)
