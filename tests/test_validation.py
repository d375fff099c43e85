"""The validation layer: every problem of an input is named, in words, and one message tells them all."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from fuzz.examples import EXPERIMENT, HISTORY, PLOT, RECORDS, RUN, TEXT_OF_RECORDS, record_of
from hypothesis import given
from hypothesis import strategies as st

from replicate.errors import RecordError, UsageError
from replicate.report.records import read_measurements
from replicate.runs.record import check_record, content_sha256, parse_failure, parse_record, seal
from replicate.validation import (
    MOST_LISTED,
    Problems,
    Range,
    Rule,
    brief,
    check_json,
    check_table,
    parse_settings,
    rules_of,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Toy:
    """A field of every type that a table may have."""

    name: str
    steps: int
    rate: float
    fast: bool
    either: float | str
    choice: Literal["a", "b"]
    pair: tuple[float, float]
    texts: tuple[str, ...]
    more: Mapping[str, Any]
    maybe: float | None = None


RULES = rules_of(Toy, ranges={"steps": Range(1, 10), "rate": Range(above=0), "pair": Range(low=0, below=1)})
GOOD: dict[str, Any] = {
    "name": "toy",
    "steps": 3,
    "rate": 1,
    "fast": True,
    "either": "near one",
    "choice": "a",
    "pair": [0.5, 0],
    "texts": ["x"],
    "more": {},
}


def problems_of(table: object, rules: Mapping[str, Rule] = RULES) -> list[str]:
    found: list[str] = []
    check_table(table, rules, "the toy", lambda _, problem: found.append(problem))
    return found


def test_a_table_that_fits_its_dataclass_has_no_problem() -> None:
    assert problems_of(GOOD) == []
    assert problems_of({**GOOD, "maybe": None, "either": 2, "pair": (0.1, 0.2)}) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("name", 3, "name of the toy is 3; it must be text"),
        ("name", " ", "name of the toy is empty"),
        ("name", "\x1b[31m", r"name of the toy is '\x1b[31m'; it must be text without control characters"),
        ("steps", 2.5, "steps of the toy is 2.5; it must be a whole number"),
        ("steps", True, "steps of the toy is True; it must be a whole number"),
        ("steps", 11, "steps of the toy is 11; it must be from 1 to 10"),
        ("rate", "fast", "rate of the toy is 'fast'; it must be a number"),
        ("rate", 0.0, "rate of the toy is 0.0; it must be above 0"),
        ("rate", float("inf"), "rate of the toy is inf; it must be above 0 and finite"),
        ("rate", 2**63, f"rate of the toy is {2**63}; it must be below 2^63 in size"),
        ("rate", 10**100, "rate of the toy is a whole number of 333 bits; it must be below 2^63 in size"),
        ("fast", 1, "fast of the toy is 1; it must be true or false"),
        ("either", None, "either of the toy is None; it must be a number or text"),
        ("either", float("nan"), "either of the toy is nan; it must be finite"),
        ("choice", "c", "choice of the toy is 'c'; it must be one of a, b"),
        ("choice", [], "choice of the toy is []; it must be one of a, b"),
        ("pair", [1], "pair of the toy is [1]; it must be a list of 2 numbers"),
        ("pair", [0, "x"], "pair of the toy is [0, 'x']; it must be a list of 2 numbers"),
        ("pair", [0, 1], "pair of the toy is [0, 1]; it must be a list of 2 numbers, each 0 or more and below 1"),
        ("texts", "x", "texts of the toy is 'x'; it must be a list of texts"),
        ("more", [], "more of the toy is []; it must be a table"),
        ("maybe", "x", "maybe of the toy is 'x'; it must be a number"),
    ],
)
def test_each_wrong_value_is_named_with_what_it_must_be(key: str, value: Any, words: str) -> None:
    assert problems_of({**GOOD, key: value}) == [words]


def test_unknown_and_missing_keys_are_named_with_the_key_that_was_meant() -> None:
    table = {k: v for k, v in GOOD.items() if k != "steps"} | {"stpes": 3, 5: 6}
    assert problems_of(table) == [
        "the toy has an unknown key 'stpes'; did you mean steps?",
        "the toy has an unknown key 5",
        "the toy has no steps",
    ]
    assert problems_of([]) == ["the toy is []; it must be a table"]


def test_one_message_tells_every_problem_with_its_place_and_no_endless_list() -> None:
    problems = Problems()
    problems.refuse(ValueError)
    problems.add("it is wrong", "toy.toml, line 3")
    problems.add("it is missing")
    with pytest.raises(UsageError) as caught:
        problems.refuse(UsageError)
    assert str(caught.value) == "toy.toml, line 3: it is wrong\nit is missing"
    for _ in range(MOST_LISTED):
        problems.add("again")
    with pytest.raises(UsageError) as caught:
        problems.refuse(UsageError)
    assert str(caught.value).splitlines()[-1] == "and 2 more"
    assert len(str(caught.value).splitlines()) == MOST_LISTED + 1


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text() | st.just(5000).map(lambda n: 10**n) | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_is_shown_in_one_short_printable_line(value: Any) -> None:
    assert brief(value).isprintable()
    assert len(brief(value)) <= 120


def test_free_json_is_refused_where_it_could_not_be_kept_or_shown() -> None:
    found: list[str] = []
    bad = {"a": [1, float("nan")], "b c": {"\x1b": 1}, "d": {1, 2}, "e": "\ud800"}
    check_json(bad, "provenance", lambda _, problem: found.append(problem))
    assert sorted(found) == [
        "a key of provenance['b c'] is '\\x1b'; it must be text without control characters",
        "provenance.a[1] is nan; it must be finite",
        "provenance.d is {1, 2}; it must be a number, text, true or false",
        "provenance.e is '\\ud800'; it must be text without control characters",
    ]
    found.clear()
    deep: Any = 1
    for _ in range(10_000):
        deep = [deep]
    check_json(deep, "provenance", lambda _, problem: found.append(problem))
    assert len(found) == 1
    assert "nested more than" in found[0]


# -- the options of a command line


def test_settings_are_json_where_they_parse_and_text_where_not() -> None:
    pairs = ["lr=1e-3", "optimizer=sgd", "betas=[0.5, 0.9]", "fast=true", 'name="x=y"', " steps = 3", "mode="]
    assert parse_settings(pairs) == {
        "lr": 1e-3,
        "optimizer": "sgd",
        "betas": [0.5, 0.9],
        "fast": True,
        "name": "x=y",
        "steps": 3,
        "mode": "",
    }
    assert parse_settings([]) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((".001", 0.001), ("5.", 5.0), ("-.5", -0.5), ("+.5e-3", 0.0005), ("1e-3", 0.001), ("1.E5", 1e5)),
        *(("+1", 1), ("1_000", 1000), ("007", 7), ("1_000.5", 1000.5), (" .5 ", 0.5), ("-1", -1)),
        *((text, text) for text in ("1__0", "_1", "1_", ".", "+", "e5", "0x10", "1,5", "1.2.3", "٣", "inf", "--1")),
    ],
)
def test_a_number_is_read_as_people_write_it(text: str, value: object) -> None:
    (found,) = parse_settings([f"lr={text}"]).values()
    assert found == value
    assert type(found) is type(value)


def test_every_pair_that_is_none_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(["lr", "=3", "steps=1", "steps=2", " =4"])
    assert str(caught.value).splitlines() == [
        "--set 'lr' is not of the form key=value.",
        "--set '=3' is not of the form key=value.",
        "--set 'steps' is given twice; give it once.",
        "--set ' =4' is not of the form key=value.",
    ]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_a_setting_that_no_parser_can_hold_is_text(text: str) -> None:
    assert parse_settings([f"lr={text}"]) == {"lr": text}


# -- records


@pytest.mark.parametrize("record", RECORDS)
def test_a_whole_record_is_itself_in_memory_and_through_bytes(record: dict[str, Any]) -> None:
    assert check_record(record) is record
    assert check_record(record, sealed=True) is record
    assert parse_record(json.dumps(record).encode()) == record
    unsealed = {k: v for k, v in record.items() if k != "sha256"}
    assert check_record(unsealed) is unsealed
    assert seal(unsealed) == record
    assert content_sha256(record) == content_sha256(unsealed) == record["sha256"]


def test_the_seal_does_not_depend_on_the_order_of_keys_or_on_tuples() -> None:
    record = copy.deepcopy(RECORDS[0])
    record["history"]["train"] = [tuple(pair) for pair in record["history"]["train"]]
    assert content_sha256(dict(reversed(record.items()))) == record["sha256"]


@pytest.mark.parametrize(
    ("which", "path", "value", "words"),
    [
        (0, ("run_id",), "0" * 64, "which is not the sha256 of the spec"),
        (0, ("run_id",), "short", "run_id of the record is 'short'; it must be a sha256"),
        (0, ("spec", "seed"), -1, "seed of spec is -1; it must be from 0 to 2147483647"),
        (0, ("spec", "training", "steps"), "9", "steps of training of spec is '9'; it must be a whole number"),
        (0, ("spec",), None, "spec of the record is None; it must be a table"),
        (0, ("measurements",), {}, "measurements of the record is {}; it must be a list"),
        (0, ("measurements", 0), 1, "measurements[0] is 1; it must be a table"),
        (0, ("measurements", 0, "value"), float("nan"), "value of measurements[0] is nan; it must be finite"),
        (0, ("measurements", 0, "value"), None, "value of measurements[0] is None; it must be a number"),
        (0, ("measurements", 0, "stderr"), -1, "stderr of measurements[0] is -1; it must be 0 or more"),
        (0, ("measurements", 0, "kind"), "bound", "must be one of exact, lower_bound, upper_bound, estimate"),
        (0, ("measurements", 0, "n"), 0, "n of measurements[0] is 0; it must be from 1"),
        (0, ("measurements", 0, "unti"), 1, "unknown key 'unti'; did you mean unit?"),
        (0, ("measurements", 2, "value"), 1.0, "value of measurements[2] is 1.0; it must be null"),
        (0, ("measurements", 2, "status"), "no", 'it must be "ok", or "n/a: " and a reason'),
        (0, ("history", "train", 1), [1, "x"], "history.train[1] is [1, 'x']; it must be a list of 2 numbers"),
        (0, ("history", "best_step"), 1.5, "best_step of history is 1.5; it must be a whole number"),
        (0, ("provenance", "threads"), float("inf"), "provenance.threads is inf; it must be finite"),
        (0, ("weights_sha256",), "x", "weights_sha256 of the record is 'x'; it must be a sha256"),
        (0, ("abuot",), "x", "unknown key 'abuot'; did you mean about?"),
        (1, ("plots", 0, "style"), "bars", "style of plots[0] is 'bars'; it must be one of line, points, images"),
        (1, ("plots", 0, "style"), "images", 'plots[0] must give the height and width of its images, "image"'),
        (1, ("plots", 0, "image"), [8, 0], "image of plots[0]"),
        (1, ("plots", 0, "levels"), {"a": "b"}, "level 'a' of plots[0] is 'b'; it must be a number"),
        (1, ("plots", 0, "lines", 0, "x"), [1, 2], "plots[0].lines[0] has 2 x and 3 y"),
        (1, ("plots", 0, "lines", 0, "y"), [1, 2, "3"], "y of plots[0].lines[0]"),
    ],
)
def test_whatever_is_wrong_in_a_record_is_named_by_its_place(
    which: int, path: tuple[Any, ...], value: Any, words: str
) -> None:
    record = copy.deepcopy(RECORDS[which])
    box = record
    for key in path[:-1]:
        box = box[key]
    box[path[-1]] = value
    with pytest.raises(RecordError) as caught:
        check_record(record)
    assert words in str(caught.value)


def test_all_problems_of_a_record_come_in_one_message() -> None:
    record = copy.deepcopy(RECORDS[0])
    del record["provenance"], record["measurements"][0]["unit"]
    record["spec"]["device"] = "tpu"
    with pytest.raises(RecordError) as caught:
        check_record(record)
    assert str(caught.value).splitlines() == [
        "the record has no provenance",
        "device of spec is 'tpu'; it must be one of cpu, cuda",
        "measurements[0] has no unit",
    ]


def test_a_record_without_its_seal_or_with_another_is_refused_where_a_seal_is_asked() -> None:
    record = {k: v for k, v in RECORDS[0].items() if k != "sha256"}
    with pytest.raises(RecordError, match="the record has no sha256"):
        check_record(record, sealed=True)
    with pytest.raises(RecordError, match="changed or damaged"):
        check_record({**record, "sha256": "0" * 64}, sealed=True)
    changed = {**RECORDS[0], "about": "another"}
    with pytest.raises(RecordError, match="changed or damaged"):
        parse_record(json.dumps(changed).encode())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[]", "must be a table"),
        (b"null", "must be a table"),
        (b"[" * 100_000, "nested without end"),
        (b'{"a":' * 100_000, "nested without end"),
        (b'{"a": 1, "a": 1}', "duplicate key"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b"9" * 5_000, "not JSON"),
        (TEXT_OF_RECORDS[0][:-30], "not JSON"),
    ],
)
def test_what_is_no_record_at_all_is_refused_with_a_reason(text: bytes, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        parse_record(text)


FAILURE = {
    "run_id": RUN.run_id(),
    "spec": RUN.as_dict(),
    "error": "NaN at step 3",
    "traceback_tail": "",
    "stderr_tail": "",
}


def test_a_failure_is_read_with_its_terminal_commands_written_out() -> None:
    read = parse_failure(json.dumps({**FAILURE, "error": "\x1b[31mred", "stderr_tail": "10 %\r20 %\n"}).encode())
    assert (read["error"], read["stderr_tail"]) == (r"\x1b[31mred", "10 %\\r20 %\n")
    older = {k: v for k, v in FAILURE.items() if k != "stderr_tail"}
    assert parse_failure(json.dumps(older).encode()) == older


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": 3}, "error of the failure is 3; it must be text"),
        ({"run_id": "0" * 64}, "not the sha256 of the spec"),
        ({"spec": {}}, "spec has no model"),
        ({"eror": "x"}, "did you mean error?"),
    ],
)
def test_a_failure_of_another_shape_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_failure(json.dumps({**FAILURE, **changes}).encode())
    assert words in str(caught.value)


def test_the_measurements_that_we_stand_behind_have_the_shape_that_is_asked_of_a_record() -> None:
    frame = read_measurements(ROOT / "results" / "standard" / "measurements.csv")
    columns = ["split", "metric", "value", "stderr", "kind", "unit", "n", "status"]
    kept = frame.loc[frame.metric != "failed_runs", columns].astype(object)
    rows = kept.where(kept.notna(), None).to_dict("records")
    for row in rows:
        if row["status"] != "ok":  # a CSV has no null: an empty cell stands for it
            row.update(kind=None, unit=None)
    assert len(rows) > 1000
    assert check_record(record_of(RUN, history=HISTORY) | {"measurements": rows})["measurements"] is rows
    assert check_record(record_of(EXPERIMENT, plots=[PLOT]))["plots"] == [PLOT]
