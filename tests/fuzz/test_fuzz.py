"""Damaged files and absurd options: every reader gives a value or its documented error."""

from __future__ import annotations

import copy
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.cases import JSON_TOKENS, TEXTS, as_json, damaged, damaged_bytes, fuzz, nested, odd, value_or
from fuzz.examples import RECORDS, SPECS, TEXT_OF_RECORDS
from replicate.data.files import parse_idx
from replicate.errors import ClaimError, RecordError, UsageError
from replicate.ledger.claims import PaperClaims, read_claims
from replicate.model import TRAINING_FIELDS
from replicate.runs.record import check_record, parse_failure, parse_record, seal
from replicate.runs.spec import make_spec, spec_from_dict, spec_hash
from replicate.validation import parse_settings


def resealed(data: Any) -> Any:
    """The record with the run id and the seal that a careful forger would give it."""
    if isinstance(data, dict):
        try:
            return seal({**data, "run_id": spec_hash(data["spec"])})
        except (KeyError, TypeError, ValueError, RecursionError):
            return data
    return data


# -- records

raw_records = st.one_of(
    damaged_bytes(TEXT_OF_RECORDS, JSON_TOKENS),
    damaged(RECORDS).map(as_json),
    damaged(RECORDS).map(resealed).map(as_json),
    st.binary(max_size=200),
)


@fuzz(0.25)
@given(raw_records)
def test_a_damaged_record_is_refused_or_its_content_is_that_of_a_whole_one(text: bytes) -> None:
    record = value_or(RecordError, parse_record, text)
    if record is not None:
        assert spec_from_dict(record["spec"]).run_id() == record["run_id"]
        assert seal(record) == record
        assert all(m["value"] is None or math.isfinite(m["value"]) for m in record["measurements"])
        json.dumps(record, allow_nan=False).encode()


@fuzz(0.05)
@given(st.data())
def test_every_flipped_bit_in_a_record_is_found(data: st.DataObject) -> None:
    which = data.draw(st.integers(0, len(RECORDS) - 1))
    text = bytearray(TEXT_OF_RECORDS[which])
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    read = value_or(RecordError, parse_record, bytes(text))
    assert read is None or as_json(seal(read)) == as_json(read)
    assert read in (None, RECORDS[which])  # white space, or the case of a letter in \u00e9 or 1e5


@fuzz(0.1)
@given(damaged(RECORDS) | odd)
def test_a_damaged_record_in_memory_is_refused_with_its_reasons(data: Any) -> None:
    if value_or(RecordError, check_record, copy.deepcopy(data)) is not None:
        assert value_or(RecordError, parse_record, as_json(seal(data))) is not None


FAILURES = [
    {"run_id": r["run_id"], "spec": r["spec"], "error": "no", "traceback_tail": "", "stderr_tail": ""} for r in RECORDS
]


@fuzz(0.05)
@given(damaged_bytes([as_json(f) for f in FAILURES], JSON_TOKENS) | damaged(FAILURES).map(as_json))
def test_a_damaged_failure_is_refused_or_can_be_shown(text: bytes) -> None:
    failure = value_or(RecordError, parse_failure, text)
    if failure is not None:
        assert failure["error"].encode()
        assert "\x1b" not in failure["error"]
        assert spec_from_dict(failure["spec"]).run_id() == failure["run_id"]


# -- claims

CLAIMS = """[paper]
key = "toy"
title = "A toy"
authors = "Nobody"
year = 2020
arxiv = "2001.00001"
bibtex = '''
@article{toy,
}
'''

[[claim]]
id = "T1"
place = "Tab 1"
says = "it is one"
kind = "number"
quantity = "the number"
unit = "nats"
published = 1.0
source_quality = "R"
relation = "within"
tolerance = 0.1
tolerance_why = "a tenth"
profile = "standard"
measure = "digits/vae/nll"

[[claim]]
id = "T2"
place = "Tab 2"
says = "it is less"
kind = "ordering"
quantity = "the difference"
unit = "nats"
published = "less (figure)"
target = 0.0
source_quality = "S"
relation = "below"
tolerance = 0
tolerance_why = "any"
profile = "full"
experiment = "toy-run"
measure = "a"
minus = "b"
plots = ["curve"]
seed_sd = 2
deterministic = true
"""
VALUES = (
    '"text"',
    "''",
    '"\\u001b[31m"',
    '"=1+1"',
    "nan",
    "inf",
    "-1",
    "1e999",
    "0x" + "f" * 5_000,
    "9" * 5_000,
    "true",
    "1979-05-27T07:32:00Z",
    "1979-99-99",
    "[]",
    '["a", 1]',
    "{}",
    "{ a = 1, a = 2 }",
    "[" * 5_000,
    "'''",
    "",
)


@st.composite
def damaged_claims(draw: Any) -> bytes:
    """Lines dropped, doubled, swapped, renamed or given other values, and then perhaps flipped bits."""
    lines = CLAIMS.splitlines()
    for _ in range(draw(st.integers(1, 2))):
        i, j = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        key, equals, _ = lines[i].partition(" = ")
        kind = draw(st.sampled_from(["value"] * 6 + ["key"] * 2 + ["drop", "double", "swap", "line"]))
        if kind == "drop" and len(lines) > 1:
            del lines[i]
        elif kind == "double":
            lines.insert(j, lines[i])
        elif kind == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "value" and equals:
            lines[i] = f"{key} = {draw(st.sampled_from(VALUES))}"
        elif kind == "key" and equals:
            lines[i] = lines[i].replace(key, draw(st.sampled_from([key[1:], key + "x", "id", "a.b", '"', "claim"])), 1)
        else:
            lines.insert(i, draw(st.sampled_from(["[[claim]]", "[claim]", "[paper]", "[x]", "= 1", "'''", "\x00"])))
    text = "\n".join(lines).encode("utf-8", "replace")
    again = draw(st.sampled_from([False, False, False, True]))
    return draw(damaged_bytes([text], tuple(v.encode() for v in VALUES))) if again else text


@pytest.fixture(scope="module")
def claims_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to be written over by every case."""
    return tmp_path_factory.mktemp("claims") / "toy.toml"


@fuzz(0.2)
@given(content=damaged_claims() | st.binary(max_size=200))
def test_a_damaged_claims_file_is_refused_or_every_claim_in_it_can_be_judged(claims_path: Path, content: bytes) -> None:
    claims_path.write_bytes(content)
    paper: PaperClaims | None = value_or(ClaimError, read_claims, claims_path)
    if paper is not None:
        assert paper.claims
        assert all(math.isfinite(c.target) and math.isfinite(c.tolerance) for c in paper.claims)


# -- specs and settings


@fuzz(0.15)
@given(damaged(SPECS) | odd)
def test_a_damaged_spec_is_refused_or_is_what_it_says(data: Any) -> None:
    spec = value_or(UsageError, spec_from_dict, copy.deepcopy(data))
    if spec is not None:
        assert spec.as_dict() == data
        assert spec.run_id() == spec_hash(data)


KEYS = (*TRAINING_FIELDS, "hidden", "couplings", "blocks", "check", "preprocessing", "stpes", "", " ", "a" * 500)
WORDS = ("1", "-1", "0", "0.5", "1e999", "NaN", "true", "null", '"adam"', "adam", "[0.5, 0.9]", "[1]", "[[1]]", "{}")
pairs = st.lists(
    st.builds(
        lambda key, equals, value: key + equals + value,
        st.sampled_from(KEYS) | st.text(max_size=6),
        st.sampled_from(["=", "=", "=", "", "=="]),
        st.sampled_from([*WORDS, *TEXTS, "[" * 100_000, "9" * 5_000, json.dumps(nested(50))]) | st.text(max_size=8),
    ),
    max_size=4,
)


@fuzz(0.1)
@given(pairs, st.sampled_from(["realnvp", "neural-ebm", "marginals", "realnvpp"]), odd)
def test_absurd_settings_are_refused_or_make_a_spec_that_survives_the_disk(
    texts: list[str], model: str, seed: Any
) -> None:
    settings = value_or(UsageError, parse_settings, texts)
    for chosen in (0, seed):
        made = value_or(UsageError, make_spec, model, "two-moons", chosen, "smoke", "cpu", "float32", settings)
        if made is not None:
            assert spec_from_dict(json.loads(json.dumps(made.as_dict()))) == made


# -- data files

IDX = struct.pack(">4i", 0x803, 3, 4, 5) + bytes(range(60))
HEADS = (b"\x00\x00\x08\x03", b"\x00\x00\x08\x01", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x00" * 4, b"<html>")


@fuzz(0.1)
@given(damaged_bytes([IDX, IDX[:16], b""], HEADS) | st.binary(max_size=100))
def test_a_damaged_idx_file_is_refused_or_has_as_many_bytes_as_it_says(content: bytes) -> None:
    images = value_or(UsageError, parse_idx, content, "images.idx")
    if images is not None:
        assert images.numel() == len(content) - 16
