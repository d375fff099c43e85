"""Foreign code changes nothing that lasts and cannot end the program, wherever it is imported or called."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from replicate.errors import Exited, Stopped
from replicate.model import Model, ModelEntry, Training
from replicate.process_state import PARTS, ProcessState, asked_to_stop, contained, set_up
from replicate.registry import MODELS, EntryPoints
from replicate.runs.executor import RunFolders
from replicate.runs.inline import Inline
from replicate.runs.spec import RunSpec, make_spec
from replicate.runs.store import read_record

#: what a module may do at its top, with the part of the state that it changes
CHANGES = {
    "torch.set_default_dtype(torch.float64)": "torch's default dtype",
    "torch.set_default_device('meta')": "torch's default device",
    "kept = torch.inference_mode(); kept.__enter__()": "torch's inference mode",
    "torch.set_grad_enabled(False)": "torch's grad mode",
    "torch.set_autocast_enabled('cpu', True)": "torch's autocast",
    "torch.autograd.set_detect_anomaly(True)": "torch's anomaly detection",
    "torch.set_num_threads(2)": "torch's threads",
    "torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())": (
        "torch's deterministic kernels"
    ),
    "import torch.utils.deterministic as d; d.fill_uninitialized_memory = not d.fill_uninitialized_memory": (
        "torch's filling of new memory"
    ),
    "torch.set_float32_matmul_precision('medium')": "torch's float32 precision",
    "torch.backends.fp32_precision = 'tf32'": "torch's float32 precision",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "torch's float32 precision",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": "torch's float32 precision",
    "torch.backends.cudnn.benchmark = True": "torch's choice of kernels",
    "torch.backends.mkldnn.set_flags(False)": "torch's choice of kernels",
    "torch.backends.cuda.enable_flash_sdp(False)": "torch's choice of kernels",
    "torch.set_flush_denormal(True)": "the handling of subnormal numbers",
    "torch.manual_seed(0)": "torch's global generator",
    "import numpy as np; np.random.seed(0)": "numpy's global generator",
    "import random; random.seed(0)": "Python's global generator",
    "import numpy as np; np.seterr(all='raise')": "numpy's handling of errors",
    "import warnings; warnings.simplefilter('error')": "the warning filters",
    "import warnings; warnings.filters = []": "the warning filters",
    "import os; os.chdir('/')": "the working folder",
    "import os; os.umask(0o777)": "the umask",
    "import locale; locale.setlocale(locale.LC_ALL, 'POSIX' if 'C.' in locale.setlocale(0) else 'C.UTF-8')": (
        "the locale"
    ),
    "import os; os.environ['OMP_NUM_THREADS'] = '7'": "the environment",
    "import os; os.environ['CUDA_VISIBLE_DEVICES'] = '7'": "the environment",
    "import os; del os.environ['PATH']": "the environment",
    "import os; os.environ.clear()": "the environment",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)": "the signal handlers",
    "import signal; signal.signal(signal.SIGTERM, lambda *_: None)": "the signal handlers",
    "import signal; signal.signal(signal.SIGALRM, lambda *_: None)": "the signal handlers",
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)": "the signal handlers",
    "import sys; sys.setrecursionlimit(5000)": "the recursion limit",
    "import sys; sys.excepthook = print": "sys.excepthook",
    "import matplotlib; matplotlib.rcParams['font.size'] = 31": "matplotlib's settings",
}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """The tests themselves leave no trace either."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before)  # the first time torch imports for it, with changes of its own
    torch.use_deterministic_algorithms(before)
    state = ProcessState()
    yield
    state.restore()


def changed(state: ProcessState) -> list[str]:
    """Names of what is no longer as it was."""
    parts = zip(PARTS, state.values, strict=True)
    return [part.name for part, before in parts if not part.same(before, part.read())]


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], EntryPoints[dict[str, Any]]]]:
    """Make an entry point of a module with this text, which ends in an ENTRY."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> EntryPoints[dict[str, Any]]:
        (tmp_path / "a_plug_in.py").write_text(f"import torch\n{text}\nENTRY = {{}}\n")
        found: EntryPoints[dict[str, Any]] = EntryPoints("none", "thing", "builtins:dict")
        found.__dict__["points"] = {"mine": EntryPoint("mine", "a_plug_in:ENTRY", "none")}
        return found

    yield make
    sys.modules.pop("a_plug_in", None)


@pytest.mark.parametrize("text", CHANGES)
def test_an_import_changes_nothing_that_lasts_and_its_plug_in_is_named(text: str, plug_in, capsys) -> None:  # type: ignore[no-untyped-def]
    state, points = ProcessState(), plug_in(text)
    assert points.found == {"mine": {}}
    assert changed(state) == []
    assert capsys.readouterr().err == f"replicate: plug-in mine changed {CHANGES[text]} at import; it was restored\n"


def test_an_import_that_fails_is_restored_too_and_all_it_changed_is_in_one_line(plug_in, capsys) -> None:  # type: ignore[no-untyped-def]
    text = "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\nraise ValueError('no')"
    state, points = ProcessState(), plug_in(text)
    assert points.broken == {"mine": "ValueError: no"}
    assert changed(state) == []
    line = "changed torch's default dtype, torch's grad mode at import; they were restored"
    assert capsys.readouterr().err == f"replicate: plug-in mine {line}\n"


def test_variables_that_a_library_leaves_for_itself_stay(plug_in, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    monkeypatch.delenv("KMP_BLOCKTIME")
    assert plug_in("import os; os.environ['KMP_BLOCKTIME'] = '0'").found
    assert os.environ["KMP_BLOCKTIME"] == "0"
    assert capsys.readouterr().err == ""


EXITS = {
    "import sys; sys.exit(0)": "SystemExit: 0",
    "import sys; sys.exit('not today')": "SystemExit: not today",
    "import _sitebuiltins; _sitebuiltins.Quitter('quit', '')(0)": "SystemExit: 0",
    "class Enough(BaseException): pass\nraise Enough('of this')": "Enough: of this",
    "raise GeneratorExit": "GeneratorExit: ",
}


@pytest.mark.parametrize("text", EXITS)
def test_an_import_that_would_end_the_program_is_a_broken_plug_in(text: str, plug_in) -> None:  # type: ignore[no-untyped-def]
    assert plug_in(text).broken == {"mine": EXITS[text]}


@pytest.mark.parametrize(
    "text",
    [
        "print('hello')",
        "import os; os.system('echo hello')",
        "import os; os.write(1, b'hello')",
        "import ctypes; ctypes.CDLL(None).puts(b'hello')",
        "import sys; sys.stdout.buffer.write(b'hello')",
        "import sys; sys.stdout.close()",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import os; os.close(1); os.close(2)",
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.buffer); print('hello'); sys.stdout = None",
        "import io, sys; sys.stdout = open('/dev/null'); sys.stderr = None",
        "import sys; sys.stdout.reconfigure(encoding='ascii'); print('hello')",
    ],
)
def test_what_foreign_code_prints_or_closes_leaves_standard_output_alone(text: str, plug_in, capfd) -> None:  # type: ignore[no-untyped-def]
    points = plug_in(text)
    assert points.found == {"mine": {}}, points.broken
    print("the answer")
    print("a remark", file=sys.stderr)
    out, err = capfd.readouterr()
    assert out == "the answer\n"
    assert err.endswith("a remark\n")
    assert ("hello" in err) == ("hello" in text)


@pytest.mark.parametrize("text", [text for text, part in CHANGES.items() if "torch" in part or "subnormal" in part])
def test_a_run_begins_with_the_same_state_whatever_was_before(text: str) -> None:
    set_up(1)
    clean = ProcessState()
    exec(text, {"torch": torch})
    set_up(1)
    assert clean.restore() == []


def test_global_generators_begin_a_run_by_its_seed() -> None:
    draws = []
    for seed in (1, 2, 1):
        set_up(seed)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[2] != draws[1]


# -- runs


class Sick(Model):
    """Does something in one of its methods."""

    family = "reference"
    capabilities = frozenset({"sample"})

    def __init__(self, where: str, what: Callable[[], object]) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.randn(2))
        self.where, self.what = where, what
        self.does("__init__")

    def does(self, method: str) -> None:
        if method == self.where:
            self.what()

    def initialise(self, train: torch.Tensor, generator: torch.Generator) -> None:
        self.does("initialise")

    def loss(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.does("loss")
        return (batch - self.theta).square().sum(1).mean()

    def after_step(self, generator: torch.Generator) -> None:
        self.does("after_step")

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        self.does("sample")
        return self.theta + torch.randn((n, 2), generator=generator)


METHODS = ("__init__", "initialise", "loss", "after_step", "sample")


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], RunSpec]:
    """Register a sick model beside the others and return the spec of its run."""

    def make(where: str, what: Callable[[], object]) -> RunSpec:
        training = Training(steps=2, batch_size=32)
        build = lambda info: Sick(where, what)  # noqa: E731
        entry = ModelEntry("reference", "sick", "none", build, frozenset({"continuous"}), training=training)
        monkeypatch.setitem(MODELS.found, "sick", entry)
        return make_spec("sick", "two-moons", profile="smoke")

    return make


def run_all(root: Path, *specs: RunSpec) -> list[tuple[str, str]]:
    """Compute the specs in this process and return how each ended."""
    told: list[tuple[str, str]] = []
    Inline().run_all(specs, RunFolders(root), lambda event, _, error: told.append((event, error)))
    return [t for t in told if t[0] != "started"]


class Enough(BaseException):
    """A plug-in's own."""


def leave(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture
def handled() -> Iterator[None]:
    """Ctrl-C is handled as in a sweep, so that a KeyboardInterrupt is none of the user's."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [SystemExit(0), Enough("of this"), KeyboardInterrupt()], ids=repr)
def test_a_model_that_would_end_the_program_fails_its_run_and_names_the_method(
    method: str, error: BaseException, sick: Any, tmp_path: Path
) -> None:
    ((how, line),) = run_all(tmp_path, sick(method, leave(error)))
    assert how == "failed"
    assert line.startswith(f"Exited: {error!r} in Sick.{method} (test_process_state.py, line ")
    assert len(line.splitlines()) == 1
    (left,) = tmp_path.glob("*/failure.json")
    assert "in does" in json.loads(left.read_text())["traceback_tail"]


def test_other_runs_go_on_after_a_model_that_would_end_the_program(sick: Any, tmp_path: Path) -> None:
    good = make_spec("marginals", "two-moons", profile="smoke")
    told = run_all(tmp_path, sick("loss", leave(SystemExit(0))), good)
    assert [how for how, _ in told] == ["failed", "done"]


def test_the_command_says_so_and_ends_with_1(sick: Any, replicate: Any) -> None:
    sick("loss", leave(SystemExit(0)))
    code, out, err = replicate("run", "sick", "two-moons", "--profile", "smoke")
    assert (code, out) == (1, "")
    assert err.startswith("replicate: Exited: SystemExit(0) in Sick.loss (test_process_state.py, line ")
    assert len(err.splitlines()) == 1


def test_who_stops_the_program_is_told_from_who_would_end_it() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert asked_to_stop(KeyboardInterrupt())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert not asked_to_stop(KeyboardInterrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked_to_stop(Stopped())
    assert not asked_to_stop(SystemExit(0))
    with pytest.raises(Stopped), contained("it"):
        raise Stopped
    with pytest.raises(Exited, match=r"^SystemExit\(0\) in test_who_stops"), contained("it"):
        sys.exit(0)


def numbers(root: Path, spec: RunSpec) -> dict[str, Any]:
    """What a run measured, times and memory aside."""
    record = read_record(root / spec.run_id())
    assert record is not None
    clocks = ("seconds", "sample_ms", "peak_memory_mb")
    return {m["metric"]: m["value"] for m in record["measurements"] if not any(c in m["metric"] for c in clocks)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the model measures when it does nothing else."""
    root, state = tmp_path_factory.mktemp("undisturbed"), ProcessState()
    with pytest.MonkeyPatch.context() as patch:
        entry = ModelEntry(
            "reference",
            "sick",
            "none",
            lambda info: Sick("", print),
            frozenset({"continuous"}),
            training=Training(steps=2, batch_size=32),
        )
        patch.setitem(MODELS.found, "sick", entry)
        spec = make_spec("sick", "two-moons", profile="smoke")
        assert run_all(root, spec) == [("done", "")]
        found = numbers(root, spec)
    state.restore()
    return found


@pytest.mark.parametrize("method", ["__init__", "initialise"])
@pytest.mark.parametrize("text", [t for t, part in CHANGES.items() if "torch" in part or "generator" in part])
def test_what_a_model_changes_for_itself_moves_no_number(
    text: str, method: str, sick: Any, tmp_path: Path, undisturbed: dict[str, Any], capfd: Any
) -> None:
    state, names = ProcessState(), {"torch": torch}
    spec = sick(method, lambda: exec(text, names))
    ended = run_all(tmp_path, spec)
    assert changed(state) == []
    if ended == [("done", "")]:
        assert numbers(tmp_path, spec) == undisturbed
    else:  # it cannot train so itself
        assert method == "initialise"
        assert ("meta" in text) or ("grad" in text) or ("inference" in text)
    where = "building" if method == "__init__" else "training"
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("replicate: ")]
    if (CHANGES[text], method) != ("torch's global generator", "__init__"):  # the suite seeds it there itself
        assert told == [f"replicate: {where} sick changed {CHANGES[text]}; it was restored"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "text",
    [
        "import os; os.chdir('/')",
        "print('hello')",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import os; os.closerange(1, 3)",
        "import signal; signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1)",
    ],
)
def test_a_run_keeps_its_record_and_the_command_its_output(
    text: str, method: str, sick: Any, replicate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec, state = sick(method, lambda: exec(text)), ProcessState()
    code, out, _ = replicate("run", "sick", "two-moons", "--profile", "smoke", "--out", "here", "--json")
    assert code == 0
    assert json.loads(out)["run_id"] == spec.run_id()
    assert read_record(tmp_path / "here" / spec.run_id()) is not None
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert set(changed(state)) <= {"sys.excepthook"}  # typer's
