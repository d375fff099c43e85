"""Objectives of linear ICA, their minimisation, and the likelihood of what they find."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from replicate.experiments import Experiment, Run, experiment, fit
from replicate.experiments.ica import SOURCE_STD, Ica, draw_unmixing, minimise, rotation, whitening
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.sampling.langevin import mala
from replicate.score_based import matching
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive

#: objectives, besides maximum likelihood, whose minimum is the truth as the data grow
CONSISTENT = ("sm", "ssm", "ssm-vr", "nce", "nce-full", "cd")
#: test examples of a learning curve, and points on it
CURVE_EXAMPLES, CURVE_POINTS = 5000, 61
#: a function of the model and of c, which replaces -log Z and is learned where an objective uses it
Objective = Callable[[Ica, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings as the package's header says; the noises of denoising are in root mean square deviations of the data."""

    dim: int
    examples: int = 5000
    test_examples: int = 100_000
    dsm_noise: float = 0.5
    dsm_low_noise: float = 0.1
    cd_steps: int = 1
    cd_step_size: float = 1.0
    cd_updates: int = 200
    cd_lr: float = 0.2


def maximum_likelihood(x: Tensor) -> Objective:
    """Return -E log p, with log Z known."""
    return lambda model, c: -model.log_prob(x).mean()


def score_matching(x: Tensor) -> Objective:
    """Return implicit score matching with this model's trace in closed form."""
    return lambda model, c: (0.5 * model.score(x).square().sum(-1) + model.laplacian(x)).mean()


def sliced(x: Tensor, reduced: bool, generator: torch.Generator) -> Objective:
    """Return sliced score matching with one fixed sign vector per example; with its variance `reduced` or not."""
    v = matching.rademacher(x, generator)
    objective = matching.sliced_score_matching_vr if reduced else matching.sliced_score_matching
    return lambda model, c: objective(model.score, x, v).mean()


def denoising(x: Tensor, relative_noise: float, generator: torch.Generator) -> Objective:
    """Return denoising score matching with one fixed noise per example."""
    sigma = relative_noise * float(x.var(0).mean().sqrt())
    z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return lambda model, c: matching.denoising_score_matching(model.score, x, sigma, z).mean()


def contrasting(x: Tensor, diagonal: bool, generator: torch.Generator) -> Objective:
    """Return noise contrast (nu = 1) with a Gaussian of the data's variances (`diagonal`) or covariance."""
    q = GaussianNoise.fit(x, diagonal)
    y = q.sample(len(x), generator)
    log_q_x, log_q_y = q.log_prob(x), q.log_prob(y)
    return lambda model, c: noise_contrastive(model.log_density(x) + c - log_q_x, model.log_density(y) + c - log_q_y)


class Fitted(NamedTuple):
    """A fitted W (D, D), the path (iterations, D, D) of M in W = M * white from the start on, and the learned log Z."""

    w: Tensor
    path: Tensor
    log_z: float = math.nan


def minimum(objective: Objective, start: Tensor, white: Tensor) -> Fitted:
    """Minimise over M (D, D) in W = M * white (D, D) and c = -log Z, from M = `start` and the c that is right there."""
    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-12, "gtol": 1e-6}
    log_z = float(Ica(start @ white).log_z())
    m, log_z, path = minimise(lambda m, c: objective(Ica(m @ white), c), start, log_z, options)
    return Fitted(m @ white, path, log_z)


def contrastive_divergence(x: Tensor, start: Tensor, white: Tensor, s: Settings, generator: torch.Generator) -> Fitted:
    """Train by CD-k: the gradient of E_data f - E_chain f, chains of k Metropolis-adjusted Langevin steps from data.

    The chains move in whitened coordinates z = white * x, where one step size fits all directions and f(x) is that of
    Ica(M) at z. Adam, lr to zero along a half cosine, the whole data set per step.
    """
    z, m = x @ white.T, nn.Parameter(start.clone())
    path = nn.Parameter(start.repeat(1 + s.cd_updates, 1, 1), requires_grad=False)
    optimizer = torch.optim.Adam([m], lr=s.cd_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.cd_updates)

    def loss() -> Tensor:
        path[schedule.last_epoch] = m.detach()
        now, model = Ica(m.detach()), Ica(m)
        chain = mala(now.log_density, now.score, z, s.cd_steps, s.cd_step_size, generator)
        return model.log_density(chain.samples).mean() - model.log_density(z).mean()

    both, state = nn.ParameterList([m, path]), {"generator": generator}
    fit(both, loss, optimizer, s.cd_updates, state, schedule=schedule, name="contrastive divergence")
    path[-1] = m.detach()
    return Fitted(m.detach() @ white, path.detach())


def fit_all(x: Tensor, white: Tensor, s: Settings, run: Run) -> dict[str, Fitted]:
    """Fit by every objective to the data x (n, D), by name; all start at "whitened"."""
    start = SOURCE_STD * rotation(s.dim, run.stream("rotation"))
    objectives = {
        "mle": maximum_likelihood(x),
        "sm": score_matching(x),
        "dsm": denoising(x, s.dsm_noise, run.stream("noise")),
        "dsm-low": denoising(x, s.dsm_low_noise, run.stream("noise")),
        "ssm": sliced(x, False, run.stream("projections")),
        "ssm-vr": sliced(x, True, run.stream("projections")),
        "nce": contrasting(x, True, run.stream("contrast")),
        "nce-full": contrasting(x, False, run.stream("contrast")),
    }
    state: State = {"found": []}
    # scipy's search cannot be saved midway: it is one step, and a resumed run repeats no search that has ended
    for i in resumable("objectives", len(objectives), state):
        state["found"].append(tuple(minimum(list(objectives.values())[i], start, white)))
    fits = {name: Fitted(*found) for name, found in zip(objectives, state["found"], strict=True)}
    fits["cd"] = contrastive_divergence(x, start, white, s, run.stream("chains"))
    fits["whitened"] = Fitted(start @ white, start.new_empty(0, *start.shape))
    return fits


def independent_components(run: Run, s: Settings) -> None:
    """Fit every objective to one draw of mixing and data; the exact likelihood of fresh examples scores them."""
    truth = Ica(draw_unmixing(s.dim, run.stream("mixing")).to(run.device))
    x = truth.sample(s.examples, run.stream("data"))
    white = whitening(x)
    fits = fit_all(x, white, s, run)
    test = truth.sample(s.test_examples, run.stream("test"))
    true = truth.log_prob(test)
    run.measure("log_likelihood:truth", Estimate.mean_of(true, "exact", "nats"))
    gap = {}
    for name, found in fits.items():
        log_p = Ica(found.w).log_prob(test)
        run.measure(f"log_likelihood:{name}", Estimate.mean_of(log_p, "exact", "nats"))
        gap[name] = Estimate.mean_of(true - log_p, "exact", "nats")
        run.measure(f"gap:{name}", gap[name])
    lead = min(gap[name].value for name in CONSISTENT) - gap["mle"].value
    run.measure("lead:mle", Estimate(lead, math.nan, "exact", "nats", len(test)))
    excess = (gap["nce"].value - gap["mle"].value) / s.dim
    run.measure("excess_per_dim:nce", Estimate(excess, math.nan, "exact", "nats per dimension", len(test)))
    for name in ("nce", "nce-full"):
        error = abs(fits[name].log_z - float(Ica(fits[name].w).log_z()))
        run.measure(f"log_z_error:{name}", Estimate.exact(error, "nats"))
    title = "Linear ICA: log-likelihood lost against the truth while each objective is minimised"
    curves = learning_curves(fits, white, test[:CURVE_EXAMPLES], truth)
    run.curves("curves", title, ("part of the optimisation", "gap (nats, exact)"), curves, log="y")


def learning_curves(
    fits: Mapping[str, Fitted], white: Tensor, test: Tensor, truth: Ica
) -> dict[str, tuple[list[float], list[float]]]:
    """Return the gap to the truth along each optimisation, which runs from 0 to 1."""
    true, curves = truth.log_prob(test).mean(), {}
    for name, found in fits.items():
        if len(found.path):
            last = len(found.path) - 1
            chosen = sorted({round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
            gap = [max(float(true - Ica(found.path[i] @ white).log_prob(test).mean()), 1e-5) for i in chosen]
            curves[name] = [i / max(last, 1) for i in chosen], gap
    return curves


def benchmark(settings: Settings, **declared: Any) -> Experiment:
    """Declare the benchmark in one number of dimensions."""
    about = f"linear ICA in {settings.dim} dimensions, nine objectives scored by the exact log-likelihood"
    declared |= {"precision": "float64", "smoke": {"examples": 500, "test_examples": 2000, "cd_updates": 20}}
    name = f"lsd-ica-{settings.dim}"
    return experiment(name, about=about, family="ebm", settings=settings, **declared)(independent_components)


#: in 50 dimensions a seed takes a quarter of an hour on one core
ICA_50 = benchmark(Settings(50, examples=50_000, cd_updates=400), seeds=3, profiles=("full",))
EXPERIMENTS = (*(benchmark(Settings(dim)) for dim in (2, 5, 10)), ICA_50)
