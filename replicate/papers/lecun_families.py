"""What each family of the suite makes of the lower half of a digit, given the upper half.

One posterior, p(lower | upper), of five models of whole digits; none was trained to complete:

- `causal-conv`: the pixels come row by row, so that the upper half is its natural condition: exact draws, exact log p.
- `realnvp`: p(lower | upper) is proportional to p(upper, lower), whose score the flow has: Metropolis-adjusted Langevin
  dynamics of the lower half in the space of the shared preprocessing, the upper half dequantised once and held.
- `vae`: pixels are discrete and independent given the latent z: Langevin dynamics, adjusted likewise, of z for
  p(z) p(upper | z), then one draw of p(lower | z).
- `sde-vp`: inpainting by annealed Langevin dynamics (Song and Ermon 2019, 1907.05600, Algorithm 2), in the space of
  the flow. Its score at noise level rho is that of the network, whatever the SDE.

Training is reduced (the steps stand in the settings), which is why nothing here is compared with print. The mutual
information of the halves is estimated as the mean of log p(lower | upper) - log p(lower), the second from another
`causal-conv` of the lower halves alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor

from replicate.energies.objectives import LogDensity
from replicate.metrics.features import FeatureClassifier
from replicate.model import DataInfo, Estimate, Model
from replicate.resume import State, resumable
from replicate.runs.evaluate import digit_features
from replicate.runs.execute import build_model
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.training import Stopwatch, train
from replicate.sampling.langevin import langevin_step, mala, standard_normal_like
from replicate.tasks.base import Task
from replicate.tasks.digits import LEVELS
from replicate.tasks.loading import load_task

ROWS, COLUMNS = 8, 8
#: pixels of half a digit
HALF = ROWS * COLUMNS // 2
#: penalty of the ridge regression, the best of 0.1, 1 and 10 on the validation digits
RIDGE = 10.0
INTENSITY = "squared intensity"
#: test digits that the report shows
SHOWN = 10


@dataclass(frozen=True)
class HalfDigits:
    """Halves of the textbook's digits, levels divided by the largest.

    Attributes:
        task: the digits, levels.
        x, y: upper and lower halves of the test digits, (447, 32).
        labels: their classes.
        known_x, known_y: halves of the training digits, (1000, 32).
        features: the classifier of whole digits.
    """

    task: Task
    x: Tensor
    y: Tensor
    labels: Tensor
    known_x: Tensor
    known_y: Tensor
    features: FeatureClassifier

    @property
    def mean(self) -> Tensor:
        """Mean lower half of the training digits, (32,)."""
        return self.known_y.mean(0)

    def baselines(self) -> dict[str, Tensor]:
        """Answers (447, 1, 32) that need no energy: training mean, lower half of the nearest upper one, ridge."""
        nearest = self.known_y[torch.cdist(self.x, self.known_x).argmin(1)]
        centre = self.known_x.mean(0)
        known = (self.known_x - centre).double()
        gram = known.T @ known + RIDGE * torch.eye(HALF, dtype=torch.float64, device=known.device)
        weights = torch.linalg.solve(gram, known.T @ (self.known_y - self.mean).double()).float()
        ridge = (self.mean + (self.x - centre) @ weights).clamp(0, 1)
        answers = {"mean": self.mean.expand_as(self.y), "neighbour": nearest, "ridge": ridge}
        return {name: y.unsqueeze(1) for name, y in answers.items()}


def half_digits(device: torch.device) -> HalfDigits:
    """The textbook's split, cut between the fourth and the fifth row."""
    task = load_task("digits")
    assert task.labels is not None
    known, test = (part.to(device) / (LEVELS - 1) for part in (task.train, task.test))
    labels = task.labels[2].to(device)
    return HalfDigits(
        task, test[:, :HALF], test[:, HALF:], labels, known[:, :HALF], known[:, HALF:], digit_features(task)
    )


# -- measures


def squared_errors(completions: Tensor, truth: Tensor) -> dict[str, Estimate]:
    """Mean squared error to the truth (n, b) of completions (n, s, b): of one, of the best, of their mean."""
    error = (completions - truth.unsqueeze(1)).square().mean(2)
    found = {"squared_error": error.mean(1)}
    if completions.shape[1] > 1:
        found["squared_error_best"] = error.min(1).values
        found["squared_error_mean"] = (completions.mean(1) - truth).square().mean(1)
    return {name: Estimate.mean_of(values, "exact", INTENSITY) for name, values in found.items()}


def slopes(whole: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of digits (.., 64), those that touch the lower half; (..)."""
    image = whole.unflatten(-1, (ROWS, COLUMNS))[..., ROWS // 2 - 1 :, :]
    down, right = image.diff(dim=-2).abs(), image[..., 1:, :].diff(dim=-1).abs()
    return torch.cat([down.flatten(-2), right.flatten(-2)], dim=-1).mean(-1)


def completion_metrics(completions: Tensor, data: HalfDigits) -> dict[str, Estimate]:
    """Measures of completions (n, s, 32) in [0, 1] of the test digits.

    `squared_errors`; "diversity", the root mean square difference of two completions of one digit; "sharpness", the
    mean slope over that of the true digits; "agreement", the share of completed digits that the classifier labels
    as the digit is labelled.
    """
    n, s, _ = completions.shape
    whole = torch.cat([data.x.unsqueeze(1).expand(-1, s, -1), completions], dim=2)
    truth = slopes(torch.cat([data.x, data.y], dim=1)).double().mean()
    sharpness = Estimate.mean_of(slopes(whole).double().mean(1) / truth, "exact", "ratio")
    named = data.features.probabilities(whole.flatten(0, 1) * (LEVELS - 1)).argmax(1)
    right = (named.view(n, s) == data.labels.cpu()[:, None]).double().mean(1)
    found = {
        **squared_errors(completions, data.y),
        "sharpness": sharpness,
        "agreement": Estimate.mean_of(right, "exact", "accuracy"),
    }
    if s > 1:
        pairs = [(completions[:, i] - completions[:, j]).square().mean(1).sqrt() for i, j in combinations(range(s), 2)]
        found["diversity"] = Estimate.mean_of(torch.stack(pairs).mean(0), "estimate", "intensity")
    return found


def sheet(data: HalfDigits, rows: Mapping[str, Tensor]) -> Plot:
    """The first SHOWN test digits and what each method makes of their lower halves, the first of (n, s, 32) each."""
    answers = {"truth": data.y.unsqueeze(1), **rows}
    lines = []
    for label, lower in answers.items():
        whole = torch.cat([data.x, lower[:, 0]], dim=1)[:SHOWN].clamp(0, 1)
        lines.append(Plot.row_of_images(label, whole.unflatten(1, (ROWS, COLUMNS))))
    title = "lower halves of test digits, given the upper ones"
    return Plot("answers", title, "pixel", "grey", tuple(lines), style="images", image=(ROWS, COLUMNS))


# -- the families


def fitted(name: str, task: Task, context: Context) -> Model:
    """A model of the suite, trained with the experiment's number of steps and the suite's other settings."""
    steps = context.params[f"{name.replace('-', '_')}_steps"]
    spec = make_spec(name, "digits", settings={"steps": steps})
    outer = context.streams
    streams = Streams(f"{outer.task}/{name}/{task.name}", outer.model, outer.seed, outer.device)
    model = build_model(spec, task, streams).to(context.device)
    with torch.enable_grad():
        train(model, task.train.to(context.device), task.valid.to(context.device), spec.training, streams)
    return model


def lower_halves(task: Task) -> Task:
    """The lower halves of the digits as a task of their own."""
    parts = {name: getattr(task, name)[:, HALF:] for name in ("train", "valid", "test")}
    info = DataInfo(HALF, "levels", LEVELS, (ROWS // 2, COLUMNS))
    return replace(task, name=f"{task.name}-lower", info=info, **parts)


def log_prob_given_upper(model: Model, whole: Tensor) -> Tensor:
    """log p(lower | upper) in nats (n,) of a `causal-conv` at levels (n, 64): the conditionals of the last pixels."""
    net: Any = model
    parameters, lower = net.conditionals(whole)[:, HALF:], whole[:, HALF:]
    values: Tensor = net.head.log_prob(parameters.flatten(0, 1), lower.flatten()).view(lower.shape).sum(1)
    return values


def flow_completions(model: Model, upper: Tensor, context: Context) -> tuple[Tensor, float]:
    """Draws (n, 32) of levels by Langevin dynamics of the lower half, and the share of accepted steps."""
    p = context.params
    net: Any = model
    generator = context.streams.fresh("realnvp")
    whole = torch.cat([upper, torch.zeros_like(upper)], dim=1)
    held = net.transform(whole, generator)[0][:, :HALF]
    density = LogDensity(lambda y: -net.inner.log_prob(torch.cat([held, y], dim=1)))
    start = standard_normal_like(held, generator)
    chain = mala(density.value, density.score, start, p["langevin_steps"], p["flow_step_size"], generator)
    assert chain.acceptance is not None
    done: Tensor = net.transform.inverse(torch.cat([held, chain.samples], dim=1))[:, HALF:]
    return done, chain.acceptance


def vae_completions(model: Model, upper: Tensor, mean: Tensor, context: Context) -> tuple[Tensor, float]:
    """Draws (n, 32) of levels by Langevin dynamics of the latent, and the share of accepted steps.

    The chain starts where the encoder puts the upper half beside the mean lower one (32,), in levels.
    """
    p = context.params
    vae: Any = model
    generator = context.streams.fresh("vae")
    level = upper.long().unsqueeze(-1)

    def energy(z: Tensor) -> Tensor:
        shares = vae.decoder.logits(vae.decode(z))[:, :HALF].log_softmax(-1)
        return -vae.prior.log_prob(z) - shares.gather(-1, level).squeeze(-1).sum(1)

    start, log_sd = vae.posterior(torch.cat([upper, mean.round().expand_as(upper)], dim=1))
    start = start + log_sd.exp() * standard_normal_like(start, generator)
    density = LogDensity(energy)
    chain = mala(density.value, density.score, start, p["langevin_steps"], p["vae_step_size"], generator)
    assert chain.acceptance is not None
    drawn: Tensor = vae.decoder.sample(vae.decode(chain.samples), generator)
    return drawn[:, HALF:], chain.acceptance


def inpainted(model: Model, upper: Tensor, context: Context) -> Tensor:
    """Draws (n, 32) of levels by Algorithm 2: at each level of noise Langevin steps, the known part noised and pasted.

    As printed, the known part's noise is drawn once a level and pasted after every step; the last step is Tweedie's
    mean (Jolicoeur-Martineau et al. 2020, 2009.05475).
    """
    p = context.params
    net: Any = model
    generator = context.streams.fresh("sde-vp")
    whole = torch.cat([upper, torch.zeros_like(upper)], dim=1)
    known = net.transform(whole, generator)[0][:, :HALF]
    levels = torch.linspace(math.log(p["noise_first"]), math.log(p["noise_last"]), p["noise_levels"]).exp().tolist()

    def predicted(z: Tensor, level: float) -> Tensor:
        noise: Tensor = net.inner.net(z, z.new_full((len(z),), math.log(level)))
        return noise

    per_level = p["steps_per_level"]
    start = levels[0] * standard_normal_like(whole, generator)
    state: State = {"z": start, "part": known, "generator": generator}
    for step in resumable("inpainting", len(levels) * per_level, state):
        level = levels[step // per_level]
        if step % per_level == 0:
            state["part"] = known + level * standard_normal_like(known, generator)
            state["z"] = torch.cat([state["part"], state["z"][:, HALF:]], dim=1)
        z = state["z"]
        score = -predicted(z, level) / level
        z = langevin_step(z, score, p["noise_step_size"] * level**2, standard_normal_like(z, generator))
        state["z"] = torch.cat([state["part"], z[:, HALF:]], dim=1)
    z = torch.cat([known, state["z"][:, HALF:]], dim=1)
    z = z - levels[-1] * predicted(z, levels[-1])
    done: Tensor = net.transform.inverse(z)[:, HALF:]
    return done


# -- the experiment


@torch.no_grad()
def completions(context: Context) -> Outcome:
    """Train each family on whole digits, complete the test digits, and measure as the energy's answers are."""
    p, streams = context.params, context.streams
    data = half_digits(context.device)
    whole = data.task.test.to(context.device)
    upper = whole[:, :HALF].repeat_interleave(p["draws"], dim=0)
    estimates: dict[str, Estimate] = {}
    makers: dict[str, Callable[[Model], Tensor]] = {}
    shown: dict[str, Tensor] = {}

    def accepted(name: str, found: tuple[Tensor, float]) -> Tensor:
        estimates[f"acceptance:{name}"] = Estimate(found[1], math.nan, "estimate", "share of proposals", len(upper))
        return found[0]

    makers["causal-conv"] = lambda model: cast(Any, model).continued(upper, streams.fresh("causal-conv"))
    makers["realnvp"] = lambda model: accepted("realnvp", flow_completions(model, upper, context))
    mean = data.mean * (LEVELS - 1)
    makers["vae"] = lambda model: accepted("vae", vae_completions(model, upper, mean, context))
    makers["sde-vp"] = lambda model: inpainted(model, upper, context)
    for name, make in makers.items():
        watch = Stopwatch()
        model = fitted(name, data.task, context)
        trained = watch.seconds
        drawn = make(model).view(len(whole), p["draws"], HALF) / (LEVELS - 1)
        shown[name] = drawn
        estimates[f"time_training:{name}"] = Estimate.exact(trained, "seconds")
        estimates[f"time_completing:{name}"] = Estimate.exact(watch.seconds - trained, "seconds")
        estimates |= {f"{metric}:{name}": e for metric, e in completion_metrics(drawn, data).items()}
        if name == "causal-conv":
            given = log_prob_given_upper(model, whole)
    alone = fitted("causal-conv", lower_halves(data.task), context).log_prob(whole[:, HALF:])
    estimates["nll_given_upper:causal-conv"] = Estimate.mean_of(-given / HALF, "exact", "nats/pixel")
    estimates["nll_alone:causal-conv"] = Estimate.mean_of(-alone / HALF, "exact", "nats/pixel")
    estimates["mutual_information:causal-conv"] = Estimate.mean_of(given - alone, "estimate", "nats")
    order = (given - alone).sort().values
    share = torch.arange(len(order)) / len(order)
    plot = Plot(
        "information",
        "what the upper half says about the lower one, over the test digits",
        "share of test digits",
        "log p(lower | upper) - log p(lower), nats",
        (Line("causal-conv", share.tolist(), order.tolist()),),
        levels={"nothing": 0.0},
    )
    return Outcome(estimates, (sheet(data, shown), plot), classifiers={data.task.name: data.features.sha256})


COMPLETIONS = Experiment(
    name="completions",
    about="lower halves of digits given upper ones, by each family of models of whole digits",
    family="reference",
    run=completions,
    params={
        "causal_conv_steps": 250,
        "realnvp_steps": 300,
        "vae_steps": 600,
        "sde_vp_steps": 500,
        "draws": 4,
        "langevin_steps": 80,
        "flow_step_size": 0.1,
        "vae_step_size": 0.15,
        "noise_first": 5.0,
        "noise_last": 0.05,
        "noise_levels": 30,
        "steps_per_level": 8,
        "noise_step_size": 0.3,
    },
    seeds=3,
    tasks=("digits",),
    overrides={
        "smoke": {
            "causal_conv_steps": 2,
            "realnvp_steps": 2,
            "vae_steps": 2,
            "sde_vp_steps": 2,
            "draws": 2,
            "langevin_steps": 2,
            "steps_per_level": 1,
        }
    },
)
