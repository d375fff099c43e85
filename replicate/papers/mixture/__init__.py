"""Salakhutdinov, Hinton 2009: Deep Boltzmann machines; the mixture-of-Bernoullis baselines of section 4.1.

Replicated: mixtures of K = 10, 100 and 500 Bernoullis fitted by EM to binarised MNIST, with exact test NLL. The model
is this suite's registered mixture-em.

Deviations: Larochelle's static bits instead of the authors' own binarisation, so the printed numbers are shown and not
judged; the orderings in K are judged. EM starts from random training rows and has a weak Dirichlet prior shared out by
the training marginals; it takes a fixed number of steps. The authors' start and stop are not printed.
"""

import torch

from replicate.experiments import Paper, Run
from replicate.experiments.image_rows import exact_nll, full_row, splits
from replicate.registry import model_entry
from replicate.tasks.images import mnist_static

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
    curves = {f"K = {components}": (range(1, len(objective) + 1), objective)}
    run.curves("em", "what EM minimises, a training example", ("EM step", "nats"), curves, log="x")


MIXTURES = tuple(
    full_row(f"mixture-k{k}", 0, f"mixture of {k} Bernoullis by EM on static bits", {"components": k}, "reference")(
        mixture_of_bernoullis
    )
    for k in (10, 100, 500)
)
PAPER = Paper("mixture", __file__, experiments=MIXTURES)
