"""What the ledger asks of a profile: the papers' experiments, and runs of registered models that claims measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from replicate.runs.experiment import Experiment
from replicate.runs.paper import papers
from replicate.runs.spec import AnySpec, experiment_spec, make_spec
from replicate.sweeps.comparison import absent_tasks, plan
from replicate.tasks.loading import task_entry


@dataclass(frozen=True)
class Skipped:
    """An experiment, or a task of the comparison, that a profile has and this machine cannot run."""

    name: str
    reason: str


def ledger_plan(profile: str, device: str = "cpu", seeds: int | None = None) -> tuple[list[AnySpec], list[Skipped]]:
    """Every spec that the papers' claims need at a profile, in a fixed order, and what cannot run for lack of data.

    Args:
        seeds: overrides the number of seeds wherever there is more than one.
    """
    specs: list[AnySpec] = []
    skipped: list[Skipped] = []
    for key in sorted(papers()):
        for experiment in papers()[key].experiments:
            if profile not in experiment.profiles:
                continue
            absent = experiment.absent(device)
            if absent:
                skipped.append(Skipped(experiment.name, absent))
                continue
            specs += (experiment_spec(key, experiment, s, profile, device) for s in _seeds(experiment, seeds))
        specs += _model_specs(key, profile, device, seeds)
    return specs, skipped


def cuda_plan(profile: str, seeds: int | None = None) -> tuple[list[AnySpec], list[Skipped]]:
    """What of a profile needs a CUDA device, and so is in no plan for a CPU.

    Args:
        seeds: as in `ledger_plan`.
    """
    specs: list[AnySpec] = []
    skipped: list[Skipped] = []
    for key in sorted(papers()):
        for experiment in papers()[key].experiments:
            if profile not in experiment.profiles or not experiment.cuda_minutes:
                continue
            if absent := experiment.absent("cuda"):
                skipped.append(Skipped(experiment.name, absent))
            else:
                specs += (experiment_spec(key, experiment, s, profile, "cuda") for s in _seeds(experiment, seeds))
    return specs, skipped


def whole_plan(profile: str, device: str = "cpu", seeds: int | None = None) -> tuple[list[AnySpec], list[Skipped]]:
    """The comparison and the ledger of a profile together; runs that both ask for stand there once.

    Raises:
        UsageError: no such profile.
    """
    compared = plan(profile, device, seeds)
    asked, skipped = ledger_plan(profile, device, seeds)
    skipped += (Skipped(name, why) for name, why in absent_tasks(profile).items())
    return list({spec.run_id(): spec for spec in [*compared, *asked]}.values()), skipped


def _seeds(experiment: Experiment, override: int | None) -> range:
    return range(experiment.seeds if experiment.seeds == 1 or not override else override)


def _model_specs(key: str, profile: str, device: str, seeds: int | None) -> Iterator[AnySpec]:
    for part in papers()[key].model_runs.get(profile, ()):
        for task in part.tasks:
            if task_entry(task).absent():
                continue
            for model in part.models:
                for seed in range(seeds or part.seeds):
                    yield make_spec(model, task, seed, profile, device)
