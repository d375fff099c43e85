"""Which code computes a run: the suite's own sources, and those of the packages whose plug-ins the run uses.

The identity of code is the sha256 of its sources, wherever they lie: a checkout, a wheel, an editable install or a
single module, tracked by git or not. Each process computes it once, for the code that it imported, and a forked child
inherits the answer. The suite uses no checkpoint and no record of other code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import Distribution, EntryPoint, version
from pathlib import Path
from typing import Any

from replicate.errors import UsageError
from replicate.registry import MODELS, EntryPoints
from replicate.runs.paper import PAPERS, find_experiment
from replicate.runs.provenance import LIBRARIES, PACKAGES, UNKNOWN, digest_of, source_here
from replicate.runs.spec import AnySpec, ExperimentSpec
from replicate.tasks.loading import TASKS
from replicate.validation import harmless

GROUPS: Mapping[str, EntryPoints[Any]] = {"model": MODELS, "task": TASKS, "paper": PAPERS}
#: what of a package is its code
CODE = (".py", ".toml", ".so", ".pyd")

#: a line of a module that imports
_IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t]+([\w., \t]+)", re.MULTILINE)

#: of a plug-in: package, version, sha256
Identity = dict[str, str]


def used(spec: AnySpec) -> list[tuple[str, str]]:
    """Return the kind and name of every model, task and paper that a run uses."""
    if not isinstance(spec, ExperimentSpec):
        return [("model", spec.model), ("task", spec.task)]
    tasks: tuple[str, ...] = ()
    with suppress(UsageError):  # what cannot be used says so when it is
        tasks = tuple(find_experiment(spec.model, spec.task).tasks)
    return [("paper", spec.model), *(("task", task) for task in tasks)]


def plug_ins(spec: AnySpec) -> dict[str, Identity]:
    """Return the identity of each plug-in that a run uses, such as that of "model:NAME"; none for the suite's own."""
    found = {f"{kind}:{name}": plug_in(kind, name) for kind, name in used(spec)}
    return {key: identity for key, identity in found.items() if identity is not None}


@cache
def plug_in(kind: str, name: str) -> Identity | None:
    """Return the identity of a plug-in as this process found it first; None where there is none of this name."""
    point = GROUPS[kind].points.get(name)
    return None if point is None or is_own(point) else identify(point)


def remember_plug_ins() -> None:
    """Ask for the identity of every plug-in, for forked children to inherit together with its modules."""
    for kind, group in GROUPS.items():
        for name in group.points:
            plug_in(kind, name)


def is_own(point: EntryPoint) -> bool:
    """Return whether an entry point names one of the suite's own modules, which have one hash for all."""
    return _module(point).partition(".")[0] in PACKAGES


def _module(point: EntryPoint) -> str:
    return point.value.partition(":")[0].strip()  # `EntryPoint.module` raises where the value is none


def identify(point: EntryPoint) -> Identity:
    """Return the package of an entry point, its version, and the sha256 of its sources on disk now."""
    digest = UNKNOWN
    with suppress(OSError):  # a file that cannot be read
        if files := _sources(point):
            digest = hashlib.sha256(f"{point.value} {digest_of(files)}".encode()).hexdigest()
    name, number = UNKNOWN, UNKNOWN
    with suppress(Exception):  # metadata that is missing or damaged
        name, number = str(point.dist.name), str(point.dist.version)  # type: ignore[union-attr]
    return {"package": harmless(name), "version": harmless(number), "sha256": digest}


def checkpoint_source(spec: AnySpec) -> str:
    """Return the sha256 of all code that a run's checkpoints depend on; "" where some of it cannot be found.

    The libraries count too, except by the kind of their build: a record names one version of each.
    """
    found = plug_ins(spec)
    if any(one["sha256"] == UNKNOWN for one in found.values()):
        return ""
    libraries = {name: version(name).partition("+")[0] for name in LIBRARIES}
    code = {"sources": source_here(), "plug-ins": {k: v["sha256"] for k, v in found.items()}, "libraries": libraries}
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()


def other_plug_ins(spec: AnySpec, provenance: Mapping[str, Any], there: str, here: str) -> str:
    """Return in words how the plug-ins that computed a record differ from those here; "" where they are the same.

    A plug-in whose sources are unknown counts as different.

    Args:
        there, here: where each is, such as "as committed" and "here".
    """
    then, now = provenance.get("plugins"), plug_ins(spec)
    then = then if isinstance(then, Mapping) else {}
    keys = [k for k in {**now, **then} if _sha256(then.get(k)) != _sha256(now.get(k)) or _sha256(now.get(k)) == UNKNOWN]
    return "; ".join(f"{key}: {_words(then.get(key))} {there}, {_words(now.get(key))} {here}" for key in keys)


def _sha256(identity: Any) -> str:
    return str(identity.get("sha256") or UNKNOWN) if isinstance(identity, Mapping) else "none"


def _words(identity: Any) -> str:
    if not isinstance(identity, Mapping):
        return "none"
    return f"{identity.get('package')} {identity.get('version')} of sources {_sha256(identity)[:8]}"


# -- the sources of a package


def _sources(point: EntryPoint) -> dict[str, Path]:
    """Return the code of the package that an entry point came from, by the names that a wheel has for it.

    Packages beside it that it imports are part of its code, since an editable install does not list them. They are not
    where the folder holds many packages, such as site-packages.
    """
    found = _package(_module(point))
    if point.dist is not None:
        for name in (point.dist.read_text("top_level.txt") or "").split():
            found |= _package(name)
        listed = _listed(point.dist)
        if listed.keys() & found.keys():  # an editable install lists only what leads to the sources
            found |= listed
    new = found
    while new:
        new = {name: path for name, path in _beside(new).items() if name not in found}
        found = found | new
    return found


def _beside(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the code of the packages that some code imports from the folder in which its own package lies."""
    found: dict[str, Path] = {}
    for name, path in files.items():
        root = path.parents[name.count("/")]
        if path.suffix != ".py" or len([*root.glob("*.dist-info")]) > 1:
            continue
        lines = (line.group(1).decode().split(" import ")[0] for line in _IMPORT.finditer(path.read_bytes()))
        imported = {
            module.split(".")[0].split()[0] for line in lines for module in line.split(",") if module.strip(". ")
        }
        for module in sorted(imported - {*PACKAGES, name.split("/")[0].removesuffix(".py")}):
            if (root / module).is_dir():
                found |= _folder(module, root / module)
            elif (root / f"{module}.py").is_file():
                found[f"{module}.py"] = root / f"{module}.py"
    return found


def _listed(dist: Distribution) -> dict[str, Path]:
    """Return the code that a distribution says it installed."""
    files = (f for f in dist.files or () if f.suffix in CODE and ".." not in f.parts)
    located = {f.as_posix(): Path(str(dist.locate_file(f))) for f in files}
    return {name: path for name, path in located.items() if path.is_file()}


def _package(module: str) -> dict[str, Path]:
    """Return the code of the outermost package of a module, or of the module itself where it is in none.

    Namespace packages (PEP 420) have no code and belong to no distribution, so they are passed over. To look into
    one, Python imports it; nothing else is imported.
    """
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:n]))
        except Exception:  # an importer may be a plug-in's own
            return {}
        if spec is None:
            return {}
        if spec.origin is not None:
            break
    else:
        return {}
    origin = Path(spec.origin)
    if not origin.is_file():  # in an archive, which then is the file, or in the interpreter
        return {path.name: path for path in origin.parents if path.is_file()}
    if spec.submodule_search_locations is None:
        return {"/".join([*parts[: n - 1], origin.name]): origin}
    found: dict[str, Path] = {}
    for folder in spec.submodule_search_locations:
        found |= _folder("/".join(parts[:n]), Path(folder))
    return found


def _folder(name: str, folder: Path) -> dict[str, Path]:
    """Return the code below a folder by its name in a package."""
    files = (path for path in folder.rglob("*") if path.suffix in CODE and path.is_file())
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in files}
