"""Linear ICA by every method, in whitened coordinates, scored by the exact likelihood of fresh examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replicate.energies.objectives import MaximumLikelihood, NoiseContrastive, Objective
from replicate.experiments import Run, experiment
from replicate.experiments.ica import SOURCE_STD, Ica, draw_unmixing, rotation, whitening
from replicate.model import Estimate, Model
from replicate.papers.song_kingma.methods import VARIANTS, Curve, Settings, draw_curves, objective_of, report, train


@dataclass(frozen=True, kw_only=True)
class IcaSettings(Settings):
    """Settings of the comparison in `dim` dimensions, chosen on seeds that are not judged."""

    dim: int = 5
    examples: int = 5000
    test_examples: int = 20_000
    batch: int = 250
    lr: float = 0.1
    move_step: float = 1.0
    pcd_k: int = 1
    jump_k: int = 1
    short_run_step: float = 0.2
    sigma: float = 0.1
    contrast: float = 1.0
    bandwidth: float = 0.3


class IcaModel(Model):
    """f(z) = -sum_i g(m_i z) with g the logistic log density and M to be learned: `Ica` without its log Z.

    A constant makes the log Z of the start (D, D) 0, where the methods that learn it begin. Without an objective it
    trains by maximum likelihood.
    """

    offset: Tensor

    def __init__(self, start: Tensor, objective: Objective | None = None) -> None:
        super().__init__()
        self.m = nn.Parameter(start.clone())
        self.register_buffer("offset", Ica(start).log_z())
        self.objective = objective or MaximumLikelihood(lambda energy: self.log_z())

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.objective.prepare(train, generator)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective.loss(self.energy, batch, generator)

    def energy(self, x: Tensor) -> Tensor:
        return self.offset - Ica(self.m).log_density(x)

    def log_z(self) -> Tensor:
        """Return the exact log Z in nats of the energy with its constant."""
        return Ica(self.m).log_z() - self.offset


def study(
    variant: str, run: Run, s: IcaSettings, data: Tensor, start: Tensor, gap: Callable[[Tensor], Tensor]
) -> Curve:
    """Train on whitened data (n, D) by one method from M = `start` (D, D) and measure it; return its learning curve.

    `gap` of M is the log-likelihood in nats that it loses at each test example.
    """
    with run.initialisation():
        objective = None if variant == "ml" else objective_of(variant, s.dim, s)
    model = IcaModel(start, objective).to(run.device, torch.float64)
    curve, seconds = train(variant, model, data, s, run, lambda: float(gap(model.m.detach()).mean()))
    estimates = {"gap": Estimate.mean_of(gap(model.m.detach()), "exact", "nats"), "time_seconds": seconds}
    if isinstance(objective, NoiseContrastive):
        error = abs(float(objective.log_z.detach()) - float(model.log_z().detach()))
        estimates["log_z_error"] = Estimate.exact(error, "nats")
    report(run, estimates, variant)
    return curve


SMOKE = {"examples": 300, "test_examples": 500, "updates": 3, "batch": 50, "flow_steps": 2}


@experiment("energies-ica", family="ebm", seeds=3, smoke=SMOKE, precision="float64")
def independent_components(run: Run, s: IcaSettings) -> None:
    """Linear ICA in 5 dimensions by every method, scored by the exact log-likelihood."""
    unmixing = draw_unmixing(s.dim, run.stream("mixing")).to(run.device)
    x = Ica(unmixing).sample(s.examples, run.stream("data"))
    white = whitening(x)
    truth = Ica(unmixing @ torch.linalg.inv(white))
    test = truth.sample(s.test_examples, run.stream("test"))
    true = truth.log_prob(test)
    start = SOURCE_STD * rotation(s.dim, run.stream("rotation"))

    def gap(m: Tensor) -> Tensor:
        return true - Ica(m).log_prob(test)

    curves = {variant: study(variant, run, s, x @ white.T, start, gap) for variant in VARIANTS}
    draw_curves(run, f"linear ICA in {s.dim} dimensions, every method", "gap to the truth (nats, exact)", curves)
