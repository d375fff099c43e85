"""Arms of training on the 8x8 digits: SDE, proposal of times and weighting, at one network and initialisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.image_scores import frechet_to_train
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.model import Estimate
from replicate.registry import model_entry
from replicate.runs.evaluate import digit_features
from replicate.runs.seeds import Streams
from replicate.runs.training import train
from replicate.sampling.langevin import standard_normal_like
from replicate.score_based.bound import mean_error
from replicate.score_based.diffusion import DiffusionModel, LevelProposal, UniformTime, Weighting, level_range
from replicate.score_based.networks import NoiseNet
from replicate.sde import SDE, VP, SubVP
from replicate.tasks.base import Task
from replicate.tasks.loading import load_task

#: the paper's levels of a discretely trained VP model: DDPM's (Ho et al. 2020, 2006.11239, section 4)
DDPM_LEVELS, DDPM_BETAS = 1000, (1e-4, 0.02)


class ImportanceTime(LevelProposal):
    """p(t) in proportion to g^2 / sigma^2 (section 4.3): independent draws, even in lambda."""

    def __init__(self, sde: SDE) -> None:
        super().__init__(*level_range(sde), location=0.0, scale=1.0, uniform=1.0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        return self.low + u * (self.high - self.low)


class DiscreteTime(UniformTime):
    """DDPM's 1000 levels, equally likely; they are the VP SDE's at t = i / 1000 up to O(1 / 1000)."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        levels = ddpm_levels().to(generator.device)
        return levels[torch.randint(len(levels), (n,), generator=generator, device=generator.device)]


def ddpm_levels() -> Tensor:
    """Return log(sigma / s) of DDPM's 1000 levels, float64, increasing."""
    alpha_bar = (1 - torch.linspace(*DDPM_BETAS, DDPM_LEVELS, dtype=torch.float64)).cumprod(0)
    return 0.5 * ((1 - alpha_bar).log() - alpha_bar.log())


@dataclass(frozen=True)
class Arm:
    """One way of training: an SDE, the proposal of its times, as noise levels, and a weighting.

    "likelihood" corrects for the proposal; "proposal" leaves every draw with weight 1.
    """

    sde: SDE
    times: Callable[[SDE], LevelProposal]
    weighting: Weighting

    def on(self, net: NoiseNet, dim: int, sample_steps: int) -> DiffusionModel:
        """Return the model that this arm trains."""
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


def train_arm(
    run: Run, arm: Arm, task: Task, steps: int, batch: int, sample_steps: int
) -> tuple[Preprocessed, DiffusionModel]:
    """Train an arm's model with the settings of the registered "sde-vp" on levels, without selection.

    Every arm has the same first weights, batches and dropout masks.
    """
    streams = Streams(run.streams.task, run.streams.model, run.streams.seed, run.device.type)
    entry = model_entry("sde-vp")
    overrides = entry.overrides["levels"]
    names = ("hidden", "depth", "features", "max_frequency", "width", "shrinkage", "dropout")
    with streams.initialisation():
        net = NoiseNet(task.info.dim, **{name: overrides.get(name, entry.params[name]) for name in names})
    inner = arm.on(net, task.info.dim, sample_steps)
    model = Preprocessed(inner, task.info, "gaussianise").to(run.device)
    training = replace(entry.training, steps=steps, batch_size=batch, lr=overrides["lr"], validate_every=0)
    train(model, task.train.to(run.device), task.valid.to(run.device), training, streams)
    return model, inner


@torch.no_grad()
def objective_spread(inner: DiffusionModel, z: Tensor, repeats: int, generator: torch.Generator) -> dict[str, Estimate]:
    """Measure the spread of one example's objective over draws of one time and one noise, by how the time is drawn.

    It is the likelihood-weighted |eps - noise|^2 at examples z (n, D). One network serves both, so that their means
    agree and only the standard deviation differs.
    """
    out = {}
    for name in ("likelihood", "importance"):
        proposal, draws = ARMS[name].times(inner.sde), []
        for _ in range(repeats):
            level = proposal.sample(len(z), generator).to(z)
            noise = standard_normal_like(z, generator)
            error = (inner.net(z + level.exp()[:, None] * noise, level) - noise).square().sum(-1)
            draws.append(error / proposal.density(level))
        values = torch.cat(draws).double()
        spread = float(values.std())
        kurtosis = float(((values - values.mean()) / spread).pow(4).mean())
        stderr = spread * math.sqrt(max(kurtosis - 1, 0.0) / len(values)) / 2
        out[f"objective_sd:{name}"] = Estimate(spread, stderr, "estimate", "nats", len(values))
        out[f"objective_mean:{name}"] = Estimate.mean_of(values, "estimate", "nats")
    return out


SMOKE = {"steps": 10, "test_images": 20, "draws": 1, "samples": 60, "sample_steps": 4, "repeats": 2}


@experiment("scoreflow-digits", family="score", seeds=3, tasks=("digits",), smoke=SMOKE)
def objectives(
    run: Run,
    *,
    steps: int = 700,
    batch: int = 128,
    test_images: int = 447,
    draws: int = 2,
    samples: int = 1000,
    sample_steps: int = 32,
    repeats: int = 20,
) -> None:
    """Weighting and time of denoising score matching: likelihood and samples on digits.

    Every arm: its likelihood of the test images by the probability flow, its samples, and its error by noise level,
    drawn in excess of the plain objective's.
    """
    task = load_task("digits")
    test = task.test[:test_images].to(run.device)
    levels = torch.linspace(*level_range(ARMS["plain"].sde), 24, dtype=torch.float64, device=run.device)
    errors: dict[str, list[float]] = {}
    for name, arm in ARMS.items():
        model, inner = train_arm(run, arm, task, steps, batch, sample_steps)
        log_p = log_likelihood(model, test, Effort(ode_draws=draws), run.stream("evaluation"))
        run.measure(f"nll:{name}", -log_p.mean())
        if name in SAMPLED:
            run.measure(f"frechet:{name}", frechet_to_train(task, model.sample(samples, run.stream("sample"))))
        z, _ = model.transform(test, run.stream("dequantise"))
        generator = run.stream("levels")
        with torch.no_grad():  # the bound's integrand, in nats
            errors[name] = [mean_error(inner, z, at.expand(len(z)), generator).mean().item() for at in levels]
        if name == "plain":
            run.measure_all(objective_spread(inner, z, repeats, run.stream("spread")))
    run.classifiers[task.name] = digit_features(task).sha256
    excess = {
        name: (levels.tolist(), [e - p for e, p in zip(error, errors["plain"], strict=True)])
        for name, error in errors.items()
        if name not in ("plain", "subvp")
    }
    title = "Test error of the noise prediction, in excess of the plain objective's"
    run.curves("error-by-level", title, ("log(sigma / s)", "excess of E|eps - z|^2, nats"), excess)
