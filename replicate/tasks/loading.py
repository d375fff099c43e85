"""Load a task's data by its name, once per process and fold."""

from functools import cache

from replicate.errors import Exited, UsageError
from replicate.model import ModelEntry
from replicate.process_state import contained
from replicate.registry import EntryPoints
from replicate.tasks.base import Task, TaskEntry
from replicate.tasks.checks import check_task

TASKS: EntryPoints[TaskEntry] = EntryPoints("replicate.tasks", "task", "replicate.tasks.base:TaskEntry")


def tasks() -> dict[str, TaskEntry]:
    """Return every task that could be imported, by name."""
    return TASKS.found


def task_entry(name: str) -> TaskEntry:
    """Return the entry of a task; raises UsageError if there is no such task, or it cannot be imported."""
    return TASKS.get(name)


def load_task(name: str, seed: int = 0) -> Task:
    """Load a task's data as a run of this seed sees them: cross-validated tasks have another fold for each seed.

    Raises:
        UsageError: no such task, it cannot be imported or loaded, its files are missing or damaged, or its data are not
            what it says of them.
    """
    return _loaded(name, seed % task_entry(name).folds)


@cache
def _loaded(name: str, fold: int) -> Task:
    entry = task_entry(name)
    try:
        with contained(f"task {name}", "when it was loaded", within_run=True):
            found = entry.load(fold) if entry.folds > 1 else entry.load()
    except Exception as error:  # whatever a plug-in's code raises
        if isinstance(error, UsageError) and not isinstance(error, Exited):
            raise
        why = " ".join((str(error) if isinstance(error, Exited) else f"{type(error).__name__}: {error}").split())
        raise UsageError(f"task {name!r} cannot be loaded: {why}. Fix its data or its package.") from error
    return check_task(name, entry, found)


def data_sha256(name: str, seed: int = 0) -> str:
    """Return `Task.sha256` of what `load_task` gives, once computed per process; raises UsageError as that does."""
    return _digest(name, seed % task_entry(name).folds)


@cache
def _digest(name: str, fold: int) -> str:
    return _loaded(name, fold).sha256()


def forget_tasks() -> None:
    """Free the data of every task."""
    _loaded.cache_clear()
    _digest.cache_clear()


def unsupported(entry: ModelEntry, task: Task) -> str | None:
    """Return why this model cannot run on this task, or None where it can."""
    domain = task.info.domain
    if entry.needs_density and task.density is None and domain not in entry.domains:
        return "it needs a task whose true density is known"
    if entry.needs_image and task.info.image is None:
        return "it needs images"
    if task.info.dim < entry.needs_dim:
        return f"it needs data of {entry.needs_dim} dimensions or more"
    known = task.density is not None and entry.needs_density and not entry.domains
    if known or domain in entry.domains or "continuous" in entry.domains:
        return None
    return f"it supports only {' and '.join(sorted(entry.domains))}, and the data are {domain}"
