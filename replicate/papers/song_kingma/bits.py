"""A restricted Boltzmann machine (RBM) on thresholded digits, trained in every way that bits allow, with exact Z.

Log Z is a sum over the states of few hidden units. The methods are exact maximum likelihood and all that need no
gradient in x: CD-1, CD-10 and persistent CD (Hinton 2002; Tieleman 2008), Gibbs chains that start at noise, noise
contrast with independent bits and with a mixture of Bernoullis, conditional noise contrast with bit flips, and ratio
matching (Hyvarinen 2007). They share start, minibatches, number of updates and learning rate.

Choices made here: the machine's units are centred (Montavon & Mueller 2012), Adam, a rate that falls to zero along a
cosine. The weights kept are the best of `checks` looks at the exact validation likelihood.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from replicate.energies import objectives
from replicate.energies.bits import BitFlipContrastive, FactorisedBernoulli, RatioMatching, block_gibbs
from replicate.experiments import Check, Run, experiment, fit
from replicate.experiments.batches import Minibatches
from replicate.experiments.rbm import (
    BinaryRows,
    Machine,
    binary_rows,
    exact_samples,
    flat,
    hidden_log_weights,
    to_float64,
)
from replicate.likelihood.enumeration import states
from replicate.model import DataInfo, Estimate, Model
from replicate.registry import model_entry
from replicate.runs.training import Stopwatch


@dataclass(frozen=True)
class Settings:
    """Settings of the machine, of Adam, of the methods (ratio to flip_rate) and of the measurements."""

    hidden: int = 12
    updates: int = 600
    batch: int = 100
    lr: float = 0.05
    momentum: float = 0.5
    ratio: int = 5
    components: int = 20
    flip_rate: float = 0.1
    checks: int = 6
    samples: int = 5000
    sweeps: int = 10
    copies: int = 10


class CentredMachine(nn.Module):
    """A Bernoulli RBM whose units enter the interaction minus the data's rates and 1/2; starts as independent bits.

    The rates are those of the bits `train` (n, D); there are `hidden` hidden units.
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
        """Return the plain machine of the same distribution."""
        w = self.weights
        return Machine(w, self.visible - w.sum(1) / 2, self.hidden - self.offset @ w)

    def forward(self, x: Tensor) -> Tensor:
        """Return the free energy of x (n, D) in nats, shape (n,), shifted so that log Z is about 0 at the start."""
        return self.machine().free_energy(x) + self.start_log_z

    @torch.no_grad()
    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """Return x (n, D) after that many draws of h given x and x given h."""
        return self.machine().gibbs(x, sweeps, generator)

    def log_z(self) -> Tensor:
        """Return the exact log Z of exp(-forward), a float64 scalar that autograd can differentiate."""
        return torch.logsumexp(hidden_log_weights(self.machine()), 0) - self.start_log_z

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log probability of x (n, D) in nats, shape (n,), float64."""
        return -self(x).double() - self.log_z()


class MixtureNoise(objectives.Noise):
    """The suite's mixture of Bernoullis, which `initialise` fits, as noise: known density, drawn from directly."""

    def __init__(self, machine: CentredMachine, components: int) -> None:
        super().__init__()
        info = DataInfo(len(machine.visible), "bits", 2)
        self.reference: Model = model_entry("mixture-em").build(info, components=components)

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        self.reference.initialise(train, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.reference.sample(n, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.reference.log_prob(x)


#: training methods by name, for a machine and the experiment's settings
METHODS: dict[str, Callable[[CentredMachine, Settings], objectives.Objective]] = {
    "ml": lambda machine, s: objectives.MaximumLikelihood(lambda energy: machine.log_z()),
    "cd1": lambda machine, s: objectives.ContrastiveDivergence(block_gibbs(machine), 1),
    "cd10": lambda machine, s: objectives.ContrastiveDivergence(block_gibbs(machine), 10),
    "pcd": lambda machine, s: objectives.PersistentCD(block_gibbs(machine), 1, s.batch, FactorisedBernoulli()),
    "short-run": lambda machine, s: objectives.ShortRun(block_gibbs(machine), 10, FactorisedBernoulli()),
    "nce": lambda machine, s: objectives.NoiseContrastive(FactorisedBernoulli(), s.ratio),
    "nce-mixture": lambda machine, s: objectives.NoiseContrastive(MixtureNoise(machine, s.components), s.ratio),
    "cnce": lambda machine, s: BitFlipContrastive(s.flip_rate, s.ratio),
    "ratio-matching": lambda machine, s: RatioMatching(),
}


def products(dim: int, s: Settings) -> dict[str, float]:
    """Return the cost of each method: products of a row of bits with the weights, per example of a batch and update.

    An energy is one, a Gibbs sweep two. Exact log Z has one for each hidden state.
    """
    chains = {"cd1": 4, "cd10": 22, "pcd": 4, "short-run": 22}
    contrast = dict.fromkeys(("nce", "nce-mixture", "cnce"), 1 + s.ratio)
    return {"ml": 1 + 2**s.hidden / s.batch, **chains, **contrast, "ratio-matching": 1 + dim}


class Trained(NamedTuple):
    """A machine with its best weights, (updates, mean validation NLL) at each check, and seconds of training alone."""

    machine: CentredMachine
    curve: list[tuple[int, float]]
    seconds: float


def learn(name: str, data: BinaryRows, run: Run, s: Settings) -> Trained:
    """Train a machine by one method, without the test rows."""
    machine = run.build(lambda: CentredMachine(data.train, s.hidden))
    objective, g = METHODS[name](machine, s), run.stream(f"training-{name}")
    objective.prepare(data.train, g)
    optimizer = torch.optim.Adam([*machine.parameters(), *objective.parameters()], s.lr, betas=(s.momentum, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.updates)
    batches = Minibatches(data.train, s.batch, run.stream("batches"), whole=True)
    watch = Stopwatch()

    def validation() -> float:
        begin = watch.seconds
        nll = float(-machine.log_prob(data.valid).mean())
        watch.load_state_dict({"seconds": begin})  # scoring does not count
        return nll

    state = {"objective": objective, "batches": batches, "generator": g, "watch": watch}
    check = Check(max(1, s.updates // s.checks), validation)

    def loss() -> Tensor:
        return objective.loss(machine, next(batches), g)

    found = fit(machine, loss, optimizer, s.updates, state, check, schedule, f"training by {name}")
    return Trained(machine, found.checks, watch.seconds)


def model_statistics(machine: Machine) -> Machine:
    """Return E[v h'], E[v] and E[h] under a float64 machine, by enumeration of its hidden states."""
    p = hidden_log_weights(machine).softmax(0)
    h = states(len(machine.hidden), 2, 0, len(p), p.device)
    v = machine.visible_mean(h)
    return Machine(v.T @ (p[:, None] * h), p @ v, p @ h)


def cd_biases(machine: Machine, rows: Tensor, sweeps: int, copies: int, generator: torch.Generator) -> list[float]:
    """Estimate the root mean square of (expected CD-k update - exact gradient) for k = 1, .., `sweeps`.

    It is over weights and biases. The difference of the two is the model's E[v h'], E[v], E[h] minus the same of chains
    of k sweeps from the data (n, D), float64 as the machine. Its square is the product of estimates from two
    independent sets of chains, `copies` from each row, which sampling noise does not inflate.
    """
    exact, v, found = flat(model_statistics(machine)), rows.repeat(2, copies, 1), []
    for _ in range(sweeps):
        v = machine.gibbs(v, 1, generator)
        first, second = (flat(machine.statistics(part)) - exact for part in v)
        found.append(math.sqrt(max(float((first * second).mean()), 0.0)))
    return found


SMOKE = {"hidden": 6, "updates": 12, "checks": 3, "samples": 200, "sweeps": 2, "copies": 1}


@experiment("energies-bits", family="ebm", seeds=3, tasks=("digits-binary",), smoke=SMOKE)
def trained_on_bits(run: Run, s: Settings) -> None:
    """One RBM with exact log Z on thresholded digits, trained by maximum likelihood and eight ways without."""
    data = binary_rows("digits-binary", run.device)
    fits = {name: learn(name, data, run, s) for name in METHODS}
    best = to_float64(Machine(*(part.detach() for part in fits["ml"].machine.machine())))
    fresh = exact_samples(best, hidden_log_weights(best), s.samples, run.stream("samples")).float()
    at_best = fits["ml"].machine.log_prob(fresh)
    cost = products(data.train.shape[1], s)
    independent = FactorisedBernoulli()
    independent.fit(data.train, run.stream("independent"))
    run.measure("nll:independent", Estimate.mean_of(-independent.log_prob(data.test), "exact", "nats"))
    for name, (machine, _, seconds) in fits.items():
        run.measure(f"nll:{name}", Estimate.mean_of(-machine.log_prob(data.test), "exact", "nats"))
        run.measure(f"train_nll:{name}", Estimate.mean_of(-machine.log_prob(data.train), "exact", "nats"))
        if name != "ml":
            run.measure(f"kl_from_ml:{name}", Estimate.mean_of(at_best - machine.log_prob(fresh), "estimate", "nats"))
        run.measure(f"cost:{name}", Estimate.exact(cost[name], "products with the weights"))
        run.measure(f"time_training:{name}", Estimate.exact(seconds, "seconds"))
    biases = cd_biases(best, data.train.double(), s.sweeps, s.copies, run.stream("bias"))
    for k in (k for k in (1, 2, 5, 10) if k <= s.sweeps):
        n = 2 * s.copies * len(data.train)
        run.measure(f"gradient_bias:cd{k}", Estimate(biases[k - 1], math.nan, "estimate", "root mean square", n))
    title, axes = "One RBM on thresholded digits, trained in every way", ("updates", "validation NLL in nats, exact")
    curves = {name: ([i for i, _ in curve], [nll for _, nll in curve]) for name, (_, curve, _) in fits.items()}
    levels = {"independent bits": float(-independent.log_prob(data.valid).mean())}
    run.curves("likelihood", title, axes, curves, levels=levels)
    title = "CD-k against the exact gradient, at the machine of maximum likelihood"
    axes = ("Gibbs sweeps k", "root mean square difference")
    run.curves("bias", title, axes, {"CD-k": (range(1, s.sweeps + 1), biases)}, log="y")
