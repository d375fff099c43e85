"""A paper as the suite runs it: experiments as functions, claims as a file, and the runs that both need."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from replicate.registry import MODELS, EntryPoints, unknown
from replicate.runs.experiment import Experiment
from replicate.tasks.loading import TASKS


@dataclass(frozen=True)
class ModelRuns:
    """Registered models that a claim measures on a task of the comparison.

    Attributes:
        models, tasks: names; every model runs on every task.
        seeds: how many.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Paper:
    """One paper: the object that an entry point in `replicate.papers` names.

    Attributes:
        key: short name, that of its folder.
        claims_file: TOML file with its claims (`replicate.ledger.claims`), or the `__file__` of the module beside which
            they are in claims.toml.
        experiments: what its claims measure.
        model_runs: by profile, runs of registered models that its claims measure.
    """

    key: str
    claims_file: Path | str
    experiments: tuple[Experiment, ...] = ()
    model_runs: Mapping[str, tuple[ModelRuns, ...]] = field(default_factory=dict)

    @property
    def claims_path(self) -> Path:
        """The file with its claims."""
        path = Path(self.claims_file)
        return path.with_name("claims.toml") if path.suffix == ".py" else path


PAPERS: EntryPoints[Paper] = EntryPoints(
    "replicate.papers", "paper", "replicate.runs.paper:Paper", "`replicate claims` shows all."
)


def papers() -> dict[str, Paper]:
    """Return every paper that could be imported, by its key."""
    return PAPERS.found


def broken_entries() -> dict[str, str]:
    """Return the reason for each model, task and paper that cannot be used, by name."""
    return {**MODELS.broken, **TASKS.broken, **PAPERS.broken}


def find_experiment(paper: str, name: str) -> Experiment:
    """Return an experiment of a paper.

    Raises:
        UsageError: no such paper or experiment, or the paper cannot be imported.
    """
    found = {e.name: e for e in PAPERS.get(paper).experiments}
    if name not in found:
        raise unknown("experiment", name, found, f"{paper} has {', '.join(sorted(found)) or 'none'}.")
    return found[name]
