"""Contain foreign code: what it changes in this process is restored and named, and it cannot end the program.

Python has one default dtype, one global generator, one working folder per process. Code of a plug-in may change them
when it is imported, builds a model or trains it, and move the numbers of whatever runs next. `contained` goes around
each such place; `PARTS` is the list of what it reads before and restores after.

Three things pass: variables that a library adds to the environment for itself and its children (`WATCHED` has those
that may not be added), `sys.path`, which a plug-in may need later, and BLAS threads, which are slow to read and which
every run sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import locale
import operator
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import sklearn.linear_model  # noqa: F401  # leaves filters and variables of its own, which are no plug-in's
import torch

from replicate.errors import Exited, Interrupted, Stopped
from replicate.validation import harmless

#: environment variables that libraries read later and that may move a number or a file; others may be added
WATCHED = (
    *("BLIS_", "CUBLAS", "CUDA", "CUDNN", "GOTO_", "LC_", "LD_", "MKL_", "NUMEXPR", "NVIDIA_", "OMP_", "OPENBLAS"),
    *("PYTORCH", "PYTHON", "REPLICATE_", "TORCH", "VECLIB"),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)
#: guards of torch's inference mode end where they are freed
_guards: list[Any] = []


@dataclass(frozen=True)
class Part:
    """One part of the process's state.

    Attributes:
        name: in messages.
        read: returns its value, which later changes do not reach.
        write: sets it to a value that `read` returned.
        same: whether the value is as before, given both; nothing is restored then.
        run: its value when a run begins; None where a run takes it as it is.
        told: whether a change within a run is named: what a library does when it is first imported is not.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = operator.eq
    run: Any = None
    told: bool = True


def _quietly(f: Callable[[], Any]) -> Any:
    """Return f(), or None where it raises."""
    try:
        return f()
    except (OSError, RuntimeError, ValueError, TypeError):
        return None


def _default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)  # "cpu" slows every call down


def _inference(on: bool) -> None:
    guard = torch.inference_mode(on)
    guard.__enter__()
    _guards.append(guard)


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _set_autocast(values: tuple[bool, ...]) -> None:
    for kind, on in zip(("cpu", "cuda"), values, strict=True):
        torch.set_autocast_enabled(kind, on)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _precision_owners() -> tuple[Any, ...]:
    b = torch.backends
    return b, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn  # type: ignore[attr-defined]


def _precision() -> tuple[Any, ...]:
    """Return torch's three older switches, and the newer one of every backend.

    Where the newer ones say something that the older cannot, torch raises at a look at these: None.
    """
    b = torch.backends
    older = (torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32)
    return (*map(_quietly, older), *(owner.fp32_precision for owner in _precision_owners()))


def _set_precision(values: tuple[Any, ...]) -> None:
    products, cuda, cudnn, *newer = values
    if None not in (products, cuda, cudnn):
        torch.set_float32_matmul_precision(products)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = cuda, cudnn
    for owner, value in zip(_precision_owners(), newer, strict=True):
        if owner.fp32_precision != value:
            owner.fp32_precision = value


def _kernels() -> tuple[bool, ...]:
    c, b = torch.backends.cudnn, torch.backends.cuda
    attention = b.flash_sdp_enabled(), b.mem_efficient_sdp_enabled(), b.math_sdp_enabled()
    return c.enabled, c.benchmark, c.deterministic, torch._C._get_mkldnn_enabled(), *attention


def _set_kernels(values: tuple[bool, ...]) -> None:
    c, b = torch.backends.cudnn, torch.backends.cuda
    c.enabled, c.benchmark, c.deterministic, mkldnn, flash, efficient, plain = values
    torch._C._set_mkldnn_enabled(mkldnn)
    b.enable_flash_sdp(flash)
    b.enable_mem_efficient_sdp(efficient)
    b.enable_math_sdp(plain)


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _torch_generators() -> tuple[bytes, ...]:
    """Return the states of the CPU's generator and, where CUDA is in use, of every GPU's."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
    return tuple(state.numpy().tobytes() for state in states)


def _set_torch_generators(states: tuple[bytes, ...]) -> None:
    first, *gpus = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states)
    torch.set_rng_state(first)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)


def _same_generators(before: tuple[bytes, ...], now: tuple[bytes, ...]) -> bool:
    return before == now[: len(before)]  # those of GPUs may have come into use


def _numpy_generator() -> Any:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return kind, np.asarray(keys).tobytes(), *rest


def _set_numpy_generator(state: Any) -> None:
    kind, keys, *rest = state
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))  # noqa: NPY002


def _set_filters(filters: list[Any]) -> None:
    warnings.simplefilter("default", append=True)  # lets every module forget what it has warned of
    warnings.filters = list(filters)


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _umask() -> int:
    old = os.umask(0o077)
    os.umask(old)
    return old


def _set_environment(before: Mapping[str, str]) -> None:
    for name in [n for n in os.environ if n not in before and n.startswith(WATCHED)]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _same_environment(before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    added = (name for name in now.keys() - before.keys() if name.startswith(WATCHED))
    return next(added, None) is None and all(now.get(name) == value for name, value in before.items())


def _looks(which: str = "rcParams") -> dict[str, Any]:
    """Return matplotlib's settings, empty before its import; its backend aside, which a look at it would choose."""
    found = getattr(sys.modules.get("matplotlib"), which, {}).copy()
    return {key: value for key, value in found.items() if not key.startswith("backend")}


def _set_looks(before: dict[str, Any]) -> None:
    sys.modules["matplotlib"].rcParams.update(before or _looks("rcParamsOrig"))


def _same_looks(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return now == (before or _looks("rcParamsOrig"))


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


#: in the order in which they are restored: leaving inference mode changes grad mode
PARTS = (
    Part("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype, run=torch.float32),
    Part("torch's default device", torch.get_default_device, _default_device, run=torch.device("cpu")),
    Part("torch's inference mode", torch.is_inference_mode_enabled, _inference, run=False),
    Part("torch's grad mode", torch.is_grad_enabled, torch.set_grad_enabled, run=True),
    Part("torch's autocast", _autocast, _set_autocast, run=(False, False)),
    Part("torch's anomaly detection", _anomaly, lambda v: torch.autograd.set_detect_anomaly(*v), run=(False, True)),
    Part("torch's threads", torch.get_num_threads, torch.set_num_threads, run=1),
    Part(
        "torch's deterministic kernels",
        _deterministic,
        lambda values: torch.use_deterministic_algorithms(values[0], warn_only=values[1]),
        run=(True, False),
    ),
    Part(
        "torch's filling of new memory",
        *_attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
        run=False,  # nothing reads it, and it costs 5 %
    ),
    Part(
        "torch's float32 precision",
        _precision,
        _set_precision,
        run=("highest", False, False, "none", "ieee", "none", "none", "none", "none", "none"),
    ),
    Part("torch's choice of kernels", _kernels, _set_kernels, run=(True, False, False, True, True, True, True)),
    Part("the handling of subnormal numbers", lambda: sys.float_info.min / 2 == 0, torch.set_flush_denormal, run=False),
    Part("torch's global generator", _torch_generators, _set_torch_generators, _same_generators),
    Part("numpy's global generator", _numpy_generator, _set_numpy_generator),
    Part("Python's global generator", random.getstate, random.setstate),
    Part("numpy's handling of errors", np.geterr, lambda value: np.seterr(**value)),
    Part("the warning filters", lambda: list(warnings.filters), _set_filters, told=False),
    Part("the working folder", lambda: _quietly(os.getcwd), os.chdir),
    Part("the umask", _umask, os.umask),
    Part("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
    Part("the environment", lambda: dict(os.environ), _set_environment, _same_environment, told=False),
    Part("the signal handlers", _handlers, _set_handlers, told=False),
    Part("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit, told=False),
    Part("sys.excepthook", *_attribute(sys, "excepthook"), operator.is_, told=False),
    Part("matplotlib's settings", _looks, _set_looks, _same_looks, told=False),
)


class ProcessState:
    """What `PARTS` were when this was made."""

    def __init__(self) -> None:
        self.values = [_quietly(part.read) for part in PARTS]

    def restore(self) -> list[Part]:
        """Restore every part that is no longer the same, and return those."""
        changed = []
        for part, before in zip(PARTS, self.values, strict=True):
            now = _quietly(part.read)
            if before is None or (now is not None and part.same(before, now)):
                continue
            with suppress(OSError, ValueError, RuntimeError, locale.Error):  # only the main thread may set a handler
                part.write(before)
            changed.append(part)
        return changed


def set_up(seed: int) -> None:
    """Give every part the value with which a run begins, the global generators that of the seed.

    The suite draws from generators of its own; a plug-in that draws from a global one has other numbers in each run.
    """
    for part in PARTS:
        if part.run is not None and _quietly(part.read) != part.run:
            part.write(part.run)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def contained(who: str, when: str = "", within_run: bool = False) -> Iterator[None]:
    """Around foreign code: restore what it changed, name it on standard error, and let it not end the program.

    What it prints on standard output goes to standard error: there a program may read our JSON.

    Args:
        who, when: subject of the message and the end of its first half.
        within_run: name only what no library changes at its import.

    Raises:
        Exited: it raised what is no Exception, such as SystemExit, and nobody asked to stop.
    """
    state = ProcessState()
    try:
        with _lent_streams():
            yield
    except BaseException as error:
        if isinstance(error, Exception) or asked_to_stop(error):
            raise
        what = f"{type(error).__name__}({', '.join(map(repr, error.args))})"
        raise Exited(f"{what} in {_origin(error)} would have ended the program; raise an Exception instead") from error
    finally:
        names = [part.name for part in state.restore() if part.told or not within_run]
        if names:
            restored = "they were restored" if len(names) > 1 else "it was restored"
            line = f"{who} changed {', '.join(names)}{when and ' ' + when}; {restored}"
            print(f"replicate: {harmless(line)}", file=sys.stderr)


def asked_to_stop(error: BaseException) -> bool:
    """Return whether a user or another program stops this one, in contrast to code that calls sys.exit, say."""
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, (Stopped, Interrupted))


def _origin(error: BaseException) -> str:
    """Return the function that the suite called and that raised, with its place."""
    ours = *(f"{Path(m.__file__ or '').parent}{os.sep}" for m in (sys.modules["replicate"], torch)), contextlib.__file__
    found, trace = "foreign code", error.__traceback__
    while trace is not None:
        code, line = trace.tb_frame.f_code, trace.tb_lineno
        trace = trace.tb_next
        if not code.co_filename.startswith(ours):
            found = f"{code.co_qualname} ({Path(code.co_filename).name}, line {line})"
            if "<" not in code.co_qualname.rpartition(".")[2]:
                break
    return found


class _LentBytes(io.RawIOBase):
    """A stream of bytes whose borrower cannot close it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self.target.write(data))

    def flush(self) -> None:
        self.target.flush()

    def fileno(self) -> int:
        return int(self.target.fileno())

    def close(self) -> None:
        """Do nothing."""


class _LentText(io.TextIOBase):
    """A stream of text whose borrower cannot close it."""

    def __init__(self, target: TextIO) -> None:
        self.target = target

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        self.target.flush()

    def fileno(self) -> int:
        return self.target.fileno()

    def isatty(self) -> bool:
        return self.target.isatty()

    def close(self) -> None:
        """Do nothing."""

    def reconfigure(self, **settings: Any) -> None:
        """Do nothing: the encoding is the owner's."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.target.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.target.errors

    @property
    def buffer(self) -> _LentBytes:
        return _LentBytes(self.target.buffer)


@contextmanager
def _lent_streams() -> Iterator[None]:
    """Inside, both standard streams are standard error, for C code and other programs too, and survive a close."""
    streams = sys.stdout, sys.stderr
    if sys.stderr is None:
        yield
        return
    _flush(*streams)
    kept = {fd: copy for fd in (1, 2) if (copy := _quietly(lambda fd=fd: os.dup(fd))) is not None}  # type: ignore[misc]
    if len(kept) == 2:
        os.dup2(2, 1)
    sys.stdout = sys.stderr = _LentText(sys.stderr)
    try:
        yield
    finally:
        _flush(sys.stdout, sys.stderr, sys.__stdout__, *streams)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)
        for fd, copy in kept.items():
            with suppress(OSError):
                os.dup2(copy, fd)
                os.close(copy)
        sys.stdout, sys.stderr = streams


def _flush(*streams: Any) -> None:
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
