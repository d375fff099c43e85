"""Check what a model answers, once, where it enters the suite.

A wrong shape need not raise: values (n, 1) against (n,) broadcast to (n, n) and give another number. So each method of
the contract is checked at every call for type, shape and dtype, which costs a few microseconds and reads no value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from replicate.errors import ModelError
from replicate.model import CAPABILITIES, DataInfo, Model
from replicate.validation import NAME, brief, did_you_mean

#: what each capability needs beside `Model` itself
NEEDED = {
    "log_prob": ("log_prob",),
    "importance_weights": ("log_weights",),
    "energy": ("energy",),
    "annealing": ("base_log_z", "base_sample", "anneal"),
    "diffusion": ("sde", "score_at"),
    "sample": ("sample",),
}
#: a method's number of arguments, and the shape of its answer to D and them
SHAPES: dict[str, tuple[int, Callable[..., tuple[int, ...]]]] = {
    "loss": (2, lambda dim, batch, generator: ()),
    "validation_loss": (2, lambda dim, batch, generator: ()),
    "log_prob": (1, lambda dim, x: x.shape[:-1]),
    "log_weights": (3, lambda dim, x, k, generator: (*x.shape[:-1], k)),
    "energy": (1, lambda dim, x: x.shape[:-1]),
    "score": (1, lambda dim, x: x.shape),
    "score_at": (2, lambda dim, x, t: x.shape),
    "sample": (2, lambda dim, n, generator: (n, dim)),
    "base_sample": (2, lambda dim, n, generator: (n, dim)),
}
#: methods whose answer is no single tensor, with their numbers of arguments
OTHERS = {"anneal": 4, "base_log_z": 0, "samplers": 0}
METHODS = (*SHAPES, *OTHERS)


def guarded(model: object, info: DataInfo) -> Model:
    """Check a built model's declarations and return it; from now on every answer of its methods is checked.

    The model keeps its name, type, bits and state: its class becomes a subclass of the same name.

    Raises:
        ModelError: it is no model, or it cannot do what it declares.
    """
    if not isinstance(model, Model):
        raise ModelError(f"build returned {_found(model)}; it must return a replicate.model.Model")
    if problem := _problem(model):
        raise ModelError(f"{type(model).__name__}{problem}")
    kind = type(model)
    names = [name for name in METHODS if hasattr(kind, name)]
    if any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1]):
        bound = names  # the class's own hook may refuse a subclass that it does not know
    else:
        model.__class__ = _subclass(kind, names, info.dim)
        bound = [name for name in METHODS if name in vars(model)]  # these hide the class's
    for name in bound:
        vars(model)[name] = partial(_own, model, info.dim, name, getattr(model, name))
    return model


def _subclass(kind: type[Model], names: Sequence[str], dim: int) -> type[Model]:
    """Return a subclass of the same name whose methods check their answers."""

    def checked(name: str) -> Callable[..., Any]:
        def method(self: Model, *args: Any, **kwargs: Any) -> Any:
            return _answer(self, dim, name, getattr(super(here, self), name), args, kwargs)

        return method

    words = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    space = {**words, **{name: checked(name) for name in names}}
    here: type[Model] = type(kind)(kind.__name__, (kind,), space)  # type: ignore[misc]
    return here


def _problem(model: Model) -> str:
    """Return what is wrong with a model's declarations, as the end of a sentence that begins with its class."""
    has, kind = model.capabilities, type(model)
    if not isinstance(has, (set, frozenset)):
        return f".capabilities is {brief(has)}; it must be a frozenset of names"
    for name in has:
        if name not in CAPABILITIES:
            hint = did_you_mean(name, CAPABILITIES) or f"; known are {', '.join(CAPABILITIES)}"
            return f".capabilities has {brief(name)}, which the suite does not know{hint}"
        missing = [n for n in NEEDED.get(name, ()) if not _has(model, n)]
        if name == "score" and not has & {"log_prob", "energy"} and not _has(model, "score"):
            missing = ["score"]
        if missing:
            return f" declares the capability {name!r} and has no {' and no '.join(missing)} of its own"
    if not _is_count(model.nfe):
        return f".nfe is {brief(model.nfe)}; it must be a number of network evaluations"
    inside = {*model._modules, *model._parameters, *model._buffers}
    for name in sorted(inside & {n for n in METHODS if hasattr(kind, n)}):
        return f" has a part named {name}, which its method of that name hides; give the part another name"
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            return f" has a parameter {name} without a shape; the suite needs all shapes when the model is built"
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            found = _found(value)
            return f" keeps {found} as {name} in its state, which is saved as dense tensors; keep it in a buffer"
    return ""


def _is_count(value: object) -> bool:
    """Whether a value is a number of something; a mean of such numbers, too."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def _has(model: Model, name: str) -> bool:
    """Whether a model has an attribute of its own, beside what `Model` only declares."""
    if not hasattr(Model, name):
        return hasattr(model, name)
    return name in vars(model) or getattr(type(model), name) is not getattr(Model, name)


def _own(model: Model, dim: int, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method that was set on the instance."""
    return _answer(model, dim, name, method, args, kwargs)


def _answer(model: Model, dim: int, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return a method's answer, checked where it was called as the contract has it.

    A model may call its own methods with further arguments, for other answers.
    """
    out = method(*args, **kwargs)
    if name in SHAPES:
        arity, shape = SHAPES[name]
        if len(args) == arity and not kwargs:
            require(model, name, out, shape(dim, *args))
    elif len(args) == OTHERS[name] and not kwargs:
        if name == "anneal":
            _require_step(model, out, args[0])
        elif name == "base_log_z":
            _require_number(model, out)
        else:
            return _wrapped(model, dim, out)
    return out


def require(model: Model, method: str, out: object, shape: tuple[int, ...]) -> None:
    """Check one tensor that a method returned.

    Raises:
        ModelError: it is no real floating point tensor of that shape.
    """
    if not isinstance(out, Tensor) or out.shape != shape or not out.dtype.is_floating_point:
        raise _wrong(model, method, out, f"a real floating point tensor of shape {tuple(shape)}")


def _wrong(model: Model, method: str, out: object, expected: str) -> ModelError:
    return ModelError(f"{type(model).__name__}.{method} returned {_found(out)}; expected {expected}")


def _found(value: object) -> str:
    """Return what a value is, in words."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) < 5:
        inside = ", ".join(_found(v) if isinstance(v, Tensor) else type(v).__name__ for v in value)
        return f"a {type(value).__name__} of ({inside})"
    if value is None:
        return "None"
    return " ".join(f"a {type(value).__name__}, {brief(value)}".split())  # that of an array has lines


def _require_step(model: Model, out: object, x: Tensor) -> None:
    if not isinstance(out, tuple) or len(out) != 2:
        raise _wrong(model, "anneal", out, f"log weight increments {tuple(x.shape[:-1])} and states {tuple(x.shape)}")
    require(model, "anneal (increments)", out[0], x.shape[:-1])
    require(model, "anneal (states)", out[1], x.shape)


def _require_number(model: Model, out: object) -> None:
    if not isinstance(out, Real) or not math.isfinite(out):
        raise _wrong(model, "base_log_z", out, "a finite number")


def _wrapped(model: Model, dim: int, out: object) -> Mapping[str, Any]:
    """Return further samplers whose answers are checked too."""
    if not isinstance(out, Mapping):
        raise _wrong(model, "samplers", out, "a mapping from names to samplers")
    for name, sampler in out.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or not callable(sampler):
            raise _wrong(
                model, "samplers", {name: sampler}, "names of letters, digits, dashes and dots, with callables"
            )
    return {name: partial(_drawn, model, dim, name, sampler) for name, sampler in out.items()}


def _drawn(
    model: Model, dim: int, name: str, sampler: Callable[..., Any], n: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    out, method = sampler(n, generator), f"samplers()[{name!r}]"
    if not isinstance(out, tuple) or len(out) != 2:
        raise _wrong(model, method, out, f"samples of shape {(n, dim)} and a number of network evaluations")
    x, nfe = out
    require(model, method, x, (n, dim))
    if not _is_count(nfe):
        raise _wrong(model, method, nfe, "a number of network evaluations beside the samples")
    return x, nfe
