"""Names, units, colours and number formats of the report, in one place, and the escapes of its three languages."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from replicate.model import FAMILIES, SYMBOLS

#: metrics that a second run on the same machine does not repeat to the bit: time and memory
TIMING_METRICS = frozenset({"train_seconds", "sample_ms", "peak_memory_mb", "evaluate_seconds"})


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown.

    Attributes:
        label: in a table's head.
        unit: in full words; "" where the number has none.
        decimals: digits after the point; None for three significant digits.
        better: which way is good, or None where neither is.
    """

    label: str
    unit: str = ""
    decimals: int | None = None
    better: Literal["lower", "higher"] | None = None


METRICS: dict[str, MetricInfo] = {
    "nll": MetricInfo("NLL", "nats", 2, "lower"),
    "bits_per_dim": MetricInfo("bits/dim", "bits/dim", 3, "lower"),
    "kl": MetricInfo("KL(truth || model)", "nats", 4, "lower"),
    "fisher_divergence": MetricInfo("Fisher divergence", "", None, "lower"),
    "w2": MetricInfo("2-Wasserstein", "", 3, "lower"),
    "mmd": MetricInfo("MMD", "", None, "lower"),
    "mode_weight_error": MetricInfo("mode weight error", "", 3, "lower"),
    "c2st": MetricInfo("C2ST accuracy", "", 3, "lower"),
    "frechet": MetricInfo("Fréchet", "", 2, "lower"),
    "precision": MetricInfo("precision", "", 3, "higher"),
    "recall": MetricInfo("recall", "", 3, "higher"),
    "density": MetricInfo("density", "", 3, "higher"),
    "coverage": MetricInfo("coverage", "", 3, "higher"),
    "parameters": MetricInfo("parameters", "", 0),
    "train_seconds": MetricInfo("training", "seconds", 1, "lower"),
    "sample_ms": MetricInfo("one sample", "milliseconds", None, "lower"),
    "nfe": MetricInfo("network evaluations", "", 0),
    "peak_memory_mb": MetricInfo("peak memory", "megabytes", 0),
    "evaluate_seconds": MetricInfo("evaluation", "seconds", 1),
}
#: the order in which metrics stand; the rest follow by name
METRIC_ORDER = tuple(METRICS)
#: metrics of cost; the rest are of quality
COST_METRICS = ("parameters", "train_seconds", "sample_ms", "nfe", "peak_memory_mb", "evaluate_seconds")
#: metrics for which a number of unknown side ("~") may flatter, so that it never counts as a column's best
LIKELIHOODS = ("nll", "bits_per_dim", "kl")

FAMILY_LABELS: dict[str, str] = {
    "autoregressive": "autoregressive",
    "flow": "normalizing flow",
    "vae": "VAE / IWAE",
    "ebm": "energy-based (CD)",
    "score": "score-based",
    "reference": "reference",
}
#: Okabe and Ito's colours, told apart with any common colour blindness and in grey
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
    """Whether a metric measures time or memory of the machine; by its name: experiments write `time_...`."""
    base = base_metric(metric)
    return base in TIMING_METRICS or base.startswith("time_")


def base_metric(metric: str) -> str:
    """ "w2:ula" -> "w2"."""
    return metric.partition(":")[0]


def sampler_of(metric: str) -> str:
    """ "w2:ula" -> "ula"; "" for the model's own sampler."""
    return metric.partition(":")[2]


def metric_info(metric: str) -> MetricInfo:
    """How a metric is shown; one that the suite does not know is shown under its own name."""
    base = base_metric(metric)
    return METRICS.get(base, MetricInfo(base.replace("_", " ")))


def metric_key(metric: str) -> tuple[int, str]:
    """Sorts metrics into the order of METRICS, unknown ones last by name."""
    base = base_metric(metric)
    return (METRIC_ORDER.index(base) if base in METRICS else len(METRIC_ORDER), metric)


def family_key(family: str) -> tuple[int, str]:
    """Sorts families into the order of the contract, unknown ones last by name."""
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)


def task_key(task: str) -> tuple[str, int, str]:
    """Sorts tasks by name, numbers within names by value (mixture-8 before mixture-32)."""
    match = re.search(r"\d+", task)
    return (re.sub(r"\d+", "", task), int(match.group()) if match else -1, task)


def decimals_for(metric: str, values: Iterable[float]) -> int:
    """Digits after the point that all numbers of one cell share."""
    fixed = metric_info(metric).decimals
    if fixed is not None:
        return fixed
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return 3 if largest == 0 else min(7, max(0, 2 - math.floor(math.log10(largest))))


def fixed(value: float, decimals: int) -> str:
    """A number with fixed decimals; a minus before zeros is dropped, numbers from 100,000 on are grouped."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    text = f"{value:,.{decimals}f}" if abs(value) >= 1e5 else f"{value:.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text


def significant(value: float, digits: int = 4) -> str:
    """A number with that many significant digits, for the CSV beside a figure; "" for nan."""
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def symbol(kind: str) -> str:
    """The sign of a kind; "?" for one that the contract does not know."""
    return SYMBOLS.get(kind, "?")


def short(run_id: str) -> str:
    """The first eight digits of a run id, enough to find its folder."""
    return run_id[:8]


def slug(name: str) -> str:
    """A file name for any task or model name; different names never share one."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return plain if plain == name else f"{plain or 'x'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\n": " ",
    "\r": " ",
}
_LATEX_SYMBOLS = {"=": "$=$", ">=": r"$\geq$", "<=": r"$\leq$", "~": r"$\sim$", "?": "?"}


def latex(text: str) -> str:
    """Plain text as LaTeX text mode."""
    head = "{}" if text[:1] in ("[", "*") else ""  # else the line break before it would take it for its option
    return head + "".join(_LATEX.get(c, c) for c in text)


def latex_symbol(sign: str) -> str:
    """A kind's sign as LaTeX."""
    return _LATEX_SYMBOLS[sign]


def markdown(text: str) -> str:
    """Plain text inside a Markdown table cell: neither mark-up, nor HTML, nor a new cell or line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
    return " ".join(text.split())
