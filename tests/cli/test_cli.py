"""The command line: names, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_list_names_all_families_and_tasks(replicate) -> None:  # type: ignore[no-untyped-def]
    code, out, err = replicate("list", "--json")
    found = json.loads(out)
    assert code == 0
    assert err == ""
    families = {m["family"] for m in found["models"].values()}
    assert families == {"autoregressive", "flow", "vae", "ebm", "score", "reference"}
    assert {"digits", "digits-shuffled", "digits-binary", "two-gaussians", "mixture-64"} <= set(found["tasks"])
    assert found["broken"] == {}


def test_run_prints_its_record_and_keeps_it(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = ("run", "marginals", "two-moons", "--profile", "smoke", "--seed", "3", "--json")
    code, out, _ = replicate(*words)
    record = json.loads(out)
    assert code == 0
    assert json.loads((tmp_path / "runs" / "single" / record["run_id"] / "record.json").read_text()) == record
    assert record["spec"]["seed"] == 3
    measured = {m["metric"]: m for m in record["measurements"]}
    assert measured["nll"]["kind"] == "exact"
    assert measured["kl"]["value"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "pixelcn", "digits"), "Did you mean gated-pixelcnn"),
        (("run", "realnvp", "digts"), "Did you mean digits"),
        (("run", "realnvp", "two-moons", "--set", "lr"), "key=value"),
        (("run", "realnvp", "two-moons", "--set", "lr=fast"), "a number"),
        (("run", "realnvp", "two-moons", "--device", "tpu"), "auto, cpu or cuda"),
        (("run", "realnvp", "two-moons", "--seed", "-1"), "from 0 to"),
        (("run", "realnvp", "two-moons", "--seed", "one"), "--seed"),
        (("reproduce", "--profile", "quick"), "smoke, standard or full"),
        (("compare", "vae", "realnvp", "--results", "nowhere"), "make reproduce"),
        (("verify", "--results", "nowhere"), "make reproduce"),
        (("report", "--profile", "smoke"), "make reproduce"),
        (("reproduc",), "reproduc"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(replicate, words: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = replicate(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_diverging_run_leaves_a_failure_record_and_exit_code_1(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = ("run", "realnvp", "two-moons", "--profile", "smoke", "--set", "lr=1e30", "--set", "grad_clip=0.0")
    code, _, err = replicate(*words)
    assert code == 1
    assert "training loss is" in err
    (left,) = (tmp_path / "runs" / "single").iterdir()
    assert "TrainingError" in json.loads((left / "failure.json").read_text())["error"]
    assert not (left / "record.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, _, err = replicate("run", "marginals", "two-moons", "--profile", "smoke", "--out", str(locked / "x"))
    assert code == 2
    assert f"cannot write to {locked}" in err


def test_a_folder_that_is_a_file_is_named(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    code, _, err = replicate("run", "marginals", "two-moons", "--profile", "smoke", "--out", str(tmp_path / "file"))
    assert code == 2
    assert "cannot write to" in err


def test_dry_run_lists_and_computes_nothing(replicate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = replicate("reproduce", "--profile", "smoke", "--dry-run", "--results", str(tmp_path / "results"))
    assert code == 0
    assert "realnvp two-gaussians seed 0" in out
    assert not (tmp_path / "runs").exists()


def test_the_command_comes_up_without_importing_torch() -> None:
    code = "import sys, replicate.cli.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
