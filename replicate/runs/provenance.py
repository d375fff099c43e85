"""Record where and with what a run was computed, and decide whether another run should repeat it bit for bit.

A record's provenance names the code (the sources' own hash, the lock, commit and what differs from it), the libraries,
the machine and the settings of the numerical kernels. It holds no name of a host or a user and no path. What cannot
change while a process lives is asked for once, and a forked child inherits the answer.

Two versions of the code are told apart by the hash of their sources (`replicate.runs.identity`). The commit is a label:
git may be absent, slow or refuse, and knows neither plug-ins nor what it does not track.
"""

import datetime
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

from replicate.validation import harmless

#: raised when keys of a record's provenance are added or change their meaning; records from before it carry none
FORMAT = 2
#: where the packages lie: a checkout, or what they were installed into
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("replicate", "baselines")
#: the distributions that compute what is measured
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "POT", "safetensors")
UNKNOWN = "unknown"
#: seconds that a question to another program may take
PATIENCE = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40,64}")

#: what must be the same for two runs of one spec to have the same bits, in words
MACHINE = {
    "device": "device",
    "cpu_model": "CPU model",
    "cpu_capability": "CPU instructions",
    "libc": "C library",
    "python": "Python",
    "libraries": "libraries",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "threads": "threads",
    "blas_threads": "threads of numpy and scipy",
    "deterministic": "deterministic kernels",
    "cudnn_deterministic": "deterministic cuDNN",
    "cudnn_benchmark": "cuDNN's choice by speed",
    "cublas_workspace": "cuBLAS workspace",
    "tf32": "TF32 in products",
    "cudnn_tf32": "TF32 in convolutions",
    "matmul_precision": "float32 precision of products",
}


def ask(*words: str) -> str | None:
    """Return what a program prints, or None where it is absent, fails or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=PATIENCE, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@cache
def source_version() -> tuple[str, str]:
    """Return (commit, sha256 of what differs from it except the results; "" for a clean tree).

    Both are "unknown" where the packages do not lie in a checkout of their own: the repository around a virtual
    environment is somebody else's. They are also where git does not answer; standard error then has one line that says
    why.
    """
    if not (ROOT / ".git").exists():
        return UNKNOWN, UNKNOWN
    where = ("--", ".", ":(exclude)results", ":(exclude)README.md")
    try:
        lines = _git("status", "--porcelain=v2", "--branch", "--untracked-files=normal", *where).splitlines()
        commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "")
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"{ROOT} has no commit yet")
        changes = "\n".join(line for line in lines if not line.startswith("#"))
        if changes:
            changes += _git("diff", "--no-color", "--no-ext-diff", "HEAD", *where)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"{_why(error)}. The sources are recorded by their sha256 all the same.", file=sys.stderr)
        return UNKNOWN, UNKNOWN
    return commit, hashlib.sha256(changes.encode()).hexdigest() if changes else ""


def _git(*words: str) -> str:
    """Return what git says about the packages' own checkout.

    Raises:
        OSError, subprocess.SubprocessError: it is not there, does not answer or refuses.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # no repository but this one: neither that of a hook which called us, nor one around a damaged .git
    own = {"GIT_CEILING_DIRECTORIES": str(ROOT.parent), "LC_ALL": "C"}
    # without a lock: runs side by side must not be in each other's way, nor in the user's
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    done = subprocess.run(
        command, env={**kept, **own}, capture_output=True, text=True, errors="replace", check=True, timeout=PATIENCE
    )
    return done.stdout


def _why(error: Exception) -> str:
    """Return in a line why the commit is unknown, and the next step."""
    said, step = str(error), f"`git -C {ROOT} status` shows more"
    if isinstance(error, subprocess.TimeoutExpired):
        said = f"git did not answer in {PATIENCE:g} s"
    elif isinstance(error, subprocess.CalledProcessError):
        first = (error.stderr.strip().splitlines() or [f"it ended with code {error.returncode}"])[0]
        said = f"git refuses ({first})"
        if "dubious ownership" in first:
            step = f"`git config --global --add safe.directory {ROOT}` trusts this checkout"
    elif isinstance(error, OSError):
        said, step = f"git cannot be started ({error.strerror})", "install it to have records name their commit"
    return harmless(f"{said}: the commit is recorded as unknown; {step}")


def digest_of(files: Mapping[str, Path]) -> str:
    """Return the sha256 of files, names included."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {name}\n".encode())
    return digest.hexdigest()


def source_sha256() -> str:
    """Return the sha256 of the packages' own modules and tables, names included, as they are on disk now."""
    found = (p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in (".py", ".toml"))
    # an editor's lock is a link to nowhere
    return digest_of({path.relative_to(ROOT).as_posix(): path for path in found if path.is_file()})


@cache
def source_here() -> str:
    """Return the `source_sha256` of what this process imported: that of its first call, soon after the imports."""
    return source_sha256()


def lock_sha256() -> str:
    """Return the sha256 of requirements.lock; "" where there is none, as in a wheel."""
    lock = ROOT / "requirements.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else ""


@cache
def _cpuinfo() -> dict[str, str]:
    """Return what the kernel says about the first core; empty where it says nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@cache
def cpu_model() -> str:
    """Return maker, family and model by number: a virtual machine may give every CPU of a maker one name."""
    found = [_cpuinfo().get(key, "") for key in ("vendor_id", "cpu family", "model")]
    return " ".join(found) if all(found) else platform.machine()


@cache
def driver_version() -> str:
    """Return the GPU driver's version, or ""."""
    lines = (ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split()
    return lines[0] if lines else ""


@cache
def device_name(device: torch.device) -> str:
    """Return the device's model, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def blas_threads() -> int:
    """Return the threads of linear algebra in numpy and scipy; like torch's own they change the last bits."""
    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory in megabytes: the device's on a GPU, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stamp(seconds: float) -> str:
    """Return seconds since the epoch as UTC in ISO 8601."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


@cache
def _code() -> dict[str, Any]:
    """Return the versions of the code that this process runs."""
    commit, dirty = source_version()
    own = {"commit": commit, "dirty": dirty, "source_sha256": source_here(), "lock_sha256": lock_sha256()}
    return {**own, "libraries": {name: version(name) for name in LIBRARIES}}


@cache
def _fixed(device: torch.device) -> dict[str, Any]:
    """Return what cannot change while this process lives."""
    on_gpu = device.type == "cuda"
    return {
        "format": FORMAT,
        **_code(),
        "device": device_name(device),
        "driver": driver_version() if on_gpu else "",
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "cpu_model": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Return code, machine and settings of this process, as a record has them; JSON-ready.

    Of a run on the CPU `driver` and `cuda` are "" and `cudnn` is null, whatever the machine has.
    """
    return {
        **_fixed(device),
        "threads": torch.get_num_threads(),
        "blas_threads": blas_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def machine(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a provenance on which bit equality depends, as far as it is recorded.

    The lock is left out, since it also names what computes nothing; of Python's version the patch is. The source is no
    part of the machine.
    """
    found = {key: provenance[key] for key in MACHINE if key in provenance}
    if "python" in found:
        found["python"] = ".".join(str(found["python"]).split(".")[:2])
    return found


def machine_differences(a: Mapping[str, Any], b: Mapping[str, Any], a_is: str, b_is: str) -> list[str]:
    """Return the differences between two machines in words; empty where bit equality is expected.

    What one of them does not say may differ, and counts.

    Args:
        a_is, b_is: where each was made, such as "there" and "here".
    """
    left, right = machine(a), machine(b)
    both: dict[str, tuple[Any, Any]] = {}
    silent = []
    for key, name in MACHINE.items():
        if key not in left or key not in right:
            silent.append(name)
            continue
        one, other = left[key], right[key]
        if key == "libraries" and isinstance(one, Mapping) and isinstance(other, Mapping):
            both |= {n: (one.get(n, "none"), other.get(n, "none")) for n in [*one, *other]}
        else:
            both[name] = one, other
    out = [f"{name}: {one} {a_is}, {other} {b_is}" for name, (one, other) in both.items() if one != other]
    return out + ([f"not recorded: {', '.join(silent)}"] if silent else [])
