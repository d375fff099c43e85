"""Run directories: written so that a record is either whole or not there."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from replicate.errors import RecordError, UsageError
from replicate.runs.record import parse_record


def default_runs_folder() -> Path:
    """Return REPLICATE_RUNS, or .runs in the current folder."""
    return Path(os.environ.get("REPLICATE_RUNS") or ".runs")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a handle whose bytes become the file when all are on disk; a failure leaves nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole: a temporary one beside it, flushed to disk, then renamed over it."""
    with _replacing(path) as handle:
        handle.write(data)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically; nan and infinity are refused, since JSON has none."""
    write_atomic(path, (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz atomically."""
    with _replacing(path) as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read a run's record; None where there is no whole record that belongs to this folder."""
    with contextlib.suppress(OSError, RecordError):
        record = parse_record((folder / "record.json").read_bytes())
        return record if record["run_id"] == folder.name else None
    return None


def writable(folder: Path) -> Path:
    """Return the folder, created if it was missing.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write to {folder}: {error.strerror}. Choose another folder or fix its permissions."
        ) from None
    return folder


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder; wait for it if another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        UsageError: another process holds it.
    """
    with open(folder / "lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise UsageError(
                f"{folder} is in use by process {holder}; wait for it, or set REPLICATE_RUNS to another folder."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
