"""Song & Kingma (2021), How to train your energy-based models, 2101.03288: every way that bits allow, with exact Z.

One restricted Boltzmann machine (RBM) on the suite's thresholded digits, with so few hidden units that log Z is a sum
over their states, is trained by exact maximum likelihood and by everything else that does not ask for a gradient in x:
CD-1, CD-10 and persistent CD (Hinton 2002; Tieleman 2008), Gibbs chains that start at noise, noise contrast with
independent bits and with a mixture of Bernoullis, conditional noise contrast with bit flips, and ratio matching
(Hyvarinen 2007). All have the same start, minibatches, number of updates and learning rate, and are scored by the exact
likelihood: how much of it is given up for not knowing Z, and at what cost.

The paper has no such experiment; it has the list of methods and what is known of each. Choices made here: the machine's
units are centred (Montavon & Mueller 2012), Adam, a rate that falls to zero along a cosine. The weights kept are those
of the best exact validation likelihood among `checks` of the training, the same rule for every method, although the
methods that do without Z could not have followed it by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from replicate.energies.bits import BitFlipContrastive, FactorisedBernoulli, RatioMatching, block_gibbs
from replicate.energies.objectives import (
    ContrastiveDivergence,
    MaximumLikelihood,
    Noise,
    NoiseContrastive,
    Objective,
    PersistentCD,
    ShortRun,
)
from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import Data, Machine, bits, doubled, exact_samples, flat, hidden_log_weights
from replicate.likelihood.enumeration import states
from replicate.model import DataInfo, Estimate, Model
from replicate.registry import model_entry
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.training import Stopwatch


class CentredMachine(nn.Module):
    """A Bernoulli RBM whose units enter the interaction minus the data's rates and 1/2; starts as independent bits.

    Args:
        train: bits (n, D), for the rates.
        hidden: number of hidden units H.
    """

    offset: Tensor
    start_log_z: Tensor

    def __init__(self, train: Tensor, hidden: int) -> None:
        super().__init__()
        rates = (train.sum(0) + 0.5) / (len(train) + 1)
        self.weights = nn.Parameter(0.1 * torch.randn(len(rates), hidden))
        self.visible = nn.Parameter(torch.logit(rates))
        self.hidden = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("offset", rates)
        self.register_buffer("start_log_z", hidden * math.log(2) + softplus(torch.logit(rates)).sum())

    def machine(self) -> Machine:
        """The plain machine of the same distribution."""
        w = self.weights
        return Machine(w, self.visible - w.sum(1) / 2, self.hidden - self.offset @ w)

    def forward(self, x: Tensor) -> Tensor:
        """The free energy of x (n, D) in nats, shape (n,), shifted so that log Z is about 0 at the start."""
        return self.machine().free_energy(x) + self.start_log_z

    @torch.no_grad()
    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """x (n, D) after that many draws of h given x and x given h."""
        return self.machine().gibbs(x, sweeps, generator)

    def log_z(self) -> Tensor:
        """Exact log Z of exp(-forward), a float64 scalar that autograd can differentiate."""
        return torch.logsumexp(hidden_log_weights(self.machine()), 0) - self.start_log_z

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log probability of x (n, D) in nats, shape (n,), float64."""
        return -self(x).double() - self.log_z()


class ReferenceNoise(Noise):
    """One of the suite's references, which `initialise` fits, as noise: known density, drawn from directly."""

    def __init__(self, reference: Model) -> None:
        super().__init__()
        self.reference = reference

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        self.reference.initialise(train, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.reference.sample(n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.reference.log_prob(x)


#: the training methods by name, for a machine and the experiment's settings
METHODS: dict[str, Callable[[CentredMachine, Mapping[str, Any]], Objective]] = {
    "ml": lambda machine, p: MaximumLikelihood(lambda energy: machine.log_z()),
    "cd1": lambda machine, p: ContrastiveDivergence(block_gibbs(machine), 1),
    "cd10": lambda machine, p: ContrastiveDivergence(block_gibbs(machine), 10),
    "pcd": lambda machine, p: PersistentCD(block_gibbs(machine), 1, p["batch"], FactorisedBernoulli()),
    "short-run": lambda machine, p: ShortRun(block_gibbs(machine), 10, FactorisedBernoulli()),
    "nce": lambda machine, p: NoiseContrastive(FactorisedBernoulli(), p["ratio"]),
    "nce-mixture": lambda machine, p: NoiseContrastive(_mixture(len(machine.visible), p["components"]), p["ratio"]),
    "cnce": lambda machine, p: BitFlipContrastive(p["flip_rate"], p["ratio"]),
    "ratio-matching": lambda machine, p: RatioMatching(),
}


def _mixture(dim: int, components: int) -> Noise:
    return ReferenceNoise(model_entry("mixture-em").build(DataInfo(dim, "bits", 2), components=components))


def products(dim: int, params: Mapping[str, Any]) -> dict[str, float]:
    """Products of a row of bits with the weights, an example of the batch and update: what each method costs.

    An energy is one, a Gibbs sweep two. Exact log Z has one for each hidden state.
    """
    ratio = params["ratio"]
    return {
        "ml": 1 + 2 ** params["hidden"] / params["batch"],
        "cd1": 4,
        "cd10": 22,
        "pcd": 4,
        "short-run": 22,
        "nce": 1 + ratio,
        "nce-mixture": 1 + ratio,
        "cnce": 1 + ratio,
        "ratio-matching": 1 + dim,
    }


class Fit(NamedTuple):
    """What training left.

    Attributes:
        machine: with the weights of the best validation likelihood.
        path: (updates, mean train NLL, mean validation NLL) at each check.
        seconds: of training alone.
    """

    machine: CentredMachine
    path: list[tuple[int, float, float]]
    seconds: float


def learn(name: str, data: Data, context: Context) -> Fit:
    """Train a machine by one method; the test rows are never seen."""
    p = context.params
    with context.streams.initialisation():
        machine = CentredMachine(data.train, p["hidden"]).to(context.device)
    objective, g = METHODS[name](machine, p), context.streams.fresh(f"training-{name}")
    objective.prepare(data.train, g)
    optimizer = torch.optim.Adam(
        [*machine.parameters(), *objective.parameters()], lr=p["lr"], betas=(p["momentum"], 0.999)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, p["updates"])
    batches = Minibatches(data.train, p["batch"], context.streams.fresh("batches"), whole=True)
    watch, every = Stopwatch(), max(1, p["updates"] // p["checks"])
    state: State = {
        "machine": machine,
        "objective": objective,
        "optimizer": optimizer,
        "schedule": schedule,
        "batches": batches,
        "generator": g,
        "watch": watch,
        "scoring": 0.0,
        "path": [],
        "best": machine.state_dict(),
    }
    for i in resumable(f"training by {name}", p["updates"], state):
        optimizer.zero_grad()
        objective.loss(machine, next(batches), g).backward()
        optimizer.step()
        schedule.step()
        if (i + 1) % every == 0:
            begin = watch.seconds
            train, valid = (float(-machine.log_prob(part).mean()) for part in (data.train, data.valid))
            if valid < min((v for _, _, v in state["path"]), default=math.inf):
                state["best"] = {k: v.clone() for k, v in machine.state_dict().items()}
            state["path"].append((i + 1, train, valid))
            state["scoring"] += watch.seconds - begin
    machine.load_state_dict(state["best"])
    return Fit(machine, [tuple(row) for row in state["path"]], watch.seconds - state["scoring"])


def model_statistics(machine: Machine) -> Machine:
    """E[v h'], E[v] and E[h] under a float64 machine, by enumeration of its hidden states."""
    p = hidden_log_weights(machine).softmax(0)
    h = states(len(machine.hidden), 2, 0, len(p), p.device)
    v = machine.visible_mean(h)
    return Machine(v.T @ (p[:, None] * h), p @ v, p @ h)


def cd_biases(machine: Machine, rows: Tensor, sweeps: int, copies: int, generator: torch.Generator) -> list[float]:
    """Root mean square of (expected CD-k update - exact gradient) over weights and biases, for k = 1, .., `sweeps`.

    The difference of the two is the model's E[v h'], E[v], E[h] minus the same of chains of k sweeps from the data. Its
    square is the product of estimates from two independent sets of chains, which sampling noise does not inflate.

    Args:
        machine: where the two are compared; float64.
        rows: the data (n, D), float64.
        copies: chains from each row, in each of the two sets.
    """
    exact = flat(model_statistics(machine))
    v = rows.repeat(2, copies, 1)
    found = []
    for _ in range(sweeps):
        v = machine.gibbs(v, 1, generator)
        first, second = (flat(machine.statistics(part)) - exact for part in v)
        found.append(math.sqrt(max(float((first * second).mean()), 0.0)))
    return found


def trained_on_bits(context: Context) -> Outcome:
    """Every method on the thresholded digits, scored by exact likelihood, and CD's bias where learning has ended."""
    p = context.params
    data = bits("digits-binary", context.device)
    fits = {name: learn(name, data, context) for name in METHODS}
    best = doubled(Machine(*(part.detach() for part in fits["ml"].machine.machine())))
    fresh = exact_samples(best, hidden_log_weights(best), p["samples"], context.streams.fresh("samples")).float()
    at_best = fits["ml"].machine.log_prob(fresh)
    cost = products(data.train.shape[1], p)
    independent = FactorisedBernoulli()
    independent.fit(data.train, context.streams.fresh("independent"))
    estimates = {"nll:independent": Estimate.mean_of(-independent.log_prob(data.test), "exact", "nats")}
    for name, fit in fits.items():
        estimates[f"nll:{name}"] = Estimate.mean_of(-fit.machine.log_prob(data.test), "exact", "nats")
        estimates[f"train_nll:{name}"] = Estimate.mean_of(-fit.machine.log_prob(data.train), "exact", "nats")
        if name != "ml":
            estimates[f"kl_from_ml:{name}"] = Estimate.mean_of(
                at_best - fit.machine.log_prob(fresh), "estimate", "nats"
            )
        estimates[f"cost:{name}"] = Estimate.exact(cost[name], "products with the weights")
        estimates[f"time_training:{name}"] = Estimate.exact(fit.seconds, "seconds")
    chains = context.streams.fresh("bias")
    biases = cd_biases(best, data.train.double(), p["sweeps"], p["copies"], chains)
    for k in (k for k in (1, 2, 5, 10) if k <= p["sweeps"]):
        n = 2 * p["copies"] * len(data.train)
        estimates[f"gradient_bias:cd{k}"] = Estimate(biases[k - 1], math.nan, "estimate", "root mean square", n)
    curves = tuple(Line(name, [i for i, _, _ in fit.path], [v for _, _, v in fit.path]) for name, fit in fits.items())
    likelihood = Plot(
        "likelihood",
        "One RBM on thresholded digits, trained in every way",
        "updates",
        "validation NLL in nats, exact",
        curves,
        levels={"independent bits": float(-independent.log_prob(data.valid).mean())},
    )
    bias = Plot(
        "bias",
        "CD-k against the exact gradient, at the machine of maximum likelihood",
        "Gibbs sweeps k",
        "root mean square difference",
        (Line("CD-k", list(range(1, p["sweeps"] + 1)), biases),),
        log_y=True,
    )
    return Outcome(estimates, (likelihood, bias))


ENERGIES_BITS = Experiment(
    name="energies-bits",
    about="one RBM with exact log Z on thresholded digits, trained by maximum likelihood and eight ways without",
    family="ebm",
    run=trained_on_bits,
    params={
        "hidden": 12,
        "updates": 600,
        "batch": 100,
        "lr": 0.05,
        "momentum": 0.5,
        "ratio": 5,
        "components": 20,
        "flip_rate": 0.1,
        "checks": 6,
        "samples": 5000,
        "sweeps": 10,
        "copies": 10,
    },
    seeds=3,
    tasks=("digits-binary",),
    overrides={"smoke": {"hidden": 6, "updates": 12, "checks": 3, "samples": 200, "sweeps": 2, "copies": 1}},
)
