"""Variational autoencoders: p(x) = integral of p(z) p(x | z) dz, with an encoder q(z | x) that proposes z.

Papers: Kingma and Welling 2014 (1312.6114), the ELBO with reparameterised draws; Burda, Grosse and Salakhutdinov
2016 (1509.00519), the IW-k bound; Tomczak and Welling 2018 (1705.07120), priors beyond one Gaussian.

Departures:
- Every bound uses the sampled log p(z) - log q(z | x), also the ELBO in training: the weights then average to p(x)
  and the mixture prior needs no analytic KL.
- The prior is a learned mixture of diagonal Gaussians (the "mixture of Gaussians" row of Tomczak and Welling).
- On continuous data encoder and decoder start as the rotation to the principal axes of the training data and the
  prior's components on clusters found by Lloyd's algorithm there; all of it is trained on.
- The categorical decoder tilts each pixel's marginal by a few shared functions of the level instead of emitting
  one free logit a level: with a thousand images that generalises better.
- Gradients of the IW bound are plain autograd, not the doubly reparameterised estimator (Tucker et al. 2019).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.layers import dropout, from_settings
from replicate.model import DataInfo, Family, Model, ModelEntry, Training

LOG_2PI = math.log(2 * math.pi)
#: rows whose score is taken at a time: bounds the memory of the graph
SCORE_ROWS = 2000
#: log standard deviation at which encoder and decoder start on continuous data of unit scale
START_RAW = -2.5
#: rows and steps of Lloyd's algorithm, which places the prior's components on continuous data
START_ROWS, LLOYD_STEPS = 5000, 10
#: seed of the fixed latent points behind `VariationalAutoencoder.score`
SCORE_SEED = 0


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return log N(x; mean, diag exp(2 log_std)), summed over the last dimension."""
    return (-0.5 * ((x - mean) * (-log_std).exp()).square() - log_std - 0.5 * LOG_2PI).sum(-1)


def randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise with the dtype and device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class Net(nn.Module):
    """Residual perceptron plus a linear path: y = A x + B h_last, h <- h + W silu(V silu(h)).

    The linear path starts the model as a linear factor model, which the residual path then bends.
    """

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.enter = nn.Linear(inputs, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.leave = nn.Linear(width, outputs)
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map x (n, inputs) to (n, outputs); with a generator, hidden units are dropped at `rate`."""
        h = self.enter(x)
        for first, second in zip(self.first, self.second, strict=True):
            h = h + second(dropout(F.silu(first(F.silu(h))), self.rate, generator))
        return self.leave(dropout(F.silu(h), self.rate, generator)) + self.linear(x)


class MixturePrior(nn.Module):
    """p(z) = sum_c pi_c N(z; mu_c, diag sigma_c^2) with learned parameters; one component is N(0, I), fixed."""

    def __init__(self, latent: int, components: int) -> None:
        super().__init__()
        self.latent, self.components = latent, components
        if components > 1:
            self.logits = nn.Parameter(torch.zeros(components))
            self.means = nn.Parameter(torch.randn(components, latent))
            self.log_stds = nn.Parameter(torch.full((components, latent), -math.log(components) / latent))

    def start_at(self, z: Tensor) -> None:
        """Put the components on the clusters of z (n, latent) that Lloyd's algorithm finds from the first rows."""
        if self.components == 1:
            return
        centres = z[: self.components]
        for _ in range(LLOYD_STEPS):
            member = F.one_hot(torch.cdist(z, centres).argmin(1), len(centres)).to(z.dtype)
            share = member / member.sum(0).clamp_min(1.0)
            centres = torch.where((member.sum(0) > 0)[:, None], share.T @ z, centres)
        variance = share.T @ z.square() - (share.T @ z).square()
        self.means.copy_(centres)
        self.log_stds.copy_(0.5 * variance.clamp_min(1e-3).log())
        self.logits.copy_((member.sum(0) + 1).log())

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z) of z (..., latent), shape (...)."""
        if self.components == 1:
            return (-0.5 * z.square() - 0.5 * LOG_2PI).sum(-1)
        # squares expanded into matrix products: no (..., components, latent) tensor is made
        precision = (-2 * self.log_stds).exp()
        constant = (self.means.square() * precision + 2 * self.log_stds + LOG_2PI).sum(-1)
        quadratic = z.square() @ precision.T - 2 * z @ (self.means * precision).T + constant
        return (self.logits.log_softmax(0) - 0.5 * quadratic).logsumexp(-1)

    def sample(self, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw n samples, shape (n, latent), with the dtype and device of `like`."""
        noise = randn((n, self.latent), like, generator)
        if self.components == 1:
            return noise
        c = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=generator)
        return self.means[c] + self.log_stds[c].exp() * noise


class Decoder(nn.Module):
    """p(x | z) factorised over dimensions, given `outputs` numbers that the network computes from z."""

    outputs: int
    #: width of `features`
    inputs: int

    def initialise(self, train: Tensor) -> None:
        """Fit what is known before training, from train (n, D)."""

    def features(self, x: Tensor) -> Tensor:
        """Return the encoder's input for x (n, D), shape (n, inputs)."""
        return x

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        """Return log p(x | z), shape (n, k), from out (n, k, outputs) and x (n, D)."""
        raise NotImplementedError

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of x (n, D) for each row of out (n, outputs)."""
        raise NotImplementedError


class GaussianDecoder(Decoder):
    """N(mu(z), diag sigma(z)^2) with log sigma kept above `FLOOR` by a softplus."""

    FLOOR = -6.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs, self.outputs = dim, 2 * dim

    def mean_and_log_std(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and log sigma, each (..., D), from out (..., 2 D)."""
        mean, raw = out.chunk(2, -1)
        return mean, self.FLOOR + F.softplus(raw - self.FLOOR)

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        return normal_log_prob(x[:, None], *self.mean_and_log_std(out))

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        mean, log_std = self.mean_and_log_std(out)
        return mean + log_std.exp() * randn(tuple(mean.shape), mean, generator)


class BernoulliDecoder(Decoder):
    """Independent bits with logits b_d + f_d(z), where b is fitted to the training marginals."""

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inputs = self.outputs = dim
        self.register_buffer("bias", torch.zeros(dim))

    def initialise(self, train: Tensor) -> None:
        self.bias.copy_(torch.logit((train.sum(0) + 0.5) / (len(train) + 1)))

    def features(self, x: Tensor) -> Tensor:
        return 2 * x - 1

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        sign = (2 * x - 1)[:, None]
        return F.logsigmoid(sign * (self.bias + out)).sum(-1)

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        return torch.bernoulli(torch.sigmoid(self.bias + out), generator=generator)


class CategoricalDecoder(Decoder):
    """p(x_d = l | z) proportional to exp(b_dl + sum_m a_dm(z) phi_ml).

    b is fitted to the training marginals; the `rank` functions phi of the level are learned, start as Legendre
    polynomials of the level, and are shared by all pixels.
    """

    bias: Tensor

    def __init__(self, dim: int, levels: int, rank: int) -> None:
        super().__init__()
        self.dim, self.levels, self.rank = dim, levels, rank
        self.inputs, self.outputs = dim * 2, dim * rank
        self.register_buffer("bias", torch.zeros(dim, levels))
        u = torch.linspace(-1, 1, levels)
        self.phi = nn.Parameter(torch.stack([torch.special.legendre_polynomial_p(u, m + 1) for m in range(rank)]))

    def initialise(self, train: Tensor) -> None:
        counts = F.one_hot(train.long(), self.levels).sum(0) + 0.5
        self.bias.copy_((counts / counts.sum(1, keepdim=True)).log())

    def features(self, x: Tensor) -> Tensor:
        u = 2 * x / (self.levels - 1) - 1
        return torch.cat([u, (x > 0).to(x.dtype) - 0.5], -1)

    def logits(self, out: Tensor) -> Tensor:
        """Map out (..., outputs) to unnormalised log probabilities (..., D, levels)."""
        return self.bias + out.unflatten(-1, (self.dim, self.rank)) @ self.phi

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        logits = self.logits(out)
        index = x.long()[:, None, :, None].expand(*logits.shape[:-1], 1)
        return (logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)).sum(-1)

    def sample(self, out: Tensor, generator: torch.Generator) -> Tensor:
        p = self.logits(out).softmax(-1)
        x = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
        return x.view(len(out), self.dim).to(out.dtype)


def make_decoder(info: DataInfo, rank: int) -> Decoder:
    """Build the decoder of the data's domain."""
    if info.domain == "continuous":
        return GaussianDecoder(info.dim)
    if info.domain == "bits":
        return BernoulliDecoder(info.dim)
    assert info.levels is not None
    return CategoricalDecoder(info.dim, info.levels, rank)


def quasi_normal(points: int, dim: int) -> Tensor:
    """Return a fixed set of standard normal points (points, dim): Sobol points, scrambled under `SCORE_SEED`."""
    u = torch.quasirandom.SobolEngine(dim, scramble=True, seed=SCORE_SEED).draw(points, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).float()


@dataclass(frozen=True)
class VaeSettings:
    """Settings of `VariationalAutoencoder`.

    Attributes:
        latent: dimensions of z.
        width: hidden units of the encoder and of the decoder.
        blocks: residual blocks of each.
        components: Gaussians in the prior; 1 is N(0, I).
        draws: k of the training bound.
        dropout: rate on hidden units in training.
        input_dropout: rate at which the encoder's inputs are dropped in training.
        beta_warmup: steps over which the weight of log p(z) - log q(z | x) in the training bound grows to 1.
        rank: functions of the level in the categorical decoder.
        score_draws: fixed latent points behind `score`.
        valid_draws: k of the IW bound that selects the best step.
    """

    latent: int = 16
    width: int = 128
    blocks: int = 1
    components: int = 1
    draws: int = 1
    dropout: float = 0.0
    input_dropout: float = 0.0
    beta_warmup: int = 0
    rank: int = 4
    score_draws: int = 8
    valid_draws: int = 16


class VariationalAutoencoder(Model):
    """VAE (draws = 1) and IWAE (draws > 1).

    Args:
        info: the data's shape and domain.
        s: see `VaeSettings`.
    """

    #: least log standard deviation of q(z | x)
    FLOOR: ClassVar[float] = -8.0
    family: ClassVar[Family] = "vae"
    steps: Tensor
    score_noise: Tensor

    def __init__(self, info: DataInfo, s: VaeSettings) -> None:
        super().__init__()
        self.info, self.latent, self.draws, self.valid_draws = info, s.latent, s.draws, s.valid_draws
        self.input_dropout, self.beta_warmup = s.input_dropout, s.beta_warmup
        self.decoder = make_decoder(info, s.rank)
        self.encode = Net(self.decoder.inputs, s.width, s.blocks, 2 * s.latent, s.dropout)
        self.decode = Net(s.latent, s.width, s.blocks, self.decoder.outputs, s.dropout)
        self.prior = MixturePrior(s.latent, s.components)
        self.register_buffer("steps", torch.zeros(()))
        self.capabilities = frozenset({"importance_weights", "sample"})
        if info.domain == "continuous":
            self.capabilities |= {"score"}
            self.register_buffer("score_noise", quasi_normal(s.score_draws, s.latent), persistent=False)

    @torch.no_grad()
    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.decoder.initialise(train)
        if self.info.domain == "continuous":
            self._start_at_principal_axes(train)
            rows = torch.randint(len(train), (START_ROWS,), generator=generator, device=train.device)
            self.prior.start_at(self.posterior(train[rows])[0])

    def _start_at_principal_axes(self, train: Tensor) -> None:
        """Start encoder and decoder as the rotation to the principal axes of train (n, D) and back.

        With narrow noise on both sides the model then starts as its prior, rotated: a mixture of Gaussians.
        """
        basis = torch.linalg.eigh(train.T.cov().view(2 * (self.info.dim,)).double())[1]
        axes = basis.flip(1)[:, : self.latent].to(train.dtype)
        for net, weight, width in ((self.encode, axes.T, self.latent), (self.decode, axes, self.info.dim)):
            net.linear.weight.zero_()
            net.linear.weight[: weight.shape[0], : weight.shape[1]] = weight
            net.leave.weight.mul_(0.1)
            net.leave.bias.zero_()
            net.leave.bias[width:] = START_RAW

    def posterior(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z | x), each (n, latent); dropout only with a generator."""
        h = dropout(self.decoder.features(x), self.input_dropout, generator)
        mean, raw = self.encode(h, generator).chunk(2, -1)
        return mean, self.FLOOR + F.softplus(raw - self.FLOOR)

    def bound_terms(self, x: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return log p(x | z) and log p(z) - log q(z | x), each (n, k), at z = mean + std * noise.

        Args:
            x: shape (n, D).
            noise: standard normal, broadcastable to (n, k, latent).
            generator: switches dropout on.
        """
        mean, log_std = self.posterior(x, generator)
        z = mean[:, None] + log_std[:, None].exp() * noise
        log_q = (-0.5 * noise.square() - log_std[:, None] - 0.5 * LOG_2PI).sum(-1)
        out = self.decode(z.flatten(0, 1), generator).unflatten(0, z.shape[:2])
        return self.decoder.log_prob(out, x), self.prior.log_prob(z) - log_q

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        log_lik, log_ratio = self.bound_terms(x, randn((len(x), k, self.latent), x, generator))
        return log_lik + log_ratio

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the mean IW-k bound (Burda et al., eq. 8); for k = 1 the one-draw ELBO."""
        noise = randn((len(batch), self.draws, self.latent), batch, generator)
        log_lik, log_ratio = self.bound_terms(batch, noise, generator if self.training else None)
        beta = ((self.steps + 1) / (self.beta_warmup + 1)).clamp(max=1.0)
        return math.log(self.draws) - (log_lik + beta * log_ratio).logsumexp(1).mean()

    @torch.no_grad()
    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the mean IW bound with `valid_draws` draws."""
        log_w = self.log_weights(batch, self.valid_draws, generator)
        return math.log(self.valid_draws) - log_w.logsumexp(1).mean()

    def after_step(self, generator: torch.Generator) -> None:
        self.steps += 1

    def fixed_bound(self, x: Tensor) -> Tensor:
        """IW bound (n,) at the fixed latent points: a deterministic, differentiable stand-in for log p(x)."""
        log_lik, log_ratio = self.bound_terms(x, self.score_noise.to(x.dtype))
        return (log_lik + log_ratio).logsumexp(1) - math.log(len(self.score_noise))

    def score(self, x: Tensor) -> Tensor:
        """Autograd of `fixed_bound`, shape (n, D): close to grad log p(x), and a gradient field by construction."""
        grads = []
        with torch.enable_grad():
            for part in x.detach().split(SCORE_ROWS):
                part = part.clone().requires_grad_(True)
                grads.append(torch.autograd.grad(self.fixed_bound(part).sum(), part)[0])
        return torch.cat(grads)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = self.prior.sample(n, self.steps, generator)
        return self.decoder.sample(self.decode(z), generator)


_PARAMS = {"latent": 16, "width": 128, "blocks": 1, "components": 20, "dropout": 0.2, "input_dropout": 0.2}
_NO_DROPOUT = {"dropout": 0.0, "input_dropout": 0.0}
_SHORT = {"steps": 700, "batch_size": 256, "lr": 4e-3, "weight_decay": 0.0, "ema": 0.98, "validate_every": 0}
_LONG = {"steps": 3000, "batch_size": 128, "lr": 3e-3, "weight_decay": 0.1, "ema": 0.99, "validate_every": 250}
_CONTINUOUS = {**_SHORT, **_NO_DROPOUT, "latent": 2, "width": 64, "components": 100, "beta_warmup": 0}
#: real tables
_TABLE = {**_LONG, "latent": 8, "width": 128, "components": 40}
_DIMENSIONS: dict[str, dict[str, float]] = {f"mixture-{d}": {"latent": d, "components": 10} for d in (8, 32, 64)}

VAE = ModelEntry(
    family="vae",
    about="variational autoencoder trained by the ELBO",
    paper="Kingma and Welling 2014, arXiv:1312.6114",
    build=from_settings(VariationalAutoencoder, VaeSettings),
    domains=frozenset({"continuous", "levels", "bits"}),
    params={**_PARAMS, "beta_warmup": 300, "draws": 1},
    training=Training(steps=1500, batch_size=128, lr=2e-3, weight_decay=0.1, ema=0.99, validate_every=100),
    overrides={
        "continuous": _CONTINUOUS,
        **_DIMENSIONS,
        "red-wine": {**_TABLE, "components": 20, "dropout": 0.1, "steps": 2000, "batch_size": 100, "lr": 2e-3},
        "white-wine": {**_TABLE, "dropout": 0.05},
        "parkinsons": {**_TABLE, "latent": 10},
    },
)
IWAE = replace(
    VAE,
    about="importance-weighted autoencoder trained by the IW-k bound",
    paper="Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519",
    params={**VAE.params, "draws": 5},
    training=replace(VAE.training, steps=700),
    overrides={
        "continuous": {**_CONTINUOUS, "steps": 500, "batch_size": 128},
        **{task: {**changes, "steps": 700} for task, changes in _DIMENSIONS.items()},
        "mushrooms": {**_NO_DROPOUT, "latent": 24, "steps": 2500, "validate_every": 250},
    },
)
