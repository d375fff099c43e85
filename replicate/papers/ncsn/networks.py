"""Song and Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution" (arXiv:1907.05600).

Replicated, with the section that each experiment stands for. Here, what score networks learn:

- ncsn-manifold: the score matching loss on data that lie on a plane (3.1, Fig 1);
- ncsn-score-error: where sliced score matching estimates the score well (3.2.1, Fig 2, App B.1);
- ncsn-noise-levels: score norms and weighted losses from level to level (4.2).

In `replicate.papers.ncsn_langevin`, the toy chains with exact scores:

- ncsn-langevin and ncsn-passage: the weights that plain Langevin dynamics ends with (3.2.2, Fig 3b), and how long a
  chain takes to change modes;
- ncsn-annealed: annealed Langevin on the same mixture (4.3, Fig 3c), with the settings of the main text and those of
  the appendix and the released code, under both meanings of sigma.

In `replicate.papers.ncsn_inpainting`, on Gaussians: ncsn-inpainting (Algorithm 2) and ncsn-step (Algorithm 1).

Deviations: a plane of Gaussian coordinates in 10 dimensions stands for CIFAR-10 in 3.1, with the toy's network; 8x8
digits stand for the images of 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments.noise_schedules import RUNGS, ladder
from replicate.model import Estimate
from replicate.papers.ncsn_inpainting import INPAINTING, STEP
from replicate.papers.ncsn_langevin import ANNEALED, BOX, LANGEVIN, PASSAGE
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.score_based.matching import Score, denoising_score_matching, sliced_score_matching_vr
from replicate.score_based.ncsn import NCSN
from replicate.score_based.networks import FreeScore, NoiseNet
from replicate.tasks.densities import GaussianMixture, two_gaussians
from replicate.tasks.digits import LEVELS, textbook_split

#: points of the score error's grid along a side
GRID = 100
#: losses of a few nats are not known more finely than this, in nats
ROUNDING = 1e-9


# -- sec 3.2.1: where the estimated score is right


def log_density_quantile(q: float) -> float:
    """The q-quantile of log p(x) under the toy mixture, for q up to 0.4.

    A component w N(m, I) in the plane has P(log p < c) = exp(c) 2 pi / w while c is under its peak and the other
    component is far away; weighted by w and summed over both components, q = 4 pi exp(c).
    """
    return math.log(q / (4 * math.pi))


def train_sliced(
    net: nn.Module,
    batch: Callable[[], Tensor],
    steps: int,
    lr: float,
    projections: torch.Generator,
    *sources: torch.Generator,
) -> Tensor:
    """Adam on sliced score matching with variance reduction and Gaussian projections, as in the released toy code.

    Args:
        net: score network, trained in place.
        batch: draws a fresh batch (n, D).
        steps: iterations.
        lr: learning rate.
        projections: draws v.
        sources: what `batch` draws from.

    Returns:
        The loss of each iteration, shape (steps,), float64.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    state: State = {
        "net": net,
        "optimizer": optimizer,
        "projections": projections,
        **{f"source-{i}": source for i, source in enumerate(sources)},
        "losses": torch.empty(steps, device=projections.device),
    }
    for step in resumable("sliced score matching", steps, state):
        x = batch()
        v = torch.randn(x.shape, generator=projections, device=x.device, dtype=x.dtype)
        loss = sliced_score_matching_vr(net, x, v).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        state["losses"][step] = loss.detach()
    losses: Tensor = state["losses"]
    return losses.double().cpu()


def relative_error(estimated: Tensor, true: Tensor) -> float:
    """Root mean square of |s - t| over that of |t|, for scores (n, D) in one region."""
    return float(((estimated - true).square().sum() / true.square().sum()).sqrt())


def error_by_log_density(estimated: Tensor, true: Tensor, log_p: Tensor, bins: int = 25) -> Line:
    """The relative error in bins of log p that hold equally many points of the grid."""
    parts = log_p.argsort().chunk(bins)
    x = [float(log_p[i].mean()) for i in parts]
    return Line("relative error", x, [relative_error(estimated[i], true[i]) for i in parts])


@torch.no_grad()
def along_the_axis(density: GaussianMixture, net: Score, device: torch.device) -> tuple[Line, Line]:
    """True and estimated score on the line through both modes, along that line."""
    at = torch.linspace(-BOX, BOX, 161, device=device)
    x = torch.stack([at, at], 1)
    distance = (math.sqrt(2) * at).tolist()
    true, estimated = (s.sum(1).div(math.sqrt(2)).tolist() for s in (density.score(x), net(x)))
    return Line("true", distance, true), Line("estimated", distance, estimated)


def score_error(context: Context) -> Outcome:
    """N1: the paper's network and training; the error of its score by region of log p on the plotted square."""
    p, streams, device = context.params, context.streams, context.device
    density = two_gaussians()
    with streams.initialisation():
        net = FreeScore(2, p["hidden"], 2, "softplus")  # three linear layers
    net.to(device)
    data, projections = streams.fresh("data"), streams.fresh("projections")
    train_sliced(net, lambda: density.sample(p["batch_size"], data), p["steps"], p["lr"], projections, data)

    axis = torch.linspace(-BOX, BOX, GRID, device=device)
    x = torch.cartesian_prod(axis, axis)
    true, log_p = density.score(x), density.log_prob(x)
    with torch.no_grad():
        estimated = net(x)
    near = log_p >= log_density_quantile(p["near_quantile"])
    far = log_p < log_density_quantile(p["far_quantile"])
    estimates = {
        f"relative_score_error:{name}": Estimate.exact(relative_error(estimated[where], true[where]), "ratio")
        for name, where in (("near", near), ("far", far))
    }
    error = Plot(
        "score-error",
        "Score error by log density on [-8, 8]^2",
        "log p, nats",
        "relative error of the score",
        (error_by_log_density(estimated, true, log_p),),
        log_y=True,
        levels={"no better than a score of zero": 1.0},
    )
    axis_plot = Plot(
        "score-on-the-axis",
        "Score along the line through both modes",
        "distance from the origin",
        "score along the line",
        along_the_axis(density, net, device),
    )
    return Outcome(estimates, (error, axis_plot))


SCORE_ERROR = Experiment(
    name="ncsn-score-error",
    about="error of a score from sliced score matching near two modes and away from them",
    family="score",
    run=score_error,
    params={
        "hidden": 128,
        "steps": 10_000,
        "batch_size": 128,
        "lr": 1e-3,
        "near_quantile": 0.1,
        "far_quantile": 0.001,
    },
    seeds=3,
    overrides={"smoke": {"steps": 50}},
)


# -- sec 3.1: data on a plane


def plane(dim: int, plane_dim: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis (dim, plane_dim) of a random plane through the origin."""
    return torch.linalg.qr(torch.randn(dim, plane_dim, generator=generator, device=generator.device))[0]


def loss_floor(dim: int, plane_dim: int, data_sd: float, noise_sd: float) -> float:
    """The least score matching loss on N(0, data_sd^2) in a plane plus N(0, noise_sd^2 I): -1/2 E|grad log p|^2.

    Minus infinity without noise.
    """
    if noise_sd == 0:
        return -math.inf
    across, along = (dim - plane_dim) / noise_sd**2, plane_dim / (data_sd**2 + noise_sd**2)
    return -0.5 * (across + along)


def manifold_losses(noise_sd: float, context: Context) -> Tensor:
    """Losses (steps,) of the toy network on data in a plane plus noise; all else is the same for every noise."""
    p, streams = context.params, context.streams
    basis = plane(p["dim"], p["plane_dim"], streams.fresh("plane"))
    data, noise = streams.fresh("data"), streams.fresh("noise")

    def batch() -> Tensor:
        u = torch.randn(p["batch_size"], p["plane_dim"], generator=data, device=context.device)
        z = torch.randn(p["batch_size"], p["dim"], generator=noise, device=context.device)
        return p["data_sd"] * u @ basis.T + noise_sd * z

    with streams.initialisation():
        net = FreeScore(p["dim"], p["hidden"], 2, "softplus")
    net.to(context.device)
    return train_sliced(net, batch, p["steps"], p["lr"], streams.fresh("projections"), data, noise)


def fluctuation(curve: np.ndarray) -> float:
    """Standard deviation of a curve's last quarter about its own straight line: a steady decline is none."""
    tail = curve[-(len(curve) // 4) :]
    at = np.arange(len(tail))
    return float(np.std(tail - np.polyval(np.polyfit(at, tail, 1), at), ddof=2))


def manifold(context: Context) -> Outcome:
    """N5: the loss curve without noise and with N(0, 1e-4) noise."""
    p = context.params
    floor = loss_floor(p["dim"], p["plane_dim"], p["data_sd"], p["noise_sd"])
    estimates = {}
    lines = []
    for name, noise_sd in (("clean", 0.0), ("noised", p["noise_sd"])):
        curve = manifold_losses(noise_sd, context).view(-1, p["block"]).mean(1).numpy()
        tail = curve[-(len(curve) // 4) :]
        estimates[f"loss_fluctuation:{name}"] = Estimate.exact(fluctuation(curve), "nats")
        estimates[f"loss_over_floor:{name}"] = Estimate.exact(float(tail.mean()) / floor, "ratio")
        estimates[f"relative_fluctuation:{name}"] = Estimate.exact(
            fluctuation(curve) / abs(float(tail.mean())), "ratio"
        )
        at = [(i + 1) * p["block"] for i in range(len(curve))]
        lines.append(Line(name, at, np.where(curve < 0, -curve, np.nan).tolist()))
    plot = Plot(
        "loss-curve",
        "Score matching loss on data in a plane, with its sign turned",
        "iterations",
        "minus the loss, nats",
        tuple(lines),
        log_y=True,
        levels={"least loss with the noise": -floor},
    )
    return Outcome(estimates, (plot,))


MANIFOLD = Experiment(
    name="ncsn-manifold",
    about="the score matching loss on data in a plane, without and with N(0, 1e-4) noise",
    family="score",
    run=manifold,
    params={
        "dim": 10,
        "plane_dim": 5,
        "data_sd": 0.3,
        "noise_sd": 0.01,
        "hidden": 128,
        "steps": 5000,
        "batch_size": 128,
        "lr": 3e-3,
        "block": 50,
    },
    seeds=3,
    overrides={"smoke": {"steps": 200, "block": 5}},
)


# -- sec 4.2: the weights of the noise levels


def optimal_score(train: Tensor, sigma: float) -> GaussianMixture:
    """The training images convolved with N(0, sigma^2 I): its score minimises denoising score matching on them."""
    return GaussianMixture(train.cpu(), sigma**2 * torch.eye(train.shape[1]), torch.ones(len(train)))


def train_ncsn(train: Tensor, context: Context) -> NCSN:
    """The suite's NCSN on images (n, D) at the experiment's levels, by Adam; the sampler's settings are not used."""
    p, streams = context.params, context.streams
    with streams.initialisation():
        net = NoiseNet(train.shape[1], p["hidden"], width=p["width"])
    model = NCSN(net, train.shape[1], p["first"], p["last"], RUNGS, 1, 1.0).to(context.device)
    model.initialise(train, streams.fresh("initialise"))
    batches, noise = streams.fresh("batches"), streams.fresh("noise")
    optimizer = torch.optim.Adam(model.parameters(), lr=p["lr"])
    state: State = {"model": model, "optimizer": optimizer, "batches": batches, "noise": noise}
    for _ in resumable("denoising score matching", p["steps"], state):
        chosen = torch.randint(len(train), (p["batch_size"],), generator=batches, device=context.device)
        loss = model.loss(train[chosen], noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def norm_and_loss(score: Score, x: Tensor, sigma: float, generator: torch.Generator) -> tuple[float, float]:
    """(mean |s|, mean 1/2 |sigma s + z|^2) at x + sigma z for images x (n, D)."""
    z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    loss = denoising_score_matching(score, x, sigma, z).mean()
    return float(score(x + sigma * z).norm(dim=1).mean()), float(loss)


def decades(losses: list[float]) -> float:
    """log10 of the largest over the smallest loss, where less than ROUNDING counts as that."""
    return math.log10(max(losses) / max(min(losses), ROUNDING))


def noise_levels(context: Context) -> Outcome:
    """N6: score norm and weighted loss by level, for the optimum on the training images and a trained network."""
    streams = context.streams
    train, _, test = (x.to(context.device) / (LEVELS - 1) for x, _ in textbook_split())
    model = train_ncsn(train, context)
    sigmas = ladder(context.params["first"], context.params["last"]).tolist()

    def trained(sigma: float) -> Score:
        return lambda x: model.score_at_level(x, x.new_full((len(x),), sigma))

    settings: dict[str, tuple[Callable[[float], Score], Tensor]] = {
        "optimum": (lambda sigma: optimal_score(train, sigma).score, train),
        "network-train": (trained, train),
        "network-test": (trained, test),
    }
    estimates, norms, losses = {}, [], []
    for name, (score_of, x) in settings.items():
        generator = streams.fresh(f"evaluation-{name}")
        norm, loss = map(list, zip(*(norm_and_loss(score_of(s), x, s, generator) for s in sigmas), strict=True))
        slope = float(np.polyfit(np.log(sigmas), np.log(norm), 1)[0])
        estimates[f"norm_exponent:{name}"] = Estimate.exact(slope, "exponent")
        estimates[f"weighted_loss_range:{name}"] = Estimate.exact(decades(loss), "decades")
        norms.append(Line(name, sigmas, norm))
        losses.append(Line(name, sigmas, loss))
    rule = Line("sqrt(D) / sigma", sigmas, [math.sqrt(train.shape[1]) / s for s in sigmas])
    plots = (
        Plot("score-norm", "Norm of the score by level", "sigma", "norm", (*norms, rule), log_x=True, log_y=True),
        Plot(
            "weighted-loss",
            "sigma^2-weighted denoising loss by level",
            "sigma",
            "loss, nats",
            tuple(losses),
            log_x=True,
            log_y=True,
        ),
    )
    return Outcome(estimates, plots)


NOISE_LEVELS = Experiment(
    name="ncsn-noise-levels",
    about="score norm and weighted loss from level to level, on digits",
    family="score",
    run=noise_levels,
    params={
        "first": 1.0,
        "last": 0.01,
        "hidden": 256,
        "width": 0.05,
        "steps": 1500,
        "batch_size": 128,
        "lr": 1e-3,
    },
    seeds=3,
    tasks=("digits",),
    overrides={"smoke": {"steps": 20}},
)

PAPER = Paper(
    "ncsn",
    Path(__file__).with_suffix(".toml"),
    experiments=(SCORE_ERROR, LANGEVIN, PASSAGE, ANNEALED, MANIFOLD, NOISE_LEVELS, INPAINTING, STEP),
)
