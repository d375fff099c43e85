"""A run in a process of its own, as every executor starts it.

The local pool forks it from a warm server (`worker`); a cluster's worker starts it as a program that reads its job from
standard input (`python -m replicate.runs.child`). The run sees the same process both times: one thread, deterministic
kernels, standard error in a file of the run's folder, an end when the process that watches it ends.
"""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from replicate.errors import Stopped
from replicate.process_state import contained
from replicate.resume import stop_current
from replicate.runs.execute import execute, failure, prepare_process
from replicate.runs.limits import Limits
from replicate.runs.orphan import die_when, die_with_parent
from replicate.runs.spec import AnySpec, spec_from_dict
from replicate.runs.store import write_json

#: exit codes of a child beside 0: it failed and said why; it was stopped and saved; it could not write why it failed
FAILED, STOPPED, UNWRITABLE = 1, 3, 73
#: how much of a failed run's standard error its record keeps
STDERR_TAIL = 2_000
STDERR = "stderr.txt"


def make_ready(folder: Path) -> None:
    """Empty a run's folder of a half-written or failed attempt; its checkpoints stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.iterdir(), *folder.glob("checkpoints/*.tmp")]:
        if path.is_file():
            path.unlink()
        elif path.is_dir() and path.name != "checkpoints":
            shutil.rmtree(path)


def stderr_tail(folder: Path) -> str:
    """Return the end of what a run's process printed on standard error."""
    try:
        data = (folder / STDERR).read_bytes()
    except OSError:
        return ""
    return data[-STDERR_TAIL:].decode("utf-8", "replace").strip()


def attempt(spec: AnySpec, folder: Path, limits: Limits) -> int:
    """Compute a run in this process, leave a record or a failure in its folder, and return the exit code."""
    folder = folder.absolute()  # the run may change the working folder
    try:
        device = prepare_process(spec.device, spec.run_id())
        with contained(f"the run {spec.label}", within_run=True):
            execute(spec, folder, device, limits)
    except Stopped:
        return STOPPED
    except Exception as error:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "failure.json", failure(spec, error, stderr_tail(folder)))
        except OSError:
            return UNWRITABLE
        return FAILED
    return 0


def run_job(given: dict[str, Any]) -> int:
    """Do a job in the process that is the child, and return its exit code.

    Args:
        given: JSON-ready. spec: of the run. folder: of the run. limits: of `Limits`. visible: the GPU that the child
            may see (CUDA_VISIBLE_DEVICES), or null, which leaves that as it is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        signal.signal(signal.SIGTERM, _stop)
        spec, folder, limits = spec_from_dict(given["spec"]), Path(given["folder"]), Limits(**given["limits"])
        if given["visible"] is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = given["visible"]
        if limits.memory_mb is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_mb * 2**20, limits.memory_mb * 2**20))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.dup2(os.open(folder / STDERR, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
            os.dup2(2, 1)  # what a model prints is no line of the command's
        except OSError:
            return UNWRITABLE
        return attempt(spec, folder, limits)
    except Stopped:  # between two safe points
        return STOPPED


def _stop(number: int, frame: Any) -> None:
    if not stop_current():
        raise Stopped


def worker(given: dict[str, Any]) -> None:
    """Do a job and exit; the target of a forked child."""
    die_with_parent()
    raise SystemExit(run_job(given))


def main() -> None:
    """Read one job, a line of JSON, from standard input and do it; the end of standard input ends the run."""
    given, watched = json.loads(sys.stdin.readline()), sys.stdin
    sys.stdin = open(os.devnull)  # noqa: SIM115  # a model may close it, as quit() does
    die_when(watched.read)
    os._exit(run_job(given))  # the watching thread still reads


if __name__ == "__main__":
    main()
