"""Uria, Murray and Larochelle 2014: A Deep and Tractable Density Estimator, 1310.1757.

Replicated: test NLL on static bits of MNIST of order-agnostic NADE with one and two hidden layers of 500 units, by the
number of orderings whose densities are averaged.

Each depth is one trained model with 128 recorded random orderings. "nll:k" is the NLL of an ensemble of k of them,
averaged over the 128 / k ensembles into which the 128 are cut. Each ensemble is one normalised distribution, so that
every number is exact. As pairs of ensembles make the next larger ones, nll:2k <= nll:k holds by the concavity of the
logarithm, whatever was learned; by how much is what was measured.

Deviations: Adam and a cosine schedule from He's start, without pretraining; the released code
(github.com/MarcCote/NADE) has momentum 0.9, a linear schedule from 1e-3, a start of N(0, 0.01^2) and layer-wise
pretraining. Batches of 100 and 500 rectified units are those of the code's example on these bits; that it is the
paper's own setting, and how many steps the paper took, could not be checked against a text: the steps are ours. The
split points of a batch are spread evenly, no probability is clamped (the code keeps them between 5e-5 and 1 - 5e-5),
and the best of the validated steps is kept, by an ensemble of eight orderings.

The code's own sampler of bits adds each new bit to the activations before it has drawn it, when it is still zero: no
later bit depends on it. Samples here are tested against enumeration.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.nade import OrderAgnosticNADE, log_mean_density
from replicate.experiments.image_rows import STATIC_BITS, splits, training, validation_plot
from replicate.model import Estimate, LogLikelihood
from replicate.resume import State, resumable
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.runs.training import train
from replicate.tasks.images import FILES, mnist_static


@torch.no_grad()
def by_ordering(model: OrderAgnosticNADE, x: Tensor) -> Tensor:
    """log p(x) under each recorded ordering, (n, K)."""
    state: State = {"log_p": x.new_zeros(len(x), len(model.orderings))}
    for k in resumable("orderings", len(model.orderings), state):
        state["log_p"][:, k] = model.log_prob_in(x, model.orderings[k])
    log_p: Tensor = state["log_p"]
    return log_p


def ensembles(log_p: Tensor) -> dict[int, Tensor]:
    """By k = 1, 2, 4, .., K: log p of ensembles of k orderings, averaged over K / k of them; (n, K) -> (n,) each.

    Args:
        log_p: under each of K orderings, K a power of two.
    """
    sizes = [2**i for i in range(int(math.log2(log_p.shape[1])) + 1)]
    return {k: log_mean_density(log_p.unflatten(1, (-1, k))).mean(1) for k in sizes}


def train_and_score(context: Context) -> Outcome:
    """Train on static bits and score the test bits exactly by ensembles of every size."""
    p, (fit, valid, test) = context.params, splits(context)
    with context.streams.initialisation():
        model = OrderAgnosticNADE(mnist_static().info, p["hidden"], p["layers"], p["orderings"])
    model = model.to(context.device)
    history = train(model, fit, valid, training(p), context.streams)
    found = ensembles(by_ordering(model, test))
    nll = {k: -Estimate.mean_of(log_p, "exact", "nats") for k, log_p in found.items()}
    line = Line(f"{p['layers']} hidden", list(nll), [e.value for e in nll.values()])
    plot = Plot("orderings", "NLL of ensembles", "orderings", "nats", (line,), log_x=True)
    whole = LogLikelihood(found[p["orderings"]], "exact")
    return Outcome(
        {f"nll:{k}": e for k, e in nll.items()}, (plot, validation_plot(history.valid)), examples={STATIC_BITS: whole}
    )


_SETTINGS: dict[str, Any] = {
    "hidden": 500,
    "orderings": 128,
    "steps": 500_000,
    "batch_size": 100,
    "lr": 1e-3,
    "warmup": 1000,
    "validate_every": 5000,
    "rows": 0,
}
DEPTHS = tuple(
    Experiment(
        f"eonade-{layers}",
        f"order-agnostic NADE with {layers} hidden layer(s), ensembles of 1 to 128 orderings, on static bits",
        "autoregressive",
        train_and_score,
        {**_SETTINGS, "layers": layers},
        seeds=3,
        profiles=("full",),
        files=FILES[STATIC_BITS],
        cuda_minutes=minutes,
    )
    for layers, minutes in ((1, 12), (2, 15))
)

PAPER = Paper("uria", Path(__file__).with_suffix(".toml"), experiments=DEPTHS)
