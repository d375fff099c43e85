"""A sweep's runs travel in one file: what comes out is what went in, and nothing else comes out."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from replicate.errors import UsageError
from replicate.runs.execute import execute, failure
from replicate.runs.spec import make_spec
from replicate.runs.store import read_record, write_json
from replicate.sweeps.archive import HEAD, Moved, pack_runs, unpack_runs
from replicate.sweeps.reproduce import Sweep

SPECS = [make_spec("truth", "two-gaussians", seed, "smoke") for seed in range(4)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A runs folder with a finished, a failed and an unfinished run, and the archive of it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "smoke").mkdir()
    sweep = Sweep(root / "smoke")
    sweep.open()
    folders = [sweep.current / spec.run_id() for spec in SPECS]
    execute(SPECS[0], folders[0], torch.device("cpu"))
    folders[1].mkdir()
    write_json(folders[1] / "failure.json", failure(SPECS[1], "it broke"))
    for number in (1, 2):
        path = folders[2] / "checkpoints" / f"{number:08}.checkpoint"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 10)
    archive = root / "slice.zip"
    assert str(pack_runs(root, "smoke", archive)) == "1 records, 1 failures, 1 unfinished runs"
    return root, archive


def test_what_comes_out_is_what_went_in_without_weights_and_old_checkpoints(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    root, archive = packed
    assert unpack_runs(archive, tmp_path) == Moved(1, 1, 1)
    before, after = root / "smoke/current", tmp_path / "smoke/current"
    names = {p.relative_to(after).as_posix() for p in after.rglob("*") if p.is_file()} - {"version.json"}
    run = [spec.run_id() for spec in SPECS]
    assert names == {
        f"{run[0]}/record.json",
        f"{run[0]}/arrays.npz",
        f"{run[1]}/failure.json",
        f"{run[2]}/checkpoints/00000002.checkpoint",
    }
    assert all((before / name).read_bytes() == (after / name).read_bytes() for name in names)
    assert read_record(after / run[0]) is not None


def test_finished_runs_and_later_checkpoints_stay_as_they_are(packed: tuple[Path, Path], tmp_path: Path) -> None:
    _, archive = packed
    unpack_runs(archive, tmp_path)
    later = tmp_path / "smoke/current" / SPECS[2].run_id() / "checkpoints/00000003.checkpoint"
    later.write_bytes(b"later")
    assert unpack_runs(archive, tmp_path) == Moved(0, 1, 0, known=1)
    assert sorted(p.name for p in later.parent.iterdir()) == ["00000002.checkpoint", "00000003.checkpoint"]


def test_a_record_that_arrives_ends_what_was_unfinished_here(packed: tuple[Path, Path], tmp_path: Path) -> None:
    _, archive = packed
    (tmp_path / "smoke").mkdir()
    Sweep(tmp_path / "smoke").open()
    folder = tmp_path / "smoke/current" / SPECS[0].run_id()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/00000009.checkpoint").write_bytes(b"x")
    (folder / "failure.json").write_text("{}")
    unpack_runs(archive, tmp_path)
    assert {p.name for p in folder.iterdir()} == {"record.json", "arrays.npz"}


def changed(archive: Path, target: Path, name: str, content: bytes | None) -> Path:
    """A copy of an archive in which one member has other content, or is gone."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
        if content is not None:
            new.writestr(name, content)
    return target


RECORD = f"{SPECS[0].run_id()}/record.json"
HEADS = {"format": 1, "profile": "smoke"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../evil", b"x", "no file of a run"),
        (f"{'0' * 64}/../../evil", b"x", "no file of a run"),
        ("/etc/passwd", b"x", "no file of a run"),
        (f"{'0' * 64}/model.py", b"x", "no file of a run"),
        (RECORD, b"{}", "the record has no"),
        (RECORD, b"\x00", "it is not JSON"),
        (f"{'0' * 64}/failure.json", json.dumps(failure(SPECS[3], "e")).encode(), "belongs to another run"),
        (HEAD, None, "archive.json"),
        (HEAD, b"[]", "not that of an archive"),
        (HEAD, json.dumps({**HEADS, "profile": "../x"}).encode(), "not that of an archive"),
        (HEAD, json.dumps({**HEADS, "source_sha256": "0" * 64}).encode(), "other sources"),
    ],
)
def test_anything_else_is_refused_whole(
    packed: tuple[Path, Path], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    bad = changed(packed[1], tmp_path / "bad.zip", name, content)
    with pytest.raises(UsageError, match=message) as told:
        unpack_runs(bad, tmp_path / "runs")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "runs").exists()


def test_a_record_that_was_changed_on_the_way_is_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(packed[1]) as opened:
        record = json.loads(opened.read(RECORD))
    record["measurements"][0]["value"] = 0.5
    bad = changed(packed[1], tmp_path / "bad.zip", RECORD, json.dumps(record).encode())
    with pytest.raises(UsageError, match="changed or damaged"):
        unpack_runs(bad, tmp_path / "runs")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip"])
def test_a_file_that_is_no_zip_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be used"):
        unpack_runs(tmp_path / "a.zip", tmp_path)


def test_a_truncated_archive_is_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    whole = packed[1].read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be used"):
        unpack_runs(tmp_path / "a.zip", tmp_path / "runs")


def test_no_runs_is_told_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="replicate reproduce"):
        pack_runs(tmp_path, "full", tmp_path / "a.zip")
