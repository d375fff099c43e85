"""The report says what the records say: columns, means, intervals, escapes, bytes, and the check that finds edits."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers.report_data import BEGIN, END, EVIL, SMALL, TASKS, run_id_of, write_run, write_runs
from matplotlib.axes import Axes
from scipy import stats

from replicate.errors import ReportError
from replicate.model import DataInfo
from replicate.report import build as builder
from replicate.report import tables
from replicate.report.build import TIMING_METRICS, build, verify, write_manifest
from replicate.report.compare import compare_models, compare_with_reference, differences, kind_of_difference
from replicate.report.drawing import ENDINGS, Figure, new_canvas, save, style
from replicate.report.figures import all_figures
from replicate.report.labels import fixed, latex, markdown, slug
from replicate.report.maps import Picture, samples_figure
from replicate.report.page import NOTEBOOKS, sections
from replicate.report.plots import experiment_figures
from replicate.report.readme import headline_markdown, refresh, stale, update_readme
from replicate.report.records import (
    MEASUREMENT_COLUMNS,
    SUMMARY_COLUMNS,
    RecordedRun,
    load_runs,
    measurements,
    read_measurements,
    read_summary,
    summary,
)
from replicate.report.text_table import Cell, Number, Row
from replicate.runs.record import seal
from replicate.tasks.base import TaskEntry
from replicate.tasks.loading import tasks


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models on four tasks with three seeds."""
    return write_runs(tmp_path_factory.mktemp("runs"), TASKS)


@pytest.fixture(scope="module")
def frame(runs_folder: Path) -> pd.DataFrame:
    """Its measurements."""
    return measurements(load_runs(runs_folder))


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer models, for whole builds."""
    return write_runs(tmp_path_factory.mktemp("small"), TASKS, models=SMALL, points=16)


@pytest.fixture(scope="module")
def built(small_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results/PROFILE of the small runs."""
    out = tmp_path_factory.mktemp("results") / "smoke"
    assert build(small_runs, out, "smoke") == out / "report.html"
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the built results that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "smoke"))


# -- measurements and summary


def test_measurements_have_the_contracts_columns_in_an_order_given_by_the_records(
    runs_folder: Path, tmp_path: Path
) -> None:
    frame = measurements(load_runs(runs_folder))
    assert tuple(frame.columns) == MEASUREMENT_COLUMNS
    assert ",".join(MEASUREMENT_COLUMNS) == (
        "run_id,task,model,family,seed,split,metric,value,stderr,kind,unit,n,status,device,commit"
    )
    shuffled = tmp_path / "shuffled"
    for place in sorted((p for p in runs_folder.iterdir() if p.is_dir()), key=lambda p: p.name[::-1]):
        shutil.copytree(place, shuffled / place.name)
    pd.testing.assert_frame_equal(frame, measurements(load_runs(shuffled)))


def test_a_metric_without_a_number_keeps_its_reason_and_an_empty_value(frame: pd.DataFrame) -> None:
    rows = frame[(frame.model == "kde") & (frame.metric == "fisher_divergence")]
    assert len(rows)
    assert rows.value.isna().all()
    assert rows.status.str.startswith("n/a: ").all()


def test_summary_is_the_mean_with_students_interval(frame: pd.DataFrame) -> None:
    numbers = summary(frame)
    assert tuple(numbers.columns) == SUMMARY_COLUMNS
    picked = frame[(frame.task == "digits") & (frame.model == "realnvp") & (frame.metric == "nll")].sort_values("seed")
    values = picked.value.to_numpy()
    (row,) = numbers[(numbers.task == "digits") & (numbers.model == "realnvp") & (numbers.metric == "nll")].itertuples()
    half = 4.302652729911275 * values.std(ddof=1) / math.sqrt(3)  # t quantile 0.975 at 2 degrees of freedom
    assert row.mean == pytest.approx(values.sum() / 3)
    assert (row.ci_low, row.ci_high) == pytest.approx((row.mean - half, row.mean + half))
    assert (row.ci_low, row.ci_high) == pytest.approx(
        stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    )
    assert (row.kind, row.unit, row.n_seeds, row.family) == ("upper_bound", "nats", 3, "flow")
    assert row.run_ids.split(";") == list(picked.run_id)


def test_below_three_seeds_there_is_no_interval_anywhere(tmp_path: Path) -> None:
    folder = write_runs(tmp_path / "runs", ("digits",), seeds=2, models={"pixelcnn": "autoregressive", "iwae": "vae"})
    frame = measurements(load_runs(folder))
    numbers = summary(frame)
    assert numbers.ci_low.isna().all()
    assert numbers.ci_high.isna().all()
    table = tables.task_table(tables.Results(frame), "digits")
    assert all("[" not in cell.text() for r in table.rows for cell in r.measured())


def test_numbers_of_training_splits_and_missing_ones_are_not_in_the_summary(frame: pd.DataFrame) -> None:
    extra = frame[(frame.model == "realnvp") & (frame.metric == "nll") & (frame.task == "digits")].copy()
    extra["split"], extra["value"] = "train", 0.0
    assert summary(pd.concat([frame, extra])).equals(summary(frame))
    assert "causal-conv" not in set(summary(frame).query("task == 'digits' and metric == 'nll'").model)


def test_failures_are_counted_in_summary_and_cells(frame: pd.DataFrame) -> None:
    (row,) = summary(frame).query("metric == 'failed_runs'").itertuples()
    assert (row.task, row.model, row.mean, row.n_seeds) == ("two-gaussians", EVIL, 2.0, 3)
    assert len(row.run_ids.split(";")) == 2
    cell = tables.Results(frame).cell("two-gaussians", EVIL, "kl")
    assert cell.text().endswith("failed (2 of 3)")
    assert cell.text().startswith("= ")


def test_a_record_beside_an_older_failure_wins(tmp_path: Path) -> None:
    run_id = write_run(tmp_path, "iwae", "vae", "digits", 0)
    (tmp_path / run_id / "failure.json").write_text("{}")
    assert [r.failed for r in load_runs(tmp_path).runs] == [False]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "a"}', '{"run_id": "a", "spec": {}}'])
def test_a_broken_record_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "record.json").write_text(text)
    with pytest.raises(ReportError, match=r"abc/record.json is not a whole record .* delete its folder"):
        load_runs(tmp_path)


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    run_id = write_run(tmp_path, "iwae", "vae", "digits", 0)
    record = json.loads((tmp_path / run_id / "record.json").read_text())
    record["spec"]["params"]["width"] = 32
    record["run_id"] = run_id_of(record["spec"])
    (tmp_path / record["run_id"]).mkdir()
    (tmp_path / record["run_id"] / "record.json").write_text(json.dumps(seal(record)))
    with pytest.raises(ReportError, match="two runs of iwae on digits with seed 0"):
        load_runs(tmp_path)
    assert [r.run_id for r in load_runs(tmp_path, keep=[run_id]).runs] == [run_id]


def test_pickles_in_arrays_are_refused(tmp_path: Path) -> None:
    run_id = write_run(tmp_path, "iwae", "vae", "digits", 0)
    np.savez(tmp_path / run_id / "arrays.npz", samples=np.asarray([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ReportError, match="cannot be read"):
        load_runs(tmp_path).runs[0].arrays()


# -- cells


def number(kind: str, mean: float, half: float = 0.4) -> Number:
    """A number with a symmetric interval."""
    return Number(kind, "nats", mean, mean - half, mean + half, ((0, mean, "a" * 64),))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("exact", "= 92.31 [91.91, 92.71]"),
        ("upper_bound", "<= 92.31 [91.91, 92.71]"),
        ("lower_bound", ">= 92.31 [91.91, 92.71]"),
        ("estimate", "~ 92.31 [91.91, 92.71]"),
    ],
)
def test_every_cell_shows_its_kind_and_interval(kind: str, text: str) -> None:
    cell = Cell("nll", (number(kind, 92.31),))
    assert cell.text() == text
    assert "seed 0: 92.31 (run aaaaaaaa)" in cell.tip()


def test_cells_without_numbers_show_the_reason() -> None:
    assert Cell("kl", reason="no density").text() == "n/a"
    assert Cell("kl", lost=2, tried=5).text() == "failed (2 of 5)"
    assert Cell("kl").text() == "-"


def test_a_number_that_may_flatter_is_never_marked_best() -> None:
    def line(model: str, family: str, *numbers: Number) -> Row:
        return Row((family, model, Cell("nll", numbers)), family)

    rows = [
        line("exact", "flow", number("exact", 90)),
        line("bound", "vae", number("upper_bound", 89)),
        line("low", "ebm", number("lower_bound", 50)),
        line("rough", "score", number("estimate", 60)),
        line("floor", "reference", number("exact", 10)),
    ]
    assert [cell.best for r in tables.mark_best(rows) for cell in r.measured()] == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (-0.00001, 3, "0.000"),
        (-0.0123, 3, "-0.012"),
        (123456.7, 0, "123,457"),
        (math.inf, 2, "inf"),
        (12345, 0, "12345"),
    ],
)
def test_numbers_have_one_fixed_form(value: float, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_only_suffixed_metrics_make_the_sampler_table(frame: pd.DataFrame) -> None:
    (table,) = tables.samplers_table(tables.Results(frame))
    assert {r.cells[2] for r in table.rows} == {"own", "ULA", "MALA"}
    assert all(r.cells[1] != "kde" for r in table.rows)
    main = tables.task_table(tables.Results(frame), "two-gaussians")
    assert all(":" not in c.key for c in main.columns)


# -- escapes


class Reader(HTMLParser):
    """Collects tags, what a browser would fetch, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {k: v or "" for k, v in attrs}
        self.fetched += [found[k] for k in ("src", "srcset", "data") if k in found]
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []


def test_the_page_is_whole_escaped_and_fetches_nothing(built: Path) -> None:
    text = (built / "report.html").read_text()
    assert len(text) < 6_000_000
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert reader.fetched
    assert all(s.startswith("data:image/png;base64,") for s in reader.fetched)
    assert "url(" not in text
    assert "@import" not in text
    anchors = {link[1:] for link in reader.links if link.startswith("#")}
    assert anchors <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    beside = {f"../notebooks/{name}.html" for name, _ in NOTEBOOKS}  # written by `make notebooks`
    assert beside <= set(reader.links)
    assert all((built / link).is_file() for link in set(reader.links) - beside if not link.startswith("#"))


def test_the_page_shows_failures_reasons_runs_and_provenance(built: Path, small_runs: Path) -> None:
    text = (built / "report.html").read_text()
    failed = load_runs(small_runs).failed
    assert len(failed) == 2
    assert all(r.run_id[:8] in text for r in failed)
    assert "TrainingError: the loss became nan &lt;b&gt;" in text
    assert "the model has no score | &lt;b&gt;none&lt;/b&gt;" in text
    for said in ("Test CPU", "c" * 40, "2.13.0", "seeds 0, 1, 2", "failed (2 of 3)"):
        assert said in text
    done = next(r for r in load_runs(small_runs).done if r.model == "spline-flow" and r.task == "digits")
    assert f"(run {done.run_id[:8]})" in text


def test_latex_and_markdown_escape_hostile_names(frame: pd.DataFrame) -> None:
    assert latex("a_b%&{}$#^~\\<") == (
        r"a\_b\%\&\{\}\$\#\textasciicircum{}\textasciitilde{}\textbackslash{}\textless{}"
    )
    assert markdown("a|b<i>_\n`") == r"a\|b&lt;i&gt;\_ \`"
    table = tables.task_table(tables.Results(frame), "two-gaussians")
    tex, md = table.latex(), table.markdown()
    assert latex(EVIL) in tex
    assert "<" not in tex.replace(r"\textless{}", "")
    assert r"\toprule" in tex
    assert r"\bottomrule" in tex
    assert "<script" not in md
    lines = [line for line in md.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    ampersands = {
        line.replace(r"\&", "").count("&") for line in tex.splitlines() if line.endswith(r"\\") and "&" in line
    }
    assert ampersands == {len(table.columns) - 2}


def test_file_names_are_plain_and_never_shared() -> None:
    names = ["digits", "Digits", "digits!", "../../etc", EVIL, "two-gaussians"]
    slugs = [slug(n) for n in names]
    assert len(set(slugs)) == len(names)
    assert all(set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for s in slugs)
    assert slugs[0] == "digits"


# -- bytes


def test_two_builds_of_the_same_records_are_the_same_bytes(built: Path, small_runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "again"
    build(small_runs, other, "smoke")
    names = builder.results_files(built)
    assert names == builder.results_files(other)
    assert [n for n in names if (built / n).read_bytes() != (other / n).read_bytes()] == []
    assert (built / "MANIFEST.json").read_bytes() == (other / "MANIFEST.json").read_bytes()


def test_every_figure_has_three_files_and_they_are_small(built: Path) -> None:
    figures = built / "figures"
    stems = {p.stem for p in figures.iterdir()}
    wanted = ("nll", "kl", "cost-data", "cost-densities", "dimension", "samples-digits", "density-two-gaussians")
    assert {*wanted, "score-two-gaussians", "paths-two-gaussians", "training-digits"} <= stems
    for stem in stems:
        assert (figures / f"{stem}.png").stat().st_size < 400_000
        assert (figures / f"{stem}.csv").stat().st_size < 600_000
        assert "<dc:date>" not in (figures / f"{stem}.svg").read_text()


def test_the_density_figures_csv_holds_the_normalised_maps(built: Path) -> None:
    with open(built / "figures" / "density-two-gaussians.csv") as handle:
        lines = [line.rstrip("\n").split(",") for line in handle]
    truth = [line for line in lines if line[0] == "truth"]
    axis = np.asarray(truth[0][3:], dtype=float)
    values = np.asarray([line[3:] for line in truth[1:]], dtype=float)
    assert values.shape == (16, 16)
    assert values.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)
    i, j = np.unravel_index(values.argmax(), values.shape)
    assert axis[j] == pytest.approx(2, abs=0.8)
    assert float(truth[1 + i][2]) == pytest.approx(2, abs=0.8)


def drawn_samples(
    frame: pd.DataFrame, rows: np.ndarray, levels: float, task: str = "mine"
) -> tuple[Figure, list[Axes]]:
    arrays = {"samples": rows[::-1], "reference_samples": rows, "levels": np.asarray(levels)}
    figure = samples_figure(tables.Results(frame), task, [Picture("vae", "vae", arrays)])
    assert figure is not None
    assert figure.canvas is not None
    return figure, figure.canvas.axes


def test_samples_of_a_table_are_scattered_by_its_most_correlated_columns(frame: pd.DataFrame) -> None:
    rows = np.random.default_rng(0).normal(size=(100, 5))
    rows[:, 4] = rows[:, 1] + 0.1 * rows[:, 0]
    figure, axes = drawn_samples(frame, rows, math.nan)
    assert "1 and 4" in figure.caption
    points = [np.asarray(ax.collections[0].get_offsets()) for ax in axes]
    np.testing.assert_array_equal(points[0], rows[:, [1, 4]])
    np.testing.assert_array_equal(points[1], rows[::-1][:, [1, 4]])
    lines = figure.csv.splitlines()
    assert lines[0] == "model,sample,x_0,x_1,x_2,x_3,x_4"
    assert len(lines) == 1 + 2 * 100


def test_samples_of_a_table_of_one_column_are_histograms(frame: pd.DataFrame) -> None:
    rows = np.random.default_rng(0).normal(size=(100, 1))
    figure, axes = drawn_samples(frame, rows, math.nan)
    assert "histograms of their only column" in figure.caption
    assert [sum(p.get_height() for p in ax.patches) for ax in axes] == [100, 100]  # type: ignore[attr-defined]
    assert figure.csv.splitlines()[0] == "model,sample,x_0"


@pytest.mark.parametrize("dim", [2, 3])
def test_samples_of_a_table_of_few_columns_are_scattered(frame: pd.DataFrame, dim: int) -> None:
    _, axes = drawn_samples(frame, np.random.default_rng(0).normal(size=(100, dim)), math.nan)
    assert all(len(ax.collections[0].get_offsets()) == 100 for ax in axes)


def test_samples_of_bits_that_are_no_image_are_lines_of_a_picture(frame: pd.DataFrame) -> None:
    rows = np.random.default_rng(0).integers(0, 2, size=(100, 7))
    figure, axes = drawn_samples(frame, rows, 2)
    assert "one of 7 bits" in figure.caption
    np.testing.assert_array_equal(axes[0].images[0].get_array(), rows[:36])


@pytest.mark.parametrize(("task", "height", "width"), [("digits", 8, 8), ("frey-faces", 28, 20)])
def test_samples_of_images_are_a_mosaic(frame: pd.DataFrame, task: str, height: int, width: int) -> None:
    rows = np.random.default_rng(0).integers(0, 2, size=(100, height * width))
    _, axes = drawn_samples(frame, rows, 2, task)
    picture = np.asarray(axes[0].images[0].get_array())
    second_row, third_column = slice(height + 1, 2 * height + 1), slice(2 * (width + 1), 3 * width + 2)
    np.testing.assert_array_equal(picture[second_row, third_column], rows[8].reshape(height, width))


def test_a_square_number_of_bits_is_no_image(frame: pd.DataFrame) -> None:
    rows = np.random.default_rng(0).integers(0, 2, size=(100, 100))
    for task in ("baudio", "a-plug-in-that-is-not-installed"):
        figure, axes = drawn_samples(frame, rows, 2, task)
        assert "one of 100 bits" in figure.caption
        np.testing.assert_array_equal(axes[0].images[0].get_array(), rows[:36])


def test_only_densities_in_the_plane_stand_among_two_dimensional_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"spline-flow": "flow", "truth": "reference"}
    names = tuple(f"mixture-{dim}" for dim in (1, 2, 3))
    for dim, name in zip((1, 2, 3), names, strict=True):
        entry = TaskEntry("a plug-in's", lambda: pytest.fail("loaded"), "density", info=DataInfo(dim, "continuous"))
        monkeypatch.setitem(tasks(), name, entry)
    runs = load_runs(write_runs(tmp_path / "runs", names, models=models, points=12))
    results = tables.Results(measurements(runs))
    assert tables.planar(tables.density_tasks(results)) == ["mixture-2"]
    (kl,) = [t for t in tables.model_tables(results) if t.name == "kl"]
    assert [c.key for c in kl.columns[2:]] == ["mixture-2"]
    placed = {s.id: [p.title for p in s.parts] for s in sections(results, tables.all_tables(results), [])}
    assert placed["densities"] == ["mixture-2"]
    assert placed["others"] == ["mixture-1", "mixture-3"]
    assert "dimension" not in placed
    figures = {f.name for f in all_figures(results, runs.comparison)}
    assert {"kl", "cost-densities", "training-mixture-1", "training-mixture-3"} <= figures


#: what a matplotlibrc may hold; the first one needs LaTeX
CUSTOM = {
    **{"text.usetex": True, "lines.linewidth": 9.0, "font.size": 30.0, "axes.formatter.use_locale": True},
    **{"figure.autolayout": True, "savefig.bbox": "tight", "savefig.transparent": True, "axes.axisbelow": False},
    **{"image.cmap": "hot", "path.sketch": (1.0, 100.0, 2.0), "axes.xmargin": 0.4, "svg.image_inline": False},
    **{"legend.loc": "center", "lines.antialiased": False, "agg.path.chunksize": 3, "mathtext.fontset": "stix"},
}


def test_a_matplotlibrc_changes_no_byte(tmp_path: Path) -> None:
    def saved(folder: str) -> list[bytes]:
        with style():
            canvas = new_canvas(1.5, 1.2)
            ax = canvas.add_axes((0.2, 0.2, 0.7, 0.7))
            ax.plot([0, 1, 2], [0, 3, 1], label=r"$x_1$")
            ax.imshow([[0, 1], [2, 3]])
            ax.legend()
            save(Figure("figure", "", "", canvas, "x\n"), tmp_path / folder)
        return [(tmp_path / folder / f"figure.{ending}").read_bytes() for ending in ENDINGS]

    usual = saved("usual")
    for key, value in CUSTOM.items():
        with mpl.rc_context({key: value}):
            assert saved("custom") == usual, key
            assert mpl.rcParams[key] == value


def test_drawing_leaves_no_global_state(small_runs: Path, tmp_path: Path) -> None:
    before, figures = dict(mpl.rcParams), plt.get_fignums()
    backend = mpl.get_backend()
    runs = load_runs(small_runs)
    from replicate.report.figures import comparison_figure

    with style():
        results = tables.Results(measurements(runs))
        assert comparison_figure(results, ["digits"], "nll", "nll", "NLL") is not None
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == figures
    assert mpl.get_backend() == backend


def test_measurements_survive_the_csv_bit_for_bit(built: Path, small_runs: Path) -> None:
    written = read_measurements(built / "measurements.csv")
    pd.testing.assert_frame_equal(written, measurements(load_runs(small_runs)), check_dtype=False)
    assert (written.value.dropna().to_numpy() == measurements(load_runs(small_runs)).value.dropna().to_numpy()).all()


def test_a_second_build_removes_figures_it_does_not_make_and_keeps_a_readers_files(
    copy: Path, small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "all_figures", lambda *_: iter(()))
    (copy / "notes.txt").write_text("a reader's own\n")
    build(small_runs, copy, "smoke")
    assert not list(copy.glob("figures/*"))
    assert "notes.txt" in json.loads((copy / "MANIFEST.json").read_text())
    assert verify(copy) == []


def test_a_build_that_fails_leaves_the_earlier_results_whole(
    copy: Path, small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("half-way")

    monkeypatch.setattr(builder, "render", broken)
    monkeypatch.setattr(builder, "all_figures", lambda *_: iter(()))
    with pytest.raises(RuntimeError, match="half-way"):
        build(small_runs, copy, "smoke")
    assert verify(copy) == []
    assert [p.name for p in copy.parent.iterdir()] == ["smoke"]


# -- verify


def test_verify_finds_nothing_wrong_with_a_fresh_build(built: Path) -> None:
    assert verify(built) == []


def test_verify_finds_an_edited_missing_and_added_file(copy: Path) -> None:
    (copy / "tables" / "kl.md").write_text("better numbers")
    (copy / "figures" / "kl.png").unlink()
    (copy / "notes.txt").write_text("hello")
    problems = "\n".join(verify(copy))
    assert "tables/kl.md is not the file" in problems
    assert "figures/kl.png is in the manifest and not in the folder" in problems
    assert "notes.txt is in the folder and not in the manifest" in problems


#: what desktops and editors leave in any folder
LEFT = (
    *(".DS_Store", "figures/.DS_Store", "Thumbs.db", "figures/thumbs.db", "desktop.ini", "figures/._kl.png"),
    *("tables/likelihood.md~", ".summary.csv.swp", "#summary.csv#", ".ipynb_checkpoints/a.csv", "~$summary.xlsx"),
)


def test_what_a_desktop_leaves_in_a_folder_is_none_of_the_results(copy: Path) -> None:
    before = (copy / "MANIFEST.json").read_bytes()
    for name in LEFT:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"left")
    assert verify(copy) == []
    write_manifest(copy)
    assert (copy / "MANIFEST.json").read_bytes() == before


@pytest.mark.parametrize(
    ("written", "computed", "same"),
    [
        ("a,1.234567891,b", "a,1.234567892,b", True),
        ("a,-1.234567891e-07,b", "a,-1.234567890e-07,b", True),
        ("= 9.999999999 [1.5, 2.5]", "= 10.00000000 [1.5, 2.5]", True),
        ("a,1.234567,b", "a,1.234568,b", False),
        ("a,1.5,b", "a,-1.5,b", False),
        ("a,1.5,b", "a,1.5,c", False),
        ("a,1.5,b", "a,,b", False),
        ("a,1.5e-07", "a,1.5e-08", False),
        ("seeds,3", "seeds,4", False),
        ("run,123456789", "run,123456788", False),
        ("1.5,1.5", "1.5", False),
        ("", "1.5", False),
    ],
)
def test_tables_may_differ_in_last_digits_alone(written: str, computed: str, same: bool) -> None:
    assert builder.same_text(written, computed) == same


def test_another_librarys_last_digits_make_no_table_wrong(copy: Path) -> None:
    """Intervals of another version of scipy differ in the tenth digit at most."""
    path = copy / "tables" / "kl.csv"
    committed = path.read_text()
    for factor, problems in ((1 + 2e-10, 0), (1 + 1e-6, 1)):
        nudged = re.sub(r"\d\.\d{8,}", lambda m: f"{float(m.group()) * factor:.10g}", committed)  # noqa: B023
        assert nudged != committed
        path.write_text(nudged)
        write_manifest(copy)
        assert len(verify(copy)) == problems


def test_verify_finds_an_edited_measurement_behind_a_fresh_manifest(copy: Path) -> None:
    path = copy / "measurements.csv"
    frame = read_measurements(path)
    at = frame.index[(frame.metric == "nll") & (frame.model == "spline-flow") & (frame.task == "digits")][0]
    frame.loc[at, "value"] -= 1.0
    frame.to_csv(path, index=False)
    write_manifest(copy)
    problems = verify(copy)
    assert any("digits / spline-flow / nll: mean is" in p for p in problems)


def test_verify_finds_an_edited_summary_behind_a_fresh_manifest(copy: Path) -> None:
    path = copy / "summary.csv"
    frame = read_summary(path)
    frame.loc[0, "ci_low"] += 0.001
    frame.iloc[:-1].to_csv(path, index=False)
    write_manifest(copy)
    problems = verify(copy)
    assert any("ci_low is" in p for p in problems)
    assert any("is missing from summary.csv" in p for p in problems)


def test_verify_finds_an_edited_spec_behind_a_fresh_manifest(copy: Path) -> None:
    path = copy / "records.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[0])
    record["spec"]["training"]["steps"] += 1
    path.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    write_manifest(copy)
    assert verify(copy) == [f"records.jsonl: run {record['run_id'][:8]} is not the sha256 of its spec"]


def test_verify_finds_a_run_that_was_dropped_from_the_records(copy: Path) -> None:
    path = copy / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    write_manifest(copy)
    lost = json.loads(lines[0])
    numbers, picture = verify(copy)
    assert numbers == f"measurements.csv: run {lost['run_id'][:8]} has no record"
    assert picture == f"figures.json: samples-{lost['spec']['task']} shows a run that has no record"


# -- README


def test_the_headline_names_the_best_model_of_each_family(frame: pd.DataFrame) -> None:
    text = headline_markdown(summary(frame))
    (kl,) = [line for line in text.splitlines() if line.startswith("| two-gaussians<br>KL")]
    cells = [c.strip() for c in kl.strip("|").split("|")]
    assert cells[2].endswith("<br>spline-flow")
    assert cells[6].endswith("<br>kde")  # the truth is no competitor
    assert [c.startswith("**") for c in cells[1:]] == [False, True, False, False, False, False]
    assert cells[5].startswith("~ ") is (cells[5].endswith("vp-sde"))
    (nll,) = [line for line in text.splitlines() if line.startswith("| digits<br>NLL, nats")]
    assert "<= " in nll
    assert "**= 80." in nll
    assert "Failed runs" in text
    assert "<script" not in text
    assert len({line.replace(r"\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_readme_block_is_replaced_and_nothing_else(tmp_path: Path, built: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\ntail\n")
    assert update_readme(path, "new\n")
    assert path.read_text() == f"# Title\n\n{BEGIN}\nnew\n{END}\n\ntail\n"
    assert not update_readme(path, "new\n")
    assert stale(path, built)
    assert refresh(path, built)
    assert not stale(path, built)
    assert not refresh(path, built)


@pytest.mark.parametrize("text", ["none", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}", BEGIN])
def test_a_readme_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ReportError, match="headline:begin"):
        update_readme(path, "new")
    assert path.read_text() == text


# -- comparisons


def measured(model: str, values: list[float], kind: str = "exact", first: int = 0) -> pd.DataFrame:
    """Measurements of one model's NLL on one task."""
    same = {
        "task": "digits",
        "model": model,
        "family": "flow",
        "split": "test",
        "metric": "nll",
        "unit": "nats",
        "n": 10,
    }
    same |= {"stderr": 0.01, "kind": kind, "status": "ok", "device": "", "commit": ""}
    rows = [{**same, "run_id": f"{model}{first + i}", "seed": first + i, "value": v} for i, v in enumerate(values)]
    return pd.DataFrame(rows)


def test_models_are_compared_seed_by_seed() -> None:
    frame = pd.concat([measured("a", [10, 20, 30.0, 99]), measured("b", [11, 21.5, 32.5])])
    (row,) = compare_models(frame, ["a", "b"], "nll").itertuples()
    d = np.array([-1, -1.5, -2.5])
    half = 4.302652729911275 * d.std(ddof=1) / math.sqrt(3)
    assert row.n_seeds == 3
    assert row.difference == pytest.approx(d.mean())
    assert (row.ci_low, row.ci_high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert row.ci_high > 0
    assert row.verdict == "no difference seen"


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ("exact", "exact", "exact"),
        ("upper_bound", "exact", "upper_bound"),
        ("exact", "upper_bound", "lower_bound"),
        ("upper_bound", "upper_bound", "estimate"),
        ("upper_bound", "lower_bound", "upper_bound"),
        ("estimate", "exact", "estimate"),
    ],
)
def test_the_kind_of_a_difference_follows_from_both(a: str, b: str, kind: str) -> None:
    assert kind_of_difference(a, b) == kind


def test_a_bound_decides_a_comparison_on_one_side_only() -> None:
    low, high = measured("low", [80, 80.1, 80.2], "upper_bound"), measured("high", [90, 90.1, 90.3])
    verdict = compare_models(pd.concat([low, high]), ["low", "high"]).verdict[0]
    assert verdict == "low is better"
    low["kind"], high["kind"] = "exact", "upper_bound"
    verdict = compare_models(pd.concat([low, high]), ["low", "high"]).verdict[0]
    assert verdict == "low looks better, but the kinds do not decide"


def test_below_three_shared_seeds_no_verdict_is_given() -> None:
    frame = pd.concat([measured("a", [1.0, 2, 3]), measured("b", [5.0, 6, 7], first=1)])
    assert compare_models(frame, ["a", "b"]).verdict[0] == "too few seeds"


def test_the_reference_comparison_is_bitwise_and_leaves_times_out(frame: pd.DataFrame) -> None:
    new = frame.copy()
    new.loc[new.metric.isin(TIMING_METRICS), "value"] *= 2
    assert differences(new, frame) == []
    (line,) = compare_with_reference(new, frame)
    compared = (~frame.metric.isin(TIMING_METRICS)).sum()
    assert line.startswith(f"{compared} of {compared} numbers are bit for bit")


def test_differences_from_the_reference_are_classed() -> None:
    reference = measured("a", [10.0, 10.1, 10.2, 10.3, 10.4])
    new = reference.copy()
    new["value"] = [np.nextafter(10.0, 11), 10.2, 20.0, math.nan, 10.4]
    new = pd.concat([new.iloc[:4], measured("b", [1.0])])
    found = {d.run_id: d.label for d in differences(new, reference)}
    assert found == {
        "a0": "rounding",
        "a1": "within error",
        "a2": "differs",
        "a3": "status",
        "a4": "missing",
        "b0": "new",
    }
    lines = compare_with_reference(new, reference)
    assert lines[0].startswith("0 of 4 numbers")
    assert "1 differ by more than that" in lines
    assert any("a on digits, seed 2, nll" in line for line in lines)


def test_a_number_off_the_scale_is_drawn_at_the_edge_and_squeezes_no_other() -> None:
    from replicate.report.figures import _far

    assert _far([80.0, 92.0, 105.0, 130.0]) == math.inf
    assert 105.0 < _far([80.0, 92.0, 105.0, 54596.0]) < 110.0
    assert _far([]) == math.inf


@pytest.mark.parametrize("high", [0.11, 0.3, 3.0, 300.0])
def test_a_logarithmic_axis_has_two_numbers_and_none_overlaps_another(high: float) -> None:
    lines = [{"label": "error", "x": [1, 2, 3], "y": [0.06, 0.08, high]}]
    plot = {"name": "p", "title": "A title", "x_label": "x", "y_label": "y", "style": "line", "lines": lines}
    plot |= {"log_x": False, "log_y": True, "levels": {}}
    spec = {"kind": "experiment", "model": "toy", "task": "run", "seed": 0}
    (figure,) = experiment_figures([RecordedRun("a", spec, plots=(plot,), about="a toy")])
    assert figure.canvas is not None
    figure.canvas.draw_without_rendering()
    axis = figure.canvas.axes[0].yaxis
    low, top = axis.get_view_interval()
    ticks = [t for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= t.get_loc() <= top]
    boxes = [t.label1.get_window_extent() for t in ticks if t.label1.get_text()]
    assert len(boxes) >= 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
