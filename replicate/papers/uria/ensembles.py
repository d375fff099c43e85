"""Order-agnostic NADE: ensembles of orderings on static bits of MNIST."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.nade import OrderAgnosticNADE, log_mean_density
from replicate.experiments import Run
from replicate.experiments.image_rows import STATIC_BITS, RowSettings, full_row, trained
from replicate.model import Estimate, LogLikelihood
from replicate.resume import resumable
from replicate.tasks.images import mnist_static


@dataclass(frozen=True, kw_only=True)
class Settings(RowSettings):
    """Settings of order-agnostic NADE."""

    layers: int
    hidden: int = 500
    orderings: int = 128
    steps: int = 500_000
    warmup: int = 1000
    validate_every: int = 5000


@torch.no_grad()
def by_ordering(model: OrderAgnosticNADE, x: Tensor) -> Tensor:
    """Return log p(x) under each recorded ordering, (n, K)."""
    state: dict[str, Tensor] = {"log_p": x.new_zeros(len(x), len(model.orderings))}
    for k in resumable("orderings", len(model.orderings), state):
        state["log_p"][:, k] = model.log_prob_in(x, model.orderings[k])
    return state["log_p"]


def ensembles(log_p: Tensor) -> dict[int, Tensor]:
    """Return log p of ensembles of k = 1, 2, 4, .., K orderings by k, averaged over K / k of them, (n,) each.

    `log_p` (n, K) is that under each of the K orderings, K a power of two.
    """
    sizes = [2**i for i in range(int(math.log2(log_p.shape[1])) + 1)]
    return {k: log_mean_density(log_p.unflatten(1, (-1, k))).mean(1) for k in sizes}


def score_ensembles(run: Run, s: Settings) -> None:
    """Train on static bits and score the test bits exactly by ensembles of every size."""
    task = mnist_static()
    sizes = (s.hidden, s.layers, s.orderings)
    model, test, validation = trained(run, task, lambda: OrderAgnosticNADE(task.info, *sizes), s)
    found = ensembles(by_ordering(model, test))
    nll = {k: -Estimate.mean_of(log_p, "exact", "nats") for k, log_p in found.items()}
    run.measure_all({f"nll:{k}": e for k, e in nll.items()})
    curve = list(nll), [e.value for e in nll.values()]
    run.curves("orderings", "NLL of ensembles", ("orderings", "nats"), {f"{s.layers} hidden": curve}, log="x")
    run.plot(validation)
    run.keep_examples(STATIC_BITS, LogLikelihood(found[s.orderings], "exact"))


ABOUT = "order-agnostic NADE with {} hidden layer(s), ensembles of 1 to 128 orderings, on static bits"
DEPTHS = tuple(
    full_row(f"eonade-{layers}", minutes, ABOUT.format(layers), Settings(layers=layers))(score_ensembles)
    for layers, minutes in ((1, 12), (2, 15))
)
