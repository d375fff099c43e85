"""What `replicate list` shows: models, tasks and papers with a line each.

The lines are in the modules that the entry points name, and importing those takes seconds. So the list is kept in the
user's cache folder, under a name that changes with every entry point and every source file behind one.
"""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from replicate.data.files import cache_folder
from replicate.errors import UsageError
from replicate.validation import PROFILES

GROUPS = ("replicate.models", "replicate.tasks", "replicate.papers")


def listing() -> dict[str, Any]:
    """Return every model, task, paper and profile, and the entry points that cannot be used."""
    try:
        path = cache_folder() / f"list-{_sources()}.json"
    except UsageError:  # there is nowhere to keep it
        return _read()
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = _read()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("list-*.json"):
            old.unlink()
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _sources() -> str:
    """Return a hash of all entry points and of size and time of every source file of their packages."""
    digest, packages = hashlib.sha256(), {"replicate"}
    for group in GROUPS:
        for point in sorted(entry_points(group=group)):
            digest.update(f"{group} {point.name} {point.value} {point.dist and point.dist.version}\n".encode())
            packages.add(point.module.partition(".")[0])
    for package in sorted(packages):
        if found := find_spec(package):
            folders = found.submodule_search_locations or []
            module = [Path(found.origin)] if found.origin and not folders else []
            for file in (*module, *(f for folder in folders for f in sorted(Path(folder).rglob("*.py")))):
                stat = file.stat()
                digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _read() -> dict[str, Any]:
    """Import everything and collect the lines."""
    from replicate.registry import models
    from replicate.runs.paper import broken_entries, papers
    from replicate.tasks.loading import tasks

    return {
        "models": {n: {"family": e.family, "about": e.about, "paper": e.paper} for n, e in sorted(models().items())},
        "tasks": {n: {"kind": e.kind, "about": e.about} for n, e in sorted(tasks().items())},
        "papers": {
            n: {"experiments": [e.name for e in p.experiments], "about": {e.name: e.about for e in p.experiments}}
            for n, p in sorted(papers().items())
        },
        "profiles": list(PROFILES),
        "broken": broken_entries(),
    }
