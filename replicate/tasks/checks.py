"""What a task says of its data is checked when it is loaded: a wrong number in them would become one in the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from replicate.errors import UsageError
from replicate.model import DataInfo, Domain
from replicate.tasks.base import MAX_EXAMPLES, Task, TaskEntry

SPLITS = ("train", "valid", "test")
#: numbers looked at together, so that no copy of large data is made
PIECE = 1 << 16
#: a column of fewer steps of float32 than this has lost its values to rounding
FEWEST_STEPS = 1000
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_task(name: str, entry: TaskEntry, found: object) -> Task:
    """Return what `entry.load` gave, if it is a task whose data are what it says of them.

    Args:
        name: of the task's entry point.

    Raises:
        UsageError: the first thing that is wrong, in one line: the split, row, column and value where it is one number.
    """
    problem = next(_problems(name, entry, found), "")
    if problem:
        raise UsageError(f"task {name!r} cannot be used: {problem}.")
    assert isinstance(found, Task)
    return found


def _problems(name: str, entry: TaskEntry, task: object) -> Iterator[str]:
    """Iterate over what is wrong; what follows a problem may rely on it being none."""
    if not isinstance(task, Task):
        yield f"its load gives a {type(task).__name__}, not a replicate.tasks.base.Task"
        return
    if task.name != name:
        yield f"its Task is named {task.name!r}; give it the name of the entry point"
    yield from _info_problems(task.info)
    if entry.info is not None and entry.info != task.info:
        yield f"its entry declares {entry.info}, and its Task has {task.info}"
    for split in SPLITS:
        yield from _shape_problems(split, getattr(task, split), task.info)
    for split in SPLITS:
        free = split == "train" and task.redraw is not None  # it holds the parameters of a draw
        yield from _value_problems(split, getattr(task, split), task.info, free)
    if task.info.domain == "continuous":
        yield from _column_problems(task.train)
    if task.labels is not None:
        yield from _label_problems(task)
    if task.redraw is not None and not callable(task.redraw):
        yield f"redraw is a {type(task.redraw).__name__}; it must be a function"
    dim = task.info.dim if task.density is None else getattr(task.density, "dim", None)
    if dim != task.info.dim:
        yield f"its density has dim {dim}, and its data have {task.info.dim} columns"
    if task.density is None and len(task.test) > MAX_EXAMPLES:
        most = f"a record keeps the likelihoods of at most {MAX_EXAMPLES:,}"
        yield f"test has {len(task.test):,} rows, and {most}; test on so many of them"


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _info_problems(info: object) -> Iterator[str]:
    if not isinstance(info, DataInfo):
        yield f"its info is a {type(info).__name__}, not a replicate.model.DataInfo"
        return
    if info.domain not in get_args(Domain):
        yield f"info.domain is {info.domain!r}; it must be one of {', '.join(get_args(Domain))}"
    if not _is_count(info.dim):
        yield f"info.dim is {info.dim!r}; it must be a whole number of columns, 1 or more"
    right = {"continuous": info.levels is None, "bits": info.levels == 2, "levels": _is_count(info.levels, 2)}
    if not right[info.domain]:
        wanted = {"continuous": "None", "bits": "2", "levels": "a whole number of levels, 2 or more"}[info.domain]
        yield f"info.levels is {info.levels!r}; for {info.domain} it must be {wanted}"
    if info.image is not None:
        sides = info.image if isinstance(info.image, (tuple, list)) else ()
        if len(sides) != 2 or not all(map(_is_count, sides)) or math.prod(sides) != info.dim:
            yield f"info.image is {info.image!r}; height times width must be the {info.dim} columns"


def _shape_problems(split: str, x: object, info: DataInfo) -> Iterator[str]:
    if not isinstance(x, Tensor):
        yield f"{split} is a {type(x).__name__}, not a tensor"
        return
    if x.dtype == torch.float64:
        how = "standardise in double where the numbers are large, then make them float32"
        yield f"{split} is float64, of which runs in float32 would keep seven digits: {how}"
    elif x.dtype != torch.float32:
        yield f"{split} is {str(x.dtype).removeprefix('torch.')}; it must be float32"
    if x.layout != torch.strided or x.device.type != "cpu" or x.requires_grad:
        yield f"{split} must be a dense tensor on the CPU that needs no gradient"
    if x.ndim != 2 or x.shape[1] != info.dim:
        yield f"{split} has shape {tuple(x.shape)}; it must be (rows, {info.dim}), as info.dim says"
    if not len(x):
        yield f"{split} has no rows"


def _value_problems(split: str, x: Tensor, info: DataInfo, free: bool) -> Iterator[str]:
    """Find the first number that is not finite or, unless it is free, not of the domain."""
    levels = None if free else info.levels
    rows = max(1, PIECE // x.shape[1])
    for start in range(0, len(x), rows):
        piece = x[start : start + rows]
        low, high = (float(v) for v in piece.aminmax())  # nan where there is a nan
        right = math.isfinite(low) and math.isfinite(high)
        if levels is not None:
            right = right and low >= 0 and high < levels and not bool(piece.frac().any())
        if right:
            continue
        wrong = ~piece.isfinite()
        if levels is not None:
            wrong |= (piece < 0) | (piece >= levels) | (piece.frac() != 0)
        row, column = (int(i) for i in wrong.nonzero()[0])
        allowed = "finite" if levels is None else "0 or 1" if levels == 2 else f"a whole number from 0 to {levels - 1}"
        where = f"{split}, row {start + row}, column {column} (counted from 0)"
        yield f"{where} is {float(piece[row, column]):g}; it must be {allowed}"


def _column_problems(train: Tensor) -> Iterator[str]:
    """Find columns of real numbers without a density: constant ones, and those that float32 has rounded away."""
    low, high = train.amin(0).double(), train.amax(0).double()  # aminmax(dim=0) takes eight times as long
    span, size = high - low, torch.maximum(low.abs(), high.abs())
    constant = (span == 0).nonzero().flatten().tolist()
    if constant:
        shown = ", ".join(map(str, constant[:10])) + (", .." if len(constant) > 10 else "")
        yield f"constant columns have no density, and train has {shown} (counted from 0); drop them"
    steps = span / (torch.finfo(torch.float32).eps * size)
    coarse = (steps < FEWEST_STEPS).nonzero().flatten().tolist()
    if coarse:
        at = coarse[0]
        step = "take its mean off and divide by its standard deviation in double, then make it float32"
        what = f"column {at} of train (counted from 0) goes from {float(low[at]):.9g} to {float(high[at]):.9g}"
        yield f"{what}, which is {float(steps[at]):.0f} steps of float32: {step}"


def _label_problems(task: Task) -> Iterator[str]:
    labels = task.labels
    if not isinstance(labels, (tuple, list)) or len(labels) != len(SPLITS):
        yield "labels must be three tensors, of train, valid and test"
        return
    for split, found in zip(SPLITS, labels, strict=True):
        if not isinstance(found, Tensor) or found.dtype not in _WHOLE:
            yield f"the labels of {split} must be a tensor of whole numbers"
        elif found.shape != ((rows := len(getattr(task, split))),):
            yield f"the labels of {split} have shape {tuple(found.shape)}; it must be ({rows},), one a row"
        elif int(found.min()) < 0:
            yield f"a label of {split} is {int(found.min())}; it must be 0 or more"
