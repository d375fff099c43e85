"""Salakhutdinov, Hinton 2009: Deep Boltzmann machines; the mixture-of-Bernoullis baselines of section 4.1.

Replicated: mixtures of K = 10, 100 and 500 Bernoullis fitted by EM to binarised MNIST, with exact test NLL. The model
is this suite's registered mixture-em.

Deviations: Larochelle's static bits instead of the authors' own binarisation, so the printed numbers are shown and not
judged, and the orderings in K are. EM starts from random training rows and has a weak Dirichlet prior shared out by the
training marginals; it takes a fixed number of steps. The authors' start and stop are not printed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from replicate.model import LogLikelihood
from replicate.registry import model_entry
from replicate.runs.experiment import Context, Experiment, Line, Outcome, Plot
from replicate.runs.paper import Paper
from replicate.tasks.images import FILES, mnist_static

COMPONENTS = (10, 100, 500)
#: rows scored at a time
CHUNK = 2000


@torch.no_grad()
def mixture_of_bernoullis(context: Context) -> Outcome:
    """Fit K Bernoullis by EM and score the test bits exactly."""
    p, task = context.params, mnist_static()
    train = task.train[: p["rows"] or None].to(context.device)
    test = task.test[: p["rows"] or None].to(context.device)
    settings = {name: p[name] for name in ("components", "strength", "iterations")}
    model = model_entry("mixture-em").build(task.info, **settings).to(context.device)
    model.initialise(train, context.streams.fresh("initialise"))
    log_p = torch.cat([model.log_prob(part) for part in test.split(CHUNK)])
    objective = (-torch.as_tensor(model.objective)).tolist()
    line = Line(f"K = {p['components']}", list(range(1, len(objective) + 1)), objective)
    plot = Plot("em", "what EM minimises, a training example", "EM step", "nats", (line,), log_x=True)
    exact = LogLikelihood(log_p, "exact")
    return Outcome({"nll": -exact.mean()}, (plot,), examples={task.name: exact})


def mixture(components: int) -> Experiment:
    """The experiment of one K."""
    return Experiment(
        f"mixture-k{components}",
        f"mixture of {components} Bernoullis by EM on static bits",
        "reference",
        mixture_of_bernoullis,
        {"components": components, "strength": 2.0, "iterations": 200, "rows": 0},
        seeds=3,
        profiles=("full",),
        files=FILES["mnist-static"],
    )


PAPER = Paper("mixture", Path(__file__).with_suffix(".toml"), experiments=tuple(mixture(k) for k in COMPONENTS))
