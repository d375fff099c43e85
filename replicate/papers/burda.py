"""Burda, Grosse, Salakhutdinov 2016: Importance weighted autoencoders, 1509.00519.

Replicated: VAE and IWAE with one and two stochastic layers trained with k = 1, 5, 50 draws, on dynamic and on static
binarised MNIST, scored by the bound with 5000 importance samples (table 1 and appendix D).

Setup as in the paper and its released code (github.com/yburda/iwae): deterministic layers of tanh, Glorot's uniform
start with zero biases, output bias = logit of the clipped training mean; batches of 20 in the order of the file; Adam
with beta1 = 0.99, beta2 = 0.999, eps = 1e-4 outside the bias correction, second moments that start at 1, and gradients
summed, not averaged, over a batch; stage i = 0..7 has 3^i epochs at 1e-3 * 10^(-i/7), rounded as the code rounds it:
3280 epochs, the last weights kept.

Deviations: test bits of the dynamic rows are drawn once from a fixed seed (the code draws them afresh at evaluation).
Randomness comes from this suite's streams. Rows `dreg` train the same IWAE by doubly reparameterised gradients (Tucker
et al. 2019), as one public re-implementation does. A model with two layers has the shape 784-200-200-100-100-100-50.

k = 1 is one and the same model for VAE and IWAE: the paper prints one number for both.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.likelihood.importance import iw_bound
from replicate.model import Model
from replicate.papers.burda_bounds import BOUNDS
from replicate.resume import State, resumable_together
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.graph import Repeated
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES, TEST_BITS_SEED, binarise, grey_values, mnist_static

LOG_2PI = math.log(2 * math.pi)
STAGES = 8
#: ten million steps of about a hundred kernels that start as one graph: 0.3 ms a step by their number, not measured
GPU_MINUTES = 60
#: every stage's epochs are divided by this where a CPU has to do: 44 epochs are left
SHORTENED = 81
#: examples that the code holds out of MNIST's 60,000; nothing is selected on them
HELD_OUT = 400
#: latent and hidden widths from the data upwards, by number of stochastic layers
LATENTS: dict[int, tuple[int, ...]] = {1: (50,), 2: (100, 50)}
HIDDEN: dict[int, tuple[int, ...]] = {1: (200,), 2: (200, 100)}


# -- data


def training_and_test(dynamic: bool) -> tuple[Tensor, Tensor]:
    """Training intensities, or static bits, (n, 784), and test bits (10000, 784)."""
    if not dynamic:
        task = mnist_static()
        return task.train, task.test
    train, test = (part.float() / 255 for part in grey_values("mnist"))
    return train[:-HELD_OUT], binarise(test, torch.Generator().manual_seed(TEST_BITS_SEED))


# -- the model

#: a generator, or one for each of several models side by side
Noise = torch.Generator | Sequence[torch.Generator]


def normal(shape: Sequence[int], generator: Noise, like: Tensor) -> Tensor:
    """Standard normal numbers on the device and in the precision of a tensor; of several generators one for a row."""
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.stack([normal(shape[1:], g, like) for g in generator])


def glorot(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Glorot and Bengio's uniform start and zero biases."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_layers(inputs: int, hidden: int) -> nn.Sequential:
    """Two deterministic layers of tanh."""
    return nn.Sequential(glorot(inputs, hidden), nn.Tanh(), glorot(hidden, hidden), nn.Tanh())


class GaussianLayer(nn.Module):
    """N(mu(h), diag exp(2 log_sigma(h))) given what is below or above it."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = tanh_layers(inputs, hidden)
        self.mean, self.log_sigma = glorot(hidden, outputs), glorot(hidden, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., inputs) -> mean and log standard deviation (..., outputs)."""
        h = self.hidden(x)
        return self.mean(h), self.log_sigma(h)


def log_normal(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(x; mean, diag exp(2 log_sigma)) summed over the last dimension."""
    return (-0.5 * ((x - mean) * (-log_sigma).exp()).square() - log_sigma - 0.5 * LOG_2PI).sum(-1)


class ImportanceWeightedAutoencoder(Model):
    """The paper's VAE and IWAE with one or more stochastic layers.

    Args:
        dim: D bits.
        latents, hidden: widths from the data upwards, one of each for a stochastic layer.
        draws: k of the training bound.
        weighted: train the bound L_k of the paper's eq. 8 (IWAE), else the mean of k ELBOs (VAE).
        doubly: the encoder's gradient of L_k is doubly reparameterised (Tucker et al. 2019, 1810.04152): the same mean
            with less variance. For one stochastic layer.

    Raises:
        ValueError: doubly reparameterised with more layers, or without `weighted`.
    """

    family = "vae"
    capabilities = frozenset({"importance_weights"})

    def __init__(
        self,
        dim: int,
        latents: Sequence[int],
        hidden: Sequence[int],
        draws: int,
        weighted: bool,
        doubly: bool = False,
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
        """Output bias = logit of the training mean, clipped to [0.001, 0.999] as in the code."""
        with torch.no_grad():
            self.output.bias.copy_(torch.logit(train.mean(0).clamp(0.001, 0.999)))

    def log_weights(self, x: Tensor, k: int, generator: Noise) -> Tensor:
        """log p(x, h) - log q(h | x) of x (..., n, D), shape (..., n, k), at h drawn layer by layer from q."""
        below, log_w = x.unsqueeze(-2).expand(*x.shape[:-1], k, -1), x.new_zeros(*x.shape[:-1], k)
        for i, q in enumerate(self.q):
            mean, log_sigma = q(below if i else x.unsqueeze(-2))
            noise = normal((*x.shape[:-1], k, mean.shape[-1]), generator, x)
            above = mean + log_sigma.exp() * noise
            log_w = log_w - (-0.5 * noise.square() - log_sigma - 0.5 * LOG_2PI).sum(-1)
            log_w = log_w + (log_normal(below, *self.p[i - 1](above)) if i else self._log_bits(below, above))
            below = above
        return log_w + (-0.5 * below.square() - 0.5 * LOG_2PI).sum(-1)

    def _log_bits(self, x: Tensor, h: Tensor) -> Tensor:
        """log p(x | h) of bits x (..., n, k, D)."""
        return F.logsigmoid((2 * x - 1) * self.output(self.output_hidden(h))).sum(-1)

    def loss(self, batch: Tensor, generator: Noise) -> Tensor:
        """Minus the objective, summed over the batch (..., n, D) as in the code, shape (...)."""
        if self.doubly:
            return -self._doubly_reparameterised(batch, generator)
        log_w = self.log_weights(batch, self.draws, generator)
        objective = log_w.logsumexp(-1) - math.log(self.draws) if self.weighted else log_w.mean(-1)
        return -objective.sum(-1)

    def _doubly_reparameterised(self, x: Tensor, generator: Noise) -> Tensor:
        """A number whose gradient is Tucker et al.'s eq. 5 and 6; its value is no bound.

        With q's parameters held fixed inside log w, the decoder is moved by the normalised weights, and the encoder,
        through h alone, by their squares.
        """
        mean, log_sigma = self.q[0](x.unsqueeze(-2))
        shape = (*x.shape[:-1], self.draws, mean.shape[-1])
        h = mean + log_sigma.exp() * normal(shape, generator, x)
        bits = x.unsqueeze(-2).expand(*x.shape[:-1], self.draws, -1)
        log_w = self._log_bits(bits, h) + (-0.5 * h.square() - 0.5 * LOG_2PI).sum(-1)
        log_w = log_w - log_normal(h, mean.detach(), log_sigma.detach())
        share = log_w.detach().softmax(-1)
        h.register_hook(lambda gradient: gradient * share[..., None])
        return (share * log_w).sum((-2, -1))


# -- seeds side by side


class StackedLinear(nn.Module):
    """P linear layers at once, which go on sharing their parameters with this."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))
        for layer, weight, bias in zip(layers, self.weight.detach(), self.bias.detach(), strict=True):
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (P, ..., inputs) -> (P, ..., outputs), layer p on x[p]."""
        return torch.baddbmm(self.bias[:, None], x.flatten(1, -2), self.weight.mT).unflatten(1, x.shape[1:-1])


def stacked(models: Sequence[ImportanceWeightedAutoencoder]) -> ImportanceWeightedAutoencoder:
    """One model of x (P, n, D) that is `models` side by side; a step of it in place is a step of each of them."""
    together = copy.deepcopy(models[0])
    for name, layer in models[0].named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            each = [cast(nn.Linear, model.get_submodule(name)) for model in models]
            setattr(together.get_submodule(parent), own, StackedLinear(each))
    return together


# -- training


class CodeAdam:
    """Adam as the released code has it: second moments start at 1, and eps = 1e-4 is outside the bias correction."""

    def __init__(self, parameters: Sequence[Tensor], beta1: float = 0.99, beta2: float = 0.999) -> None:
        self.parameters, self.beta1, self.beta2, self.step_number = list(parameters), beta1, beta2, 1
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.ones_like(p) for p in self.parameters]

    def next_rate(self, lr: float) -> float:
        """The bias-corrected rate of the next step, which is counted with it."""
        rate = lr * math.sqrt(1 - self.beta2**self.step_number) / (1 - self.beta1**self.step_number)
        self.step_number += 1
        return rate

    @torch.no_grad()
    def step(self, rate: Tensor | float) -> None:
        """One step at `next_rate` against the gradients that the parameters hold; all state is changed in place."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_lerp_(self.first, gradients, 1 - self.beta1)
        torch._foreach_mul_(self.second, self.beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - self.beta2)
        scale = torch._foreach_sqrt(self.second)
        torch._foreach_add_(scale, 1e-4)
        change = torch._foreach_mul(self.first, rate)
        torch._foreach_div_(change, scale)
        torch._foreach_sub_(self.parameters, change)

    def state_dict(self) -> dict[str, Any]:
        """Both moments and the number of the next step."""
        return {"first": self.first, "second": self.second, "step_number": self.step_number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the moments stay where they are in memory."""
        for moment, saved in zip([*self.first, *self.second], [*state["first"], *state["second"]], strict=True):
            moment.copy_(saved)
        self.step_number = state["step_number"]


def schedule(stages: int, shortened: int = 1) -> Iterator[tuple[int, float]]:
    """(epochs, learning rate) of each stage: 3^i at 1e-3 * 10^(-i/7), the rate to two digits as in the code.

    Args:
        shortened: the divisor of every stage's epochs, of which at least one stays.
    """
    for i in range(stages):
        yield max(1, 3**i // shortened), 1e-4 * round(10 ** (1 - i / 7), 1)


def adams(models: Sequence[ImportanceWeightedAutoencoder], joint: CodeAdam) -> list[CodeAdam]:
    """One optimizer for each of the models of `stacked`, whose moments are its rows of the `joint` one's."""
    each = [CodeAdam(list(model.parameters())) for model in models]
    for i, adam in enumerate(each):
        adam.first, adam.second = ([moment[i] for moment in moments] for moments in (joint.first, joint.second))
    return each


def fit(
    models: Sequence[ImportanceWeightedAutoencoder], train: Tensor, dynamic: bool, contexts: Sequence[Context]
) -> list[list[float]]:
    """Train in place through all stages; the mean training loss of every stage in nats, for each model.

    Several models are several seeds: their steps are taken at once, and leave what each alone would but for rounding.
    """
    p, alone = contexts[0].params, len(models) == 1
    noise, bits = ([context.streams.fresh(name) for context in contexts] for name in ("noise", "bits"))
    for model, generator in zip(models, noise, strict=True):
        model.initialise(train, generator)
    model = models[0] if alone else stacked(models)
    optimizer = CodeAdam(list(model.parameters()))
    optimizers = [optimizer] if alone else adams(models, optimizer)
    batches = train.split(p["batch_size"])
    # of every epoch: its stage's epochs and learning rate, and whether the stage ends with it
    stages = schedule(p["stages"], p["shortened"])
    plan = [(n, lr, i + 1 == n) for n, lr in stages for i in range(n)]
    states: list[State] = [
        {
            "model": one,
            "optimizer": adam,
            "noise": of_noise,
            "bits": of_bits,
            "total": torch.zeros((), device=train.device),
            "losses": [],
        }
        for one, adam, of_noise, of_bits in zip(models, optimizers, noise, bits, strict=True)
    ]

    def update(batch: Tensor, rate: Tensor | float) -> Tensor:
        """One step of Adam on a batch; its loss, or that of each model."""
        model.zero_grad(set_to_none=True)
        drawn = [binarise(batch, generator) for generator in bits] if dynamic else [batch] * len(models)
        loss = model.loss(drawn[0], noise[0]) if alone else model.loss(torch.stack(drawn), noise)
        loss.sum().backward()
        optimizer.step(rate)
        return loss.detach()

    repeated = Repeated(update, train.device, (*noise, *bits))
    # an epoch may take minutes, a batch does not
    for step in resumable_together("training", len(plan) * len(batches), states):
        epoch, i = divmod(step, len(batches))
        epochs, lr, last_of_stage = plan[epoch]
        rates = [adam.next_rate(lr) for adam in optimizers]
        losses = repeated(batches[i], rates[0])
        for state, loss in zip(states, losses.reshape(-1), strict=True):
            state["total"] += loss
            if last_of_stage and i + 1 == len(batches):
                state["losses"].append(float(state["total"]) / (epochs * len(train)))
                state["total"].zero_()
    return [state["losses"] for state in states]


def start(context: Context) -> tuple[ImportanceWeightedAutoencoder, Tensor, Tensor]:
    """An untrained model, training intensities or static bits, and test bits, all on the device."""
    p = context.params
    train, test = training_and_test(p["dynamic"])
    train, test = train[: p["rows"] or None].to(context.device), test[: p["rows"] or None].to(context.device)
    with context.streams.initialisation():
        model = ImportanceWeightedAutoencoder(
            train.shape[1], LATENTS[p["layers"]], HIDDEN[p["layers"]], p["draws"], p["weighted"], p["doubly"]
        )
    return model.to(context.device), train, test


def train_together(contexts: Sequence[Context]) -> None:
    """Several seeds of one cell, trained in common steps."""
    begun = [start(context) for context in contexts]
    fit([model for model, _, _ in begun], begun[0][1], contexts[0].params["dynamic"], contexts)


def train_and_score(context: Context) -> Outcome:
    """One cell of table 1: train, and bound -log p of the test bits with many importance samples."""
    p = context.params
    model, train, test = start(context)
    (losses,) = fit([model], train, p["dynamic"], [context])
    bound = iw_bound(model, test, p["samples"], context.streams.fresh("evaluation"))
    stages = list(itertools.accumulate(float(n) for n, _ in schedule(p["stages"], p["shortened"])))
    line = Line("training bound", stages, losses)
    plot = Plot("training", "mean training bound of each stage", "epochs", "nats", (line,), log_x=True)
    return Outcome(
        {"nll": -bound.mean(), "negative_elbo": -bound.details["elbo"], "ess": bound.details["ess"]},
        (plot,),
        examples={"mnist-dynamic" if p["dynamic"] else "mnist-static": bound},
    )


def cell(
    weighted: bool, draws: int, layers: int, dynamic: bool, shortened: int = 1, doubly: bool = False
) -> Experiment:
    """The experiment of one cell of the tables, with a `shortened` one for machines without a GPU."""
    kind, data = ("dreg" if doubly else "iwae") if weighted else "vae", "dynamic" if dynamic else "static"
    name = f"burda-{kind}-{layers}-k{draws}-{data}"
    words = "IWAE by doubly reparameterised gradients" if doubly else kind.upper()
    about = f"{words} with {layers} stochastic layer(s), k = {draws}, {data} bits of MNIST"
    epochs = sum(n for n, _ in schedule(STAGES, shortened))
    return Experiment(
        name if shortened == 1 else f"{name}-short",
        about if shortened == 1 else f"{about}, {epochs} of the paper's 3280 epochs",
        "vae",
        train_and_score,
        {
            "weighted": weighted,
            "doubly": doubly,
            "draws": draws,
            "layers": layers,
            "dynamic": dynamic,
            "stages": STAGES,
            "shortened": shortened,
            "batch_size": 20,
            "samples": 5000 if shortened == 1 else 500,
            "rows": 0,
        },
        seeds=3,
        profiles=("full",),
        files=FILES["mnist-dynamic" if dynamic else "mnist-static"],
        cuda_minutes=0 if shortened > 1 else GPU_MINUTES,
        together=train_together,
    )


_CELLS = ((True, 1), (False, 5), (False, 50), (True, 5), (True, 50))
EXPERIMENTS = (
    *(cell(weighted, draws, layers, True) for layers in (1, 2) for weighted, draws in _CELLS),
    *(cell(True, draws, 1, False) for draws in (1, 5, 50)),
    *(cell(True, draws, 1, True, doubly=True) for draws in (1, 5, 50)),
    *(cell(weighted, draws, 1, True, SHORTENED) for weighted, draws in ((True, 1), (False, 5), (True, 5))),
    cell(True, 5, 1, True, SHORTENED, doubly=True),
)

PAPER = Paper("burda", Path(__file__).with_suffix(".toml"), experiments=(BOUNDS, *EXPERIMENTS))
