"""Score networks trained on data in a plane, on two separated modes, and on digits at several noise levels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from replicate.experiments import Run, experiment, fit
from replicate.experiments.noise_schedules import geometric_levels
from replicate.model import Estimate
from replicate.papers.ncsn.langevin import BOX
from replicate.sampling.langevin import standard_normal_like
from replicate.score_based.matching import Score, denoising_score_matching, sliced_score_matching_vr
from replicate.score_based.ncsn import NCSN
from replicate.score_based.networks import FreeScore, NoiseNet
from replicate.tasks.densities import GaussianMixture, two_gaussians
from replicate.tasks.digits import LEVELS, textbook_split

#: points of the score error's grid along a side
GRID = 100
#: losses of a few nats are not known more finely than this, in nats
ROUNDING = 1e-9


def toy_network(run: Run, dim: int, hidden: int) -> FreeScore:
    """Return three linear layers with softplus between them."""
    return run.build(lambda: FreeScore(dim, hidden, 2, "softplus"))


def train_sliced(
    net: nn.Module, batch: Callable[[], Tensor], steps: int, lr: float, sources: Mapping[str, torch.Generator]
) -> Tensor:
    """Train with Adam on sliced score matching with variance reduction and Gaussian projections, as the toy code does.

    `sources` are the generators of the "projections" and of all that `batch` draws, fresh examples (n, D).

    Returns:
        The loss of each iteration, shape (steps,), float64.
    """

    def loss() -> Tensor:
        x = batch()
        return sliced_score_matching_vr(net, x, standard_normal_like(x, sources["projections"])).mean()

    return fit(net, loss, torch.optim.Adam(net.parameters(), lr=lr, fused=True), steps, sources).losses


def log_density_quantile(q: float) -> float:
    """Return the q-quantile of log p(x) under the toy mixture, for q up to 0.4.

    A component w N(m, I) in the plane has P(log p < c) = exp(c) 2 pi / w while c is under its peak and the other
    component is far away; weighted by w and summed over both components, q = 4 pi exp(c).
    """
    return math.log(q / (4 * math.pi))


def relative_error(estimated: Tensor, true: Tensor) -> float:
    """Return the root mean square of |s - t| over that of |t|, for scores (n, D) in one region."""
    return float(((estimated - true).square().sum() / true.square().sum()).sqrt())


@experiment("ncsn-score-error", family="score", seeds=3, smoke={"steps": 50})
def score_error(
    run: Run,
    *,
    hidden: int = 128,
    steps: int = 10_000,
    batch_size: int = 128,
    lr: float = 1e-3,
    near_quantile: float = 0.1,
    far_quantile: float = 0.001,
) -> None:
    """Error of a score from sliced score matching near two modes and away from them."""
    density, net = two_gaussians(), toy_network(run, 2, hidden)
    sources = {"data": run.stream("data"), "projections": run.stream("projections")}
    train_sliced(net, lambda: density.sample(batch_size, sources["data"]), steps, lr, sources)
    axis = torch.linspace(-BOX, BOX, GRID, device=run.device)
    x = torch.cartesian_prod(axis, axis)
    true, log_p = density.score(x), density.log_prob(x)
    at = torch.linspace(-BOX, BOX, 161, device=run.device)
    diagonal = torch.stack([at, at], 1)  # through both modes
    with torch.no_grad():
        estimated, on_diagonal = net(x), {"true": density.score(diagonal), "estimated": net(diagonal)}
    near, far = log_p >= log_density_quantile(near_quantile), log_p < log_density_quantile(far_quantile)
    for name, where in (("near", near), ("far", far)):
        error = relative_error(estimated[where], true[where])
        run.measure(f"relative_score_error:{name}", Estimate.exact(error, "ratio"))
    bins = log_p.argsort().chunk(25)  # of equally many points
    by_log_p = [float(log_p[i].mean()) for i in bins], [relative_error(estimated[i], true[i]) for i in bins]
    title, axes = "Score error by log density on [-8, 8]^2", ("log p, nats", "relative error of the score")
    levels = {"no better than a score of zero": 1.0}
    run.curves("score-error", title, axes, {"relative error": by_log_p}, log="y", levels=levels)
    axes = "distance from the origin", "score along the line"
    distance = (math.sqrt(2) * at).tolist()
    curves = {name: (distance, s.sum(1).div(math.sqrt(2)).tolist()) for name, s in on_diagonal.items()}
    run.curves("score-on-the-axis", "Score along the line through both modes", axes, curves)


@dataclass(frozen=True)
class ManifoldSettings:
    """Settings of ncsn-manifold: data N(0, data_sd^2) in a plane, noise N(0, noise_sd^2) in the space, and training.

    A point of the loss curve averages `block` iterations.
    """

    dim: int = 10
    plane_dim: int = 5
    data_sd: float = 0.3
    noise_sd: float = 0.01
    hidden: int = 128
    steps: int = 5000
    batch_size: int = 128
    lr: float = 3e-3
    block: int = 50


def plane(dim: int, plane_dim: int, generator: torch.Generator) -> Tensor:
    """Draw an orthonormal basis (dim, plane_dim) of a random plane through the origin."""
    return torch.linalg.qr(torch.randn(dim, plane_dim, generator=generator, device=generator.device))[0]


def loss_floor(dim: int, plane_dim: int, data_sd: float, noise_sd: float) -> float:
    """Return the least score matching loss on N(0, data_sd^2) in a plane plus N(0, noise_sd^2 I).

    It is -1/2 E|grad log p|^2, minus infinity without noise.
    """
    if noise_sd == 0:
        return -math.inf
    across, along = (dim - plane_dim) / noise_sd**2, plane_dim / (data_sd**2 + noise_sd**2)
    return -0.5 * (across + along)


def manifold_losses(run: Run, s: ManifoldSettings, noise_sd: float) -> Tensor:
    """Return the losses (steps,) of the toy network on data in a plane plus noise; only the noise's size differs."""
    basis = plane(s.dim, s.plane_dim, run.stream("plane"))
    sources = {name: run.stream(name) for name in ("data", "noise", "projections")}

    def batch() -> Tensor:
        u = torch.randn(s.batch_size, s.plane_dim, generator=sources["data"], device=run.device)
        noise = torch.randn(s.batch_size, s.dim, generator=sources["noise"], device=run.device)
        return s.data_sd * u @ basis.T + noise_sd * noise

    return train_sliced(toy_network(run, s.dim, s.hidden), batch, s.steps, s.lr, sources)


def fluctuation(curve: np.ndarray) -> float:
    """Return the standard deviation of a curve about its own straight line: a steady decline is none."""
    at = np.arange(len(curve))
    return float(np.std(curve - np.polyval(np.polyfit(at, curve, 1), at), ddof=2))


ABOUT = "the score matching loss on data in a plane, without and with N(0, 1e-4) noise"


@experiment("ncsn-manifold", about=ABOUT, family="score", seeds=3, smoke={"steps": 200, "block": 5})
def manifold(run: Run, s: ManifoldSettings) -> None:
    """Measure the loss curve and its fluctuation, without and with noise."""
    floor = loss_floor(s.dim, s.plane_dim, s.data_sd, s.noise_sd)
    curves = {}
    for name, noise_sd in (("clean", 0.0), ("noised", s.noise_sd)):
        curve = manifold_losses(run, s, noise_sd).view(-1, s.block).mean(1).numpy()
        tail = curve[-(len(curve) // 4) :]
        size, end = fluctuation(tail), float(tail.mean())
        run.measure(f"loss_fluctuation:{name}", Estimate.exact(size, "nats"))
        run.measure(f"loss_over_floor:{name}", Estimate.exact(end / floor, "ratio"))
        run.measure(f"relative_fluctuation:{name}", Estimate.exact(size / abs(end), "ratio"))
        curves[name] = [(i + 1) * s.block for i in range(len(curve))], np.where(curve < 0, -curve, np.nan).tolist()
    title, axes = "Score matching loss on data in a plane, with its sign turned", ("iterations", "minus the loss, nats")
    run.curves("loss-curve", title, axes, curves, log="y", levels={"least loss with the noise": -floor})


@dataclass(frozen=True)
class LevelSettings:
    """Settings of ncsn-noise-levels: first and last noise level, network and training."""

    first: float = 1.0
    last: float = 0.01
    hidden: int = 256
    width: float = 0.05
    steps: int = 1500
    batch_size: int = 128
    lr: float = 1e-3


def optimal_score(train: Tensor, sigma: float) -> GaussianMixture:
    """Return the training images convolved with N(0, sigma^2 I): its score minimises denoising score matching."""
    return GaussianMixture(train.cpu(), sigma**2 * torch.eye(train.shape[1]), torch.ones(len(train)))


def train_ncsn(run: Run, s: LevelSettings, train: Tensor, levels: int) -> NCSN:
    """Train the suite's NCSN on images (n, D) at the experiment's levels; the sampler's settings are not used."""
    net = run.build(lambda: NoiseNet(train.shape[1], s.hidden, width=s.width))
    model = NCSN(net, train.shape[1], s.first, s.last, levels, 1, 1.0).to(run.device)
    model.initialise(train, run.stream("initialise"))
    batches, noise = run.stream("batches"), run.stream("noise")

    def loss() -> Tensor:
        chosen = torch.randint(len(train), (s.batch_size,), generator=batches, device=run.device)
        return model.loss(train[chosen], noise)

    fit(model, loss, torch.optim.Adam(model.parameters(), lr=s.lr), s.steps, {"batches": batches, "noise": noise})
    return model


@torch.no_grad()
def norm_and_loss(score: Score, x: Tensor, sigma: float, generator: torch.Generator) -> tuple[float, float]:
    """Return (mean |s|, mean 1/2 |sigma s + z|^2) at x + sigma z for images x (n, D)."""
    z = standard_normal_like(x, generator)
    return float(score(x + sigma * z).norm(dim=1).mean()), float(denoising_score_matching(score, x, sigma, z).mean())


@experiment("ncsn-noise-levels", family="score", seeds=3, tasks=("digits",), smoke={"steps": 20})
def noise_levels(run: Run, s: LevelSettings) -> None:
    """Score norm and weighted loss from level to level, on digits."""
    train, _, test = (x.to(run.device) / (LEVELS - 1) for x, _ in textbook_split())
    sigmas = geometric_levels(s.first, s.last).tolist()
    model = train_ncsn(run, s, train, len(sigmas))

    def trained(sigma: float) -> Score:
        return lambda x: model.score_at_level(x, x.new_full((len(x),), sigma))

    cases: dict[str, tuple[Callable[[float], Score], Tensor]] = {
        "optimum": (lambda sigma: optimal_score(train, sigma).score, train),
        "network-train": (trained, train),
        "network-test": (trained, test),
    }
    norms, losses = {}, {}
    for name, (score_of, x) in cases.items():
        generator = run.stream(f"evaluation-{name}")
        norm, loss = zip(*(norm_and_loss(score_of(sigma), x, sigma, generator) for sigma in sigmas), strict=True)
        exponent = float(np.polyfit(np.log(sigmas), np.log(norm), 1)[0])
        decades = math.log10(max(loss) / max(min(loss), ROUNDING))
        run.measure(f"norm_exponent:{name}", Estimate.exact(exponent, "exponent"))
        run.measure(f"weighted_loss_range:{name}", Estimate.exact(decades, "decades"))
        norms[name], losses[name] = (sigmas, norm), (sigmas, loss)
    norms["sqrt(D) / sigma"] = sigmas, tuple(math.sqrt(train.shape[1]) / sigma for sigma in sigmas)
    run.curves("score-norm", "Norm of the score by level", ("sigma", "norm"), norms, log="xy")
    run.curves("weighted-loss", "sigma^2-weighted denoising loss by level", ("sigma", "loss, nats"), losses, log="xy")
