"""Mixtures of Bernoullis, fitted by EM to static bits of MNIST."""

from __future__ import annotations

import torch

from replicate.experiments import Run, experiment
from replicate.experiments.image_rows import STATIC_BITS, exact_nll, splits
from replicate.registry import model_entry
from replicate.tasks.images import FILES, mnist_static

#: rows scored at a time
CHUNK = 2000


@torch.no_grad()
def mixture_of_bernoullis(
    run: Run, *, components: int, strength: float = 2.0, iterations: int = 200, rows: int = 0
) -> None:
    """Fit K Bernoullis by EM and score the test bits exactly."""
    task = mnist_static()
    train, _, test = splits(task, rows, run.device)
    entry = model_entry("mixture-em")
    model = entry.build(task.info, components=components, strength=strength, iterations=iterations).to(run.device)
    model.initialise(train, run.stream("initialise"))
    exact_nll(run, model, test, CHUNK)
    objective = (-torch.as_tensor(model.objective)).tolist()
    curve = range(1, len(objective) + 1), objective
    run.curves(
        "em", "what EM minimises, a training example", ("EM step", "nats"), {f"K = {components}": curve}, log="x"
    )


MIXTURES = tuple(
    experiment(
        f"mixture-k{components}",
        about=f"mixture of {components} Bernoullis by EM on static bits",
        family="reference",
        settings={"components": components},
        seeds=3,
        profiles=("full",),
        files=FILES[STATIC_BITS],
    )(mixture_of_bernoullis)
    for components in (10, 100, 500)
)
