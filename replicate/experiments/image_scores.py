"""Experiments on MNIST and Fashion-MNIST of two papers: score SDE (2011.13456) and ScoreFlow (2101.09258).

What the weighting of denoising score matching, the SDE and the dequantiser do to bits per dimension, each with one
U-Net, and the samples and completions of NCSN (1907.05600). The claims stand in the papers' own files.

    likelihood   lambda(t) = g^2 with t drawn in proportion to g^2 / sigma^2: even in log(sigma / s)
    plain        lambda(t) = sigma^2 at uniform t: the mean of |eps - z|^2

Under the likelihood weighting the objective is the same for every SDE up to its end points (2101.09258, theorem 1 in
lambda = log(sigma / s); Kingma et al. 2021, 2107.00630, section 5.1), and the probability flow is too. So VP, sub-VP
and VE can differ there by their last noise level alone: the gap that table 2 has between VP and sub-VP comes from the
plain weighting.

One seed has the same first weights and the same batches in every experiment on one data set, so that the claims pair
by seed; the variational dequantiser belongs to the very weights that `score-mnist-vp` has.

Deviations: a U-Net of 1.5 million weights, where the papers have 60 to 100 million, and 8,000 steps of 128 images for
1.3 million (NCSN: 12,000 for 200,000); SDEs from rho = 2e-4, see `replicate.score_based.images`; each image is noised
by z and by -z; a fixed number of Runge-Kutta steps with a step-halving error in place of RK45; one draw of u and one
trace probe an image; samples by Heun's method on the probability flow. NCSN has this U-Net in place of RefineNet, with
the paper's levels and the released code's step, twice the printed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replicate.experiments.image_rows import IN_A_ROW, in_bits, sheet
from replicate.likelihood.estimator import Effort, log_likelihood
from replicate.metrics.features import image_features, sample_quality
from replicate.metrics.inception import WEIGHTS, inception, unavailable
from replicate.metrics.quality import frechet
from replicate.model import Estimate, LogLikelihood, Training
from replicate.resume import State, resumable
from replicate.runs.evaluate import digit_features
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.seeds import Streams
from replicate.runs.training import History, train
from replicate.score_based.bound import variational_bound
from replicate.score_based.diffusion import DiffusionModel, LevelProposal, UniformTime, Weighting
from replicate.score_based.images import (
    SDES,
    DequantisedImages,
    LearnedDequantisation,
    build_diffusion,
    build_ncsn,
    even_levels,
    inpaint,
)
from replicate.score_based.matching import tweedie
from replicate.score_based.ncsn import NCSN
from replicate.sde import SDE
from replicate.tasks.base import Task
from replicate.tasks.images import FILES, fashion_mnist, mnist

TASKS: dict[str, Callable[[], Task]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}
#: images at a time where all noise levels of one are computed
CHUNK = 2_000


@dataclass(frozen=True)
class Data:
    """What an experiment sees of a task, on its device; `reference` is what samples are compared with, on the CPU."""

    task: Task
    train: Tensor
    valid: Tensor
    test: Tensor
    reference: Tensor


def load(context: Context) -> Data:
    """The task that the settings name, its parts cut to `rows` where that is not 0."""
    p = context.params
    task = TASKS[p["data"]]()
    rows = slice(p["rows"] or None)
    parts = [part[rows].to(context.device) for part in (task.train, task.valid, task.test)]
    return Data(task, parts[0], parts[1], parts[2], task.train[: p["reference"]])


def shared_streams(context: Context, owner: str) -> Streams:
    """Generators that all experiments on one data set have in common; judged runs have others than designs."""
    own, p = context.streams, context.params
    stage = own.task.rpartition("/")[0]
    return Streams(f"{stage}/score-{p['data']}", owner, own.seed, context.device.type)


def training_of(p: Mapping[str, Any], steps: int, lr: float) -> Training:
    """Adam with warm-up and a cosine; the averaged weights of the last step, with no selection."""
    warmup = min(p["warmup"], steps // 2)
    return Training(steps, p["batch_size"], lr, betas=(0.9, 0.99), warmup=warmup, ema=p["ema"])


def judged(samples: Mapping[str, Tensor], data: Data, context: Context) -> Outcome:
    """Quality of the samples of every variant ("" or ":name"), and FID where Inception's weights are there."""
    name, info = context.params["data"], data.task.info
    assert info.image is not None
    estimates: dict[str, Estimate] = {}
    missing, classifiers = {}, {name: image_features(name).sha256}
    for variant, x in samples.items():
        estimates |= {f"{metric}{variant}": e for metric, e in sample_quality(x.cpu(), data.reference, name).items()}
    if why := unavailable():
        missing = {f"fid{variant}": why for variant in samples}
    else:
        judge = inception()
        real = judge.features(data.reference, info.image, context.device)
        for variant, x in samples.items():
            estimates[f"fid{variant}"] = frechet(judge.features(x.cpu(), info.image, context.device), real)
        classifiers["inception"] = judge.sha256
    return Outcome(estimates, missing=missing, classifiers=classifiers)


# -- diffusions


def proposal_of(sde: SDE, weighting: str) -> tuple[LevelProposal, Weighting]:
    """Training levels and their weights under the settings' weighting, "likelihood" or "plain"."""
    if weighting == "likelihood":
        return even_levels(sde), "likelihood"
    return UniformTime(sde), "proposal"


def trained_diffusion(context: Context, data: Data) -> tuple[DequantisedImages, DiffusionModel, History]:
    """The model that the settings name, trained on uniformly dequantised images."""
    p, info = context.params, data.task.info
    streams = shared_streams(context, "unet")
    sde = SDES[p["sde"]]
    with streams.initialisation():
        inner = build_diffusion(info, sde, *proposal_of(sde, p["weighting"]), p["sample_steps"], channels=p["channels"])
    model = DequantisedImages(inner, info).to(context.device)
    history = train(model, data.train, data.valid, training_of(p, p["steps"], p["lr"]), streams)
    return model, inner, history


def with_learned_dequantiser(context: Context, data: Data, inner: DiffusionModel) -> tuple[DequantisedImages, History]:
    """The same diffusion model with q(u | x) trained for it."""
    p, streams = context.params, shared_streams(context, "dequantiser")
    with streams.initialisation():
        model = LearnedDequantisation(inner, data.task.info, channels=p["dequantiser_channels"]).to(context.device)
    settings = training_of(p, p["dequantiser_steps"], p["dequantiser_lr"])
    return model, train(model, data.train, data.valid, settings, streams)


@torch.no_grad()
def flow_likelihood(model: DequantisedImages, x: Tensor, context: Context) -> LogLikelihood:
    """Lower bound on log P(x) by the probability flow: one draw of u and one probe an image."""
    effort = Effort(ode_draws=1, ode_steps=context.params["ode_steps"])
    return log_likelihood(model, x, effort, context.streams.fresh("evaluation"))


@torch.no_grad()
def bound_likelihood(model: DequantisedImages, inner: DiffusionModel, x: Tensor, context: Context) -> LogLikelihood:
    """Lower bound on log P(x) by the variational bound, with the draws of u that `flow_likelihood` has."""
    y, log_volume = model.transform(x, context.streams.fresh("evaluation"))
    parts = y.split(CHUNK)
    state: State = {"done": [], "generator": context.streams.fresh("bound")}
    for i in resumable("variational bound", len(parts), state):
        one = variational_bound(inner, parts[i], context.params["bound_levels"], state["generator"])
        state["done"].append(one.values)
    return LogLikelihood(torch.cat(state["done"]) + log_volume.double(), "lower_bound")


def likelihoods(context: Context) -> Outcome:
    """Train one diffusion model; its likelihood of the test images by flow and by bound, and its samples."""
    p, data = context.params, load(context)
    dim = data.task.info.dim
    model, inner, history = trained_diffusion(context, data)
    curves = {"score": history}
    uniform = model
    if p["dequantiser"] == "variational":
        model, curves["dequantiser"] = with_learned_dequantiser(context, data, inner)
    log_p = flow_likelihood(model, data.test, context)
    estimates = {
        **in_bits(log_p, dim),
        **log_p.details,
        **in_bits(bound_likelihood(model, inner, data.test, context), dim, ":elbo"),
        "nfe": Estimate.exact(inner.nfe, "network evaluations"),
        "train_seconds": Estimate.exact(sum(h.seconds for h in curves.values()), "seconds"),
    }
    samples = uniform.sample(p["samples"], context.streams.fresh("sample"))
    quality = judged({"": samples}, data, context)
    rows = {"data": data.test, **{f"samples {i + 1}": samples[IN_A_ROW * i :] for i in range(4)}}
    plots = (sheet("samples", "Samples of the probability flow", rows, data.task.info), training_curve(curves))
    found = {**estimates, **quality.estimates}
    return Outcome(found, plots, quality.missing, {data.task.name: log_p}, quality.classifiers)


# -- NCSN


def trained_ncsn(context: Context, data: Data) -> tuple[DequantisedImages, NCSN, History]:
    """NCSN at the paper's levels, trained."""
    p, streams = context.params, shared_streams(context, "unet")
    names = ("sigma_max", "sigma_min", "levels", "steps_per_level", "step_size", "channels")
    with streams.initialisation():
        inner = build_ncsn(data.task.info, **{name: p[name] for name in names})
    model = DequantisedImages(inner, data.task.info).to(context.device)
    history = train(model, data.train, data.valid, training_of(p, p["steps"], p["lr"]), streams)
    return model, inner, history


@torch.no_grad()
def completions(inner: NCSN, y: Tensor, known: Tensor, generator: torch.Generator) -> Tensor:
    """The images y (n, D) with the columns that are not known drawn anew by algorithm 2."""
    start = inner.sigmas[0] * torch.randn(y.shape, generator=generator, device=y.device)
    eps = inner.step_size * float(inner.sigmas[-1]) ** 2
    chain = inpaint(inner.score_at_level, inner.sigmas, y, known, start, inner.steps_per_level, eps, generator)
    return torch.where(known, y, chain.samples)


def hidden_error(found: Tensor, truth: Tensor, known: Tensor) -> Estimate:
    """Root mean square error over the pixels (n, D) that are not known."""
    square = Estimate.mean_of((found - truth)[:, ~known].square().mean(1), "estimate", "grey levels")
    root = math.sqrt(square.value)
    return replace(square, value=root, stderr=square.stderr / (2 * root))


@torch.no_grad()
def denoised(inner: NCSN, y: Tensor) -> Tensor:
    """Tweedie's mean at the last level, the step that `annealed_langevin` can end with."""
    return tweedie(y, inner.score(y), float(inner.sigmas[-1]))


def annealed(context: Context) -> Outcome:
    """Train NCSN; samples with and without a denoising step at the end of the same chains; lower halves inpainted."""
    p, data = context.params, load(context)
    model, inner, history = trained_ncsn(context, data)
    inverse = model.transform.inverse
    y = inner.sample(p["samples"], context.streams.fresh("sample"))
    samples = {"": inverse(y), ":denoised": inverse(denoised(inner, y))}
    estimates = {"nfe": Estimate.exact(inner.nfe, "network evaluations")}
    quality = judged(samples, data, context)
    given = data.test[: p["inpainted"]]
    known = upper_half(data.task).to(context.device)
    seen, _ = model.transform(given, context.streams.fresh("dequantise"))
    filled = [inverse(completions(inner, seen, known, context.streams.fresh(f"inpaint-{i}"))) for i in range(2)]
    others = torch.where(known, given, samples[""][torch.arange(len(given)) % p["samples"]])
    estimates["hidden_error"] = hidden_error(filled[0], given, known)
    estimates["hidden_error:unconditional"] = hidden_error(others, given, known)
    rows = {
        "given": torch.where(known, given, 0.0),
        **{f"completed {i + 1}": x for i, x in enumerate(filled)},
        "true": given,
    }
    drawn = {"not denoised": samples[""], "denoised": samples[":denoised"], "data": data.test}
    plots = (
        sheet("samples", "Samples of annealed Langevin dynamics", drawn, data.task.info),
        sheet("inpainting", "Lower halves by algorithm 2", rows, data.task.info),
        training_curve({"score": history}),
    )
    return Outcome({**estimates, **quality.estimates}, plots, quality.missing, classifiers=quality.classifiers)


def upper_half(task: Task) -> Tensor:
    """Which pixels (D,) of an image lie in its upper half."""
    assert task.info.image is not None
    height, width = task.info.image
    return torch.arange(height).repeat_interleave(width) < height // 2


# -- plots


def training_curve(histories: dict[str, History]) -> Plot:
    """The training objective of every network of the run."""
    lines = [Line(name, [s for s, _ in h.train], [v for _, v in h.train]) for name, h in histories.items()]
    return Plot("training", "Training objective", "optimizer step", "objective of one image", tuple(lines))


# -- the experiments

_NETWORK: dict[str, Any] = {"rows": 0, "channels": 32, "steps": 8_000, "batch_size": 128, "warmup": 500, "ema": 0.999}
_SAMPLES: dict[str, Any] = {"samples": 2_000, "reference": 10_000}
_DIFFUSION: dict[str, Any] = {
    **_NETWORK,
    **_SAMPLES,
    "data": "mnist",
    "sde": "vp",
    "weighting": "likelihood",
    "dequantiser": "uniform",
    "lr": 1e-3,
    "ode_steps": 48,
    "bound_levels": 64,
    "sample_steps": 64,
}
_DEQUANTISER = {
    "dequantiser": "variational",
    "dequantiser_channels": 32,
    "dequantiser_steps": 2_000,
    "dequantiser_lr": 1e-3,
}


def _diffusion(name: str, about: str, minutes: int, **changes: Any) -> Experiment:
    params = {**_DIFFUSION, **changes}
    files = FILES[params["data"]]
    return Experiment(
        name,
        about,
        "score",
        likelihoods,
        params,
        seeds=3,
        profiles=("full",),
        files=files,
        optional_files=(WEIGHTS,),
        cuda_minutes=minutes,
    )


VP_LIKELIHOOD = _diffusion("score-mnist-vp", "VP with a U-Net, likelihood weighting: bits/dim of MNIST", 8)
VP_PLAIN = _diffusion("score-mnist-vp-plain", "the same under plain weighting at uniform times", 8, weighting="plain")
VP_VARIATIONAL = _diffusion(
    "score-mnist-vp-variational", "the weights of score-mnist-vp with a learned dequantiser", 9, **_DEQUANTISER
)
SUBVP_LIKELIHOOD = _diffusion("score-mnist-subvp", "sub-VP with a U-Net, likelihood weighting", 8, sde="subvp")
SUBVP_PLAIN = _diffusion(
    "score-mnist-subvp-plain", "sub-VP under plain weighting at uniform times", 8, sde="subvp", weighting="plain"
)
VE_LIKELIHOOD = _diffusion("score-mnist-ve", "VE with a U-Net, likelihood weighting", 8, sde="ve")
FASHION = _diffusion(
    "score-fashion-vp", "VP with a U-Net, likelihood weighting: bits/dim of Fashion-MNIST", 8, data="fashion-mnist"
)
NCSN_MNIST = Experiment(
    "ncsn-mnist",
    "NCSN with a U-Net on MNIST: annealed Langevin samples and completed lower halves",
    "score",
    annealed,
    {
        **_NETWORK,
        **_SAMPLES,
        "data": "mnist",
        "steps": 12_000,
        "lr": 1e-3,
        "sigma_max": 2.0,
        "sigma_min": 0.02,
        "levels": 10,
        "steps_per_level": 100,
        "step_size": 0.4,
        "inpainted": 500,
    },
    seeds=3,
    profiles=("full",),
    files=FILES["mnist"],
    optional_files=(WEIGHTS,),
    cuda_minutes=6,
)

#: listed by ScoreFlow
WEIGHTINGS = (VP_LIKELIHOOD, VP_PLAIN, VP_VARIATIONAL, FASHION)
#: listed by score SDE
DIFFUSIONS = (SUBVP_LIKELIHOOD, SUBVP_PLAIN, VE_LIKELIHOOD, NCSN_MNIST)


def frechet_to_train(task: Task, samples: Tensor) -> Estimate:
    """Frechet distance of samples (n, 64) to the training images, in the suite's digit features."""
    features = digit_features(task)
    return frechet(features.features(samples.cpu()), features.features(task.train))
