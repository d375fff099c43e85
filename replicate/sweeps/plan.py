"""The plan of a sweep as a value: which runs a profile has, which this call computes, and which this machine cannot.

A profile has the runs of the comparison (`replicate.sweeps.comparison`), the papers' experiments, and runs of
registered models that claims measure.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from replicate.runs.paper import papers
from replicate.runs.spec import AnySpec, experiment_spec, make_spec
from replicate.sweeps.comparison import absent_tasks, compared_runs
from replicate.tasks.loading import task_entry


@dataclass(frozen=True)
class Skipped:
    """An experiment, or a task of the comparison, that a profile has and this machine cannot run."""

    name: str
    reason: str


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep.

    Attributes:
        profile: smoke, standard or full.
        specs: the runs to compute, in a fixed order.
        others: runs of the profile that this call does not compute; the report lists those that have a record.
        skipped: what this machine cannot run.
        adds: the computed runs are added to the results, which keep all that they have.
        reused: how many runs of the profile the results have already.
    """

    profile: str
    specs: tuple[AnySpec, ...]
    others: tuple[AnySpec, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    adds: bool = False
    reused: int = 0

    @property
    def run_ids(self) -> list[str]:
        """The ids of all runs of the profile."""
        return [spec.run_id() for spec in (*self.specs, *self.others)]


def make_plan(
    profile: str,
    device: str = "cpu",
    seeds: int | None = None,
    cuda_rows: bool = False,
    have: Collection[str] | None = None,
) -> SweepPlan:
    """Plan a sweep of a profile.

    Args:
        profile: smoke, standard or full.
        device: the kind of device, "cpu" or "cuda".
        seeds: overrides the number of seeds wherever there is more than one.
        cuda_rows: compute only the runs that need a CUDA device.
        have: ids of runs that the results have and that are reused; None computes all runs.

    Raises:
        UsageError: no such profile.
    """
    if cuda_rows:
        (specs, skipped), (others, _) = cuda_plan(profile, seeds), whole_plan(profile, "cpu", seeds)
    else:
        specs, skipped = whole_plan(profile, device, seeds)
        others = cuda_plan(profile, seeds)[0] if device == "cpu" else []
    if have is None:
        return SweepPlan(profile, tuple(specs), tuple(others), tuple(skipped))
    done = [s for s in specs if s.run_id() in have]
    missing = tuple(s for s in specs if s.run_id() not in have)
    return SweepPlan(profile, missing, (*others, *done), tuple(skipped), adds=True, reused=len(done))


def whole_plan(profile: str, device: str = "cpu", seeds: int | None = None) -> tuple[list[AnySpec], list[Skipped]]:
    """Return every run of a profile once, and what this machine cannot run; raises UsageError as `make_plan`."""
    compared = compared_runs(profile, device, seeds)
    claimed, skipped = ledger_plan(profile, device, seeds)
    skipped += (Skipped(name, why) for name, why in absent_tasks(profile).items())
    return list({spec.run_id(): spec for spec in [*compared, *claimed]}.values()), skipped


def ledger_plan(
    profile: str, device: str = "cpu", seeds: int | None = None, cuda_only: bool = False
) -> tuple[list[AnySpec], list[Skipped]]:
    """Return every run that the papers' claims need at a profile, in a fixed order, and what cannot run here.

    Args:
        cuda_only: leave out whatever does not need a CUDA device.
    """
    specs: list[AnySpec] = []
    skipped: list[Skipped] = []
    for key in sorted(papers()):
        for e in papers()[key].experiments:
            if profile not in e.profiles or (cuda_only and not e.cuda_minutes):
                continue
            if why := e.absent(device):
                skipped.append(Skipped(e.name, why))
                continue
            count = e.seeds if e.seeds == 1 or not seeds else seeds
            specs += (experiment_spec(key, e, s, profile, device) for s in range(count))
        if not cuda_only:
            specs += _model_specs(key, profile, device, seeds)
    return specs, skipped


def cuda_plan(profile: str, seeds: int | None = None) -> tuple[list[AnySpec], list[Skipped]]:
    """Return the runs of a profile that need a CUDA device, and what of them cannot run for lack of data."""
    return ledger_plan(profile, "cuda", seeds, cuda_only=True)


def _model_specs(key: str, profile: str, device: str, seeds: int | None) -> Iterator[AnySpec]:
    for part in papers()[key].model_runs.get(profile, ()):
        for task in part.tasks:
            if task_entry(task).absent():
                continue
            for model in part.models:
                for seed in range(seeds or part.seeds):
                    yield make_spec(model, task, seed, profile, device)
