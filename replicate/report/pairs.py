"""Models of one task side by side, paired by test example: the bootstrap over examples that a seed's interval lacks.

An interval over seeds says how far another training would move a model; it keeps the test set. The bootstrap here
draws test examples with replacement and keeps the trainings, and pairing by example removes what makes an image hard
for every model.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from replicate.model import flipped, kind_of_difference
from replicate.report.labels import symbol, task_key, with_interval
from replicate.report.records import RecordedRun
from replicate.report.text_table import TextTable
from replicate.runs.experiment import unpack_examples

RESAMPLES = 2000
#: resamples in memory at a time: their counts of examples are a matrix
CHUNK = 100
NAME = "paired-by-example"
HEADS = ("task", "model", "family", "NLL", "seeds", "examples", "minus the best", "minus the next better", "better on")


@dataclass(frozen=True)
class Scored:
    """A model's NLL of every test example of a task.

    Attributes:
        name: the model, or the experiment that trained it.
        nll: in nats (n,), the mean over seeds; over folds, their test parts one after the other.
        kind: of the NLL, the upper bound of a lower bound on log p.
    """

    name: str
    family: str
    nll: np.ndarray
    kind: str
    seeds: int


def scored(runs: Iterable[RecordedRun]) -> dict[str, list[Scored]]:
    """Return every model with its NLL of each test example by task, best first.

    Runs of one model on the same data are averaged, runs on different data (the folds of a cross-validation) put one
    after the other. Runs without likelihoods of examples are skipped.
    """
    found: dict[tuple[str, str], list[RecordedRun]] = {}
    for run in runs:
        for task in run.examples:
            found.setdefault((str(task), run.label), []).append(run)
    out: dict[str, list[Scored]] = {}
    for (task, name), seeds in found.items():
        seeds = sorted(seeds, key=lambda r: r.seed)
        packed = [r.examples[task] for r in seeds]
        values = [-unpack_examples(p) for p in packed]
        folds = len({r.spec["data_sha256"] for r in seeds}) > 1
        nll = np.concatenate(values) if folds else np.mean(values, axis=0)
        kinds = {flipped(str(p["kind"])) for p in packed}
        kind = kinds.pop() if len(kinds) == 1 else "estimate"
        out.setdefault(task, []).append(Scored(name, seeds[0].family, nll, kind, len(seeds)))
    return {task: sorted(out[task], key=lambda s: (float(s.nll.mean()), s.name)) for task in sorted(out, key=task_key)}


def resampled_means(values: np.ndarray, name: str) -> np.ndarray:
    """Return bootstrap means of columns, values (n, k) -> (RESAMPLES, k), with the same examples for every column.

    Args:
        name: of the task; it seeds the draws.
    """
    seed = int.from_bytes(hashlib.sha256(f"paired/{name}".encode()).digest()[:8], "big")
    generator, n = np.random.default_rng(seed), len(values)
    size = CHUNK if n <= 20_000 else CHUNK // 5  # 16 megabytes at the most
    draws = (generator.multinomial(n, np.full(n, 1 / n), size=size) for _ in range(RESAMPLES // size))
    return np.concatenate([counts @ values / n for counts in draws])


def _difference(a: Scored, b: Scored, means: np.ndarray) -> str:
    """Write a - b with its 95 % percentile interval, from the bootstrap means of the difference."""
    low, high = np.quantile(means, (0.025, 0.975))
    text = with_interval("{:.3f}".format, float((a.nll - b.nll).mean()), float(low), float(high))
    return f"{symbol(kind_of_difference(a.kind, b.kind))} {text}"


def _rows(task: str, models: Sequence[Scored]) -> Iterable[tuple[str, ...]]:
    sizes = [len(m.nll) for m in models]
    usual = max(set(sizes), key=lambda n: (sizes.count(n), n))  # a run on fewer examples cannot be paired
    models = [m for m in models if len(m.nll) == usual]
    stacked = np.stack([m.nll for m in models], axis=1)
    means = resampled_means(stacked, task)
    for i, model in enumerate(models):
        tail = ("", "", "")
        if i > 0:
            best, before = (_difference(model, models[k], means[:, i] - means[:, k]) for k in (0, i - 1))
            tail = (best, before, f"{float((model.nll < models[i - 1].nll).mean()):.0%}")
        head = (task, model.name, model.family, f"{symbol(model.kind)} {model.nll.mean():.3f}", str(model.seeds))
        yield (*head, str(usual), *tail)


def paired_table(runs: Iterable[RecordedRun]) -> list[TextTable]:
    """Make the table of every task that two models or more are scored on; none where there is no such task."""
    rows = [row for task, models in scored(runs).items() if len(models) > 1 for row in _rows(task, models)]
    caption = (
        "NLL in nats of every test example, averaged over seeds; models of a task in order of the mean. Differences "
        f"are paired by example, with a 95 % bootstrap interval over examples ({RESAMPLES} resamples); a difference of "
        "an upper bound and an exact number is known from one side alone, as its sign says. Better on: the share of "
        "examples on which the model is better than the next better one."
    )
    return [TextTable.of_text(NAME, "Models paired by test example", caption, HEADS, rows)] if rows else []
