"""A record says with what it was made, names nobody, and tells when the same bits are due."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from replicate.report.build import PROVENANCE
from replicate.runs import provenance as module
from replicate.runs.provenance import (
    FORMAT,
    MACHINE,
    ask,
    driver_version,
    machine_differences,
    provenance,
    source_sha256,
    source_version,
)

CPU = torch.device("cpu")
#: what a run adds to what its process finds
OF_THE_RUN = {"started", "finished", "sittings"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one module, in place of the suite's."""
    root = tmp_path / "checkout"
    (root / "replicate").mkdir(parents=True)
    (root / "results").mkdir()
    (root / "replicate" / "model.py").write_text("one = 1\n")
    (root / "results" / "measurements.csv").write_text("1\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(
        root,
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "commit",
        "--quiet",
        "--message",
        "first",
    )
    monkeypatch.setattr(module, "ROOT", root)
    return root


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout


def version() -> tuple[str, str]:
    return source_version.__wrapped__()


# -- the keys


def test_it_has_the_keys_that_verify_asks_of_a_record_and_is_json() -> None:
    found = provenance(CPU)
    assert set(found) == PROVENANCE - OF_THE_RUN
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["format"] == FORMAT
    assert len(found["source_sha256"]) == 64
    assert found["libraries"]["torch"] == torch.__version__


def test_it_names_no_host_no_user_and_no_path() -> None:
    text = json.dumps(provenance(CPU))
    for private in (getpass.getuser(), os.environ.get("HOME", ""), str(module.ROOT), os.getcwd(), "/"):
        assert not private or f'"{private}' not in text
    assert platform.node() not in json.loads(text).values()
    if len(platform.node()) > 3:
        assert platform.node() not in text


def test_settings_of_this_process_are_asked_at_every_call() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert provenance(CPU)["threads"] == before + 1
    finally:
        torch.set_num_threads(before)
    assert provenance(CPU)["threads"] == before


def test_no_program_is_asked_and_no_file_read_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    first = provenance(CPU)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert provenance(CPU) == first


@pytest.mark.parametrize("words", [("no-such-program-anywhere",), ("false",)])
def test_a_program_that_is_absent_or_fails_says_nothing(words: tuple[str, ...]) -> None:
    assert ask(*words) is None


@pytest.mark.parametrize(("printed", "driver"), [("535.129.03\n535.129.03\n", "535.129.03"), ("", ""), (None, "")])
def test_the_driver_is_the_first_gpus_or_nothing(
    printed: str | None, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ask", lambda *_: printed)
    assert driver_version.__wrapped__() == driver


# -- the code


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert version() == (git(checkout, "rev-parse", "HEAD").strip(), "")


def test_a_change_of_code_is_dirty_each_in_its_own_way_and_one_of_results_is_not(checkout: Path) -> None:
    (checkout / "results" / "measurements.csv").write_text("2\n")
    assert version()[1] == ""
    seen = set()
    for text in ("two = 2\n", "three = 3\n"):
        (checkout / "replicate" / "model.py").write_text(text)
        seen.add(version()[1])
    (checkout / "replicate" / "other.py").write_text("")
    seen.add(version()[1])
    assert len(seen) == 3
    assert "" not in seen


def test_an_installed_package_takes_no_commit_from_the_repository_around_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = checkout / "environment" / "site-packages"
    inside.mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", inside)
    assert version() == ("unknown", "unknown")


def test_asking_for_the_version_writes_nothing_that_a_commit_could_wait_for(checkout: Path) -> None:
    index = checkout / ".git" / "index"
    before = index.read_bytes()
    os.utime(checkout / "replicate" / "model.py", (1, 1))  # git itself would now refresh its index
    assert version()[1] == ""
    assert index.read_bytes() == before


def test_the_sources_digest_follows_every_byte_and_name_of_the_code_and_nothing_else(checkout: Path) -> None:
    seen = {source_sha256()}
    (checkout / "replicate" / "notes.md").write_text("aside")
    (checkout / "replicate" / "__pycache__").mkdir()
    (checkout / "replicate" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"0")
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_model.py").write_text("")
    assert source_sha256() in seen
    (checkout / "replicate" / "model.py").write_text("one = 2\n")
    seen.add(source_sha256())
    (checkout / "replicate" / "model.py").rename(checkout / "replicate" / "models.py")
    seen.add(source_sha256())
    (checkout / "baselines").mkdir()
    (checkout / "baselines" / "claims.toml").write_text("")  # a file that git does not know
    seen.add(source_sha256())
    assert len(seen) == 4


# -- a git that does not say it


@pytest.fixture
def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of these lines of shell in git's place."""

    def put(lines: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "git").write_text(f"#!/bin/sh\n{lines}\n")
        (folder / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return put


NOBODYS = "fatal: detected dubious ownership in repository at '/x'"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("exec sleep 60", ["git did not answer in 0.3 s: the commit is recorded as unknown; `git -C "]),
        (f'echo "{NOBODYS}" >&2\nexit 128', [f"git refuses ({NOBODYS}): ", "--global --add safe.directory "]),
        ("echo 'fatal: \\033[2Jnot a repository' >&2\nexit 128", ["git refuses (fatal: \\x1b[2Jnot a repository)"]),
        ("exit 3", ["git refuses (it ended with code 3): the commit is recorded as unknown"]),
        ("echo '# branch.oid (initial)'", [" has no commit yet: the commit is recorded as unknown"]),
        ("echo 'words of another program'", [" has no commit yet: the commit is recorded as unknown"]),
        ("printf '\\377'", [" has no commit yet: the commit is recorded as unknown"]),
        ("kill -9 $$", ["git refuses (it ended with code -9)"]),
    ],
)
def test_a_git_that_does_not_answer_is_told_in_one_line_and_the_commit_is_unknown(
    lines: str,
    words: list[str],
    checkout: Path,
    fake_git: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_git(lines)
    monkeypatch.setattr(module, "PATIENCE", 0.3 if "sleep" in lines else 10.0)
    assert version() == ("unknown", "unknown")
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in words), line
    assert line.endswith("The sources are recorded by their sha256 all the same.")


def test_no_git_is_told_and_a_folder_that_is_no_checkout_is_not(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version() == ("unknown", "unknown")
    assert "git cannot be started (No such file or directory)" in capsys.readouterr().err
    shutil.rmtree(checkout / ".git")
    assert version() == ("unknown", "unknown")
    assert capsys.readouterr().err == ""


def test_the_sources_are_known_where_git_is_not(checkout: Path, fake_git: Callable[[str], None]) -> None:
    before = source_sha256()
    fake_git("exit 1")
    assert source_sha256() == before
    (checkout / "replicate" / ".#model.py").symlink_to("somebody@somewhere")  # an editor's lock
    assert source_sha256() == before


@pytest.mark.parametrize(
    "name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_NAMESPACE", "GIT_OBJECT_DIRECTORY"]
)
def test_a_hook_of_another_repository_does_not_change_the_commit(
    name: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = git(checkout, "rev-parse", "HEAD").strip(), ""
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "--quiet")
    monkeypatch.setenv(name, str(tmp_path / "other" / ("" if name == "GIT_WORK_TREE" else ".git")))
    assert version() == expected


def test_a_damaged_checkout_takes_no_commit_from_the_repository_around_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = checkout / "environment"
    (inside / ".git").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", inside)
    assert version() == ("unknown", "unknown")
    assert "git refuses (fatal: not a git repository" in capsys.readouterr().err


def test_untracked_modules_are_changes_whatever_the_user_lets_git_show(checkout: Path) -> None:
    git(checkout, "config", "status.showUntrackedFiles", "no")
    (checkout / "replicate" / "other.py").write_text("")
    assert version()[1] != ""


# -- the machine


def test_a_machine_does_not_differ_from_itself_nor_by_code_time_or_pythons_patch() -> None:
    here = provenance(CPU)
    there = {**here, "commit": "another", "dirty": "x", "source_sha256": "y", "lock_sha256": "z", "started": "then"}
    there["python"] = ".".join([*here["python"].split(".")[:2], "99"])
    assert machine_differences(here, here, "there", "here") == []
    assert machine_differences(there, here, "there", "here") == []


@pytest.mark.parametrize("key", MACHINE)
def test_every_part_of_the_machine_counts_and_is_named(key: str) -> None:
    here = provenance(CPU)
    (line,) = machine_differences({**here, key: "9.9"}, here, "there", "here")
    assert line.startswith(f"{MACHINE[key]}: 9.9 there, ")
    assert line.endswith(" here")


@pytest.mark.parametrize("key", MACHINE)
def test_what_a_record_does_not_say_may_differ(key: str) -> None:
    here = provenance(CPU)
    silent = {k: v for k, v in here.items() if k != key}
    expected = [f"not recorded: {MACHINE[key]}"]
    assert machine_differences(silent, here, "there", "here") == expected
    assert machine_differences(here, silent, "there", "here") == expected


def test_libraries_that_differ_are_named_each() -> None:
    here = provenance(CPU)
    other = {**here["libraries"], "scipy": "0.1"}
    del other["POT"]
    found = machine_differences({**here, "libraries": other}, here, "there", "here")
    assert found == [
        f"scipy: 0.1 there, {here['libraries']['scipy']} here",
        f"POT: none there, {here['libraries']['POT']} here",
    ]
