"""Which runs have a valid record already, so that a sweep need not compute them: `replicate reproduce --reuse SOURCE`.

results     records in results/PROFILE
COMMIT      finished runs of a sweep that another commit computed, after some of them were rerun and matched
"""

import random
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from replicate.errors import UsageError
from replicate.report.records import load_runs, measurements, read_records
from replicate.runs.executor import Executor
from replicate.runs.identity import other_plug_ins
from replicate.runs.provenance import UNKNOWN, source_version
from replicate.runs.spec import spec_from_dict
from replicate.runs.store import held, read_record
from replicate.sweeps.rerun import draw, rerun_drawn
from replicate.sweeps.sweep import Sweep

#: the source that is a results folder
RESULTS = "results"


def in_results(folder: Path) -> set[str]:
    """Return the ids of the finished runs of a results folder that these plug-ins computed; none without results."""
    path = folder / "records.jsonl"
    finished = [r for r in read_records(path) if "error" not in r] if path.exists() else []
    return {str(r.get("run_id")) for r in finished if _by_these_plug_ins(r)}


def _by_these_plug_ins(record: Mapping[str, Any]) -> bool:
    """Return whether no plug-in that is here now differs from the one that computed a record."""
    try:
        spec = spec_from_dict(record.get("spec"))
    except UsageError:  # `replicate verify` reports it; its id says what was computed
        return True
    return not other_plug_ins(spec, record.get("provenance") or {}, "then", "now")


def adopt(
    sweep: Sweep, commit: str, planned: Collection[str], checks: int, executor: Executor, say: Callable[[str], None]
) -> int:
    """Continue a sweep of another commit with its finished runs, if that moves no number.

    Some of the runs, drawn at random, are rerun by the code that is here now and must match bit for bit. Every record
    keeps the commit that computed it. Runs in progress start again, and runs that are not planned are removed. A sweep
    that was finished is in progress again, so that the runs that this commit adds are computed.

    Args:
        commit: of the sweep, or its first digits.
        planned: ids of the runs of the sweep that continues.
        checks: how many runs are rerun.
        executor: computes them.
        say: receives every line for the user.

    Returns:
        The exit code: 0 where the runs are reused, 1 where one did not match, 3 where a signal stopped it; only 0
        changes anything.

    Raises:
        UsageError: there is no such sweep, or a version has changes that are not committed.
    """
    there, (here, dirty) = sweep.version() or {}, source_version()
    found = str(there.get("commit", "none"))
    if sweep.belongs_here() and (sweep.current.exists() or found == here):  # the same command again
        return 0
    if len(commit) < 4 or not found.startswith(commit):
        raise UsageError(f"the sweep in {sweep.root} is of commit {found[:12]}, not {commit!r}.")
    if here == UNKNOWN:
        raise UsageError("--reuse COMMIT needs the commit that is here, which git does not say; nothing is changed.")
    if dirty or there.get("dirty") != "":
        raise UsageError(
            "--reuse works between two clean commits: commit your changes. "
            "A sweep that was started with uncommitted changes cannot be reused."
        )
    with held(sweep.root):
        loaded = load_runs(sweep.runs)
        finished = (read_record(sweep.runs / run.run_id) for run in loaded.done if run.run_id in planned)
        records = {r["run_id"]: r for r in finished if r is not None and _by_these_plug_ins(r)}
        drawn = draw(list(records.values()), checks, random.SystemRandom().randrange(2**31), say)
        if records and not drawn:
            say("no run of that sweep can be rerun here, so none is reused")
            return 1
        if drawn:
            how = f" of commit {found[:8]} by commit {here[:8]}"
            report = rerun_drawn(drawn, measurements(loaded), lambda _: executor, say, how)
            if report.code or any(r.machine for r in report.runs):
                say("not every run matched bit for bit: none is reused")
                return report.code or 1
        sweep.reopen()
        for folder in (p for p in sweep.current.iterdir() if p.is_dir() and p.name not in records):
            shutil.rmtree(folder)
        sweep.mark_version()
    say(f"{len(records)} finished runs of commit {found[:8]} are reused")
    return 0
