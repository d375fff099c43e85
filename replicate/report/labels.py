"""Names, units, colours and number formats of the report, in one place, and the escapes of its three languages."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from replicate.model import FAMILIES, SYMBOLS


@dataclass(frozen=True)
class MetricInfo:
    """How the report shows a metric, and what kind of metric it is.

    Attributes:
        label: head of its columns.
        note: what it means, in one sentence.
        unit: in full words; "" where the number has none.
        decimals: digits after the point; None for three significant digits.
        better: the good direction, None where there is none.
        cost: it measures what a model costs, not how good it is.
        timing: it measures time or memory of the machine, so that a second run does not repeat its bits.
        likelihood: an estimate of it ("~") may flatter, so that it never counts as the best of a column.
    """

    label: str
    note: str = ""
    unit: str = ""
    decimals: int | None = None
    better: Literal["lower", "higher"] | None = None
    cost: bool = False
    timing: bool = False
    likelihood: bool = False


_likelihood = partial(MetricInfo, better="lower", likelihood=True)
_distance = partial(MetricInfo, decimals=3, better="lower")
_share = partial(MetricInfo, decimals=3, better="higher")
_cost = partial(MetricInfo, cost=True)
_timing = partial(MetricInfo, cost=True, timing=True)
#: every metric of the suite in the order of the report; all others follow by name
METRICS: dict[str, MetricInfo] = {
    "nll": _likelihood("NLL", "Mean negative log-likelihood of the test split.", "nats", 2),
    "bits_per_dim": _likelihood("bits/dim", "NLL divided by the number of dimensions and by ln 2.", "bits/dim", 3),
    "kl": _likelihood(
        "KL(truth || model)", "Mean of log p(x) - log q(x) over test points of the truth p; 0 is perfect.", "nats", 4
    ),
    "fisher_divergence": MetricInfo(
        "Fisher divergence",
        "Mean squared distance between the model's score and the truth's at test points.",
        better="lower",
    ),
    "w2": _distance(
        "2-Wasserstein", "2-Wasserstein distance between samples and test points, by exact optimal transport."
    ),
    "mmd": MetricInfo("MMD", "Maximum mean discrepancy between samples and test points.", better="lower"),
    "mode_weight_error": _distance(
        "mode weight error", "Distance between the share of samples in each mode and the mode's true probability."
    ),
    "c2st": _distance("C2ST accuracy", "Accuracy of a classifier that tells samples from test data; 0.5 is perfect."),
    "frechet": MetricInfo(
        "Fréchet",
        "Fréchet distance between samples and test data in the features of a small classifier.",
        "",
        2,
        "lower",
    ),
    "precision": _share("precision", "Share of samples that fall among test data in feature space."),
    "recall": _share("recall", "Share of test data that fall among samples in feature space."),
    "density": _share("density", "How densely test data surround the samples in feature space; about 1 is perfect."),
    "coverage": _share("coverage", "Share of test data with a sample in their neighbourhood in feature space."),
    "parameters": _cost("parameters", "Trainable numbers.", "", 0),
    "train_seconds": _timing("training", "Wall time of training.", "seconds", 1, "lower"),
    "sample_ms": _timing(
        "one sample", "Wall time of sampling a batch, divided by its size.", "milliseconds", better="lower"
    ),
    "nfe": _cost("network evaluations", "Network evaluations one after the other for one batch of samples.", "", 0),
    "peak_memory_mb": _timing(
        "peak memory", "Peak memory of the process, libraries included; of the device on a GPU.", "megabytes", 0
    ),
    "evaluate_seconds": _timing("evaluation", "Wall time of all measurements together.", "seconds", 1),
}
#: metrics that a second run on the same machine does not repeat to the bit: time and memory
TIMING_METRICS = frozenset(name for name, info in METRICS.items() if info.timing)

FAMILY_LABELS: dict[str, str] = {
    "autoregressive": "autoregressive",
    "flow": "normalizing flow",
    "vae": "VAE / IWAE",
    "ebm": "energy-based (CD)",
    "score": "score-based",
    "reference": "reference",
}
#: Okabe and Ito's colours, distinct with any common colour blindness and in grey
FAMILY_COLOURS: dict[str, str] = {
    "autoregressive": "#0072B2",
    "flow": "#009E73",
    "vae": "#E69F00",
    "ebm": "#D55E00",
    "score": "#CC79A7",
    "reference": "#5F6670",
}
SAMPLERS: dict[str, str] = {
    "": "own",
    "ula": "ULA",
    "mala": "MALA",
    "annealed": "annealed Langevin",
    "annealed-no-denoise": "annealed, last step not denoised",
    "pc": "predictor-corrector",
    "ode": "probability flow",
}


def is_timing(metric: str) -> bool:
    """Return whether a metric measures time or memory of the machine: by its name, as experiments write `time_...`."""
    return metric_info(metric).timing or metric.startswith("time_")


def base_metric(metric: str) -> str:
    """Return the metric without its variant: "w2:ula" -> "w2"."""
    return metric.partition(":")[0]


def sampler_of(metric: str) -> str:
    """Return the variant of a metric, "w2:ula" -> "ula"; "" for the model's own sampler."""
    return metric.partition(":")[2]


def metric_info(metric: str) -> MetricInfo:
    """Return how the report shows a metric; one that the suite does not know appears under its own name."""
    base = base_metric(metric)
    return METRICS.get(base, MetricInfo(base.replace("_", " ")))


def metric_key(metric: str) -> tuple[int, str]:
    """Return the key that sorts metrics into the order of METRICS, unknown ones last by name."""
    base = base_metric(metric)
    return (list(METRICS).index(base) if base in METRICS else len(METRICS), metric)


def family_key(family: str) -> tuple[int, str]:
    """Return the key that sorts families into the order of the contract, unknown ones last by name."""
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)


def task_key(task: str) -> tuple[str, int, str]:
    """Return the key that sorts tasks by name, numbers within names by value (mixture-8 before mixture-32)."""
    match = re.search(r"\d+", task)
    return (re.sub(r"\d+", "", task), int(match.group()) if match else -1, task)


def decimals_for(metric: str, values: Iterable[float]) -> int:
    """Return the digits after the point that all numbers of one cell share."""
    fixed = metric_info(metric).decimals
    if fixed is not None:
        return fixed
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return 3 if largest == 0 else min(7, max(0, 2 - math.floor(math.log10(largest))))


def fixed(value: float, decimals: int) -> str:
    """Write a number with fixed decimals: no minus before zeros, thousands grouped from 100,000 on."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    text = f"{value:,.{decimals}f}" if abs(value) >= 1e5 else f"{value:.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


def significant(value: float, digits: int = 4) -> str:
    """Write a number with so many significant digits; "" for nan."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def with_interval(write: Callable[[float], str], mean: float, low: float, high: float) -> str:
    """Write a number and its interval, "1.2 [1.1, 1.3]"; the number alone where an end is not finite."""
    return write(mean) + (f" [{write(low)}, {write(high)}]" if math.isfinite(low) and math.isfinite(high) else "")


def symbol(kind: str) -> str:
    """Return the sign of a kind; "?" for one that the contract does not know."""
    return SYMBOLS.get(kind, "?")


def short(run_id: str) -> str:
    """Return the first eight digits of a run id, enough to find its folder."""
    return run_id[:8]


def slug(name: str) -> str:
    """Return a file name for a task or model; different names never share one."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return plain if plain == name else f"{plain or 'x'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


_LATEX = {
    **{c: f"\\{c}" for c in "{}$&#%_"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", '"': r"\textquotedbl{}", "\n": " ", "\r": " "},
}
#: the signs of kinds as LaTeX
LATEX_SYMBOLS = {"=": "$=$", ">=": r"$\geq$", "<=": r"$\leq$", "~": r"$\sim$", "?": "?"}


def latex(text: str) -> str:
    """Escape plain text for LaTeX's text mode."""
    head = "{}" if text[:1] in ("[", "*") else ""  # else the line break before it would take it for its option
    return head + "".join(_LATEX.get(c, c) for c in text)


def markdown(text: str) -> str:
    """Escape plain text for a Markdown table cell: neither mark-up, nor HTML, nor a new cell or line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
    return " ".join(text.split())
