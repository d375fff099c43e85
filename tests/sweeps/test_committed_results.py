"""What is committed agrees with itself: files, tables, records, verdicts, and what README says of them."""

import re
from pathlib import Path

import pytest

from replicate.report.build import remarks, verify
from replicate.report.readme import stale

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [f for f in (ROOT / "results" / "standard", ROOT / "results" / "full") if (f / "MANIFEST.json").exists()]
committed = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)


@committed
def test_every_file_table_and_verdict_follows_from_the_records(folder: Path) -> None:
    assert verify(folder) == []


@committed
def test_readme_says_what_the_results_say(folder: Path) -> None:
    assert not stale(ROOT / "README.md", folder)


@committed
def test_every_record_says_where_and_from_which_commit_it_comes(folder: Path) -> None:
    assert remarks(folder) == []


@committed
def test_every_page_that_the_report_links_is_there(folder: Path) -> None:
    links = re.findall(r'href="([^"#][^"]*)"', (folder / "report.html").read_text())
    assert sum(link.startswith("../notebooks/") for link in links) == 6
    assert [link for link in links if not (folder / link).is_file()] == []


@committed
def test_every_figure_stands_on_the_page_once(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    names = [p.stem for p in (folder / "figures").glob("*.png")]
    assert [name for name in names if page.count(f'id="figure-{name}"') != 1] == []
