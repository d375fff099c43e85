"""The paper's variational and importance-weighted autoencoders."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.vae import LOG_2PI, normal_log_prob
from replicate.model import Model


def glorot(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer with Glorot and Bengio's uniform start and zero biases."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_layers(inputs: int, hidden: int) -> nn.Sequential:
    """Return two deterministic layers of tanh."""
    return nn.Sequential(glorot(inputs, hidden), nn.Tanh(), glorot(hidden, hidden), nn.Tanh())


class GaussianLayer(nn.Module):
    """N(mu(h), diag exp(2 log_sigma(h))), where h are tanh layers of the variables below or above."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = tanh_layers(inputs, hidden)
        self.mean, self.log_sigma = glorot(hidden, outputs), glorot(hidden, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation (.., outputs) given x (.., inputs)."""
        h = self.hidden(x)
        return self.mean(h), self.log_sigma(h)


class ImportanceWeightedAutoencoder(Model):
    """The paper's VAE and IWAE with one or more stochastic layers.

    Args:
        dim: D bits.
        latents, hidden: widths from the data upwards, one of each per stochastic layer.
        draws: k of the training bound.
        weighted: train the bound L_k of the paper's eq. 8 (IWAE), else the mean of k ELBOs (VAE).
        doubly: take the encoder's doubly reparameterised gradient of L_k (Tucker et al. 2019, 1810.04152), which has
            the same mean and less variance.

    Raises:
        ValueError: doubly reparameterised with several stochastic layers, or without `weighted`.
    """

    family = "vae"
    capabilities = frozenset({"importance_weights"})

    def __init__(
        self, dim: int, latents: Sequence[int], hidden: Sequence[int], draws: int, weighted: bool, doubly: bool = False
    ) -> None:
        super().__init__()
        if doubly and (len(latents) > 1 or not weighted):
            raise ValueError("the doubly reparameterised gradient is that of the IW bound with one stochastic layer")
        self.draws, self.weighted, self.doubly = draws, weighted, doubly
        sizes = [dim, *latents]
        pairs = list(zip(sizes, sizes[1:], hidden, strict=False))
        self.q = nn.ModuleList(GaussianLayer(below, h, above) for below, above, h in pairs)
        self.p = nn.ModuleList(GaussianLayer(above, h, below) for below, above, h in pairs[1:])
        self.output_hidden = tanh_layers(latents[0], hidden[0])
        self.output = glorot(hidden[0], dim)

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Set the output bias to the logit of the training mean, clipped to [0.001, 0.999] as in the code."""
        with torch.no_grad():
            self.output.bias.copy_(torch.logit(train.mean(0).clamp(0.001, 0.999)))

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        """Return log p(x, h) - log q(h | x) of x (n, D), shape (n, k), at h drawn layer by layer from q."""
        below, log_w = x[:, None].expand(-1, k, -1), x.new_zeros(len(x), k)
        for i, q in enumerate(self.q):
            mean, log_sigma = q(below if i else x[:, None])
            noise = torch.randn(len(x), k, mean.shape[-1], generator=generator, device=x.device, dtype=x.dtype)
            above = mean + log_sigma.exp() * noise
            log_w = log_w - (-0.5 * noise.square() - log_sigma - 0.5 * LOG_2PI).sum(-1)
            log_w = log_w + (normal_log_prob(below, *self.p[i - 1](above)) if i else self._log_bits(below, above))
            below = above
        return log_w + (-0.5 * below.square() - 0.5 * LOG_2PI).sum(-1)

    def _log_bits(self, x: Tensor, h: Tensor) -> Tensor:
        """Return log p(x | h) of bits x (n, k, D), shape (n, k)."""
        return F.logsigmoid((2 * x - 1) * self.output(self.output_hidden(h))).sum(-1)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Return minus the objective, summed over the batch (n, D) as in the code."""
        if self.doubly:
            return -self._doubly_reparameterised(batch, generator)
        log_w = self.log_weights(batch, self.draws, generator)
        objective = log_w.logsumexp(-1) - math.log(self.draws) if self.weighted else log_w.mean(-1)
        return -objective.sum(-1)

    def _doubly_reparameterised(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a number whose gradient is Tucker et al.'s eq. 5 and 6; its value is no bound.

        The normalised weights weight the decoder's gradient, and their squares that of the encoder, through h alone.
        """
        mean, log_sigma = self.q[0](x[:, None])
        shape = (len(x), self.draws, mean.shape[-1])
        h = mean + log_sigma.exp() * torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        log_w = self._log_bits(x[:, None].expand(-1, self.draws, -1), h)
        log_w = log_w + (-0.5 * h.square() - 0.5 * LOG_2PI).sum(-1)
        log_w = log_w - normal_log_prob(h, mean.detach(), log_sigma.detach())
        share = log_w.detach().softmax(-1)
        h.register_hook(lambda gradient: gradient * share[..., None])
        return (share * log_w).sum((-2, -1))
