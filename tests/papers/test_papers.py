"""All papers together: what every claim and every table measures is really run."""

from pathlib import Path

import pytest
import torch

from replicate.ledger.claims import all_claims, claims_of, resolved
from replicate.ledger.tables import MeasureCell, measure_tables
from replicate.runs.execute import execute
from replicate.runs.paper import broken_entries, papers
from replicate.runs.record import check_record
from replicate.runs.spec import AnySpec, ExperimentSpec, experiment_spec, spec_from_dict
from replicate.sweeps.plan import ledger_plan, whole_plan

PAPERS = sorted(papers())


def planned(profile: str) -> dict[tuple[str, str], list[AnySpec]]:
    """Specs of a profile by (task, model), each once."""
    out: dict[tuple[str, str], list[AnySpec]] = {}
    for spec in whole_plan(profile)[0]:
        out.setdefault((spec.task, spec.model), []).append(spec)
    return out


def owner(measure: str) -> tuple[str, str]:
    task, model, _ = measure.split("/")
    return task, model


def test_no_paper_is_broken_and_no_two_claims_share_an_id() -> None:
    assert broken_entries() == {}
    assert len(all_claims()) == len(PAPERS) >= 20


def test_every_claim_of_the_standard_profile_is_run_there_over_enough_seeds() -> None:
    runs, judged = planned("standard"), 0
    for paper in all_claims():
        for claim in paper.claims:
            measures = [resolved(m, claim, paper.key) for m in (claim.measure, claim.minus, claim.over) if m]
            if claim.profile == "standard" and not claim.not_comparable:
                judged += 1
                for measure in measures:
                    assert len(runs.get(owner(measure), ())) >= (1 if claim.deterministic else 3), (claim.id, measure)
    assert judged >= 25


def test_a_claim_that_no_profile_can_run_says_what_it_needs() -> None:
    runs = planned("full").keys() | planned("standard").keys()
    for paper in all_claims():
        for claim in paper.claims:
            if owner(resolved(claim.measure, claim, paper.key)) not in runs:
                assert claim.needs or claim.not_comparable, claim.id


def test_every_table_measures_what_some_profile_runs() -> None:
    known = {owner for profile in ("standard", "full") for owner in planned(profile)}
    for key, paper in papers().items():  # those whose files are absent here as well
        known |= {(e.name, key) for e in paper.experiments}
        parts = [part for asked in paper.model_runs.values() for part in asked]
        known |= {(task, model) for part in parts for task in part.tasks for model in part.models}
    for table in measure_tables():
        for cell in (c for row in table.rows for c in row if isinstance(c, MeasureCell)):
            assert owner(cell.measure) in known, (table.name, cell)


@pytest.mark.parametrize("profile", ["smoke", "standard", "full"])
def test_one_seed_of_a_model_or_experiment_is_one_run(profile: str) -> None:
    for group in planned(profile).values():
        assert len({s.seed for s in group}) == len(group)
        assert all(spec_from_dict(s.as_dict()) == s for s in group if isinstance(s, ExperimentSpec))


def test_experiments_whose_files_are_absent_are_named_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REPLICATE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    unset = {s.name: s.reason for s in ledger_plan("full", "cuda")[1]}
    assert "REPLICATE_DATA is not set" in unset["static-rbm-cd25"]
    monkeypatch.setenv("REPLICATE_DATA", str(tmp_path))
    missing = {s.name: s.reason for s in ledger_plan("full", "cuda")[1]}
    assert missing.keys() == unset.keys()
    assert f"REPLICATE_DATA={tmp_path}" in missing["static-rbm-cd25"]
    (tmp_path / "mnist-static").mkdir()
    monkeypatch.setattr("replicate.data.files.expected", lambda path: None)  # made-up content under real names
    for part in ("train", "valid", "test"):
        (tmp_path / "mnist-static" / f"binarized_mnist_{part}.amat.gz").write_bytes(b"")
    assert "static-rbm-cd25" not in {s.name for s in ledger_plan("full", "cuda")[1]}
    assert ledger_plan("standard")[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("key", PAPERS)
def test_every_experiment_leaves_a_record_that_can_be_read(key: str) -> None:
    for what in papers()[key].experiments:
        if "standard" in what.profiles:
            check_record(execute(experiment_spec(key, what, 0, "smoke", "cpu"), None, torch.device("cpu")))


@pytest.mark.parametrize("key", PAPERS)
def test_bibtex_experiments_and_plots_are_named_once_and_used(key: str) -> None:
    paper = papers()[key]
    claims = claims_of(paper)
    assert claims.bibtex.strip().startswith("@")
    names = [e.name for e in paper.experiments]
    assert len(names) == len(set(names))
    used = {c.experiment for c in claims.claims}
    shown = {m.measure.split("/")[0] for t in measure_tables() for row in t.rows for m in row if not isinstance(m, str)}
    elsewhere = {m.split("/")[0] for p in all_claims() for c in p.claims for m in (c.measure, c.minus) if "/" in m}
    assert set(names) <= used | shown | elsewhere
