"""What is committed agrees with itself: files, tables, records, verdicts, and what README says of them."""

import re
from pathlib import Path

import pytest

from replicate.report.build import remarks, verify
from replicate.report.readme import stale

ROOT = Path(__file__).resolve().parents[1]
STANDARD = ROOT / "results" / "standard"
committed = pytest.mark.skipif(not (STANDARD / "MANIFEST.json").exists(), reason="no results/standard here")


@committed
def test_every_file_table_and_verdict_follows_from_the_records() -> None:
    assert verify(STANDARD) == []


@committed
def test_readme_says_what_the_results_say() -> None:
    assert not stale(ROOT / "README.md", STANDARD)


@committed
def test_every_record_says_where_and_from_which_commit_it_comes() -> None:
    assert remarks(STANDARD) == []


@committed
def test_every_page_that_the_report_links_is_there() -> None:
    links = re.findall(r'href="([^"#][^"]*)"', (STANDARD / "report.html").read_text())
    assert sum(link.startswith("../notebooks/") for link in links) == 6
    assert [link for link in links if not (STANDARD / link).is_file()] == []
