# ruff: noqa: F401 - the names below are imported for type checkers and editors
"""Scoreboard: every family of generative model p(x) = exp(-f(x)) / Z through one protocol.

The names of `__all__` are the front door: `from replicate import ula`. Each is imported when it is first used, so that
`import replicate` loads neither torch nor pandas.

Example:
    >>> import torch
    >>> from replicate import ula, w2
    >>> g = torch.Generator().manual_seed(0)
    >>> chain = ula(lambda x: -x, torch.zeros(500, 1), 100, 0.1, g)
    >>> w2(chain.samples, torch.randn(500, 1, generator=g)).value < 0.3
    True
"""

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("scoreboard-replicate")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+source"

if TYPE_CHECKING:
    from replicate.energies.model import build_objective
    from replicate.energies.objectives import (
        ConditionalNoiseContrastive,
        ContrastiveDivergence,
        DenoisingScoreMatching,
        ImplicitScoreMatching,
        MaximumLikelihood,
        MinimumKSD,
        NoiseContrastive,
        PersistentCD,
        ShortRun,
        SlicedScoreMatching,
    )
    from replicate.fitting import Check, Fit, fit
    from replicate.likelihood.ais import ais, bracket, reverse_ais, schedule
    from replicate.likelihood.enumeration import enumerate_log_z, rbm_log_z
    from replicate.likelihood.estimator import Effort, log_likelihood
    from replicate.likelihood.importance import elbo, iw_bound
    from replicate.likelihood.ode import ode_log_prob
    from replicate.likelihood.quadrature import log_z
    from replicate.metrics.autocorrelation import autocorrelation_time
    from replicate.metrics.classifier import c2st
    from replicate.metrics.divergences import fisher_divergence, kl
    from replicate.metrics.quality import frechet, precision_recall_density_coverage
    from replicate.metrics.samples import mmd, mode_weight_error, w2
    from replicate.model import DataInfo, Estimate, LogLikelihood, Model, ModelEntry, Training
    from replicate.registry import model_entry, models
    from replicate.runs.experiment import Run, experiment
    from replicate.runs.seeds import Streams
    from replicate.runs.spec import make_spec
    from replicate.runs.subjects import train_model
    from replicate.runs.training import train
    from replicate.sampling.annealed import annealed_langevin
    from replicate.sampling.langevin import mala, ula
    from replicate.sampling.predictor_corrector import Corrector, predictor_corrector, reverse_sde
    from replicate.sampling.probability_flow import probability_flow
    from replicate.sampling.tempering import Rounds, parallel_tempering
    from replicate.score_based.bound import variational_bound
    from replicate.score_based.contrastive import noise_contrastive
    from replicate.score_based.matching import (
        denoising_score_matching,
        explicit_score_matching,
        implicit_score_matching,
        sliced_score_matching,
        sliced_score_matching_vr,
        tweedie,
    )
    from replicate.sde import SDE, VE, VP, SubVP
    from replicate.tasks.loading import load_task


@cache
def _homes() -> dict[str, str]:
    """Return the module of each public name, read from the imports above, which only type checkers run."""
    import ast  # most programs need it only once a public name is asked for

    with open(__file__, encoding="utf-8") as source:
        blocks = (node for node in ast.parse(source.read()).body if isinstance(node, ast.If))
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name == "__all__":
        return sorted(_homes())
    if name.startswith("__") or name not in _homes():
        raise AttributeError(f"module 'replicate' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_homes()[name]), name)
    return value


def __dir__() -> list[str]:
    """Return all names, loaded or not."""
    return sorted({*globals(), *_homes()})
