"""Linear ICA by objectives that need no log Z, scored by the exact likelihood.

Grathwohl, Wang, Jacobsen, Duvenaud and Zemel 2020, "Learning the Stein Discrepancy for Training and Evaluating
Energy-Based Models without Sampling" (2002.05616), the ICA benchmark: x = A s with independent logistic sources
s_i of scale 1, and the model

    log p(x) = f(x) - log Z,   f(x) = sum_i g(w_i x),   log Z = -log|det W|,   g the logistic log density,

of which an objective sees f alone while its score, the likelihood, sees all. The mixing is the released code's: W
standard normal, drawn again until its condition number is below D. The logistic density is smooth, so that score
matching is exact here; with Laplace's |.| it would not apply.

Deviations from the released code, which draws new data at each of 100,000 Adam steps:
- every objective has the same `examples` data and one auxiliary draw an example (a noise, a projection, a chain), and
  those whose draws can be kept fixed are minimised to convergence by L-BFGS in float64. What remains is the
  statistics of the objective and not its learning rate. Contrastive divergence has no objective to minimise and follows
  its gradient by Adam, lr and steps chosen once on a seed that no claim uses;
- all start at the whitening of the data after a random rotation, and move M in W = M * whitening;
- score matching has the exact trace (the code's "sm" is its sliced form with Gaussian projections, `ssm-vr` here with
  signs); denoising score matching and contrastive divergence are not in the code;
- the learned Stein discrepancy itself and the kernel one are not replicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from replicate.experiments.ica import SOURCE_STD, Ica, draw_unmixing, rotation, whitening
from replicate.model import Estimate
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.seeds import Streams
from replicate.sampling.langevin import mala
from replicate.score_based import matching
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive

#: objectives, besides maximum likelihood, whose minimum is the truth as the data grow
CONSISTENT = ("sm", "ssm", "ssm-vr", "nce", "nce-full", "cd")
#: of a search by L-BFGS
MAX_ITERATIONS = 1000
#: test examples of a learning curve
CURVE_EXAMPLES = 5000


#: of the model and of c, which stands for -log Z and is learned where an objective asks for it
Objective = Callable[[Ica, Tensor], Tensor]


def maximum_likelihood(x: Tensor) -> Objective:
    """-E log p, with log Z known."""
    return lambda model, c: -model.log_prob(x).mean()


def score_matching(x: Tensor) -> Objective:
    """Implicit score matching with this model's trace in closed form."""
    return lambda model, c: (0.5 * model.score(x).square().sum(-1) + model.laplacian(x)).mean()


def sliced(x: Tensor, reduced: bool, generator: torch.Generator) -> Objective:
    """Sliced score matching with one fixed sign vector an example; with its variance `reduced` or not."""
    v = matching.rademacher(x, generator)
    objective = matching.sliced_score_matching_vr if reduced else matching.sliced_score_matching
    return lambda model, c: objective(model.score, x, v).mean()


def denoising(x: Tensor, relative_noise: float, generator: torch.Generator) -> Objective:
    """Denoising score matching, one fixed noise an example, sigma in root mean square deviations of the data."""
    sigma = relative_noise * float(x.var(0).mean().sqrt())
    z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return lambda model, c: matching.denoising_score_matching(model.score, x, sigma, z).mean()


def contrasting(x: Tensor, diagonal: bool, generator: torch.Generator) -> Objective:
    """Noise-contrastive estimation against a Gaussian of the data's variances (`diagonal`) or covariance, nu = 1."""
    q = GaussianNoise.fit(x, diagonal)
    y = q.sample(len(x), generator)
    log_q_x, log_q_y = q.log_prob(x), q.log_prob(y)
    return lambda model, c: noise_contrastive(model.log_density(x) + c - log_q_x, model.log_density(y) + c - log_q_y)


@dataclass(frozen=True)
class Fit:
    """A fitted model, its path and what else was learned.

    Attributes:
        model: at the end.
        path: W after each recorded iteration, the start first, shape (iterations, D, D).
        log_z: learned log Z where the objective has one.
    """

    model: Ica
    path: Tensor
    log_z: float = math.nan


def room_for_path(start: Tensor, iterations: int) -> Tensor:
    """Where a path of so many iterations will stand.

    Room is taken at once: small matrices that are kept one by one, between blocks of a whole data set that come and go,
    leave holes that no block fits into, and a long search of 50 dimensions then takes ten gigabytes.
    """
    path = start.new_empty(1 + iterations, *start.shape)
    path[0] = start
    return path


def minimise(objective: Objective, start: Tensor, white: Tensor) -> Fit:
    """L-BFGS over M in W = M * white and c = -log Z, from M = `start` and the c that is right there.

    Args:
        objective: a scalar; where it ignores c, the gradient in c is zero and c stays.
        start: M at the start, shape (D, D).
        white: whitening matrix, shape (D, D).
    """
    d = len(start)
    path, taken = room_for_path(start @ white, MAX_ITERATIONS), 1
    log_det = float(torch.linalg.slogdet(start @ white).logabsdet)

    def tensor(v: np.ndarray) -> Tensor:
        return torch.as_tensor(v, dtype=torch.float64, device=start.device).clone()

    def value_and_grad(v: np.ndarray) -> tuple[float, np.ndarray]:
        theta = tensor(v).requires_grad_(True)
        loss = objective(Ica(theta[:-1].view(d, d) @ white), theta[-1])
        (grad,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), grad.cpu().numpy()

    def record(v: np.ndarray) -> None:
        nonlocal taken
        path[taken] = tensor(v)[:-1].view(d, d) @ white
        taken += 1

    first = np.append(start.flatten().cpu().numpy(), log_det)
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2000, "ftol": 1e-12, "gtol": 1e-6}
    found = minimize(value_and_grad, first, jac=True, method="L-BFGS-B", callback=record, options=options)
    return Fit(Ica(tensor(found.x)[:-1].view(d, d) @ white), path[:taken].clone(), -float(found.x[-1]))


def contrastive_divergence(
    x: Tensor, start: Tensor, white: Tensor, params: Mapping[str, Any], generator: torch.Generator
) -> Fit:
    """CD-k: the gradient of E_data f - E_chain f, chains of k Metropolis-adjusted Langevin steps from the data.

    The chains move in whitened coordinates z = white * x, where one step size fits all directions; W = M * white has
    f(x) = (Ica(M)).f(z). Adam, lr to zero along a half cosine, the whole data set a step.
    """
    z = x @ white.T
    m = nn.Parameter(start.clone())
    steps = params["cd_updates"]
    optimizer = torch.optim.Adam([m], lr=params["cd_lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    state: State = {
        "m": nn.ParameterList([m]),
        "optimizer": optimizer,
        "schedule": schedule,
        "generator": generator,
        "path": room_for_path(start @ white, steps),
    }
    for i in resumable("contrastive divergence", steps, state):
        now = Ica(m.detach())
        chain = mala(now.log_density, now.score, z, params["cd_steps"], params["cd_step_size"], generator)
        model = Ica(m)
        optimizer.zero_grad()
        (model.log_density(chain.samples).mean() - model.log_density(z).mean()).backward()
        optimizer.step()
        schedule.step()
        state["path"][i + 1] = m.detach() @ white
    return Fit(Ica(m.detach() @ white), state["path"])


def fit_all(x: Tensor, params: Mapping[str, Any], streams: Streams) -> dict[str, Fit]:
    """Every objective on the data x (n, D), by name; "whitened" is where all start."""
    white = whitening(x)
    start = SOURCE_STD * rotation(x.shape[1], streams.fresh("rotation"))
    objectives = {
        "mle": maximum_likelihood(x),
        "sm": score_matching(x),
        "dsm": denoising(x, params["dsm_noise"], streams.fresh("noise")),
        "dsm-low": denoising(x, params["dsm_low_noise"], streams.fresh("noise")),
        "ssm": sliced(x, False, streams.fresh("projections")),
        "ssm-vr": sliced(x, True, streams.fresh("projections")),
        "nce": contrasting(x, True, streams.fresh("contrast")),
        "nce-full": contrasting(x, False, streams.fresh("contrast")),
    }
    names = list(objectives)
    state: State = {"found": []}
    # scipy's search cannot be saved midway: it is one step, and an objective that has been minimised stays so
    for i in resumable("objectives", len(names), state):
        fit = minimise(objectives[names[i]], start, white)
        state["found"].append({"w": fit.model.w, "path": fit.path, "log_z": fit.log_z})
    fits = {n: Fit(Ica(f["w"]), f["path"], f["log_z"]) for n, f in zip(names, state["found"], strict=True)}
    fits["cd"] = contrastive_divergence(x, start, white, params, streams.fresh("chains"))
    fits["whitened"] = Fit(Ica(start @ white), start.new_empty(0, *start.shape))
    return fits


def independent_components(context: Context) -> Outcome:
    """Fit every objective to one draw of mixing and data; the exact likelihood of fresh examples scores them."""
    params, streams = context.params, context.streams
    truth = Ica(draw_unmixing(params["dim"], streams.fresh("mixing")).to(context.device))
    fits = fit_all(truth.sample(params["examples"], streams.fresh("data")), params, streams)
    test = truth.sample(params["test_examples"], streams.fresh("test"))
    true = truth.log_prob(test)
    estimates = {"log_likelihood:truth": Estimate.mean_of(true, "exact", "nats")}
    for name, fit in fits.items():
        log_p = fit.model.log_prob(test)
        estimates[f"log_likelihood:{name}"] = Estimate.mean_of(log_p, "exact", "nats")
        estimates[f"gap:{name}"] = Estimate.mean_of(true - log_p, "exact", "nats")
    lead = min(estimates[f"gap:{name}"].value for name in CONSISTENT) - estimates["gap:mle"].value
    estimates["lead:mle"] = Estimate(lead, math.nan, "exact", "nats", len(test))
    excess = (estimates["gap:nce"].value - estimates["gap:mle"].value) / params["dim"]
    estimates["excess_per_dim:nce"] = Estimate(excess, math.nan, "exact", "nats per dimension", len(test))
    for name in ("nce", "nce-full"):
        error = abs(fits[name].log_z - float(fits[name].model.log_z()))
        estimates[f"log_z_error:{name}"] = Estimate.exact(error, "nats")
    return Outcome(estimates, (learning_curves(fits, test[:CURVE_EXAMPLES], truth),))


def learning_curves(fits: Mapping[str, Fit], test: Tensor, truth: Ica) -> Plot:
    """Gap to the truth along each optimisation, which runs from 0 to 1."""
    true = truth.log_prob(test).mean()
    lines = []
    for name, fit in fits.items():
        if len(fit.path):
            chosen = sorted({round(i * (len(fit.path) - 1) / 60) for i in range(61)})
            gap = [max(float(true - Ica(fit.path[i]).log_prob(test).mean()), 1e-5) for i in chosen]
            lines.append(Line(name, [i / max(len(fit.path) - 1, 1) for i in chosen], gap))
    return Plot(
        "curves",
        "Linear ICA: log-likelihood lost against the truth while each objective is minimised",
        "part of the optimisation",
        "gap (nats, exact)",
        tuple(lines),
        log_y=True,
    )


#: the released code's sources and mixing; what it leaves open is chosen as the module's header says
PARAMS: Mapping[str, Any] = {
    "examples": 5000,
    "test_examples": 100_000,
    "dsm_noise": 0.5,
    "dsm_low_noise": 0.1,
    "cd_steps": 1,
    "cd_step_size": 1.0,
    "cd_updates": 200,
    "cd_lr": 0.2,
}
SMOKE = {"examples": 500, "test_examples": 2000, "cd_updates": 20}


def ica_experiment(dim: int, profiles: tuple[str, ...] = ("standard",), **changed: Any) -> Experiment:
    """The benchmark in `dim` dimensions, with some settings `changed`."""
    return Experiment(
        name=f"lsd-ica-{dim}",
        about=f"linear ICA in {dim} dimensions, nine objectives scored by the exact log-likelihood",
        family="ebm",
        run=independent_components,
        params={"dim": dim, **PARAMS, **changed},
        overrides={"smoke": SMOKE},
        profiles=profiles,
        precision="float64",
    )


ICA_2, ICA_5, ICA_10 = ica_experiment(2), ica_experiment(5), ica_experiment(10)
#: a quarter of an hour of one core a seed
ICA_50 = replace(ica_experiment(50, ("full",), examples=50_000, cd_updates=400), seeds=3)

PAPER = Paper("lsd", Path(__file__).with_suffix(".toml"), experiments=(ICA_2, ICA_5, ICA_10, ICA_50))
