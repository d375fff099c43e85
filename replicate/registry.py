"""Models, tasks and papers by name, found through entry points; a plug-in's are found the same way as our own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from replicate.errors import UsageError
from replicate.model import FAMILIES, ModelEntry, Training
from replicate.papers.base import Paper
from replicate.runs.experiment import Experiment
from replicate.tasks.base import Task, TaskEntry


def unknown(what: str, name: str, known: Iterable[str], next_step: str) -> UsageError:
    """One line: what is unknown, the nearest names, and the command that lists them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return UsageError(f"unknown {what} {name!r}.{hint} {next_step}")


def _load(group: str, kind: type) -> tuple[dict[str, Any], dict[str, str]]:
    found: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for point in sorted(entry_points(group=group), key=lambda p: p.name):
        try:
            entry = point.load()
        except (Exception, SystemExit) as error:  # a plug-in that cannot be imported must not take the others down
            broken[point.name] = f"{type(error).__name__}: {error}"
            continue
        if isinstance(entry, kind):
            found[point.name] = entry
        else:
            broken[point.name] = f"{point.value} is a {type(entry).__name__}, not a {kind.__name__}"
    return found, broken


@cache
def _models() -> tuple[dict[str, ModelEntry], dict[str, str]]:
    found, broken = _load("replicate.models", ModelEntry)
    for name, entry in list(found.items()):
        if entry.family not in FAMILIES:
            broken[name] = f"family {entry.family!r} is not one of {', '.join(FAMILIES)}"
            del found[name]
    return found, broken


@cache
def _tasks() -> tuple[dict[str, TaskEntry], dict[str, str]]:
    return _load("replicate.tasks", TaskEntry)


@cache
def _papers() -> tuple[dict[str, Paper], dict[str, str]]:
    return _load("replicate.papers", Paper)


def models() -> dict[str, ModelEntry]:
    """Every model that could be imported, by name."""
    return _models()[0]


def tasks() -> dict[str, TaskEntry]:
    """Every task that could be imported, by name."""
    return _tasks()[0]


def papers() -> dict[str, Paper]:
    """Every paper that could be imported, by its key."""
    return _papers()[0]


def broken() -> dict[str, str]:
    """Entry points that could not be used: name -> reason."""
    return {**_models()[1], **_tasks()[1], **_papers()[1]}


def experiment(paper: str, name: str) -> Experiment:
    """An experiment of a paper.

    Raises:
        UsageError: no such paper or experiment, or the paper cannot be imported.
    """
    if paper in _papers()[1]:
        raise UsageError(f"paper {paper!r} cannot be used: {_papers()[1][paper]}. Fix or uninstall its package.")
    if paper not in papers():
        raise unknown("paper", paper, papers(), "`replicate claims` shows all.")
    found = {e.name: e for e in papers()[paper].experiments}
    if name not in found:
        raise unknown("experiment", name, found, f"{paper} has {', '.join(sorted(found)) or 'none'}.")
    return found[name]


def model_entry(name: str) -> ModelEntry:
    """The model's entry.

    Raises:
        UsageError: no such model, or it cannot be imported.
    """
    if name in _models()[1]:
        raise UsageError(f"model {name!r} cannot be used: {_models()[1][name]}. Fix or uninstall its package.")
    if name not in models():
        raise unknown("model", name, models(), "`replicate list` shows all.")
    return models()[name]


def task_entry(name: str) -> TaskEntry:
    """The task's entry.

    Raises:
        UsageError: no such task, or it cannot be imported.
    """
    if name in _tasks()[1]:
        raise UsageError(f"task {name!r} cannot be used: {_tasks()[1][name]}. Fix or uninstall its package.")
    if name not in tasks():
        raise unknown("task", name, tasks(), "`replicate list` shows all.")
    return tasks()[name]


def load_task(name: str, seed: int = 0) -> Task:
    """The task's data as a run of this seed sees them: cross-validated tasks have another fold for each seed.

    Raises:
        UsageError: no such task, it cannot be imported, or its files are missing or damaged.
    """
    return _loaded(name, seed % task_entry(name).folds)


@cache
def _loaded(name: str, fold: int) -> Task:
    entry = task_entry(name)
    return entry.load(fold) if entry.folds > 1 else entry.load()


def data_sha256(name: str, seed: int = 0) -> str:
    """`Task.sha256` of what `load_task` gives, computed once a process.

    Raises:
        UsageError: as in `load_task`.
    """
    return _digest(name, seed % task_entry(name).folds)


@cache
def _digest(name: str, fold: int) -> str:
    return _loaded(name, fold).sha256()


def forget_tasks() -> None:
    """Let the data of every task go."""
    _loaded.cache_clear()
    _digest.cache_clear()


def unsupported(entry: ModelEntry, task: Task) -> str | None:
    """Why this model cannot run on this task, or None."""
    domain = task.info.domain
    if entry.needs_density and task.density is None and domain not in entry.domains:
        return "it needs a task whose true density is known"
    if entry.needs_image and task.info.image is None:
        return "it needs images"
    if domain in entry.domains or "continuous" in entry.domains:
        return None
    return f"it models {' and '.join(sorted(entry.domains))}, and the data are {domain}"


TRAINING_FIELDS = tuple(f.name for f in fields(Training))
