"""One neural energy on digits in every way.

The digits' 17 levels become 64 continuous numbers by the suite's preprocessing (`DequantisedGaussian`); there the same
network g tilts the data's Gaussian fit, log p = log p0 - g - log Z (`TrainedEnergy`). Every training method of
`replicate.energies` but exact maximum likelihood, which has no log Z here, makes equally many updates from the same
start and on the same rows; implicit score matching, whose exact trace costs 64 times as much, makes fewer. The suite's
protocol scores them: a dequantisation bound on the likelihood of the test digits whose log Z is bracketed by annealing
both ways, and samples' Frechet distance in the suite's features. Where annealing finds no log Z, there is no number.

Choices made here: noise levels and step sizes on one seed that no claim uses; a flow as contrastive noise that is
fitted for few steps with dropout, since it soon memorises 1000 digits, and then kept (Gao et al. 2020, 1912.00589, then
train it against the energy). The validation likelihood takes log Z from a short annealing run.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicate.energies import objectives
from replicate.energies.model import EnergyNet, TrainedEnergy
from replicate.errors import TrainingError
from replicate.experiments import Run, experiment
from replicate.likelihood.ais import ais, schedule
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.metrics.quality import frechet, precision_recall_density_coverage
from replicate.model import DataInfo, Estimate, Training
from replicate.registry import model_entry
from replicate.runs.evaluate import digit_features
from replicate.runs.seeds import Streams
from replicate.runs.training import History, train
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

#: chains of the annealing run behind a validation
CHECK_CHAINS = 64
#: nats between forward and reverse log Z beyond which the two have not found it
OPEN_BRACKET = 2.0


@dataclass(frozen=True)
class Settings:
    """Settings of network, training, the methods (move_step to dropout), the sampler and the evaluation."""

    hidden: int = 64
    layers: int = 2
    updates: int = 300
    ism_updates: int = 50
    checks: int = 6
    batch: int = 100
    lr: float = 5e-3
    weight_decay: float = 0.1
    move_step: float = 0.1
    k: int = 2
    short_k: int = 5
    sigma: float = 0.1
    contrast: float = 0.1
    ratio: int = 4
    bandwidth: float = 1.0
    flow_steps: int = 50
    dropout: float = 0.3
    step_size: float = 0.4
    annealing: int = 50
    ais_chains: int = 48
    ais_steps: int = 150
    dequantisation_draws: int = 8
    samples: int = 447


class ScoredEnergy(TrainedEnergy):
    """An energy that is validated by its likelihood, whatever it is trained by."""

    @torch.no_grad()
    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return mean energy plus log Z of a short annealing run: the NLL in nats, too low on average."""
        log_z = ais(self, CHECK_CHAINS, schedule(self.annealing), generator).log_z.value
        return self.energy(batch).mean() + log_z


def methods(info: DataInfo, s: Settings) -> dict[str, objectives.Objective]:
    """Build every training method by name, untrained; the flow draws its weights from torch's generator."""
    move, flow_info = objectives.langevin_move(s.move_step), replace(info, domain="continuous", levels=None)
    flow = model_entry("realnvp").build(flow_info, couplings=4, hidden=32, dropout=s.dropout)
    return {
        "cd": objectives.ContrastiveDivergence(move, s.k),
        "pcd": objectives.PersistentCD(move, s.k, s.batch),
        "short-run": objectives.ShortRun(move, s.short_k),
        "ism": objectives.ImplicitScoreMatching(),
        "dsm": objectives.DenoisingScoreMatching(s.sigma),
        "ssm": objectives.SlicedScoreMatching(),
        "nce": objectives.NoiseContrastive(objectives.FittedGaussian(), s.ratio),
        "cnce": objectives.ConditionalNoiseContrastive(s.contrast, s.ratio),
        "ksd": objectives.MinimumKSD(s.bandwidth),
        "flow-nce": objectives.FlowContrastive(flow, s.flow_steps, s.ratio),
    }


def gradients(dim: int, s: Settings) -> dict[str, float]:
    """Return the cost of each method: passes through the energy, either way, per example of a batch and update.

    Following a loss on energies is two passes at each point, on scores four (the gradient in x, and back through it).
    A Metropolis-adjusted move is four: its start and its proposal, with gradients.
    """
    chains, short, contrast = 4 + 4 * s.k, 4 + 4 * s.short_k, 2 + 2 * s.ratio
    cost: dict[str, float] = {"cd": chains, "pcd": chains, "short-run": short, "ism": 4 + 4 * dim, "dsm": 8, "ssm": 8}
    return cost | {"nce": contrast, "cnce": contrast, "ksd": 4, "flow-nce": contrast}


def learn(name: str, task: Task, run: Run, s: Settings, updates: int) -> tuple[Preprocessed, History]:
    """Train by one method, without the test rows; return the energy behind its preprocessing, and its history.

    All methods share the start and the rows. No updates leave the Gaussian that the energy tilts.

    Raises:
        TrainingError: the loss is no longer a number.
    """
    with run.initialisation():
        network = EnergyNet(task.info.dim, s.hidden, s.layers)
        objective = methods(task.info, s)[name]
    energy = ScoredEnergy(
        network, objective, task.info, jumps=False, step_size=s.step_size, annealing=s.annealing, after=s.annealing
    )
    model = Preprocessed(energy, task.info, "gaussianise").to(run.device)
    every, decay = updates // s.checks, s.weight_decay
    settings = Training(updates, s.batch, s.lr, betas=(0.5, 0.99), weight_decay=decay, ema=0.98, validate_every=every)
    streams = run.streams
    own = Streams(streams.task, f"{streams.model}-{name}", streams.seed, streams.device)  # and "batches" for all
    return model, train(model, task.train.to(run.device), task.valid.to(run.device), settings, own)


SMOKE = {"hidden": 8, "updates": 2, "ism_updates": 1, "checks": 1, "flow_steps": 2, "annealing": 2}
SMOKE |= {"ais_chains": 8, "ais_steps": 2, "dequantisation_draws": 1, "samples": 20}


@experiment("energies-digits", family="ebm", seeds=3, tasks=("digits",), smoke=SMOKE)
def trained_on_digits(run: Run, s: Settings) -> None:
    """One neural energy on digits trained in ten ways, log Z bracketed by annealing."""
    task = load_task("digits")
    run.omit("nll:ml", "there is no log Z to differentiate in 64 dimensions")
    score("gaussian", learn("nce", task, run, s, 0)[0], task, run, s)
    curves = {}
    for name, cost in gradients(task.info.dim, s).items():
        run.measure(f"cost:{name}", Estimate.exact(cost, "passes through the energy"))
        try:
            model, history = learn(name, task, run, s, s.ism_updates if name == "ism" else s.updates)
        except TrainingError as error:
            for metric in ("nll", "frechet"):
                run.omit(f"{metric}:{name}", f"diverged: {error}")
            continue
        run.measure(f"time_training:{name}", Estimate.exact(history.seconds, "seconds"))
        run.measure(f"best_update:{name}", Estimate.exact(history.best_step, "updates"))
        curve = [value for _, value in history.valid]
        run.measure(f"drift:{name}", Estimate(curve[-1] - min(curve), math.nan, "estimate", "nats", CHECK_CHAINS))
        curves[name] = [step for step, _ in history.valid], curve
        score(name, model, task, run, s)
    title = "One energy on digits, trained in every way"
    y_label = "validation NLL of the transformed digits in nats, log Z by a short annealing run"
    run.curves("likelihood", title, ("updates", y_label), curves)
    run.classifiers[task.name] = digit_features(task).sha256


def score(name: str, model: Preprocessed, task: Task, run: Run, s: Settings) -> None:
    """Measure test NLL with its bracket, and the samples' quality; omit what is not a number, with the reason."""
    generator, test = run.stream(f"evaluation-{name}"), task.test.to(run.device)
    effort = Effort(dequantisation_draws=s.dequantisation_draws, ais_chains=s.ais_chains, ais_steps=s.ais_steps)
    log_p = log_likelihood(model, test, effort, generator)
    gap = replace(log_p.details["ais_log_z_reverse"] - log_p.details["ais_log_z_forward"], kind="estimate")
    if abs(gap.value) <= OPEN_BRACKET:
        run.measure_all({"nll": -log_p.mean(), "log_z_gap": gap}, name)
    else:
        reason = f"annealing gives no log Z: forward and reverse are {gap.value:.3g} nats apart"
        run.omit(f"nll:{name}", reason)
    samples = model.sample(s.samples, generator)
    if bool(samples.isfinite().all()):
        features = digit_features(task)
        fake, real = features.features(samples.cpu()), features.features(task.test)
        coverage = precision_recall_density_coverage(real, fake)["coverage"]
        run.measure_all({"frechet": frechet(fake, real), "coverage": coverage}, name)
    else:
        run.omit(f"frechet:{name}", "the sampler diverged")
