"""A run's record: its shape, the seal that any change of it breaks, and its reader.

A record comes from disk or from a worker on the network, so nothing in it is believed before `check_record` has seen
it: keys, types, finite numbers, text that is safe in a terminal and in a table, a run id that is the sha256 of the
spec, and a seal that is the sha256 of everything else.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from replicate.errors import RecordError
from replicate.model import KINDS, Estimate
from replicate.runs.experiment import MAX_PIXELS, MAX_POINTS, Plot, unpack_examples
from replicate.runs.spec import canonical, check_spec, spec_hash
from replicate.validation import (
    CELL,
    DIGEST,
    MOST,
    NAME,
    Problems,
    Range,
    Rule,
    brief,
    check_json,
    check_table,
    check_value,
    harmless,
    rules_of,
)

SEAL = "sha256"
_TABLE = Rule(Mapping)
_LIST = Rule(list)
_TEXT = Rule(str, required=False, blank=True)
_RECORD = {
    "run_id": Rule(str, pattern=DIGEST),
    "spec": _TABLE,
    "measurements": _LIST,
    "provenance": _TABLE,
    "history": Rule(Mapping, required=False),
    "plots": Rule(list, required=False),
    "examples": Rule(Mapping, required=False),
    "classifiers": Rule(Mapping, required=False),
    "weights_sha256": Rule(str, pattern=DIGEST, required=False),
    "about": _TEXT,
    "paper": _TEXT,
    SEAL: Rule(str, pattern=DIGEST, required=False),
}
#: texts of a failure that nobody wrote with care
_SAID = ("error", "traceback_tail", "stderr_tail")
_FAILURE = {
    **{"run_id": _RECORD["run_id"], "spec": _TABLE, "error": Rule(str, blank=True)},
    **{"traceback_tail": _TEXT, "stderr_tail": _TEXT},
}
_NAMED = {"split": Rule(str, pattern=NAME), "metric": Rule(str, pattern=CELL), "status": Rule(str, pattern=CELL)}
#: a row with a number, and one that says why there is none
_OK = {
    **_NAMED,
    **rules_of(Estimate, ranges={"stderr": Range(low=0), "n": Range(1, 2**53)}, choices={"kind": KINDS}),
    "stderr": Rule(float | None, Range(low=0)),
    "unit": Rule(str, pattern=CELL, blank=True),
}
_NONE = {**_NAMED, **{key: Rule(NoneType) for key in rules_of(Estimate)}}
_AT_LEAST_0 = Rule(float, Range(low=0))
_HISTORY = {"train": _LIST, "valid": _LIST, "best_step": Rule(int, Range(0, MOST)), "seconds": _AT_LEAST_0}
_AXIS_LABEL = Rule(str, pattern=CELL, blank=True)
_PLOT = {
    **rules_of(Plot, complete=True),
    "name": Rule(str, pattern=NAME),  # it becomes the name of a file
    "x_label": _AXIS_LABEL,
    "y_label": _AXIS_LABEL,
    "lines": _LIST,
    "image": Rule(tuple[int, int], Range(1), required=False),
}
_EXAMPLES = {"kind": Rule(str, choices=KINDS), "low": Rule(float), "span": _AT_LEAST_0, "values": Rule(str)}
_LINE = {"label": _AXIS_LABEL, "x": Rule(tuple[float | None, ...]), "y": Rule(tuple[float | None, ...])}


def content_sha256(record: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of a record without its seal."""
    return hashlib.sha256(canonical({key: value for key, value in record.items() if key != SEAL})).hexdigest()


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add the seal to a record."""
    return {**record, SEAL: content_sha256(record)}


def check_record(data: object, sealed: bool = False) -> dict[str, Any]:
    """Check a record and return it.

    Args:
        sealed: whether it must carry the seal of its content.

    Raises:
        RecordError: every difference from what `replicate.runs.execute.execute` writes.
    """
    problems = Problems()
    if check_table(data, _RECORD, "the record", lambda _, problem: problems.add(problem)):
        assert isinstance(data, Mapping)
        _check_parts(data, problems)
        if not problems:  # so that both hashes have something sound to work on
            _check_hashes(data, sealed, problems)
    problems.refuse(RecordError)
    assert isinstance(data, dict)
    return data


def _check_parts(record: Mapping[str, Any], problems: Problems) -> None:
    wrong = lambda _, problem: problems.add(problem)  # noqa: E731
    check_spec(record.get("spec"), problems, "spec")
    check_json(record.get("provenance"), "provenance", wrong)
    for name, row in _items(record.get("measurements"), "measurements"):
        rules = _OK if isinstance(row, Mapping) and row.get("status") == "ok" else _NONE
        if check_table(row, rules, name, wrong) and rules is _NONE:
            status = row.get("status")
            if isinstance(status, str) and not status.startswith("n/a: "):
                problems.add(f'status of {name} is {brief(status)}; it must be "ok", or "n/a: " and a reason')
    history = record.get("history")
    if isinstance(history, Mapping):
        check_table(history, _HISTORY, "history", wrong)
        for split in ("train", "valid"):
            for name, pair in _items(history.get(split), f"history.{split}"):
                check_value(name, pair, Rule(tuple[float, float]), wrong)
    for name, data in _by_task(record, "examples", problems):
        _check_examples(name, data, problems)
    for name, digest in _by_task(record, "classifiers", problems):
        check_value("sha256", digest, _RECORD["run_id"], wrong, name)
    for name, plot in _items(record.get("plots"), "plots"):
        _check_plot(plot, name, problems)


def _by_task(record: Mapping[str, Any], part: str, problems: Problems) -> Iterable[tuple[str, Any]]:
    """Iterate over what a part of a record has for each task, with its place in words; note names that are none."""
    found = record.get(part)
    for task, value in found.items() if isinstance(found, Mapping) else ():
        if not isinstance(task, str) or not NAME.fullmatch(task):
            problems.add(f"{part} of {brief(task)}: not a valid task name")
        yield f"{part} of {brief(task)}", value


def _check_examples(name: str, data: object, problems: Problems) -> None:
    before = len(problems)
    if check_table(data, _EXAMPLES, name, lambda _, problem: problems.add(problem)) and len(problems) == before:
        assert isinstance(data, Mapping)
        try:
            unpack_examples(data)
        except ValueError as error:
            problems.add(f"{name}: {error}")


def _check_plot(plot: object, name: str, problems: Problems) -> None:
    wrong = lambda _, problem: problems.add(problem)  # noqa: E731
    if not check_table(plot, _PLOT, name, wrong):
        return
    assert isinstance(plot, Mapping)
    if ("image" in plot) != (plot.get("style") == "images"):
        problems.add(f'{name} must give the height and width of its images, "image", where its style is "images" alone')
    most = MAX_PIXELS if "image" in plot else MAX_POINTS
    for at, line in _items(plot.get("lines"), f"{name}.lines"):
        if check_table(line, _LINE, at, wrong):
            assert isinstance(line, Mapping)
            x, y = line.get("x"), line.get("y")
            if isinstance(x, list) and isinstance(y, list) and not len(x) == len(y) <= most:
                problems.add(f"{at} has {len(x)} x and {len(y)} y; x and y must have the same length, at most {most}")
    levels = plot.get("levels")
    if isinstance(levels, Mapping):
        check_json(list(levels), f"{name}.levels", wrong)
        for label, level in levels.items():
            check_value(f"level {brief(label)}", level, Rule(float), wrong, name)


def _check_hashes(record: Mapping[str, Any], sealed: bool, problems: Problems) -> None:
    if spec_hash(record["spec"]) != record["run_id"]:
        problems.add(f"run_id is {record['run_id'][:12]}.., which is not the sha256 of the spec")
    if sealed and SEAL not in record:
        problems.add(f"the record has no {SEAL}: it was not written to its end, or by another version")
    elif sealed and record[SEAL] != content_sha256(record):
        problems.add(f"{SEAL} is {record[SEAL][:12]}.., which is not that of the record: it was changed or damaged")


def _items(values: object, name: str) -> Iterable[tuple[str, Any]]:
    """Iterate over the items of a list with their place in words; over nothing if it is no list."""
    return ((f"{name}[{i}]", value) for i, value in enumerate(values)) if isinstance(values, list) else ()


def parse_record(text: bytes) -> dict[str, Any]:
    """Parse the sealed record of a file or a message.

    Raises:
        RecordError: it is no JSON, or `check_record` refuses it.
    """
    return check_record(_parsed(text), sealed=True)


def parse_failure(text: bytes) -> dict[str, Any]:
    """Parse the failure of a run that has no record; terminal commands in its texts are escaped.

    Raises:
        RecordError: it is no JSON, or has another shape than `replicate.runs.execute.failure` gives.
    """
    data, problems = _parsed(text), Problems()
    if isinstance(data, dict):
        data |= {key: harmless(data[key]) for key in _SAID if isinstance(data.get(key), str)}
    if check_table(data, _FAILURE, "the failure", lambda _, problem: problems.add(problem)):
        check_spec(data.get("spec"), problems, "spec")
        if not problems and spec_hash(data["spec"]) != data["run_id"]:
            problems.add(f"run_id is {data['run_id'][:12]}.., which is not the sha256 of the spec")
    problems.refuse(RecordError)
    return {**data, "error": data["error"] or "unknown error"}  # it stands in tables, where nothing would say nothing


def _parsed(text: bytes) -> Any:
    """Parse JSON as the standard defines it: UTF-8, no NaN, no key twice."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_table)
    except RecursionError:
        raise RecordError("it is not JSON that can be read: its brackets are nested without end") from None
    except ValueError as error:  # bytes that are no text, text that is no JSON, numbers of too many digits
        raise RecordError(f"it is not JSON: {error}") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"duplicate key in {brief(table)}")
    return table
