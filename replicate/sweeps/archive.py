"""The runs of a sweep in one file: so that a machine without lasting storage can compute part of a profile.

    replicate reproduce --profile full --cuda-rows --time-budget 500; replicate data pack-runs slice.zip
    replicate data unpack-runs slice.zip      # here, and there before the next slice

An archive holds records, failures, arrays for the report, and the newest checkpoint of what is unfinished; weights
stay behind. It belongs to the sources it was computed with, by their sha256, since a machine that is handed files has
no repository. What is unpacked is not trusted: names, sizes, records and their seals are checked, and nothing in it is
code.
"""

import json
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replicate.errors import RecordError, UsageError
from replicate.runs.identity import other_plug_ins
from replicate.runs.provenance import source_here
from replicate.runs.record import parse_failure, parse_record
from replicate.runs.spec import spec_from_dict
from replicate.runs.store import held, writable, write_atomic
from replicate.sweeps.sweep import Sweep
from replicate.validation import PROFILES

FORMAT = 1
HEAD = "archive.json"
#: bytes that a member may have, unpacked
MOST = 1 << 30
_MEMBER = re.compile(r"([0-9a-f]{64})/(record\.json|failure\.json|arrays\.npz|checkpoints/[0-9]{8}\.checkpoint)")


@dataclass(frozen=True)
class Moved:
    """What went into an archive or came out of it: numbers of runs.

    Attributes:
        records, failures, unfinished: finished, failed, and with a checkpoint.
        known: records of the archive that were here already and stayed as they were.
    """

    records: int = 0
    failures: int = 0
    unfinished: int = 0
    known: int = 0

    def __str__(self) -> str:
        known = f", {self.known} known already" if self.known else ""
        return f"{self.records} records, {self.failures} failures, {self.unfinished} unfinished runs{known}"


def _members(run: Path) -> Iterator[Path]:
    """Iterate over the files of one run that an archive takes."""
    ended = [run / name for name in ("record.json", "failure.json") if (run / name).is_file()]
    yield from ended[:1]  # a record beside a failure is the later, successful try
    if (run / "arrays.npz").is_file() and (run / "record.json").is_file():
        yield run / "arrays.npz"
    if not (run / "record.json").is_file():
        yield from sorted((run / "checkpoints").glob("*.checkpoint"))[-1:]


def pack_runs(root: Path, profile: str, target: Path) -> Moved:
    """Write the runs of a profile's sweep below REPLICATE_RUNS, finished or in progress, into one zip file.

    Raises:
        UsageError: there are no runs, or a sweep is at work on them.
    """
    sweep = Sweep(root / profile)
    runs = sweep.runs
    if not runs.is_dir():
        raise UsageError(f"there are no runs of profile {profile} in {root}; `replicate reproduce` makes them.")
    counts: Counter[str] = Counter()
    partial = target.with_name(target.name + ".part")
    with held(sweep.root), zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(HEAD, json.dumps({"format": FORMAT, "profile": profile, "source_sha256": source_here()}))
        for path in (p for run in sorted(runs.iterdir()) if run.is_dir() for p in _members(run)):
            counts[path.relative_to(runs).parts[1]] += 1
            out.write(path, path.relative_to(runs).as_posix())
    partial.replace(target)
    return Moved(counts["record.json"], counts["failure.json"], counts["checkpoints"])


def unpack_runs(archive: Path, root: Path) -> Moved:
    """Add the runs of an archive to the sweep of its profile, a finished one too; `replicate reproduce` resumes it.

    Finished runs that are here already stay as they are; of two checkpoints of a run the later one stays.

    Args:
        root: REPLICATE_RUNS.

    Raises:
        UsageError: it is no archive of these sources, or something in it is not what `pack_runs` writes; nothing is
            changed then.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            profile = _head(opened, archive)
            content = {name: _checked(opened, name) for name in opened.namelist() if name != HEAD}
    except (OSError, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        why = "; ".join(str(error).splitlines())
        raise UsageError(f"{archive} cannot be used: {why}. `replicate data pack-runs` makes such files.") from None
    sweep = Sweep(writable(root / profile))
    with held(sweep.root):
        sweep.open(add=True)
        return _add(content, sweep.current)


def _head(opened: zipfile.ZipFile, archive: Path) -> str:
    """Return the profile of an archive; raises ValueError if it is none, or was made with other sources."""
    head = json.loads(opened.read(HEAD)) if opened.getinfo(HEAD).file_size < 10_000 else None
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("profile") not in PROFILES:
        raise ValueError(f"its {HEAD} is not that of an archive of runs")
    if head.get("source_sha256") != source_here():
        raise ValueError("its runs were computed with other sources than these; check out the same commit")
    return str(head["profile"])


def _checked(opened: zipfile.ZipFile, name: str) -> bytes:
    """Read a member's bytes; raises ValueError if its name, size or content is not that of a run's file."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        raise ValueError(f"it holds {name[:100]!r}, which is no file of a run")
    if opened.getinfo(name).file_size > MOST:
        raise ValueError(f"{name} has more than {MOST} bytes")
    content = opened.read(name)
    if match[2] in ("record.json", "failure.json"):
        try:
            found = (parse_record if match[2] == "record.json" else parse_failure)(content)
        except RecordError as error:
            raise ValueError(f"{name}: {error}") from None
        if found["run_id"] != match[1]:
            raise ValueError(f"{name} belongs to another run")
        made_with = found.get("provenance")  # a failure has none
        if made_with and (other := other_plug_ins(spec_from_dict(found["spec"]), made_with, "there", "here")):
            raise ValueError(f"{name} was computed with another version of a plug-in ({other}); install the same")
    return content


def _add(content: dict[str, bytes], runs: Path) -> Moved:
    counts: Counter[str] = Counter()
    finished_here = {name.split("/")[0] for name in content if (runs / name.split("/")[0] / "record.json").is_file()}
    # a record last: where it is, everything is
    for name in sorted(content, key=lambda n: n.endswith("record.json")):
        run, _, file = name.partition("/")
        if run in finished_here:
            counts["known"] += file == "record.json"
            continue
        if file.startswith("checkpoints"):
            here = sorted((runs / run / "checkpoints").glob("*.checkpoint"))
            if here and here[-1].name >= Path(name).name:
                continue
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(runs / name, content[name])
        counts[file.partition("/")[0]] += 1
        if file == "record.json":
            shutil.rmtree(runs / run / "checkpoints", ignore_errors=True)
            (runs / run / "failure.json").unlink(missing_ok=True)
    return Moved(counts["record.json"], counts["failure.json"], counts["checkpoints"], counts["known"])
