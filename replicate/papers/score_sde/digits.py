"""Tables 1 and 2 and figure 3 with one network trained on the 8x8 digits."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.image_scores import frechet_to_train
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.ode import ode_log_prob
from replicate.model import Estimate
from replicate.papers.score_sde.samplers import SAMPLERS, SNR, measure_tolerances, sample
from replicate.runs.execute import run as run_spec
from replicate.runs.spec import make_spec
from replicate.score_based.bound import variational_bound
from replicate.score_based.diffusion import DiffusionModel
from replicate.sde import SDE, VE
from replicate.tasks.base import Task


def measure_samplers(run: Run, model: Preprocessed, task: Task, samples: int, nfe: int) -> None:
    """Draw by P, PC and C on VE and VP with one network; measure the Frechet distance to the training images."""
    inner = cast(DiffusionModel, model.inner)
    own: SDE = inner.sde
    low = float(own.log_ratio(torch.tensor(own.t_min, dtype=torch.float64)).exp())
    for sde_name, sde in {"ve": VE(low, 50.0), "vp": own}.items():
        score_at = on_sde(inner, sde).score_at
        for name in SAMPLERS:
            generator = run.stream(f"sample-{sde_name}-{name}")
            z = sample(name, score_at, sde, samples, dim=task.info.dim, nfe=nfe, snr=SNR, generator=generator)
            run.measure(f"frechet:{sde_name}-{name}", frechet_to_train(task, model.transform.inverse(z)))


def on_sde(model: DiffusionModel, sde: SDE) -> DiffusionModel:
    """Return the same network on another SDE, whose noise levels must be among those that it was trained on."""
    return DiffusionModel(model.net, model.dim, sde, model.proposal, model.weighting, model.sample_steps)


def measure_likelihoods(run: Run, model: Preprocessed, x: Tensor, draws: int, ode_steps: int, levels: int) -> None:
    """Measure -log P of images x (n, D) by the flow and by the variational bound, with one set of noise draws."""
    inner, generator = cast(DiffusionModel, model.inner), run.stream("evaluation")
    flow, bound = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for _ in range(draws):
        z, logdet = model.transform(x, generator)
        ode = ode_log_prob(inner, z, generator, steps=ode_steps)
        elbo = variational_bound(inner, z, levels, generator)
        flow += (ode.values + logdet).double() / draws
        bound += (elbo.values + logdet) / draws
    run.measure("nll:ode", Estimate.mean_of(-flow, "upper_bound", "nats"))
    run.measure("nll:elbo", Estimate.mean_of(-bound, "upper_bound", "nats"))
    run.measure("nll_gap", Estimate.mean_of(flow - bound, "estimate", "nats"))
    run.measure("solver_error", ode.details["solver_error"])


@experiment(
    "score-sde-digits",
    family="score",
    seeds=3,
    tasks=("digits",),
    smoke={"steps": 10, "samples": 100, "nfe": 8, "test_images": 40, "draws": 1, "ode_steps": 4, "levels": 4},
)
def trained_digits(
    run: Run,
    *,
    steps: int = 1000,
    samples: int = 1000,
    nfe: int = 200,
    test_images: int = 447,
    draws: int = 8,
    ode_steps: int = 12,
    levels: int = 32,
) -> None:
    """Samplers, likelihood against its bound, and ODE tolerance with one trained network on digits."""
    spec = make_spec("sde-vp", "digits", run.streams.seed, settings={"steps": steps})
    trained, task, _, _ = run_spec(spec, run.device)
    model = cast(Preprocessed, trained)
    measure_samplers(run, model, task, samples, nfe)
    measure_likelihoods(run, model, task.test[:test_images].to(run.device), draws, ode_steps, levels)
    inner = cast(DiffusionModel, model.inner)
    start = inner.sde.prior_sample(samples, task.info.dim, run.stream("latents"))

    def quality(z: Tensor) -> Estimate:
        return frechet_to_train(task, model.transform.inverse(z))

    measure_tolerances(run, inner.score_at, inner.sde, start, quality)
