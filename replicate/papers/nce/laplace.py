"""Linear ICA with Laplacian sources and its log Z, over sample sizes."""

import math

import torch
from torch import Tensor

from replicate.experiments import Run, experiment
from replicate.experiments.ica import draw_unmixing, minimise
from replicate.model import Estimate
from replicate.papers.nce.gaussian import plot_errors, slope
from replicate.resume import State, resumable
from replicate.score_based.contrastive import GaussianNoise, noise_contrastive


def sample_laplace(w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw x = W^-1 s with Laplacian s of unit variance, shape (n, D)."""
    u = torch.rand(n, len(w), generator=generator, device=w.device, dtype=w.dtype) - 0.5
    return torch.linalg.solve(w, (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).T).T


def laplace_log_density(x: Tensor, w: Tensor) -> Tensor:
    """Return f(x) = -sqrt(2) sum_i |w_i x| at x (n, D), shape (n,); Z = 2^{D/2} / |det W|."""
    return -math.sqrt(2) * (x @ w.T).abs().sum(-1)


def laplace_log_z(w: Tensor) -> Tensor:
    """Return log Z = D/2 log 2 - log |det W|, in nats."""
    return 0.5 * len(w) * math.log(2) - torch.linalg.slogdet(w).logabsdet


def fit_laplace(x: Tensor, y: Tensor, noise: GaussianNoise, start: Tensor) -> tuple[Tensor, float]:
    """Find W (D, D) and log Z by the contrastive loss of data x against noises y, from `start` and its log Z."""
    log_q_x, log_q_y = noise.log_prob(x), noise.log_prob(y)

    def loss(w: Tensor, c: Tensor) -> Tensor:
        return noise_contrastive(laplace_log_density(x, w) + c - log_q_x, laplace_log_density(y, w) + c - log_q_y)

    return minimise(loss, start, float(laplace_log_z(start)), {"maxiter": 200, "gtol": 1e-6})[:2]


@experiment("nce-ica", family="ebm", smoke={"doublings": 1, "repetitions": 3}, profiles=("full",), precision="float64")
def laplace_consistency(
    run: Run, *, dim: int = 4, condition: float = 10.0, smallest: int = 500, doublings: int = 5, repetitions: int = 100
) -> None:
    """ICA with Laplacian sources and its log Z by noise-contrastive estimation over sample sizes."""
    sizes = [smallest * 2**i for i in range(doublings + 1)]
    mixing, data, contrast = run.stream("mixing"), run.stream("data"), run.stream("noise")
    errors = torch.zeros(2, len(sizes), repetitions, dtype=torch.float64)
    state: State = {"mixing": mixing, "data": data, "contrast": contrast, "errors": errors}
    for r in resumable("repetitions", repetitions, state):
        w = torch.linalg.inv(draw_unmixing(dim, mixing, condition))  # the mixing is what is standard normal
        for i, n in enumerate(sizes):
            x = sample_laplace(w, n, data)
            noise = GaussianNoise.fit(x)
            near = w * (1 + 0.05 * torch.randn(dim, dim, generator=data, device=w.device, dtype=w.dtype))
            found, log_z = fit_laplace(x, noise.sample(n, contrast), noise, near)
            state["errors"][0, i, r] = (found - w).square().sum() / w.square().sum()
            state["errors"][1, i, r] = log_z - float(laplace_log_z(w))
    unmixing, log_z_error = state["errors"]
    mse = {"unmixing": unmixing.mean(1).tolist(), "log_z": log_z_error.square().mean(1).tolist()}
    run.measure_all({f"slope:{part}": slope(sizes, values) for part, values in mse.items()})
    run.measure("squared_error:unmixing", Estimate.mean_of(unmixing[-1], "estimate", "ratio"))
    run.measure("squared_error:log_z", Estimate.mean_of(log_z_error[-1].square(), "estimate", "nats squared"))
    run.measure("log_z_bias", Estimate.mean_of(log_z_error[-1], "estimate", "nats"))
    plot_errors(run, "Noise-contrastive estimates of ICA", sizes, mse, "log_z")
