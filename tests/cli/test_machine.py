"""The reader's machine: its terminal, encoding, folders and habits change no answer, or one line says what to do."""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection, process, util
from pathlib import Path

import pytest
from rich.console import Console

from replicate.cli import command
from replicate.cli.listing import listing
from replicate.cli.options import seconds
from replicate.data import files
from replicate.errors import UsageError
from replicate.runs import server
from replicate.runs.pool import DAY
from replicate.validation import MOST

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = str(ROOT / "results")


# -- the terminal and its encoding


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("words", [("claims", "--paper", "nce"), ("claims", "--paper", "ncsn", "--json"), ("--help",)])
def test_no_encoding_of_the_terminal_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, encoding: str, words: tuple[str, ...]
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    where = ("--results", COMMITTED) if words[0] == "claims" else ()
    monkeypatch.setattr(sys, "argv", ["replicate", *words, *where])
    code = 0
    try:
        command.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    for stream in (out, err):
        stream.flush()
    assert code == 0
    text = out.buffer.getvalue().decode(encoding)
    assert "nce" in text or "ncsn" in text or "reproduce" in text


@pytest.mark.parametrize(("terminal", "columns", "width"), [(False, "0", 160), (True, "0", 80), (True, "70", 70)])
def test_columns_of_0_are_no_width(monkeypatch: pytest.MonkeyPatch, terminal: bool, columns: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    made = Console(file=io.StringIO(), force_terminal=terminal, markup=False)
    monkeypatch.setattr(command, "console", made)
    monkeypatch.setattr(command, "errors", made)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((int(columns) or 80, 24)))
    command.prepare_output()
    assert made.width == width
    made.print("words", style="red")
    assert "\x1b[3" not in made.file.getvalue()  # type: ignore[attr-defined]


# -- options


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0.0), ("1.5", 1.5), ("1e3", 1e3), ("inf", MOST), ("Infinity", MOST), ("1e300", MOST)]
)
def test_seconds_are_a_number_that_every_timer_takes(text: str, value: float) -> None:
    assert seconds(text) == value
    select.select([], [], [], 0 * value)
    assert int(min(DAY, value) * 1000) < 2**31  # of poll(2)


@pytest.mark.parametrize("option", ["--run-limit", "--checkpoint-every", "--time-budget"])
@pytest.mark.parametrize("text", ["nan", "-1", "-inf", "soon", "1h", ""])
def test_seconds_that_are_none_are_bad_usage(replicate, option: str, text: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = replicate("reproduce", "--profile", "smoke", option, text)
    assert code == 2
    assert "is not a number of seconds, 0 or more" in " ".join(err.split())
    assert "Traceback" not in err


def test_a_run_without_limits_ends_well(replicate) -> None:  # type: ignore[no-untyped-def]
    words = ("run", "marginals", "two-moons", "--profile", "smoke", "--run-limit", "inf", "--checkpoint-every", "inf")
    assert replicate(*words)[0] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("compare", "vae", "vae"), "name at least two different models to compare"),
        (("compare", "vae", "vae", "vae"), "name at least two different models to compare"),
        (("compare", "vae"), "name at least two different models to compare"),
        (("compare",), "Missing argument"),
        (("compare", "vae", "spline-flw"), "unknown model 'spline-flw'. Did you mean spline-flow"),
        (("compare", "vae", "spline-flow", "--metric", "nl"), "unknown metric 'nl'. Did you mean nll"),
        (("compare", "vae", "spline-flow", "--profile", "standart"), "did you mean standard"),
        (("claims", "--profile", "ful"), "did you mean full"),
        (("claims", "--paper", "nobody"), "unknown paper 'nobody'"),
        (("verify", "--profile", ""), "choose smoke, standard or full"),
        (("reproduce", "--memory-limit", "9" * 15), "memory-limit"),
    ],
)
def test_a_mistyped_question_is_one_line(replicate, words: tuple[str, ...], line: str) -> None:  # type: ignore[no-untyped-def]
    where = () if words[0] == "reproduce" else ("--results", COMMITTED)
    code, _, err = replicate(*words, *where)
    assert code == 2
    assert line in err
    assert "Traceback" not in err


def test_a_model_named_twice_is_compared_once(replicate) -> None:  # type: ignore[no-untyped-def]
    answers = [
        replicate("compare", *names, "--results", COMMITTED, "--json")
        for names in (("vae", "spline-flow"), ("vae", "spline-flow", "vae"))
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0
    assert json.loads(answers[0][1])


def test_a_folder_with_a_space_is_quoted_in_the_next_step(  # type: ignore[no-untyped-def]
    replicate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for what in ("verify", "remarks"):  # of files they are tested elsewhere
        monkeypatch.setattr(f"replicate.report.build.{what}", lambda *_: [])
    monkeypatch.setattr("replicate.ledger.tables.read_ledger", lambda: None)
    readme = tmp_path / "READ ME.md"
    readme.write_text("".join(f"<!-- {m}:begin -->\nold\n<!-- {m}:end -->\n" for m in ("headline", "ledger")))
    (tmp_path / "my results" / "standard").mkdir(parents=True)
    for name in ("MANIFEST.json", "summary.csv", "claims.csv", "records.jsonl"):
        shutil.copyfile(Path(COMMITTED, "standard", name), tmp_path / "my results" / "standard" / name)
    code, _, err = replicate("verify", "--results", str(tmp_path / "my results"), "--readme", str(readme))
    assert code == 1
    assert f"`replicate report --profile standard --readme '{readme}'`" in err


# -- folders


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPLICATE_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", ["", ".", "relative/home"])
def test_without_a_home_nothing_is_read_or_written_below_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_cache: None, home: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(UsageError, match="HOME is not set to a folder; set HOME or REPLICATE_DATA"):
        files.data_folder()
    assert files.find("images") is None
    assert "REPLICATE_DATA is not set, and there is no cache folder" in files.absent(["images"])
    with pytest.raises(UsageError, match=r"images .* is missing: REPLICATE_DATA is not set, and there is no"):
        files.data_file("images", "its place")
    monkeypatch.setattr("replicate.cli.listing._read", lambda: {"models": {}})
    assert listing() == {"models": {}}
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_name_has_no_home(monkeypatch: pytest.MonkeyPatch, no_cache: None) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    with pytest.raises(UsageError, match="HOME is not set"):
        files.data_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert files.data_folder() == Path("/somewhere/scoreboard-replicate")


def test_home_comes_from_the_system_where_the_variable_is_unset(
    monkeypatch: pytest.MonkeyPatch, no_cache: None
) -> None:
    pwd = pytest.importorskip("pwd")
    monkeypatch.delenv("HOME")
    assert files.data_folder() == Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache", "scoreboard-replicate")


@pytest.fixture
def long_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files whose path has 90 characters or more; multiprocessing has made none of its own."""
    folder = tmp_path / ("t" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    config = process.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setitem(config, "tempdir", None)
    return folder


def test_a_long_tmpdir_makes_no_socket_too_long(long_folder: Path) -> None:
    server._short_socket_path()
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
    os.unlink(address)
    assert tempfile.gettempdir() == str(long_folder)


def test_a_long_tmpdir_without_a_way_out_is_named(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise PermissionError(13, "Permission denied", "/tmp/pymp-1")

    monkeypatch.setattr(util, "get_temp_dir", refuse)
    with pytest.raises(UsageError, match=f"TMPDIR={long_folder} is too long for a socket.*set TMPDIR to a shorter"):
        server._short_socket_path()


# -- git


def test_git_changes_no_line_end(tmp_path: Path) -> None:
    """Sources and results are hashed; core.autocrlf would write other bytes on checking out."""
    content = b"one\ntwo\n"
    shutil.copyfile(ROOT / ".gitattributes", tmp_path / ".gitattributes")
    (tmp_path / "module.py").write_bytes(content)

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, "-c", "core.autocrlf=true", *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "module.py").unlink()
    git("checkout", "--", "module.py")
    assert (tmp_path / "module.py").read_bytes() == content
