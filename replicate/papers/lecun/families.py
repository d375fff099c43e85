"""The lower half of a digit, given the upper half, by each family of the suite.

One posterior, p(lower | upper), of models of whole digits; none was trained to complete:

- `causal-conv`: it draws pixels row by row, so that the upper half is its natural condition: exact draws, exact log p.
- `realnvp`: p(lower | upper) is proportional to p(upper, lower), whose score the flow has: Metropolis-adjusted Langevin
  dynamics of the lower half in the space of the shared preprocessing, the upper half dequantised once and held.
- `vae`: pixels are discrete and independent given the latent z: Langevin dynamics, adjusted likewise, of z for
  p(z) p(upper | z), then one draw of p(lower | z).
- `sde-vp`: inpainting by annealed Langevin dynamics (Song and Ermon 2019, 1907.05600, Algorithm 2), in the space of
  the flow. Its score at noise level rho is that of the network, whatever the SDE.

Training is reduced, so that nothing here is compared with print. The mutual information of the halves is estimated as
the mean of log p(lower | upper) - log p(lower), the second from a `causal-conv` of the lower halves alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replicate.energies.objectives import LogDensity
from replicate.experiments import Run, experiment
from replicate.model import DataInfo, Estimate, Model
from replicate.papers.lecun.digits import COLUMNS, HALF, ROWS, HalfDigits, completion_metrics, digits_plot, half_digits
from replicate.resume import State, resumable
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.subjects import build_model
from replicate.runs.training import Stopwatch, train
from replicate.sampling.langevin import langevin_step, mala, standard_normal_like
from replicate.tasks.base import Task
from replicate.tasks.digits import LEVELS

FAMILIES = ("causal-conv", "realnvp", "vae", "sde-vp")


@dataclass(frozen=True)
class Settings:
    """Training steps of each model and how it is sampled.

    Attributes:
        draws: completions per digit.
        langevin_steps, flow_step_size, vae_step_size: of the adjusted Langevin dynamics of the flow and of the VAE.
        noise_first, noise_last, noise_levels: levels of annealed Langevin dynamics, a geometric sequence.
        steps_per_level, noise_step_size: its steps, and their size in units of the squared level.
    """

    causal_conv_steps: int = 250
    realnvp_steps: int = 300
    vae_steps: int = 600
    sde_vp_steps: int = 500
    draws: int = 4
    langevin_steps: int = 80
    flow_step_size: float = 0.1
    vae_step_size: float = 0.15
    noise_first: float = 5.0
    noise_last: float = 0.05
    noise_levels: int = 30
    steps_per_level: int = 8
    noise_step_size: float = 0.3


def fitted(name: str, steps: int, task: Task, run: Run) -> Model:
    """Train a model of the suite for a number of steps, with the suite's other settings."""
    spec, outer = make_spec(name, "digits", settings={"steps": steps}), run.streams
    streams = Streams(f"{outer.task}/{name}/{task.name}", outer.model, outer.seed, outer.device)
    model = build_model(spec, task, streams).to(run.device)
    with torch.enable_grad():
        train(model, task.train.to(run.device), task.valid.to(run.device), spec.training, streams)
    return model


def lower_halves(task: Task) -> Task:
    """Return the lower halves of the digits as a task of their own."""
    parts = {name: getattr(task, name)[:, HALF:] for name in ("train", "valid", "test")}
    info = DataInfo(HALF, "levels", LEVELS, (ROWS // 2, COLUMNS))
    return replace(task, name=f"{task.name}-lower", info=info, **parts)


def log_prob_given_upper(model: Any, whole: Tensor) -> Tensor:
    """Return log p(lower | upper) in nats (n,) of a `causal-conv` at levels (n, 64): its last conditionals."""
    parameters, lower = model.conditionals(whole)[:, HALF:], whole[:, HALF:]
    values: Tensor = model.head.log_prob(parameters.flatten(0, 1), lower.flatten()).view(lower.shape).sum(1)
    return values


def flow_completions(model: Any, upper: Tensor, s: Settings, generator: torch.Generator) -> tuple[Tensor, float]:
    """Draw lower halves (n, 32) in levels by Langevin dynamics; also return the share of accepted steps."""
    held = model.transform(torch.cat([upper, torch.zeros_like(upper)], dim=1), generator)[0][:, :HALF]
    density = LogDensity(lambda y: -model.inner.log_prob(torch.cat([held, y], dim=1)))
    start = standard_normal_like(held, generator)
    chain = mala(density.value, density.score, start, s.langevin_steps, s.flow_step_size, generator)
    assert chain.acceptance is not None
    done: Tensor = model.transform.inverse(torch.cat([held, chain.samples], dim=1))[:, HALF:]
    return done, chain.acceptance


def vae_completions(
    vae: Any, upper: Tensor, mean: Tensor, s: Settings, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Draw lower halves (n, 32) in levels by Langevin dynamics of the latent; also return the share of accepted steps.

    The chain starts at the encoder's answer to the upper half beside the mean lower one (32,), in levels.
    """
    level = upper.long().unsqueeze(-1)

    def energy(z: Tensor) -> Tensor:
        shares = vae.decoder.logits(vae.decode(z))[:, :HALF].log_softmax(-1)
        return -vae.prior.log_prob(z) - shares.gather(-1, level).squeeze(-1).sum(1)

    start, log_sd = vae.posterior(torch.cat([upper, mean.round().expand_as(upper)], dim=1))
    start = start + log_sd.exp() * standard_normal_like(start, generator)
    density = LogDensity(energy)
    chain = mala(density.value, density.score, start, s.langevin_steps, s.vae_step_size, generator)
    assert chain.acceptance is not None
    drawn: Tensor = vae.decoder.sample(vae.decode(chain.samples), generator)
    return drawn[:, HALF:], chain.acceptance


def inpainted(model: Any, upper: Tensor, s: Settings, generator: torch.Generator) -> Tensor:
    """Draw lower halves (n, 32) in levels by Algorithm 2: the known part's noise is drawn once per level, as printed.

    It is pasted after every step; the last step is Tweedie's mean (Jolicoeur-Martineau et al. 2020, 2009.05475).
    """
    whole = torch.cat([upper, torch.zeros_like(upper)], dim=1)
    known = model.transform(whole, generator)[0][:, :HALF]
    levels = torch.linspace(math.log(s.noise_first), math.log(s.noise_last), s.noise_levels).exp().tolist()

    def predicted(z: Tensor, level: float) -> Tensor:
        noise: Tensor = model.inner.net(z, z.new_full((len(z),), math.log(level)))
        return noise

    state: State = {"z": levels[0] * standard_normal_like(whole, generator), "part": known, "generator": generator}
    for step in resumable("inpainting", len(levels) * s.steps_per_level, state):
        level = levels[step // s.steps_per_level]
        if step % s.steps_per_level == 0:
            state["part"] = known + level * standard_normal_like(known, generator)
            state["z"] = torch.cat([state["part"], state["z"][:, HALF:]], dim=1)
        z = state["z"]
        score = -predicted(z, level) / level
        z = langevin_step(z, score, s.noise_step_size * level**2, standard_normal_like(z, generator))
        state["z"] = torch.cat([state["part"], z[:, HALF:]], dim=1)
    z = torch.cat([known, state["z"][:, HALF:]], dim=1)
    z = z - levels[-1] * predicted(z, levels[-1])
    done: Tensor = model.transform.inverse(z)[:, HALF:]
    return done


def _completed(name: str, model: Any, upper: Tensor, data: HalfDigits, run: Run, s: Settings) -> tuple[Tensor, float]:
    """Draw lower halves (n, 32) in levels by a family; also return its share of accepted steps, nan without any."""
    generator = run.stream(name)
    if name == "causal-conv":
        return model.continued(upper, generator), math.nan
    if name == "realnvp":
        return flow_completions(model, upper, s, generator)
    if name == "vae":
        return vae_completions(model, upper, data.known.y.mean(0) * (LEVELS - 1), s, generator)
    return inpainted(model, upper, s, generator), math.nan


SMOKE = dict.fromkeys(("causal_conv_steps", "realnvp_steps", "vae_steps", "sde_vp_steps", "draws", "langevin_steps"), 2)


@experiment("completions", family="reference", seeds=3, tasks=("digits",), smoke=SMOKE | {"steps_per_level": 1})
@torch.no_grad()
def completions(run: Run, s: Settings) -> None:
    """Lower halves of digits given upper ones, by each family of models of whole digits."""
    data = half_digits(run.device)
    whole = data.task.test.to(run.device)
    upper = whole[:, :HALF].repeat_interleave(s.draws, dim=0)
    training_steps = s.causal_conv_steps, s.realnvp_steps, s.vae_steps, s.sde_vp_steps
    shown: dict[str, Tensor] = {}
    for name, steps in zip(FAMILIES, training_steps, strict=True):
        watch = Stopwatch()
        model = fitted(name, steps, data.task, run)
        trained = watch.seconds
        levels, acceptance = _completed(name, model, upper, data, run, s)
        shown[name] = levels.view(len(whole), s.draws, HALF) / (LEVELS - 1)
        if not math.isnan(acceptance):
            accepted = Estimate(acceptance, math.nan, "estimate", "share of proposals", len(upper))
            run.measure(f"acceptance:{name}", accepted)
        run.measure(f"time_training:{name}", Estimate.exact(trained, "seconds"))
        run.measure(f"time_completing:{name}", Estimate.exact(watch.seconds - trained, "seconds"))
        run.measure_all(completion_metrics(shown[name], data), name)
        if name == "causal-conv":
            given = log_prob_given_upper(model, whole)
    alone = fitted("causal-conv", s.causal_conv_steps, lower_halves(data.task), run).log_prob(whole[:, HALF:])
    run.measure("nll_given_upper:causal-conv", Estimate.mean_of(-given / HALF, "exact", "nats/pixel"))
    run.measure("nll_alone:causal-conv", Estimate.mean_of(-alone / HALF, "exact", "nats/pixel"))
    run.measure("mutual_information:causal-conv", Estimate.mean_of(given - alone, "estimate", "nats"))
    run.classifiers[data.task.name] = data.features.sha256
    run.plot(digits_plot(data, shown))
    order = (given - alone).sort().values
    share = torch.arange(len(order)) / len(order)
    title = "what the upper half says about the lower one, over the test digits"
    axes = "share of test digits", "log p(lower | upper) - log p(lower), nats"
    run.curves("information", title, axes, {"causal-conv": (share.tolist(), order.tolist())}, levels={"nothing": 0.0})
