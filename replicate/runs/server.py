"""The clean process that the pool's children are forked from.

It imports torch and the suite once. Nothing here imports torch, so a command can start it before it imports torch
itself; both then import at the same time.
"""

import multiprocessing as mp
import os
import tempfile
from collections.abc import Iterable
from multiprocessing import forkserver, util

from replicate.errors import UsageError

#: threads of every numerical library in a child; more would make results depend on the machine's cores
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
#: names tasks to the process, which takes no arguments
CLASSIFY = "REPLICATE_CLASSIFY"
#: bytes that the path of a socket may have, and what multiprocessing adds to the folder of temporary files
LONGEST, SOCKET = 100, "/pymp-xxxxxxxx/listener-xxxxxxxx"


def context() -> mp.context.ForkServerContext:
    """How a child is started."""
    _short_socket_path()
    for name in ONE_THREAD:
        os.environ[name] = "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = mp.get_context("forkserver")
    found.set_forkserver_preload(["__main__", "replicate.runs.child", "replicate.runs.warm"])
    return found


def start(classify: Iterable[str] = ()) -> None:
    """Start the process now if it is not there yet; it ends with this one.

    Args:
        classify: tasks whose feature classifier it shall train, for every run to inherit.
    """
    os.environ[CLASSIFY] = ",".join(classify)
    context()
    forkserver.ensure_running()


def _short_socket_path() -> None:
    """Put the sockets of multiprocessing into /tmp where TMPDIR is too long for the path of one."""
    if len(os.fsencode(tempfile.gettempdir())) + len(SOCKET) > LONGEST:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()  # made once, asked for by every socket, and removed at the end of this process
        except OSError as error:
            why = f"TMPDIR={before} is too long for a socket, and /tmp cannot be used ({error.strerror})"
            raise UsageError(f"{why}; set TMPDIR to a shorter path.") from None
        finally:
            tempfile.tempdir = before
