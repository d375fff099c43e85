"""Verdicts by two one-sided tests, and a ledger that can be judged again from its own files."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.claims_file import CLAIM, PAPER
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from replicate.errors import ReportError
from replicate.ledger.claims import PaperClaims, read_claims
from replicate.ledger.tables import MeasureCell, MeasureTable
from replicate.report import ledger
from replicate.report.build import Claims, build, verify, write_manifest
from replicate.report.readme import blocks
from replicate.report.records import MEASUREMENT_COLUMNS
from replicate.report.verdicts import Criterion, Measured, band, judge


def criterion(**changes: object) -> Criterion:
    given = {
        "target": 1.0,
        "relation": "within",
        "tolerance": 0.1,
        "seed_sd": 0.0,
        "measure": "run/toy/a",
        "minus": "",
        "over": "",
        "deterministic": False,
        "kind": "number",
        "judged_at": "standard",
        "not_comparable": "",
        "needs": "",
    }
    return Criterion(**{**given, **changes})  # type: ignore[arg-type]


def frame(kind: str = "exact", status: str = "ok", **values: list[float]) -> pd.DataFrame:
    """Measurements run/toy/NAME over seeds 0, 1, .."""
    rows = [
        (f"{name}{seed}", "run", "toy", "score", seed, "test", name, value, 0.0, kind, "nats", 1, status, "cpu", "c")
        for name, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]
    return pd.DataFrame(rows, columns=list(MEASUREMENT_COLUMNS))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.01, 0.99], "reproduced"),
        ([1.09, 1.01, 0.95], "inconclusive"),  # the mean lies in the band, the interval does not
        ([2.0, 2.01, 1.99], "not reproduced"),
        ([0.5, 0.5, 0.5], "not reproduced"),
        ([1.0, 1.0], "not comparable"),
    ],
)
def test_the_90_percent_interval_decides(values: list[float], verdict: str) -> None:
    judged = judge(criterion(), Measured(frame(a=values)), "standard")
    assert judged.verdict == verdict
    if verdict == "not reproduced":
        assert judged.reason.startswith("above" if values[0] > 1 else "below")
    if len(values) > 2:
        ends = stats.t.interval(0.9, len(values) - 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose((judged.ci_low, judged.ci_high), np.nan_to_num(ends, nan=values[0]))


def test_at_the_edge_of_the_band_one_verdict_in_twenty_is_reproduced() -> None:
    x = np.random.default_rng(0).normal(1.1, 0.02, (600, 5))  # the truth lies on the band's upper end
    said = [judge(criterion(), Measured(frame(a=list(row))), "standard").verdict for row in x]
    assert 0.026 < said.count("reproduced") / len(said) < 0.074  # 2.7 standard errors


@given(st.floats(-5, 5), st.floats(0.01, 3), st.sampled_from(["within", "at most", "at least", "above", "below"]))
def test_bands_contain_the_values_that_their_words_describe(target: float, d: float, relation: str) -> None:
    low, high = band(criterion(target=target, tolerance=d, relation=relation), [1.0])
    inside = {"within": target, "at most": target, "at least": target, "above": target + d, "below": target - d}
    assert low <= inside[relation] <= high
    assert (low <= target <= high) == (relation in ("within", "at most", "at least"))


def test_a_band_in_standard_deviations_is_as_wide_as_the_spread_of_the_seeds() -> None:
    values = [0.8, 1.2, 1.0]
    low, high = band(criterion(seed_sd=2.0), values)
    assert math.isclose(high - low, 4 * np.std(values, ddof=1))


def test_orderings_are_paired_by_seed_and_have_a_probability() -> None:
    data = frame(a=[3.0, 5.0, 9.0], b=[2.0, 3.9, 8.1])
    ordering = criterion(minus="run/toy/b", relation="above", target=0.0, tolerance=0.5, kind="ordering")
    judged = judge(ordering, Measured(data), "standard")
    assert judged.verdict == "reproduced"
    differences = np.array([1.0, 1.1, 0.9])
    spread = differences.std(ddof=1) * math.sqrt(4 / 3)
    assert math.isclose(judged.probability, 1 - stats.t.cdf((0.5 - 1.0) / spread, 2))
    assert math.isclose(
        judge(criterion(over="run/toy/b"), Measured(data), "standard").mean, (1.5 + 5 / 3.9 + 9 / 8.1) / 3
    )


def test_a_seed_that_only_one_side_has_is_left_out() -> None:
    judged = judge(criterion(minus="run/toy/b"), Measured(frame(a=[3.0, 5.0, 9.0, 4.0], b=[2.0, 4.0, 8.0])), "standard")
    assert [seed for seed, _ in judged.seeds] == [0, 1, 2]


def test_a_difference_of_two_bounds_is_an_estimate() -> None:
    data = frame("upper_bound", a=[3.0, 5.0, 9.0], b=[2.0, 4.0, 8.0])
    assert judge(criterion(minus="run/toy/b"), Measured(data), "standard").number_kind == "estimate"
    assert judge(criterion(), Measured(data), "standard").number_kind == "upper_bound"


def test_a_reduced_run_is_never_compared_with_print() -> None:
    judged = judge(criterion(), Measured(frame(a=[1.0, 1.0, 1.0])), "smoke")
    assert (judged.verdict, judged.reason[:11]) == ("not comparable", "a smoke run")
    full = judge(criterion(judged_at="full"), Measured(frame(a=[1.0, 1.0, 1.0])), "standard")
    assert full.verdict == "not comparable"
    assert judge(criterion(), Measured(frame(a=[1.0, 1.0, 1.0])), "full").verdict == "reproduced"


def test_a_verdict_without_measurements_has_a_reason() -> None:
    nothing = Measured(frame(b=[1.0]))
    assert judge(criterion(needs="the MNIST images"), nothing, "standard").reason == "needs the MNIST images"
    assert judge(criterion(judged_at="full"), nothing, "standard").reason == "needs the full profile"
    assert judge(criterion(judged_at="standard"), nothing, "full").reason == "the standard profile measures it"
    assert judge(criterion(not_comparable="another split"), nothing, "standard").verdict == "not comparable"
    absent = Measured(frame(status="n/a: no sampler", a=[math.nan]))
    assert judge(criterion(), absent, "standard").reason == "n/a: no sampler"


def test_failed_runs_are_never_ignored() -> None:
    lost = frame(failed_runs=[math.nan], status="failed: out of memory")
    assert judge(criterion(), Measured(lost), "standard").reason == "1 runs failed"
    both = pd.concat([frame(a=[1.0, 1.0, 1.0]), lost])
    assert judge(criterion(), Measured(both), "standard").verdict == "inconclusive"


def test_a_computation_without_randomness_is_judged_on_one_run() -> None:
    assert judge(criterion(deterministic=True), Measured(frame(a=[1.05])), "standard").verdict == "reproduced"
    assert judge(criterion(deterministic=True), Measured(frame(a=[1.15])), "standard").verdict == "not reproduced"


def test_two_values_of_one_seed_are_refused() -> None:
    data = pd.concat([frame(a=[1.0]), frame(a=[2.0])])
    with pytest.raises(ReportError, match="two values for seed 0"):
        judge(criterion(), Measured(data), "standard")


# -- the whole way through a results folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> PaperClaims:
    """Three claims on one experiment: one holds, one does not, one waits for the full profile."""
    path = tmp_path_factory.mktemp("papers") / "toy.toml"
    own = CLAIM.replace('measure = "digits/vae/nll"', 'experiment = "run"\nmeasure = "a"\nplots = ["curve"]')
    second = own.replace('"T1"', '"T2"').replace("published = 1.0", "published = 5.0")
    third = own.replace('"T1"', '"T3"').replace('"standard"', '"full"').replace('"a"', '"z"')
    path.write_text(PAPER + own + second + third)
    return read_claims(path)


def write_experiment(folder: Path, seed: int, value: float) -> None:
    spec = {
        "model": "toy",
        "task": "run",
        "family": "score",
        "seed": seed,
        "profile": "standard",
        "precision": "float32",
        "device": "cpu",
        "params": {},
        "data_sha256": "",
        "results_version": 1,
        "kind": "experiment",
    }
    from replicate.runs.record import seal
    from replicate.runs.spec import spec_hash

    run_id = spec_hash(spec)
    rows = [
        {"split": "test", "metric": name, "value": v, "stderr": 0.0, "kind": "exact", "unit": "nats", "n": 1}
        for name, v in (("a", value), ("b", value + 1))
    ]
    plot = {
        "name": "curve",
        "title": "A <b>curve</b>",
        "x_label": "step",
        "y_label": "loss",
        "lines": [{"label": "$x", "x": [1, 2, 3], "y": [1.0, None, seed]}],
        "style": "line",
        "log_x": False,
        "log_y": False,
        "levels": {"printed": 1.0},
    }
    cloud = {**plot, "name": "cloud", "style": "points"}
    row = {"label": "two of 1 x 2", "x": [0, 1, 2, 3], "y": [0.0, 0.25, 0.5, 1.0]}
    sheet = {**plot, "name": "sheet", "style": "images", "image": [1, 2], "lines": [row]}
    record = {
        "run_id": run_id,
        "spec": spec,
        "about": "a toy",
        "paper": "toy",
        "measurements": [{**r, "status": "ok"} for r in rows],
        "plots": [plot, cloud, sheet],
        "provenance": {"commit": "abc", "device": "cpu"},
    }
    (folder / run_id).mkdir(parents=True)
    (folder / run_id / "record.json").write_text(json.dumps(seal(record)))


@pytest.fixture
def claims(paper: PaperClaims) -> Claims:
    table = MeasureTable("side", "Side by side", "A caption.", ("a", "b"), (("<i>", MeasureCell("run/toy/a")),))
    return Claims((paper,), (table,))


@pytest.fixture
def results(tmp_path: Path, claims: Claims) -> Path:
    for seed in range(3):
        write_experiment(tmp_path / "runs", seed, 1 + 0.01 * seed)
    out = tmp_path / "results" / "standard"
    build(tmp_path / "runs", out, "standard", claims=claims)
    return out


def test_the_ledger_is_written_read_and_verified(results: Path, paper: PaperClaims) -> None:
    rows = ledger.read_claims_csv(results / "claims.csv")
    assert [r["verdict"] for r in rows] == ["reproduced", "not reproduced", "not run"]
    assert rows[0]["n_seeds"] == "3"
    assert rows[0]["run_ids"].count(";") == 2
    assert rows[2]["reason"] == "needs the full profile"
    assert verify(results, Claims((paper,))) == []
    line = blocks(results)["ledger"]
    assert "3 claims of 1 paper: 1 reproduced, 1 not reproduced, 0 inconclusive, 0 not comparable, 1 not run" in line
    assert line.endswith("Not reproduced: T2.")


def test_a_cell_that_was_not_run_names_its_own_need_and_not_that_of_its_comparison(paper: PaperClaims) -> None:
    own = replace(paper.claims[0], measure="a/toy/nll", experiment="", needs="a CUDA device")
    gap = replace(own, id="gap", minus="b/toy/nll", needs="a CUDA device and the file of b")
    row = tuple(MeasureCell(measure) for measure in ("a/toy/nll", "b/toy/nll", "run/toy/a"))
    table = MeasureTable("side", "Side by side", "A caption.", ("a", "b", "c"), (row,))
    for claims in ((own, gap), (gap, own)):
        (filled,) = ledger.filled_tables([table], frame(a=[1.0]), [replace(paper, claims=claims)], "full")
        assert filled.rows[0].cells[:2] == (
            "not run: needs a CUDA device",
            "not run: needs a CUDA device and the file of b",
        )


def test_a_cell_names_the_profile_that_measures_it(paper: PaperClaims) -> None:
    cells = tuple(MeasureCell(measure) for measure in ("a/toy/nll", "run/toy/a"))
    table = MeasureTable("side", "Side by side", "A caption.", ("a", "b"), (cells,))
    claim = replace(paper.claims[0], measure="a/toy/nll", experiment="", profile="standard")
    given = [table], frame(a=[1.0]), [replace(paper, claims=(claim,))]
    assert ledger.filled_tables(*given, "full")[0].rows[0].cells[0] == "not run: the standard profile measures it"
    assert ledger.filled_tables(*given, "smoke")[0].rows[0].cells[0] == "not run: needs the standard profile"
    assert ledger.filled_tables(*given, "standard")[0].rows[0].cells[0] == "not run"


def test_contract_columns_come_first_and_in_order() -> None:
    assert ",".join(ledger.CLAIM_COLUMNS).startswith(
        "claim_id,paper,place,quantity,unit,published,source_quality,tolerance,mean,ci_low,ci_high,n_seeds,verdict,"
        "reason,run_ids"
    )


def test_experiments_stay_out_of_the_comparison(results: Path) -> None:
    assert "run" in (results / "summary.csv").read_text()
    assert "toy" not in blocks(results)["headline"]


def test_a_claim_opens_to_its_figure_seeds_spec_deviations_and_bibtex(results: Path) -> None:
    page = (results / "report.html").read_text()
    start = page.index('id="claim-T1"')
    inside = page[start : page.index('id="claim-T2"')]
    assert "figure-toy-run-curve" in inside
    assert "0: 1, 1: 1.01, 2: 1.02" in inside
    assert "&#34;profile&#34;: &#34;standard&#34;" in inside
    assert "@article{toy," in inside
    assert "A <b>curve</b>" not in page
    assert "<td><i></td>" not in page
    for name in ("toy-run-curve", "toy-run-cloud", "toy-run-sheet"):
        for ending in ("png", "svg", "csv"):
            assert (results / "figures" / f"{name}.{ending}").exists()
    for name in ("ledger", "side"):
        for ending in ("csv", "md", "tex"):
            assert (results / "tables" / f"{name}.{ending}").exists()
    assert "= 1.01 [0.9852, 1.035]" in (results / "tables" / "side.md").read_text().replace("\\", "")


def spoil(results: Path, name: str, change: dict[str, str], claim: str = "T2") -> None:
    """Change one claim's columns in claims.csv, and make the manifest agree."""
    path = results / name
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        if row.get("claim_id") == claim:
            row.update(change)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_manifest(results)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"verdict": "reproduced"}, "verdict is 'reproduced', its measurements give 'not reproduced'"),
        ({"mean": "5"}, "mean is '5'"),
        ({"run_ids": ""}, "run_ids is ''"),
        ({"n_seeds": "5"}, "n_seeds is '5'"),
        ({"relation": "about"}, "cannot be judged"),
        ({"profile": "smoke"}, "its measurements give 'not comparable'"),
    ],
)
def test_verify_recomputes_every_verdict(results: Path, change: dict[str, str], found: str) -> None:
    spoil(results, "claims.csv", change)
    problems = verify(results)
    assert problems
    assert any(found in p for p in problems)


def test_a_band_changed_afterwards_contradicts_the_papers_file(results: Path, paper: PaperClaims) -> None:
    spoil(results, "claims.csv", {"tolerance": "10.0", "verdict": "reproduced"})
    problems = verify(results, Claims((paper,)))
    assert any("claim T2: tolerance is '10.0', toy.toml says '0.1'" in p for p in problems)


def test_a_measurement_changed_consistently_contradicts_its_record(results: Path, paper: PaperClaims) -> None:
    path = results / "measurements.csv"
    path.write_text(path.read_text().replace(",1.02,", ",1.03,"))
    write_manifest(results)
    problems = verify(results, Claims((paper,)))
    assert any("are not those of its record" in p for p in problems)
    assert any(p.startswith("claims.csv: claim T1: mean") for p in problems)


def test_a_claim_left_out_of_the_ledger_is_found(results: Path, paper: PaperClaims) -> None:
    lines = (results / "claims.csv").read_text().splitlines(keepends=True)
    (results / "claims.csv").write_text("".join(line for line in lines if not line.startswith("T2")))
    write_manifest(results)
    assert "claims.csv has no claim T2; toy.toml has" in verify(results, Claims((paper,)))


def test_a_table_edited_with_its_manifest_is_found(results: Path, claims: Claims) -> None:
    for name in ("ledger.md", "side.tex"):
        path = results / "tables" / name
        path.write_text(path.read_text().replace("1.01", "9.01"))
    write_manifest(results)
    wrong = [f"tables/{name} is not the table that the measurements give" for name in ("ledger.md", "side.tex")]
    assert verify(results, claims) == wrong
