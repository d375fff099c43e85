"""Checkpoints: bit-exact, two kept, and never believed when a byte of them has changed."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicate.runs import checkpoint
from replicate.runs.checkpoint import Checkpoints, pack, unpack

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return (torch.randn(shape, generator=generator) * 3).to(draw(st.sampled_from(DTYPES)))


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
states = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(states)
def test_a_state_comes_back_bit_for_bit(state: Any) -> None:
    assert same(unpack(pack(state)), state)


def test_infinities_shared_storage_and_views_come_back() -> None:
    x = torch.arange(6.0)
    back = unpack(pack({"a": x, "b": x, "part": x[2:4], "turned": x.view(2, 3).T, "best": math.inf}))
    assert back["best"] == math.inf
    assert back["part"].tolist() == [2, 3]
    assert back["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert back["turned"].stride() == (1, 3)  # as it lay in memory: products round by the order of their terms
    back["a"][0] = 9
    assert back["b"][0] == 0


WHOLE = pack({"head": {"format": checkpoint.FORMAT, "run_id": "r", "source": "s"}, "state": {"x": torch.arange(3)}})


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_every_flipped_bit_in_a_checkpoint_is_found(byte: int, bit: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[byte] ^= 1 << bit
    with pytest.raises(ValueError, match="sha256 differs"):
        unpack(bytes(damaged))


@given(st.integers(0, len(WHOLE) - 1))
def test_any_truncation_is_found(length: int) -> None:
    with pytest.raises(ValueError, match="sha256 differs"):
        unpack(WHOLE[:length])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "r", "s")
    for i in range(5):
        kept.write({"i": i})
    assert [p.name for p in kept.paths()] == ["00000004.checkpoint", "00000005.checkpoint"]
    assert kept.read() == {"i": 4}


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "empty", "gone"])
def test_older_checkpoint_is_used_when_the_newer_is_damaged(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Checkpoints(tmp_path, "r", "s")
    kept.write({"i": 0})
    kept.write({"i": 1})
    newest = kept.paths()[-1]
    data = newest.read_bytes()
    if damage == "gone":
        newest.unlink()
    else:
        flipped = data[:200] + bytes([data[200] ^ 4]) + data[201:]
        newest.write_bytes({"truncated": data[:-9], "bit flipped": flipped, "empty": b""}[damage])
    assert kept.read() == {"i": 0}
    assert damage == "gone" or "00000002.checkpoint of run r is not used" in capsys.readouterr().err
    kept.write({"i": 2})
    assert kept.read() == {"i": 2}


def test_run_starts_from_its_beginning_when_both_checkpoints_are_damaged(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "r", "s")
    kept.write({"i": 0})
    kept.write({"i": 1})
    for path in kept.paths():
        path.write_bytes(b"\0" * 300)
    assert kept.read() is None


@pytest.mark.parametrize(("run_id", "source"), [("other", "s"), ("r", "other")])
def test_another_spec_or_version_of_the_code_is_refused(
    tmp_path: Path, run_id: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Checkpoints(tmp_path, "r", "s").write({"i": 0})
    assert Checkpoints(tmp_path, run_id, source).read() is None
    assert "another spec or another version of the code" in capsys.readouterr().err


def test_failed_write_leaves_the_older_checkpoint_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, "r", "s")
    kept.write({"i": 0})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("replicate.runs.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        kept.write({"i": 1})
    assert [p.name for p in kept.folder.iterdir()] == ["00000001.checkpoint"]  # type: ignore[union-attr]
    assert kept.read() == {"i": 0}


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Checkpoints(None, "r", "s")
    kept.write({"i": 0})
    assert kept.read() is None
    kept.clear()
