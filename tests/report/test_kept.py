"""A results folder is enough to rewrite its report, and to add other runs to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.report_data import SMALL, row, run_id_of, spec_of, write_failure, write_run, write_runs

from replicate.errors import ReportError
from replicate.report.build import build, results_files, verify, write_manifest
from replicate.report.kept import INDEX, kept_runs, read_index
from replicate.report.records import FAILED, load_runs, measurements, read_measurements, write_measurements
from replicate.runs.effort import Evaluation
from replicate.runs.record import seal

ROOT = Path(__file__).resolve().parents[2]
NONE = Path("no-such-folder")
TASKS = ("two-gaussians", "mixture-8", "digits")


def write_experiment(folder: Path, seed: int) -> str:
    """A run of a paper's experiment with one plot; returns its id."""
    head = {"kind": "experiment", "model": "toy", "task": "toy-fit", "family": "score", "seed": seed}
    spec = {
        **head,
        "data_sha256": "",
        "profile": "smoke",
        "results_version": 1,
        "precision": "float32",
        "device": "cpu",
        "params": {},
    }
    line = {"label": "error", "x": [1.0, 2.0, 3.0], "y": [3.0, 1.0 + seed / 3, 1.0]}
    axes = {"x_label": "steps", "y_label": "nats", "log_x": False, "log_y": True}
    plot = {"name": "error", "title": "Error", "style": "line", "lines": [line], "levels": {"best": 1.0}, **axes}
    record: dict[str, Any] = {
        "run_id": run_id_of(spec),
        "spec": spec,
        "about": "a toy",
        "paper": "Nobody 2020",
        "measurements": [row("nll", 1.0 + seed, "exact")],
        "provenance": {"commit": "c" * 40, "dirty": "", "device": "Test CPU"},
        "plots": [plot],
    }
    place = folder / record["run_id"]
    place.mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(seal(record)))
    return str(record["run_id"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the comparison with failures among them, and two seeds of an experiment."""
    folder = write_runs(tmp_path_factory.mktemp("runs"), TASKS, models=SMALL, points=12)
    for seed in range(2):
        write_experiment(folder, seed)
    return folder


@pytest.fixture(scope="module")
def built(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their results."""
    out = tmp_path_factory.mktemp("results") / "smoke"
    build(runs, out, "smoke")
    return out


@pytest.fixture
def results(built: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(built, tmp_path / "smoke"))


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in results_files(folder)}


@pytest.mark.parametrize("folder", sorted((ROOT / "results").glob("*/MANIFEST.json")), ids=lambda p: p.parent.name)
def test_runs_read_from_committed_results_match_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    kept, folder = kept_runs(folder.parent), folder.parent
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert [json.dumps(r.as_record(), sort_keys=True) for r in kept.runs] == lines
    write_measurements(measurements(kept), tmp_path / "measurements.csv")
    assert (tmp_path / "measurements.csv").read_bytes() == (folder / "measurements.csv").read_bytes()


def test_a_report_rewritten_from_its_results_alone_is_the_same_bytes(built: Path, results: Path) -> None:
    before = content(built)
    assert {"density-two-gaussians.png", "samples-digits.csv", "toy-fit-error.svg", "nll.png"} <= {
        Path(n).name for n in before
    }
    build(NONE, results, "smoke", keep=None)
    assert content(results) == before
    assert verify(results) == []


def test_every_figure_is_on_the_page_once_claimed_or_not(built: Path) -> None:
    page = (built / "report.html").read_text()
    assert {name: page.count(f'id="figure-{name}"') for name in read_index(built)} == dict.fromkeys(
        read_index(built), 1
    )


def test_an_added_run_is_in_every_table_and_older_pictures_name_it_in_their_captions(
    results: Path, tmp_path: Path
) -> None:
    old = content(results)
    for seed in range(3):
        write_run(tmp_path / "mine", "my-flow", "flow", "digits", seed)
    build(tmp_path / "mine", results, "smoke", keep=None)
    new = content(results)
    assert verify(results) == []
    assert "my-flow" in (results / "tables/likelihood.md").read_text()
    assert read_measurements(results / "measurements.csv")["model"].nunique() == len(SMALL) + 1 + 1  # and the toy
    for name in ("samples-digits", "density-two-gaussians"):
        assert all(new[f"figures/{name}.{e}"] == old[f"figures/{name}.{e}"] for e in ("png", "svg", "csv"))
    assert new["figures/nll.png"] != old["figures/nll.png"]  # drawn again from the numbers
    page = (results / "report.html").read_text()
    assert page.count("Drawn before my-flow joined.") == 2  # beneath the picture, and in its alternative text
    build(NONE, results, "smoke", keep=None)
    assert content(results) == new


def test_a_seed_added_to_an_experiment_is_drawn_with_the_earlier_ones(results: Path, tmp_path: Path) -> None:
    together = tmp_path / "together"
    for seed in range(3):
        write_experiment(together, seed)
    third = write_experiment(tmp_path / "third", 2)
    build(tmp_path / "third", results, "smoke", keep=None)
    build(together, tmp_path / "at-once", "smoke")
    for ending in ("png", "svg", "csv"):
        file = f"figures/toy-fit-error.{ending}"
        assert (results / file).read_bytes() == (tmp_path / "at-once" / file).read_bytes()
    assert third in read_index(results)["toy-fit-error"]["runs"]
    assert verify(results) == []


def test_a_picture_without_kept_plots_is_copied_and_its_index_names_its_seeds(results: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (results / "records.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in r.items() if k != "plots"}, sort_keys=True) + "\n" for r in lines)
    (results / "records.jsonl").write_text(text)
    before = content(results)
    build(NONE, results, "smoke", keep=None)
    assert content(results) == before
    write_experiment(tmp_path / "third", 2)
    build(tmp_path / "third", results, "smoke", keep=None)
    assert content(results)["figures/toy-fit-error.png"] == before["figures/toy-fit-error.png"]
    index = read_index(results)["toy-fit-error"]
    assert (len(index["runs"]), "Drawn" in index["caption"]) == (2, False)


def test_a_new_run_replaces_the_earlier_one_of_its_seed_unless_only_it_failed(results: Path, tmp_path: Path) -> None:
    def value(model: str) -> float:
        frame = read_measurements(results / "measurements.csv")
        return float(frame[(frame.model == model) & (frame.task == "digits") & (frame.seed == 1)].value.iloc[0])

    before = value("rbm-pcd"), value("spline-flow")
    write_failure(tmp_path / "new", "rbm-pcd", "ebm", "digits", 1)
    path = tmp_path / "new" / write_run(tmp_path / "new", "spline-flow", "flow", "digits", 1) / "record.json"
    record = json.loads(path.read_text())
    record["measurements"][0]["value"] += 1.0
    path.write_text(json.dumps(seal(record)))
    build(tmp_path / "new", results, "smoke", keep=None)
    assert (value("rbm-pcd"), value("spline-flow")) == (before[0], before[1] + 1.0)


def test_a_success_replaces_a_failure(results: Path, tmp_path: Path) -> None:
    frame = read_measurements(results / "measurements.csv")
    lost = frame[frame.metric == FAILED].iloc[0]
    write_run(tmp_path / "new", lost.model, lost.family, lost.task, int(lost.seed))
    build(tmp_path / "new", results, "smoke", keep=None)
    after = read_measurements(results / "measurements.csv")
    assert (after.metric == FAILED).sum() == (frame.metric == FAILED).sum() - 1
    assert verify(results) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("profile", "standard"),
        ("results_version", 2),
        ("data_sha256", "0" * 64),
        ("evaluation", asdict(Evaluation(samples=999))),
    ],
)
def test_a_run_with_other_settings_of_measurement_is_not_added(
    results: Path, tmp_path: Path, key: str, value: Any
) -> None:
    before = content(results)
    spec = spec_of("my-flow", "flow", "digits", 0) | {key: value}
    folder = tmp_path / "new"
    path = folder / write_run(folder, "my-flow", "flow", "digits", 0) / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(seal(record | {"spec": spec, "run_id": run_id_of(spec)})))
    with pytest.raises(ReportError, match=f"my-flow on digits, seed 0, cannot be added to .* its {key} differs"):
        build(folder, results, "smoke", keep=None)
    assert content(results) == before


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("measurements.csv", lambda text: text.replace(",rbm-pcd,ebm,0,test,nll,1", ",rbm-pcd,ebm,0,test,nll,0", 1)),
        ("records.jsonl", lambda text: text.replace('"run_id"', '"id"', 1)),
        ("records.jsonl", lambda text: text.replace('"width": 64', '"width": 65', 1)),
    ],
)
def test_edited_results_are_refused_and_not_rewritten(results: Path, file: str, spoil: Callable[[str], str]) -> None:
    text = (results / file).read_text()
    assert spoil(text) != text
    (results / file).write_text(spoil(text))
    before = content(results)
    with pytest.raises(ReportError, match="disagrees with itself"):
        build(NONE, results, "smoke", keep=None)
    assert content(results) == before


def test_only_the_named_runs_are_kept(results: Path, runs: Path, tmp_path: Path) -> None:
    kept = {r.run_id for r in load_runs(runs).done if r.model == "rbm-pcd"}
    write_run(tmp_path / "new", "my-flow", "flow", "digits", 0)
    build(tmp_path / "new", results, "smoke", keep=kept)
    frame = read_measurements(results / "measurements.csv")
    assert set(frame.model) == {"my-flow", "rbm-pcd"}
    assert not (results / "figures/samples-digits.png").exists()  # it showed runs that are not kept
    assert verify(results) == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda index: index.pop("nll"), "figures.json has no entry for nll"),
        (lambda index: index.update(ghost=index["nll"]), "figures.json names ghost, which is not in figures"),
        (lambda index: index["samples-digits"]["runs"].append("f" * 64), "samples-digits shows a run that has no"),
        (lambda index: index["nll"].pop("caption"), "figures.json has no caption"),
        (
            lambda index: index.update({"../nll": index["nll"]}),
            "figures.json is '../nll'; it must be a name of letters",
        ),
    ],
)
def test_verify_finds_an_index_that_differs_from_the_figures(
    results: Path, spoil: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    index = read_index(results)
    spoil(index)
    (results / INDEX).write_text(json.dumps(index))
    write_manifest(results)
    assert any(problem in line for line in verify(results))


def test_one_command_adds_a_folder_of_single_runs_to_the_results(
    replicate: Callable[..., tuple[int, str, str]], results: Path, tmp_path: Path
) -> None:
    write_run(tmp_path / "mine", "my-flow", "flow", "digits", 0)
    words = ("report", "--profile", "smoke", "--results", str(results.parent))
    code, _, err = replicate(*words, "--runs", str(tmp_path / "mine"))
    assert (code, err) == (0, "")
    assert "my-flow" in set(read_measurements(results / "measurements.csv").model)
    code, _, err = replicate(*words, "--runs", str(tmp_path / "yours"))
    assert (code, err.count("\n")) == (2, 1)
    assert "there is no folder of runs" in err
