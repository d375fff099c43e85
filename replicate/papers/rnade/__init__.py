"""Uria, Murray, Larochelle 2013: RNADE, the real-valued neural autoregressive density-estimator, 1306.0186.

Replicated: the mean test log-likelihood of a mixture of Gaussians and of an autoregressive density with mixtures of
Gaussians as conditionals, on red wine, white wine and Parkinsons by the paper's protocol (`replicate.tasks.tables`),
ten folds; and, in claims with ids DN-, that of the order-agnostic deep NADE of the same authors (1310.1757) there and
on the bits of mushrooms and dna. All are runs of registered models: gaussian-mixture, causal-conv (one order, as
RNADE), eonade and made (mean densities over many orders and over sets of masks), of which made validates best.

Deviations: copies of a row are in one fold. The folds are ours. causal-conv shares its weights by convolution, where
RNADE has one hidden layer of 50 units; both models choose their step on validation and are trained by Adam. The paper
prints log-likelihoods, the suite measures NLL.

Two experiments measure, with the best model, how far such likelihoods can be trusted:

- `rnade-copies`: the printed protocol's random cut, where copies of a test row may be trained on, against the cut of
  the task, which on Parkinsons (no copies) keeps a patient session's recordings, of one time and UPDRS score, together.
- `rnade-rounding`: wine's columns are rounded, so that spikes on the values that occur raise a likelihood at will.
  The same model, trained and scored on rows with uniform noise of one rounding step, bounds the log-probability of the
  rounded row from below and gains nothing from a spike. A column's step is the median gap of its distinct values.
"""

from replicate.experiments import ModelRuns, Paper
from replicate.papers.rnade.artefacts import COPIES, ROUNDING, TABLES

PAPER = Paper(
    "rnade",
    __file__,
    experiments=(*COPIES, *ROUNDING),
    model_runs={
        "full": (
            ModelRuns(("gaussian-mixture", "causal-conv", "eonade", "made"), TABLES, 10),
            ModelRuns(("eonade",), ("mushrooms", "dna"), 3),
            ModelRuns(("made",), ("mushrooms",), 3),
            ModelRuns(("causal-conv",), ("dna",), 3),
        )
    },
)
