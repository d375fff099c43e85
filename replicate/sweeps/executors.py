"""Choose the device and the executor that the options of a command ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicate.errors import UsageError

if TYPE_CHECKING:
    from replicate.runs.executor import Executor
    from replicate.runs.limits import Limits


def resolve_device(device: str) -> str:
    """Return the kind of device to use, "cpu" or "cuda"; raises UsageError if this machine has none such."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {device!r}; it must be auto, cpu or cuda.")
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise UsageError("no CUDA device was found; use --device cpu, or install the CUDA build of torch.")
    return "cpu"


def check_options(device: str, scheduler: str | None, cuda_rows: bool, in_process: bool) -> None:
    """Check options before anything is imported or started; raises UsageError if they contradict each other."""
    if cuda_rows and device == "cpu":
        raise UsageError("--cuda-rows computes runs that need a CUDA device, and --device is cpu; remove one of them.")
    if scheduler and in_process:
        raise UsageError("--scheduler and --in-process exclude each other; give one of them.")


def sweep_device(device: str, scheduler: str | None, cuda_rows: bool) -> str:
    """Return a sweep's `resolve_device`; on a cluster only the user knows the workers' devices."""
    device = "cuda" if cuda_rows else device
    if scheduler is None:
        return resolve_device(device)
    return "cpu" if device == "auto" else device


def make_executor(
    device: str,
    limits: Limits,
    jobs: int = 0,
    runs_per_gpu: int = 1,
    scheduler: str | None = None,
    in_process: bool = False,
) -> Executor:
    """Return the executor that the options ask for; raises UsageError if no scheduler answers at the address.

    Args:
        device: "cpu" or "cuda".
        limits: of each run.
        jobs: runs at a time; 0 for one per core, or for as many as the GPUs offer.
        runs_per_gpu: runs that share a GPU.
        scheduler: address of a Dask scheduler.
        in_process: one run after the other in this process.
    """
    if in_process:
        from replicate.runs.inline import Inline

        return Inline(limits)
    if scheduler:
        from replicate.runs.cluster import Cluster

        return Cluster(scheduler, device, limits)
    from replicate.runs.pool import Pool, slots

    return Pool(slots(device, jobs, runs_per_gpu), limits)
