"""The notebooks' VAE and ARM: a categorical distribution of each pixel, with clamped probabilities."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.experiments import Run, experiment
from replicate.likelihood.importance import iw_bound
from replicate.model import DataInfo, Estimate, Model
from replicate.papers.textbook.training import LOG_2PI, Loop, early_stopped, nats, perceptron, plot_validation
from replicate.tasks.loading import load_task

#: the notebooks' clamp of probabilities
CLAMP = 1e-5


def clamped_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """Log of softmax(logits) (..., L) at levels x (...), with probabilities clamped as the notebooks do."""
    return level_log_probability(logits, x).clamp(math.log(CLAMP), math.log1p(-CLAMP))


def level_log_probability(logits: Tensor, x: Tensor) -> Tensor:
    """Log of softmax(logits) (..., L) at levels x (...)."""
    return logits.log_softmax(-1).gather(-1, x.long().unsqueeze(-1)).squeeze(-1)


# -- VAE


@dataclass(frozen=True)
class VAESettings(Loop):
    """Settings of the VAE and its evaluation."""

    latent: int = 16
    hidden: int = 256
    draws: int = 64
    scaled_entropy: bool = False


class VAE(Model):
    """The notebook's VAE: raw integers in, L latents, a free categorical for each pixel out.

    Args:
        info: levels.
        latent, hidden: sizes.
        entropy_factor: what multiplies the log variance in log q(z | x); 1 is right, an early release has `latent`.
    """

    family = "vae"
    capabilities = frozenset({"importance_weights"})

    def __init__(self, info: DataInfo, latent: int, hidden: int, entropy_factor: float = 1.0) -> None:
        super().__init__()
        assert info.levels is not None
        self.dim, self.levels, self.latent, self.entropy_factor = info.dim, info.levels, latent, entropy_factor
        self.encode = perceptron(info.dim, hidden, 2 * latent)
        self.decode = perceptron(latent, hidden, info.dim * info.levels)

    def terms(self, x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One draw of z for each of k: logits (n, k, D, levels), log p(z), log q(z | x) and sum of log variances."""
        mean, log_var = self.encode(x).chunk(2, 1)
        shape = (len(x), k, self.latent)
        noise = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        z = mean[:, None] + (0.5 * log_var).exp()[:, None] * noise
        log_q = (-0.5 * noise.square() - 0.5 * log_var[:, None] - 0.5 * LOG_2PI).sum(-1)
        log_prior = (-0.5 * z.square() - 0.5 * LOG_2PI).sum(-1)
        return self.decode(z).unflatten(-1, (self.dim, self.levels)), log_prior, log_q, log_var.sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the notebook's one-sample negative ELBO of each example, with clamped probabilities."""
        logits, log_prior, log_q, log_var = self.terms(x, 1, generator)
        log_q = log_q.squeeze(1) - 0.5 * (self.entropy_factor - 1) * log_var
        return -(clamped_log_probability(logits.squeeze(1), x).sum(-1) + log_prior.squeeze(1) - log_q)

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        logits, log_prior, log_q, _ = self.terms(x, k, generator)
        levels = x[:, None].expand(-1, k, -1)
        return level_log_probability(logits, levels).sum(-1) + log_prior - log_q


def vae(run: Run, s: VAESettings) -> None:
    """Train the notebook's VAE; measure the printed number, the ELBO without its clamp and the weighted bound."""
    task = load_task("digits")
    with run.initialisation():
        model = VAE(task.info, s.latent, s.hidden, float(s.latent) if s.scaled_entropy else 1.0)
    model = model.to(run.device)
    history = early_stopped(model, model.printed_loss, task, s, run.streams, run.device)
    test, valid = task.test.to(run.device), task.valid.to(run.device)
    with torch.no_grad():
        printed = model.printed_loss(test, run.stream("printed-test"))
    bound = iw_bound(model, test, s.draws, run.stream("bound-test"), chunk=2000)
    run.measure("nll_as_printed:valid", Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)))
    run.measure("nll_as_printed:test", nats(printed))
    run.measure("negative_elbo:test", -bound.details["elbo"])
    run.measure("nll_iw_bound:test", -bound.mean())
    bound = iw_bound(model, valid, s.draws, run.stream("bound-valid"), chunk=2000)
    run.measure("nll_iw_bound:valid", -bound.mean())
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    levels = {"author's best": 100.54}
    plot_validation(run, "VAE on digits: one-sample negative ELBO", {"VAE": history}, levels)


VAE_AS_RELEASED = experiment(
    "textbook-vae",
    family="vae",
    about="the textbook's VAE on digits: as printed, its ELBO, and the importance-weighted bound",
    seeds=3,
    tasks=("digits",),
)(vae)
VAE_EARLY_RELEASE = experiment(
    "textbook-vae-early-release",
    family="vae",
    about="the VAE notebook's early release, whose log q(z | x) multiplies the log variance by the number of latents",
    settings={"scaled_entropy": True},
    seeds=3,
    tasks=("digits",),
    profiles=("full",),
)(vae)


# -- ARM


@dataclass(frozen=True)
class ARMSettings(Loop):
    """Settings of the ARM."""

    channels: int = 256
    kernel: int = 7


class ARM(Model):
    """The notebook's autoregressive model: four causal convolutions over the pixels in order, raw integers in."""

    family = "autoregressive"
    capabilities = frozenset({"log_prob"})

    def __init__(self, info: DataInfo, channels: int, kernel: int) -> None:
        super().__init__()
        assert info.levels is not None
        self.kernel = kernel
        sizes = [1, channels, channels, channels, info.levels]
        self.layers = nn.ModuleList(nn.Conv1d(i, o, kernel) for i, o in itertools.pairwise(sizes))

    def logits(self, x: Tensor) -> Tensor:
        """Map x (n, D) to logits (n, D, levels); those of pixel d see x[:, :d] only."""
        h = F.pad(x[:, None, :-1], (1, 0))
        for i, layer in enumerate(self.layers):
            h = layer(F.pad(F.leaky_relu(h) if i else h, (self.kernel - 1, 0)))
        return h.transpose(1, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        return level_log_probability(self.logits(x), x).sum(-1)

    def printed_loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the notebook's NLL with clamped probabilities, shape (n,); it has no noise."""
        return -clamped_log_probability(self.logits(x), x).sum(-1)


@experiment(
    "textbook-arm",
    family="autoregressive",
    about="the textbook's ARM on digits: as printed, and exact",
    seeds=3,
    tasks=("digits",),
    profiles=("full",),
)
def arm(run: Run, s: ARMSettings) -> None:
    """Train the notebook's ARM; measure the printed number and, without its clamp, the exact one."""
    task = load_task("digits")
    with run.initialisation():
        model = ARM(task.info, s.channels, s.kernel)
    model = model.to(run.device)
    history = early_stopped(model, model.printed_loss, task, s, run.streams, run.device)
    test = task.test.to(run.device)
    with torch.no_grad():
        printed, exact = model.printed_loss(test, run.stream("printed")), -model.log_prob(test)
    run.measure("nll_as_printed:valid", Estimate(min(history), math.nan, "estimate", "nats", len(task.valid)))
    run.measure("nll_as_printed:test", nats(printed))
    run.measure("nll:test", Estimate.mean_of(exact, "exact", "nats"))
    run.measure("epochs", Estimate.exact(len(history), "epochs"))
    plot_validation(run, "ARM on digits: NLL", {"ARM": history}, {"author's best": 88.72})
