"""Every task of the suite declares the shape of its data, for the report, which does not load it."""

from __future__ import annotations

import pytest

from replicate.tasks.base import TaskEntry
from replicate.tasks.loading import TASKS, forget_tasks, load_task, tasks


@pytest.mark.parametrize("name", sorted(TASKS.points))
def test_a_task_declares_the_info_of_its_data(name: str) -> None:
    entry = tasks()[name]
    assert entry.info is not None
    if missing := entry.absent():
        pytest.skip(missing)
    assert load_task(name).info == entry.info
    forget_tasks()
    getattr(entry.load, "cache_clear", int)()  # Omniglot is a gigabyte


def test_a_series_is_of_densities_of_different_dimension() -> None:
    entries = [entry for entry in tasks().values() if entry.series]
    assert [entry.kind for entry in entries] == ["density"] * len(entries)
    shapes = [(entry.series, entry.info.dim) for entry in entries if entry.info]
    assert len(set(shapes)) == len(entries) > 1


def test_a_plug_in_need_not_declare_an_info() -> None:
    entry = TaskEntry("a task", lambda: load_task("rings"), "density")
    assert (entry.info, entry.series) == (None, "")
