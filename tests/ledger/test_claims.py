"""Claims files: what is right is read, what is wrong is refused with the line that is wrong."""

from pathlib import Path

import pytest
from helpers.claims_file import CLAIM, PAPER

from replicate.errors import ClaimError
from replicate.ledger.claims import read_claims, resolved
from replicate.ledger.tables import MeasureCell, measure_tables


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(text)
    return path


def line_of(text: str, start: str, nth: int = 0) -> int:
    return [i for i, line in enumerate(text.splitlines(), 1) if line.startswith(start)][nth]


def test_a_right_file_is_read_and_a_printed_number_is_its_own_target(tmp_path: Path) -> None:
    paper = read_claims(write(tmp_path, PAPER + CLAIM))
    (claim,) = paper.claims
    assert (paper.key, paper.cite) == ("toy", "Nobody 2020, arXiv:2001.00001")
    assert (claim.id, claim.published, claim.target, claim.tolerance) == ("T1", 1.0, 1.0, 0.1)
    assert resolved(claim.measure, claim, "toy") == "digits/vae/nll"


def test_a_metric_alone_is_that_of_the_papers_experiment(tmp_path: Path) -> None:
    text = CLAIM.replace('measure = "digits/vae/nll"', 'experiment = "toy-run"\nmeasure = "kl:a"\nminus = "kl:b"')
    (claim,) = read_claims(write(tmp_path, PAPER + text)).claims
    assert resolved(claim.measure, claim, "toy") == "toy-run/toy/kl:a"
    assert resolved(claim.minus, claim, "toy") == "toy-run/toy/kl:b"
    assert resolved(claim.over, claim, "toy") == ""


@pytest.mark.parametrize(
    "key", ["source_quality", "tolerance", "unit", "place", "tolerance_why", "measure", "relation"]
)
def test_a_claim_without_what_makes_it_judgeable_is_refused_at_its_line(tmp_path: Path, key: str) -> None:
    second = CLAIM.replace('"T1"', '"T2"')
    text = PAPER + CLAIM + "\n".join(line for line in second.splitlines() if not line.startswith(f"{key} ="))
    with pytest.raises(ClaimError, match=f"toy.toml, line {line_of(text, '[[claim]]', 1)}: claim T2 has no {key}$"):
        read_claims(write(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source_quality = "R"', 'source_quality = "X"', "must be one of R, S, U"),
        ("tolerance = 0.1", "tolerance = -0.1", "must be 0 or more"),
        ("tolerance = 0.1", "tolerance = nan", "must be 0 or more"),
        ("tolerance = 0.1", 'tolerance = "a tenth"', "must be a number"),
        ('unit = "nats"', 'unit = " "', "is empty"),
        ('relation = "within"', 'relation = "near"', "must be one of within"),
        ('profile = "standard"', 'profile = "smoke"', "must be one of standard, full"),
        ('measure = "digits/vae/nll"', 'measure = "nll"', "needs an experiment"),
        ('measure = "digits/vae/nll"', 'measure = "digits//nll"', "must be METRIC or TASK/MODEL/METRIC"),
        ('id = "T1"', 'id = "T 1"', "letters, digits"),
        ("tolerance = 0.1", "tolerance = inf", "must be 0 or more and finite"),
        ("published = 1.0", "published = 0x" + "f" * 400, "a whole number of 1600 bits; it must be below"),
        ("published = 1.0", "published = nan", "must be finite"),
        ('place = "Tab 1"', "place = 1979-05-27", "must be text"),
        ('quantity = "the number"', 'quantity = "=1+1"', "which a spreadsheet would run"),
        ('says = "it is one"', 'says = "\\u001b[31m"', "text without control characters"),
        ('measure = "digits/vae/nll"', 'measure = "digits/vae/nll"\nplots = "curve"', "must be a list of texts"),
    ],
)
def test_a_wrong_value_is_refused_at_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = PAPER + CLAIM.replace(old, new)
    line = line_of(text, new.splitlines()[-1])
    with pytest.raises(ClaimError, match=rf"toy\.toml, line {line}: .*{message}"):
        read_claims(write(tmp_path, text))


def test_a_mistyped_key_is_named_with_the_key_that_was_meant(tmp_path: Path) -> None:
    text = PAPER + CLAIM + 'devations = "none"\n'
    with pytest.raises(
        ClaimError, match=r"line 27: claim T1 has an unknown key 'devations'; did you mean deviations\?"
    ):
        read_claims(write(tmp_path, text))


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    text = (PAPER + CLAIM + CLAIM).replace("tolerance = 0.1\n", "").replace('arxiv = "2001.00001"\n', "")
    with pytest.raises(ClaimError) as caught:
        read_claims(write(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "no source" in lines[0]
    assert lines[-1].endswith("claim id 'T1' is used twice")


def test_text_as_published_needs_a_target(tmp_path: Path) -> None:
    text = PAPER + CLAIM.replace("published = 1.0", 'published = "near one (figure)"')
    with pytest.raises(ClaimError, match="belongs into target"):
        read_claims(write(tmp_path, text))
    (claim,) = read_claims(write(tmp_path, text + "target = 1.0\n")).claims
    assert (claim.published, claim.target) == ("near one (figure)", 1.0)


def test_problems_of_types_choices_and_ranges_come_in_one_message(tmp_path: Path) -> None:
    text = (PAPER + CLAIM).replace("year = 2020", "year = 20").replace('kind = "number"', 'kind = "guess"')
    text = text.replace("tolerance = 0.1", "tolerance = -1").replace('unit = "nats"', "unit = 1")
    with pytest.raises(ClaimError) as caught:
        read_claims(write(tmp_path, text))
    told = [line.partition(": ")[2].partition(" of ")[0] for line in str(caught.value).splitlines()]
    assert told == ["year", "kind", "unit", "tolerance"]


@pytest.mark.parametrize("text", ["a = " + "9" * 5_000, "a = " + "[" * 5_000, "a = " + "{ a = " * 2_000])
def test_toml_that_breaks_its_parser_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ClaimError, match=r"toy\.toml is not TOML"):
        read_claims(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "[paper]\nkey = 1\n", "[[claim]]\n", "not toml", PAPER])
def test_what_is_no_claims_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ClaimError, match=r"toy\.toml"):
        read_claims(write(tmp_path, text))


def test_a_table_of_print_and_numbers_is_refused_where_a_row_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "tables.toml"
    head = '[[table]]\nname = "t"\ntitle = "T"\ncaption = "C"\nheads = ["a", "b"]\n'
    path.write_text(head + 'rows = [["text", { measure = "a/b/c" }]]\n')
    assert measure_tables(path)[0].rows == (("text", MeasureCell("a/b/c")),)
    for rows in ('[["text"]]', '[["text", { measure = "nll" }]]', '[["text", { metric = "a/b/c" }]]'):
        path.write_text(head + f"rows = {rows}\n")
        with pytest.raises(ClaimError, match=r"tables\.toml, table t"):
            measure_tables(path)
