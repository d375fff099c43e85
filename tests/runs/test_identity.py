"""Code is known by its sources, wherever they lie: other code is another identity, and nothing of it is used."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plug_in import FAILING, edit_loss, plugged, write_plug_in

from replicate.errors import UsageError
from replicate.registry import MODELS
from replicate.runs import cluster, identity
from replicate.runs.checkpoint import Session
from replicate.runs.child import attempt
from replicate.runs.identity import checkpoint_source, identify, is_own, other_plug_ins, plug_in, plug_ins
from replicate.runs.limits import Limits
from replicate.runs.spec import make_spec
from replicate.runs.store import read_record, write_json
from replicate.sweeps.archive import pack_runs, unpack_runs
from replicate.sweeps.rerun import other_source
from replicate.sweeps.reuse import in_results
from replicate.sweeps.sweep import Sweep

OWN = make_spec("truth", "two-gaussians", profile="smoke")


# -- the sources of a package, however it is installed


def lay(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def about(site: Path, module: str, record: list[str], tops: str = "") -> None:
    """What an installer leaves of a distribution beside its modules."""
    files = {"METADATA": "Metadata-Version: 2.1\nName: layouts\nVersion: 0.3\n", "RECORD": "\n".join(record) + "\n"}
    files["entry_points.txt"] = f"[replicate.models]\nlaid = {module}:ENTRY\n"
    lay(site / "layouts-0.3.dist-info", {**files, **({"top_level.txt": tops} if tops else {})})


PACKAGE = {"laid/__init__.py": "", "laid/model.py": "from laid.losses import loss\n", "laid/losses.py": "one = 1\n"}


def editable(root: Path) -> Path:
    lay(root / "src", PACKAGE)
    about(root / "site", "laid.model", ["__editable__.layouts.pth,,", "layouts-0.3.dist-info/RECORD,,"], "laid\n")
    return root / "src/laid/losses.py"


def editable_with_two_packages(root: Path) -> Path:
    lay(root / "src", {**PACKAGE, "apart/__init__.py": "", "apart/losses.py": "one = 1\n"})
    about(root / "site", "laid.model", ["__editable__.layouts.pth,,"], "laid\napart\n")
    return root / "src/apart/losses.py"


def editable_that_says_nothing(root: Path) -> Path:
    lay(root / "src", {**PACKAGE, "laid/model.py": "import os, apart.losses\n", "apart/losses.py": "one = 1\n"})
    about(root / "site", "laid.model", ["_layouts.pth,,"])
    return root / "src/apart/losses.py"


def wheel(root: Path) -> Path:
    lay(root / "site", PACKAGE)
    about(root / "site", "laid.model", [f"{name},," for name in PACKAGE])
    return root / "site/laid/losses.py"


def wheel_with_a_module_beside(root: Path) -> Path:
    lay(root / "site", {**PACKAGE, "laid_losses.py": "one = 1\n"})
    about(root / "site", "laid.model", [f"{name},," for name in (*PACKAGE, "laid_losses.py")])
    return root / "site/laid_losses.py"


def single_module(root: Path) -> Path:
    lay(root / "site", {"laid.py": "one = 1\n"})
    about(root / "site", "laid", ["laid.py,,"])
    return root / "site/laid.py"


def modules_side_by_side(root: Path) -> Path:
    lay(root / "src", {"laid.py": "from laid_losses import loss\n", "laid_losses.py": "one = 1\n"})
    about(root / "site", "laid", ["_layouts.pth,,"])
    return root / "src/laid_losses.py"


def untracked_module(root: Path) -> Path:
    changed = editable(root)
    for words in (("init", "--quiet"), ("add", "src/laid/__init__.py")):
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    return changed


def namespace(root: Path) -> Path:
    lay(root / "src", {"firm/" + name: text for name, text in PACKAGE.items()})
    lay(root / "site", {"firm/other/__init__.py": "somebody else's\n"})
    about(root / "site", "firm.laid.model", ["_layouts.pth,,"], "firm\n")
    return root / "src/firm/laid/losses.py"


LAYOUTS = [
    *(editable, editable_with_two_packages, editable_that_says_nothing, wheel, wheel_with_a_module_beside),
    *(single_module, modules_side_by_side, untracked_module, namespace),
]


def point(root: Path) -> EntryPoint:
    (found,) = importlib.metadata.Distribution.at(root / "site/layouts-0.3.dist-info").entry_points
    return found._for(importlib.metadata.Distribution.at(root / "site/layouts-0.3.dist-info"))  # type: ignore[attr-defined]


def edit_the_loss(changed: Path) -> None:
    changed.write_text(changed.read_text().replace("one = 1", "one = 2"))


def add_a_module(changed: Path) -> None:
    (changed.parent / "laid_more.py").write_text("")
    changed.write_text(changed.read_text() + "import laid_more\n")


def edit_nothing(changed: Path) -> None:
    changed.write_text(changed.read_text())
    (changed.parent / "__pycache__").mkdir(exist_ok=True)
    (changed.parent / "__pycache__" / "losses.cpython-311.pyc").write_bytes(b"0")
    (changed.parent / "README.md").write_text("words")
    (changed.parent / ".#losses.py").symlink_to("somebody@somewhere.1:2")  # an editor's lock


@pytest.mark.parametrize(("edit", "differs"), [(edit_the_loss, True), (add_a_module, True), (edit_nothing, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_of_a_plug_in_follows_its_sources_however_it_is_installed(
    layout: Callable[[Path], Path],
    edit: Callable[[Path], None],
    differs: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = layout(tmp_path)
    for folder in ("src", "site"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    before = identify(point(tmp_path))
    assert (before["package"], before["version"], len(before["sha256"])) == ("layouts", "0.3", 64)
    edit(changed)
    importlib.invalidate_caches()
    assert (identify(point(tmp_path))["sha256"] != before["sha256"]) == differs
    assert not [name for name in sys.modules if name.partition(".")[0] in ("laid", "apart", "laid_losses")]


def test_a_wheel_and_its_editable_install_are_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layout, folder in ((editable, "src"), (wheel, "site")):
        layout(tmp_path / layout.__name__)
        monkeypatch.syspath_prepend(tmp_path / layout.__name__ / folder)
        found.append(identify(point(tmp_path / layout.__name__)))
    assert found[0] == found[1]


def test_a_package_in_an_archive_is_known_by_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for text in ("one = 1\n", "one = 2\n"):
        with zipfile.ZipFile(tmp_path / "laid.zip", "w") as out:
            out.writestr("zipped_plug_in/__init__.py", text)
        monkeypatch.setattr(sys, "path", [str(tmp_path / "laid.zip"), *sys.path])
        importlib.invalidate_caches()
        seen.add(identify(EntryPoint("laid", "zipped_plug_in:ENTRY", "replicate.models"))["sha256"])
    assert len(seen) == 2
    assert identity.UNKNOWN not in seen


def test_another_object_of_the_same_module_is_another_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single_module(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    points = [EntryPoint("laid", f"laid:{name}", "replicate.models") for name in ("ONE", "TWO")]
    assert identify(points[0])["sha256"] != identify(points[1])["sha256"]


@pytest.mark.parametrize("value", ["nowhere_to_be_found:X", "sys:X", "no-module"])
def test_sources_that_cannot_be_found_are_unknown(value: str) -> None:
    found = identify(EntryPoint("laid", value, "replicate.models"))
    assert found == dict.fromkeys(("package", "version", "sha256"), "unknown")


def test_the_suites_own_entry_points_have_the_hash_of_the_suite() -> None:
    assert [p.name for p in MODELS.points.values() if not is_own(p)] == []
    assert plug_ins(OWN) == {}


# -- the runs of a plug-in whose code is edited between two calls


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a plug-in that trains a model, found by this process."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits in one second are two programs
    folder = tmp_path / "plug-ins"
    write_plug_in(folder)
    with plugged(folder):
        yield folder


def called(home: Path, folder: Path) -> dict[str, Any] | None:
    """What a process of its own leaves: the record, or None where the run failed half-way."""
    with plugged(home):
        spec = make_spec("plugged", "two-gaussians", profile="smoke")
        before = torch.are_deterministic_algorithms_enabled()
        try:
            attempt(spec, folder / spec.run_id(), Limits(checkpoint_every=0))
        finally:
            torch.use_deterministic_algorithms(before)
        return read_record(folder / spec.run_id())


@pytest.mark.parametrize("edited", [True, False])
def test_no_checkpoint_of_other_code_is_used(
    home: Path, edited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FAILING, "1")
    assert called(home, tmp_path) is None
    monkeypatch.delenv(FAILING)
    if edited:
        edit_loss(home)
    record = called(home, tmp_path)
    assert record is not None
    assert len(record["provenance"]["sittings"]) == (1 if edited else 2)
    assert ("another version of the code, of a plug-in" in capfd.readouterr().err) == edited
    with plugged(home):
        assert record["provenance"]["plugins"] == {"model:plugged": plug_in("model", "plugged")}
    assert record["provenance"]["plugins"]["model:plugged"]["package"] == "plugged"
    assert record["history"]["train"] == called(home, tmp_path / "undisturbed")["history"]["train"]  # type: ignore[index]


@pytest.mark.parametrize("edited", [True, False])
def test_no_record_of_other_code_is_used(home: Path, edited: bool, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "smoke").mkdir(parents=True)
    sweep = Sweep(root / "smoke")
    sweep.open()
    record = called(home, sweep.current)
    assert record is not None
    (tmp_path / "results").mkdir()
    (tmp_path / "results/records.jsonl").write_text(json.dumps(record) + "\n")
    pack_runs(root, "smoke", tmp_path / "slice.zip")
    if edited:
        edit_loss(home)
    with plugged(home):
        spec = make_spec("plugged", "two-gaussians", profile="smoke")
        assert sweep.open() == "resuming the unfinished sweep"  # the suite's own runs are what they were
        assert ("other plug-ins: model:plugged: plugged 0.1" in other_source(spec, record["provenance"])) == edited
        assert in_results(tmp_path / "results") == (set() if edited else {spec.run_id()})
        if edited:
            with pytest.raises(UsageError, match=r"computed with another version of a plug-in .*install the same"):
                unpack_runs(tmp_path / "slice.zip", tmp_path / "there")
        else:
            assert unpack_runs(tmp_path / "slice.zip", tmp_path / "there").records == 1
        said = sweep.drop_other_plug_ins([OWN, spec])
        assert len(said) == edited
        assert all(line.startswith("1 finished runs are of another version of a plug-in") for line in said)
        assert (read_record(sweep.current / spec.run_id()) is None) == edited


def test_a_process_keeps_the_identity_of_what_it_imported(home: Path) -> None:
    spec = make_spec("plugged", "two-gaussians", profile="smoke")
    before = plug_ins(spec), checkpoint_source(spec)
    edit_loss(home)
    assert (plug_ins(spec), checkpoint_source(spec)) == before
    with plugged(home):
        assert checkpoint_source(spec) != before[1]


def test_a_plug_in_without_sources_keeps_no_checkpoints_and_is_never_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity, "_sources", lambda point: {})
    spec = make_spec("plugged", "two-gaussians", profile="smoke")
    session = Session(spec, tmp_path, torch.device("cpu"), Limits())
    session.checkpoints.write({})
    assert not (tmp_path / "checkpoints").exists()
    assert capsys.readouterr().err.count("keeps no checkpoints") == 1
    assert other_plug_ins(spec, session.provenance(), "then", "now") != ""


@pytest.mark.parametrize("library", ["torch", "scipy"])
def test_a_checkpoint_is_of_the_libraries_too_but_not_of_their_build(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, before = identity.version, checkpoint_source(OWN)
    for number, same in ((true(library).partition("+")[0] + "+other", True), ("0.0.1", False)):
        monkeypatch.setattr(identity, "version", lambda name, n=number: n if name == library else true(name))
        assert (checkpoint_source(OWN) == before) == same


def test_workers_with_another_plug_in_differ_and_those_whose_git_is_silent_do_not(home: Path) -> None:
    before = cluster.versions("cpu")
    edit_loss(home)
    (line,) = cluster.differences(cluster.versions("cpu"), before)  # a worker's children import what is there now
    assert line.startswith("plug-in model:plugged plugged 0.1 of sources ")
    silent = {**before, "commit": "unknown", "uncommitted changes": "unknown"}
    assert cluster.differences(before, silent) == cluster.differences(silent, before) == []
    assert len(cluster.differences(before, {**silent, "source files": "other"})) == 1


# -- the folder of a sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    found = Sweep(tmp_path)
    found.open()
    (found.current / "some-run").mkdir()
    return found


@pytest.mark.parametrize(
    "version",
    [None, "", "{", "[]", '{"commit": "a", "dirty": ""}', '{"commit": "unknown", "dirty": "unknown"}', "\udcff"],
)
def test_a_sweep_that_does_not_say_its_version_is_moved_and_not_deleted(sweep: Sweep, version: str | None) -> None:
    path = sweep.current / "version.json"
    for n in (1, 2):
        path.unlink() if version is None else path.write_bytes(version.encode(errors="surrogateescape"))
        said = sweep.open()
        assert said.startswith("the unfinished sweep does not say which version of the code it is of")
        assert str(sweep.root / f"set-aside-{n}") in said
        assert (sweep.root / f"set-aside-{n}" / "some-run").is_dir()
        assert sweep.open() == "resuming the unfinished sweep"
        (sweep.current / "some-run").mkdir()


@pytest.mark.parametrize(
    ("commit", "dirty", "words"),
    [("a" * 40, "", "`--reuse aaaaaaaa`"), ("a" * 40, "b", ""), ("unknown", "unknown", "")],
)
def test_a_sweep_of_other_sources_starts_afresh_and_says_how_its_runs_are_kept(
    sweep: Sweep, commit: str, dirty: str, words: str
) -> None:
    write_json(sweep.current / "version.json", {"source_sha256": "0" * 64, "commit": commit, "dirty": dirty})
    said = sweep.open()
    assert "is of another version of the code: its runs are deleted" in said
    assert ("--reuse" in said, words in said) == (bool(words), True)
    assert not (sweep.current / "some-run").exists()


@pytest.mark.parametrize("commit", ["unknown", "b" * 40])
def test_what_git_says_does_not_change_whose_sweep_it_is(
    sweep: Sweep, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicate.sweeps.sweep.source_version", lambda: (commit, commit))
    assert sweep.open() == "resuming the unfinished sweep"
    assert (sweep.current / "some-run").is_dir()


def test_an_empty_folder_without_a_version_is_begun(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    assert Sweep(tmp_path).open() == "starting afresh"
    assert [p.name for p in tmp_path.iterdir()] == ["current"]
