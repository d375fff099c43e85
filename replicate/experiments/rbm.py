"""A restricted Boltzmann machine as the papers write it: a plain triple of tensors, exact where it is small."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from baselines.ebm import RBM
from replicate.likelihood.enumeration import states
from replicate.model import DataInfo
from replicate.tasks.loading import load_task


class Machine(NamedTuple):
    """p(v, h) = exp(v'W h + b'v + c'h) / Z over bits; also a gradient of such a machine.

    Attributes:
        weights: W, shape (.., D, H); leading dimensions are independent machines side by side.
        visible: b, shape (.., D).
        hidden: c, shape (.., H).
    """

    weights: Tensor
    visible: Tensor
    hidden: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Machine:
        """Return the machine with each of its three tensors changed."""
        return Machine(*(change(part) for part in self))

    def hidden_mean(self, v: Tensor) -> Tensor:
        """p(h_j = 1 | v) of v (.., n, D), shape (.., n, H)."""
        return torch.sigmoid(self.hidden.unsqueeze(-2) + v @ self.weights)

    def visible_mean(self, h: Tensor) -> Tensor:
        """p(v_d = 1 | h) of h (.., n, H), shape (.., n, D)."""
        return torch.sigmoid(self.visible.unsqueeze(-2) + h @ self.weights.mT)

    def gibbs(self, v: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """Return v (.., n, D) after that many draws of h given v and v given h."""
        for _ in range(sweeps):
            v = _draw(self.visible_mean(_draw(self.hidden_mean(v), generator)), generator)
        return v

    def statistics(self, v: Tensor) -> Machine:
        """Return the means of v h', v and h over the rows of v (.., n, D), with h at its conditional mean."""
        h, n = self.hidden_mean(v), v.shape[-2]
        return Machine(v.mT @ h / n, v.mean(-2), h.mean(-2))

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -b'v - sum_j softplus(c_j + (v'W)_j) of v (n, D), shape (n,); log p(v) = -F(v) - log Z."""
        return -v @ self.visible - softplus(self.hidden + v @ self.weights).sum(-1)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `replicate.likelihood.enumeration.rbm_log_z`: level 0 of a visible unit has zeros."""
        w, b, c = self
        return torch.stack([0 * w, w], 1), torch.stack([0 * b, b], 1), c

    def plus(self, step: Machine, size: float | Tensor = 1.0) -> Machine:
        """Return the machine moved by `size` times `step`; sizes (R, 1, 1) are those of R machines side by side."""
        flat = size.squeeze(-1) if isinstance(size, Tensor) else size
        return Machine(
            self.weights + size * step.weights, self.visible + flat * step.visible, self.hidden + flat * step.hidden
        )

    def model(self, train: Tensor, generator: torch.Generator) -> RBM:
        """Return a model of the suite with the same distribution; its annealing starts at the rates of train (n, D).

        Call it inside `run.initialisation()`, since it constructs a module.
        """
        w, b, c = self
        model = RBM(DataInfo(len(b), "bits", 2), hidden=len(c)).to(w.device, w.dtype)
        model.initialise(train, generator)
        model.offset.zero_()
        with torch.no_grad():
            model.weights.copy_(w)
            model.hidden_bias.copy_(c)
            # `RBM` counts a hidden unit as h - 1/2
            model.bias_change.copy_(torch.stack([torch.zeros_like(b), b + w.sum(1) / 2], 1) - model.base_bias)
        return model


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype) < p).to(p.dtype)


def flat(machine: Machine) -> Tensor:
    """Return all numbers of one machine or gradient as a vector."""
    return torch.cat([part.flatten() for part in machine])


def to_float64(machine: Machine) -> Machine:
    """Return the machine in float64."""
    return machine.map(Tensor.double)


def hidden_log_weights(machine: Machine) -> Tensor:
    """Return log sum_v exp(v'W h + b'v + c'h) of every hidden state, shape (2^H,), in the order of `states`.

    The first half of the units is the slow index, so that each half's sums are formed once.
    """
    w, b, c = to_float64(machine)
    half = len(c) // 2
    slow, fast = (states(n, 2, 0, 2**n, w.device) for n in (half, len(c) - half))
    drive, bias = b + slow @ w[:, :half].T, slow @ c[:half]
    fast_drive, fast_bias = fast @ w[:, half:].T, fast @ c[half:]
    return torch.cat([softplus(d + fast_drive).sum(1) + a + fast_bias for d, a in zip(drive, bias, strict=True)])


def exact_samples(machine: Machine, log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n independent samples (n, D), float64: hidden states by their `hidden_log_weights`, then v given h."""
    index = torch.multinomial(log_weights.softmax(0), n, replacement=True, generator=generator)
    place = torch.arange(len(machine.hidden) - 1, -1, -1, device=index.device)
    return _draw(to_float64(machine).visible_mean((index[:, None] >> place & 1).double()), generator)


class BinaryRows(NamedTuple):
    """The splits of a task of bits: (n, D) each, float32."""

    train: Tensor
    valid: Tensor
    test: Tensor


def binary_rows(name: str, device: torch.device) -> BinaryRows:
    """Load the rows of a task of bits, such as "digits-binary" or "mnist-static"."""
    task = load_task(name)
    return BinaryRows(*(part.to(device) for part in (task.train, task.valid, task.test)))
