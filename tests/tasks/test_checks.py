"""A task's data are what it says of them, or one line names the split, the row, the column and the value."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from replicate.errors import UsageError
from replicate.model import DataInfo, LogLikelihood
from replicate.registry import model_entry
from replicate.runs.experiment import pack_examples, unpack_examples
from replicate.runs.spec import make_spec
from replicate.tasks import loading
from replicate.tasks.base import MAX_EXAMPLES, Task, TaskEntry
from replicate.tasks.checks import check_task
from replicate.tasks.densities import GaussianMixture
from replicate.tasks.loading import TASKS, forget_tasks, load_task, unsupported

Change = Callable[[Task], object]


def made(domain: str = "bits", dim: int = 6, rows: int = 40) -> Task:
    """A sound small task; its continuous columns are standard normal."""
    g = torch.Generator().manual_seed(0)
    levels = {"bits": 2, "levels": 5, "continuous": None}[domain]
    parts = []
    for _ in range(3):
        x = torch.randn(rows, dim, generator=g) if levels is None else torch.rand(rows, dim, generator=g).mul(levels)
        parts.append(x if levels is None else x.floor())
    labels = tuple(torch.arange(rows) % 3 for _ in range(3))
    return Task("mine", "made up", DataInfo(dim, domain, levels), *parts, labels=labels)  # type: ignore[arg-type]


def entry_of(task: object) -> TaskEntry:
    return TaskEntry("made up", lambda: task, "data")  # type: ignore[arg-type, return-value]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[TaskEntry], None]:
    """Register an entry as the task "mine"."""
    forget_tasks()
    TASKS.found  # noqa: B018  # loads the others first

    def registered(entry: TaskEntry) -> None:
        forget_tasks()
        monkeypatch.setitem(TASKS.found, "mine", entry)

    return registered


def put(split: str, row: int, column: int, value: float) -> Change:
    def changed(task: Task) -> Task:
        x = getattr(task, split).clone()
        x[row, column] = value
        return replace(task, **{split: x})

    return changed


def given(**fields: Any) -> Change:
    return lambda task: replace(task, **fields)


def info(**fields: Any) -> Change:
    return lambda task: replace(task, info=replace(task.info, **fields))


def each(change: Callable[[torch.Tensor], Any], split: str = "train") -> Change:
    return lambda task: replace(task, **{split: change(getattr(task, split))})


@pytest.mark.parametrize("domain", ["bits", "levels", "continuous"])
@pytest.mark.parametrize("dim", [1, 3, 6])
def test_sound_data_pass_as_they_are(domain: str, dim: int) -> None:
    task = made(domain, dim)
    assert check_task("mine", entry_of(task), task) is task


NAN, INF = float("nan"), float("inf")
#: what is changed in sound data, and what the line says
BAD: list[tuple[str, Change, str]] = [
    # values of the domain
    ("bits", each(lambda x: 255 * x), "it must be 0 or 1"),
    ("bits", each(lambda x: 2 * x - 1), "is -1; it must be 0 or 1"),
    ("bits", each(lambda x: x / 2), "is 0.5; it must be 0 or 1"),
    ("bits", put("test", 7, 2, 2), "test, row 7, column 2 (counted from 0) is 2; it must be 0 or 1"),
    (
        "levels",
        put("valid", 39, 5, 5),
        "valid, row 39, column 5 (counted from 0) is 5; it must be a whole number from 0",
    ),
    ("levels", put("train", 0, 0, 1.5), "train, row 0, column 0 (counted from 0) is 1.5; it must be a whole number"),
    ("levels", put("train", 3, 1, -1), "is -1; it must be a whole number from 0 to 4"),
    *(
        (domain, put(split, 11, 4, bad), f"{split}, row 11, column 4 (counted from 0) is {bad:g}; it must be")
        for domain, split, bad in [
            ("continuous", "train", NAN),
            ("continuous", "valid", INF),
            ("continuous", "test", -INF),
            ("bits", "train", NAN),
            ("bits", "test", INF),
            ("levels", "valid", NAN),
        ]
    ),
    # shapes and types
    ("bits", each(lambda x: x.bool()), "train is bool; it must be float32"),
    ("levels", each(lambda x: x.long(), "test"), "test is int64; it must be float32"),
    ("continuous", each(lambda x: x.half()), "train is float16; it must be float32"),
    ("continuous", each(lambda x: x.double() + 1.6e9), "standardise in double"),
    ("bits", each(lambda x: x.numpy()), "train is a ndarray, not a tensor"),
    ("bits", each(lambda x: None), "train is a NoneType, not a tensor"),
    ("bits", each(lambda x: x[0]), "train has shape (6,); it must be (rows, 6)"),
    ("bits", each(lambda x: x[:, None], "valid"), "valid has shape (40, 1, 6); it must be (rows, 6)"),
    ("bits", each(lambda x: x[:, :5], "test"), "test has shape (40, 5); it must be (rows, 6)"),
    ("bits", each(lambda x: x[:0], "valid"), "valid has no rows"),
    ("bits", each(lambda x: x.to_sparse()), "train must be a dense tensor on the CPU"),
    ("bits", each(lambda x: x.clone().requires_grad_()), "that needs no gradient"),
    # columns of real numbers
    ("continuous", each(lambda x: x * (torch.arange(6) != 2)), "constant columns have no density, and train has 2 "),
    ("continuous", each(lambda x: x * 0 + 1), "train has 0, 1, 2, 3, 4, 5 (counted from 0); drop them"),
    ("continuous", each(lambda x: (x.double() + 1.6e9).float()), "constant columns have no density"),
    ("continuous", each(lambda x: (x.double() * 1000 + 1.6e9).float()), "steps of float32: take its mean off and"),
    # what it says of itself
    ("bits", lambda task: {"train": task.train}, "its load gives a dict, not a replicate.tasks.base.Task"),
    ("bits", lambda task: None, "its load gives a NoneType"),
    ("bits", given(name="yours"), "its Task is named 'yours'; give it the name of the entry point"),
    ("bits", given(info=None), "its info is a NoneType, not a replicate.model.DataInfo"),
    ("bits", info(dim=7), "it must be (rows, 7), as info.dim says"),
    ("bits", info(dim=0), "info.dim is 0; it must be a whole number of columns"),
    ("bits", info(dim=6.0), "info.dim is 6.0"),
    ("bits", info(domain="binary"), "info.domain is 'binary'; it must be one of continuous, levels, bits"),
    ("bits", info(levels=None), "info.levels is None; for bits it must be 2"),
    ("levels", info(levels=None), "for levels it must be a whole number of levels, 2 or more"),
    ("continuous", info(levels=3), "for continuous it must be None"),
    ("bits", info(image=(2, 2)), "info.image is (2, 2); height times width must be the 6 columns"),
    ("bits", info(image=(3, 2, 1)), "info.image is (3, 2, 1)"),
    ("bits", info(image=6), "info.image is 6;"),
    ("bits", info(image=(-2, -3)), "info.image is (-2, -3)"),
    # labels, the density, the draw
    ("bits", given(labels=(torch.arange(40), torch.arange(40))), "labels must be three tensors"),
    ("bits", given(labels=torch.arange(3)), "labels must be three tensors"),
    ("bits", given(labels=(torch.arange(40), torch.arange(39), torch.arange(40))), "labels of valid have shape (39,)"),
    ("bits", given(labels=(torch.arange(40).float(),) * 3), "labels of train must be a tensor of whole numbers"),
    ("bits", given(labels=([0] * 40,) * 3), "labels of train must be a tensor of whole numbers"),
    ("bits", given(labels=(torch.eye(40).long(),) * 3), "labels of train have shape (40, 40)"),
    ("bits", given(labels=(-torch.ones(40).long(),) * 3), "a label of train is -1; it must be 0 or more"),
    ("continuous", given(density=object()), "its density has dim None, and its data have 6 columns"),
    ("bits", given(redraw=3), "redraw is a int; it must be a function"),
]


@pytest.mark.parametrize(("domain", "change", "line"), BAD, ids=[line[:40] for *_, line in BAD])
def test_a_task_that_is_not_what_it_says_is_one_line_before_anything_is_trained(
    domain: str, change: Change, line: str, register: Callable[[TaskEntry], None]
) -> None:
    register(entry_of(change(made(domain))))
    with pytest.raises(UsageError) as told:
        make_spec("marginals", "mine")
    assert line in str(told.value)
    assert str(told.value).startswith("task 'mine' cannot be used: ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "error", [ValueError("no\nluck"), FileNotFoundError(2, "No such file", "x.csv"), SystemExit(3)]
)
def test_a_task_whose_code_fails_is_one_line(error: BaseException, register: Callable[[TaskEntry], None]) -> None:
    def load() -> Task:
        raise error

    register(TaskEntry("fails", load, "data"))
    with pytest.raises(UsageError) as told:
        make_spec("marginals", "mine")
    assert str(told.value).startswith(f"task 'mine' cannot be loaded: {type(error).__name__}")
    assert "\n" not in str(told.value)


def test_an_entry_declares_the_info_of_its_data(register: Callable[[TaskEntry], None]) -> None:
    task = made()
    register(replace(entry_of(task), info=DataInfo(6, "bits", 2, (2, 3))))
    with pytest.raises(UsageError, match="its entry declares DataInfo"):
        load_task("mine")


def test_parameters_of_a_draw_need_only_be_finite(register: Callable[[TaskEntry], None]) -> None:
    task = replace(made(), redraw=lambda rows, generator: rows.round())
    register(entry_of(each(lambda x: x / 2)(task)))
    load_task("mine")
    register(entry_of(put("train", 1, 1, NAN)(task)))
    with pytest.raises(UsageError, match="train, row 1, column 1"):
        load_task("mine")


def test_a_bad_number_deep_in_large_data_is_found_by_its_row() -> None:
    x = torch.zeros(3_000, 100)
    x[:, 0] = torch.arange(3_000) % 2
    task = Task("mine", "", DataInfo(100, "bits", 2), x, x[:5], x[:5])
    bad = put("train", 2_345, 67, 3)(task)
    with pytest.raises(UsageError, match=r"train, row 2345, column 67 \(counted from 0\) is 3;"):
        check_task("mine", entry_of(bad), bad)


def test_the_check_runs_once_a_process_and_costs_little(
    monkeypatch: pytest.MonkeyPatch, register: Callable[[TaskEntry], None]
) -> None:
    calls = []
    monkeypatch.setattr(loading, "check_task", lambda *words: calls.append(words[0]) or check_task(*words))
    register(entry_of(made()))
    for _ in range(3):
        load_task("mine")
    assert calls == ["mine"]
    x = (torch.arange(20_000 * 64).view(20_000, 64) % 2).float()
    large = Task("mine", "", DataInfo(64, "bits", 2), x, x[:9], x[:9])
    begin = time.process_time()
    check_task("mine", entry_of(large), large)
    assert time.process_time() - begin < 0.25  # about 0.02 on an idle core


# -- sizes


def test_likelihoods_of_25000_test_rows_are_kept() -> None:
    values = torch.linspace(-90, -80, 25_000, dtype=torch.float64)
    found = unpack_examples(pack_examples(LogLikelihood(values, "exact")))
    assert len(found) == 25_000
    assert abs(found - values.numpy()).max() < 1e-3


@pytest.mark.parametrize(("rows", "fits"), [(25_000, True), (MAX_EXAMPLES, True), (MAX_EXAMPLES + 1, False)])
def test_more_test_rows_than_a_record_keeps_are_refused_when_the_spec_is_made(
    rows: int, fits: bool, register: Callable[[TaskEntry], None]
) -> None:
    task = made(dim=2)
    register(entry_of(replace(task, test=task.train[:1].expand(rows, 2).clone(), labels=None)))
    if fits:
        assert make_spec("marginals", "mine").task == "mine"
        return
    with pytest.raises(UsageError, match=r"test has 100,001 rows, and a record keeps .* at most 100,000"):
        make_spec("marginals", "mine")


# -- one and three dimensions


def line(dim: int) -> Task:
    """Two Gaussians, whose density is known."""
    means = torch.stack([-2 * torch.ones(dim), 2 * torch.ones(dim)])
    density = GaussianMixture(means, torch.eye(dim, dtype=torch.float64), torch.ones(2))
    g = torch.Generator().manual_seed(0)
    train, valid, test = (density.sample(n, g) for n in (400, 100, 100))
    return Task("mine", "two", DataInfo(dim, "continuous"), train, valid, test, density=density)


@pytest.mark.parametrize(("dim", "reason"), [(1, "it needs data of 2 dimensions or more"), (2, None), (3, None)])
@pytest.mark.parametrize("model", ["realnvp", "spline-flow"])
def test_couplings_are_refused_on_one_dimension_when_the_spec_is_made(
    model: str, dim: int, reason: str | None, register: Callable[[TaskEntry], None]
) -> None:
    for task in (line(dim), made("bits", dim), made("levels", dim)):
        assert unsupported(model_entry(model), task) == reason
    register(entry_of(line(dim)))
    if reason is None:
        make_spec(model, "mine")
        return
    with pytest.raises(UsageError, match=f"{model} cannot run on mine: {reason}"):
        make_spec(model, "mine")
