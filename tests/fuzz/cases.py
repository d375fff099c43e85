"""How many cases, from which seed, and how a valid file is damaged.

FUZZ_CASES is the number of cases over all targets together. Without it the few cases are the same every time; with it
they are drawn afresh from a seed that the end of the run names and FUZZ_SEED repeats.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES") or 2_000)
ON_DEMAND = bool(os.environ.get("FUZZ_CASES"))
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]


def fuzz(share: float) -> Callable[[Any], Any]:
    """Run a property on this share of all cases."""

    def wrap(test: Any) -> Any:
        count = max(1, round(CASES * share))
        chosen = settings(
            max_examples=count,
            derandomize=not ON_DEMAND,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return chosen(seed(SEED)(test) if ON_DEMAND else test)

    return wrap


def value_or(error: type[ValueError], read: Callable[..., T], *given: Any) -> T | None:
    """What a reader gives, or None where it refuses with its own error and a message that can be shown."""
    try:
        return read(*given)
    except error as refused:
        kind, message = type(refused), str(refused)
    assert kind is error
    assert message.strip()
    assert "Traceback" not in message
    assert all(c.isprintable() or c == "\n" for c in message)
    assert all(len(line) < 1_000 for line in message.splitlines())
    return None


# -- values that no reader expects


def nested(depth: int, table: bool = False) -> Any:
    """A list in a list in a list, or tables."""
    out: Any = 1
    for _ in range(depth):
        out = {"a": out} if table else [out]
    return out


TEXTS = (
    "",
    " ",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "=1+1",
    "../../etc",
    "<script>",
    "[/red]",
    "nan",
    "1",
    "a" * 5_000,
    "é",
)
NUMBERS = (-1, 0, 1, 2, 2**31, 2**63, 10**400, -0.0, 0.5, 1e308, float("nan"), float("inf"), float("-inf"))
odd = st.one_of(
    st.sampled_from([None, True, False, *TEXTS, *NUMBERS]),
    st.sampled_from([[], {}, [[]], nested(20), nested(20, True), nested(100)]).map(copy.deepcopy),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


# -- damage


def places(data: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside."""
    out: list[tuple[Any, Any]] = []
    todo = [data]
    while todo and len(out) < most:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        out += ((item, key) for key in keys)
        todo += (item[key] for key in keys)
    return out


def change(draw: Draw, data: Any) -> Any:
    """One change of JSON-like data: a value, its type, its key, its presence, or its place."""
    found = places(data)
    if not found:
        return draw(odd)
    box, key = draw(st.sampled_from(found))
    kind = draw(st.sampled_from(["value", "value", "drop", "rename", "swap", "type", "add"]))
    if kind == "value":
        box[key] = draw(odd)
    elif kind == "drop":
        del box[key]
    elif kind == "rename" and isinstance(box, dict):
        other = draw(st.sampled_from([key[1:], key + "s", key[::-1], *map(str, list(box)[:3])]) | st.text(max_size=6))
        box[other] = box.pop(key)
    elif kind == "swap":
        there, at = draw(st.sampled_from(found))
        box[key], there[at] = copy.deepcopy(there[at]), copy.deepcopy(box[key])
    elif kind == "type":
        value = box[key]
        box[key] = draw(st.sampled_from([str(value)[:50], [value], {"a": value}, bool(value)]))
    elif isinstance(box, dict):
        box[draw(st.text(max_size=6))] = draw(odd)
    else:
        box.insert(0, draw(odd))
    return data


@st.composite
def damaged(draw: Draw, valid: Any) -> Any:
    """Valid data with one to three changes."""
    data = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        data = change(draw, data)
    return data


@st.composite
def damaged_bytes(draw: Draw, valid: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """A valid file with flipped bits, or cut, doubled, overwritten with odd tokens, or no such file at all."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "drop", "double", "put", "put", "raw"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at:end]
        elif kind == "double":
            data[at:at] = data[at:end]
        elif kind == "put":
            data[at:end] = draw(st.sampled_from(tokens))
        elif kind == "raw":
            data[at:] = draw(st.binary(max_size=64))
    return bytes(data)


def as_json(data: Any) -> bytes:
    """The text that Python writes of anything, NaN included."""
    return json.dumps(data).encode()


JSON_TOKENS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5_000,
    b"[" * 100_000,
    b'{"a":' * 5_000,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b'"\\ud800"',
    b'"run_id": 1, "run_id": 2,',
    b"null",
    b"-1",
    b'"',
)
