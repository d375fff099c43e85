"""Maximum likelihood training of score-based diffusion models (Song, Durkan, Murray and Ermon 2021, 2101.09258).

Replicated on the 8x8 digits: what the weighting and the drawing of the time do to the likelihood and to the samples,
at one network, one initialisation, the same batches and the same number of steps. The arms are

    plain        lambda(t) = sigma^2, t uniform: the mean of |eps - z|^2, the "original" weighting of the paper
    likelihood   lambda(t) = g^2, t uniform (eq. 7 and theorem 1)
    importance   lambda(t) = g^2, t drawn in proportion to g^2 / sigma^2 (section 4.3): even in log(sigma / s)

and two more that score_sde's table 2 asks for: "subvp" is plain on the sub-VP SDE, "discrete" is plain on DDPM's 1000
levels. With lambda = log rho = log(sigma / s) one has d lambda / dt = g^2 / (2 sigma^2) for every affine SDE, so that
the likelihood weighting is the integral of E|eps - z|^2 over lambda, whatever the SDE.

`variational_bound` is theorem 3 with the last step to the data: the bound that the likelihood weighting lowers.

Deviations: a multilayer perceptron preconditioned by the data's Gaussian fit, a thousandth of the paper's
training, in which each example is noised by z and by -z (the same objective with less noise, for every arm), uniform
dequantisation with gaussianised marginals in place of variational dequantisation; t_min = 1e-3 (VP)
and 0.03 (sub-VP), which are the same noise, where the paper has 1e-5; samples by Heun's method on the probability
flow; the Frechet distance is taken in the features of a digit classifier, to the training images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicate.experiments.image_scores import WEIGHTINGS, frechet_to_train
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import Estimate, Training
from replicate.registry import model_entry
from replicate.runs.evaluate import digit_features
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.seeds import Streams
from replicate.runs.training import train
from replicate.score_based.bound import mean_error
from replicate.score_based.diffusion import DiffusionModel, LevelProposal, UniformTime, Weighting, level_range
from replicate.score_based.networks import NoiseNet
from replicate.sde import SDE, VP, SubVP
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

#: the paper's levels of a discretely trained VP model: DDPM's (Ho et al. 2020, 2006.11239, section 4)
DDPM_LEVELS, DDPM_BETAS = 1000, (1e-4, 0.02)


# -- times


class ImportanceTime(LevelProposal):
    """p(t) in proportion to g^2 / sigma^2 (section 4.3): independent draws, even in lambda."""

    def __init__(self, sde: SDE) -> None:
        super().__init__(*level_range(sde), location=0.0, scale=1.0, uniform=1.0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return self.low + u * (self.high - self.low)


class DiscreteTime(UniformTime):
    """DDPM's 1000 levels, each as likely as another; they are the VP SDE's at t = i / 1000 up to O(1 / 1000)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        levels = ddpm_levels().to(generator.device)
        return levels[torch.randint(len(levels), (n,), generator=generator, device=generator.device)]


def ddpm_levels() -> Tensor:
    """log(sigma / s) of DDPM's 1000 levels, float64, increasing."""
    alpha_bar = (1 - torch.linspace(*DDPM_BETAS, DDPM_LEVELS, dtype=torch.float64)).cumprod(0)
    return 0.5 * ((1 - alpha_bar).log() - alpha_bar.log())


def single_draw_objective(model: DiffusionModel, z: Tensor, generator: torch.Generator) -> Tensor:
    """Likelihood-weighted |eps - noise|^2 of each row of z (n, D), one time and one noise draw each, shape (n,)."""
    level = model.proposal.sample(len(z), generator).to(z)
    noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
    error = (model.net(z + level.exp()[:, None] * noise, level) - noise).square().sum(-1)
    return error / model.proposal.density(level)


# -- the experiment


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        sde: the forward process.
        times: the proposal of training times on it, as noise levels.
        weighting: "likelihood" corrects for the proposal; "proposal" leaves every draw with weight 1.
    """

    sde: SDE
    times: Callable[[SDE], LevelProposal]
    weighting: Weighting

    def on(self, net: NoiseNet, dim: int, sample_steps: int) -> DiffusionModel:
        """The model that this arm trains."""
        return DiffusionModel(net, dim, self.sde, self.times(self.sde), self.weighting, sample_steps)


ARMS: dict[str, Arm] = {
    "plain": Arm(VP(t_min=1e-3), UniformTime, "proposal"),
    "likelihood": Arm(VP(t_min=1e-3), UniformTime, "likelihood"),
    "importance": Arm(VP(t_min=1e-3), ImportanceTime, "likelihood"),
    "subvp": Arm(SubVP(t_min=0.03), UniformTime, "proposal"),
    "discrete": Arm(VP(t_min=1e-3), DiscreteTime, "proposal"),
}

#: arms whose samples are compared
SAMPLED = ("plain", "likelihood", "importance")

#: the registered model whose network and optimiser all arms share
BASE = "sde-vp"


def settings_of(params: Mapping[str, Any]) -> tuple[dict[str, Any], Training]:
    """The registered model's network and training on levels, with this experiment's steps and no selection."""
    entry = model_entry(BASE)
    overrides = entry.overrides["levels"]
    names = ("hidden", "depth", "features", "max_frequency", "width", "shrinkage", "dropout")
    network = {name: overrides.get(name, entry.params[name]) for name in names}
    own = {"steps": params["steps"], "batch_size": params["batch"], "lr": overrides["lr"], "validate_every": 0}
    training = replace(entry.training, **own)
    return network, training


def trained(arm: Arm, context: Context, task: Task) -> tuple[Preprocessed, DiffusionModel]:
    """An arm's model, trained; every arm has the same first weights, batches and dropout masks."""
    own = context.streams
    streams = Streams(own.task, own.model, own.seed, context.device.type)
    network, training = settings_of(context.params)
    with streams.initialisation():
        net = NoiseNet(task.info.dim, **network)
    inner = arm.on(net, task.info.dim, context.params["sample_steps"])
    model = Preprocessed(inner, task.info, "gaussianise").to(context.device)
    train(model, task.train.to(context.device), task.valid.to(context.device), training, streams)
    return model, inner


def objective_spread(inner: DiffusionModel, z: Tensor, repeats: int, generator: torch.Generator) -> dict[str, Estimate]:
    """Standard deviation over draws of one example's likelihood-weighted objective, by how its time is drawn.

    One network serves both, so that their means agree and only the spread differs.
    """
    out = {}
    for name in ("likelihood", "importance"):
        inner.proposal = ARMS[name].times(inner.sde)
        with torch.no_grad():
            values = torch.cat([single_draw_objective(inner, z, generator) for _ in range(repeats)]).double()
        spread = float(values.std())
        kurtosis = float(((values - values.mean()) / spread).pow(4).mean())
        stderr = spread * math.sqrt(max(kurtosis - 1, 0.0) / len(values)) / 2
        out[f"objective_sd:{name}"] = Estimate(spread, stderr, "estimate", "nats", len(values))
        out[f"objective_mean:{name}"] = Estimate.mean_of(values, "estimate", "nats")
    return out


def error_by_level(inner: DiffusionModel, z: Tensor, levels: Tensor, generator: torch.Generator) -> list[float]:
    """Mean |eps - z|^2 over the rows of z (n, D) at each level (L,): the bound's integrand, in nats."""
    with torch.no_grad():
        means = [mean_error(inner, z, level.expand(len(z)), generator).mean() for level in levels]
    return torch.stack(means).tolist()


def objectives(context: Context) -> Outcome:
    """Every arm: its likelihood by the probability flow on the test images, its samples, and where it errs."""
    params, task = context.params, load_task("digits")
    test = task.test[: params["test_images"]].to(context.device)
    effort = Effort(ode_draws=params["draws"])
    levels = torch.linspace(*level_range(ARMS["plain"].sde), 24, dtype=torch.float64, device=context.device)
    estimates: dict[str, Estimate] = {}
    errors: dict[str, list[float]] = {}
    for name, arm in ARMS.items():
        model, inner = trained(arm, context, task)
        log_p = log_likelihood(model, test, effort, context.streams.fresh("evaluation"))
        estimates[f"nll:{name}"] = -log_p.mean()
        if name in SAMPLED:
            samples = model.sample(params["samples"], context.streams.fresh("sample"))
            estimates[f"frechet:{name}"] = frechet_to_train(task, samples)
        z, _ = model.transform(test, context.streams.fresh("dequantise"))
        errors[name] = error_by_level(inner, z, levels, context.streams.fresh("levels"))
        if name == "plain":
            estimates |= objective_spread(inner, z, params["repeats"], context.streams.fresh("spread"))
    plots = (excess_by_level(levels.tolist(), errors),)
    return Outcome(estimates, plots, classifiers={task.name: digit_features(task).sha256})


def excess_by_level(levels: list[float], errors: dict[str, list[float]]) -> Plot:
    """Where on the noise levels each VP objective pays more, or less, than the plain one."""
    lines = tuple(
        Line(name, levels, [e - p for e, p in zip(errors[name], errors["plain"], strict=True)])
        for name in errors
        if name not in ("plain", "subvp")
    )
    title = "Test error of the noise prediction, in excess of the plain objective's"
    return Plot("error-by-level", title, "log(sigma / s)", "excess of E|eps - z|^2, nats", lines)


DIGITS = Experiment(
    name="scoreflow-digits",
    about="weighting and time of denoising score matching: likelihood and samples on digits",
    family="score",
    run=objectives,
    params={
        "steps": 700,
        "batch": 128,
        "test_images": 447,
        "draws": 2,
        "samples": 1000,
        "sample_steps": 32,
        "repeats": 20,
    },
    seeds=3,
    tasks=("digits",),
    overrides={
        "smoke": {"steps": 10, "test_images": 20, "draws": 1, "samples": 60, "sample_steps": 4, "repeats": 2},
    },
)

PAPER = Paper("scoreflow", Path(__file__).with_suffix(".toml"), experiments=(DIGITS, *WEIGHTINGS))
