"""A restricted Boltzmann machine as the papers write it: a plain triple of tensors, exact where it is small."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.ebm import RBM
from replicate.likelihood.enumeration import states
from replicate.model import DataInfo
from replicate.tasks.images import mnist_static
from replicate.tasks.loading import load_task


class Machine(NamedTuple):
    """p(v, h) = exp(v'W h + b'v + c'h) / Z over bits, as the papers write it; also a gradient of such a machine.

    Attributes:
        weights: W, shape (.., D, H); leading dimensions are independent machines side by side.
        visible: b, shape (.., D).
        hidden: c, shape (.., H).
    """

    weights: Tensor
    visible: Tensor
    hidden: Tensor

    def hidden_mean(self, v: Tensor) -> Tensor:
        """p(h_j = 1 | v) of v (.., n, D), shape (.., n, H)."""
        return torch.sigmoid(self.hidden.unsqueeze(-2) + v @ self.weights)

    def visible_mean(self, h: Tensor) -> Tensor:
        """p(v_d = 1 | h) of h (.., n, H), shape (.., n, D)."""
        return torch.sigmoid(self.visible.unsqueeze(-2) + h @ self.weights.mT)

    def gibbs(self, v: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """v (.., n, D) after that many draws of h given v and v given h."""
        for _ in range(sweeps):
            v = _bits(self.visible_mean(_bits(self.hidden_mean(v), generator)), generator)
        return v

    def statistics(self, v: Tensor) -> Machine:
        """Means of v h', v and h over the rows of v (.., n, D), hidden units at their conditional means."""
        h, n = self.hidden_mean(v), v.shape[-2]
        return Machine(v.mT @ h / n, v.mean(-2), h.mean(-2))

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -b'v - sum_j softplus(c_j + (v'W)_j) of v (n, D), shape (n,); log p(v) = -F(v) - log Z."""
        return -v @ self.visible - torch.nn.functional.softplus(self.hidden + v @ self.weights).sum(-1)

    def plus(self, step: Machine, size: float | Tensor = 1.0) -> Machine:
        """This machine moved by `size` times `step`; sizes (R, 1, 1) are those of R machines side by side."""
        flat = size.squeeze(-1) if isinstance(size, Tensor) else size
        return Machine(
            self.weights + size * step.weights, self.visible + flat * step.visible, self.hidden + flat * step.hidden
        )

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `replicate.likelihood.enumeration.rbm_log_z`: level 0 of a visible unit has zeros."""
        zero = torch.zeros_like
        return (
            torch.stack([zero(self.weights), self.weights], 1),
            torch.stack([zero(self.visible), self.visible], 1),
            self.hidden,
        )

    def model(self, train: Tensor, generator: torch.Generator) -> RBM:
        """The same distribution as a model of the suite, whose annealing starts at the base rates of train (n, D).

        To be called inside `streams.initialisation()`, since it constructs a module.
        """
        w, b, c = self
        model = RBM(DataInfo(len(b), "bits", 2), hidden=len(c)).to(w.device, w.dtype)
        model.initialise(train, generator)
        model.offset.zero_()
        with torch.no_grad():
            model.weights.copy_(w)
            model.hidden_bias.copy_(c)
            # `RBM` counts a hidden unit as h - 1/2
            plain = torch.stack([torch.zeros_like(b), b + w.sum(1) / 2], 1)
            model.bias_change.copy_(plain - model.base_bias)
        return model


def _bits(p: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype) < p).to(p.dtype)


def flat(machine: Machine) -> Tensor:
    """All numbers of one machine or gradient as a vector."""
    return torch.cat([part.flatten() for part in machine])


def doubled(machine: Machine) -> Machine:
    """The machine in float64."""
    return Machine(*(part.double() for part in machine))


def hidden_log_weights(machine: Machine) -> Tensor:
    """log sum_v exp(v'W h + b'v + c'h) of every hidden state, shape (2^H,), in the order of `enumeration.states`.

    The first half of the units is the slow index, so that each half's sums are formed once.
    """
    w, b, c = doubled(machine)
    half = len(c) // 2
    slow, fast = (states(n, 2, 0, 2**n, w.device) for n in (half, len(c) - half))
    drive, bias = b + slow @ w[:, :half].T, slow @ c[:half]
    fast_drive, fast_bias = fast @ w[:, half:].T, fast @ c[half:]
    rows = [F.softplus(d + fast_drive).sum(1) + a + fast_bias for d, a in zip(drive, bias, strict=True)]
    return torch.cat(rows)


def exact_samples(machine: Machine, log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n independent samples of the machine, shape (n, D): hidden states by their enumerated weights, then v given h."""
    w = doubled(machine)
    index = torch.multinomial(log_weights.softmax(0), n, replacement=True, generator=generator)
    place = torch.arange(len(w.hidden) - 1, -1, -1, device=index.device)
    h = (index[:, None] >> place & 1).double()
    p = w.visible_mean(h)
    return (torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype) < p).double()


class Data(NamedTuple):
    """Bits: (n, D) each, float32."""

    train: Tensor
    valid: Tensor
    test: Tensor


def bits(name: str, device: torch.device) -> Data:
    """The suite's `digits-binary`, or "mnist-static" from REPLICATE_DATA."""
    task = mnist_static() if name == "mnist-static" else load_task(name)
    return Data(*(part.to(device) for part in (task.train, task.valid, task.test)))
