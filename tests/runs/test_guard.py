"""What a model answers is checked where it enters: one line with the method, what it returned and what is expected."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from replicate.errors import ModelError, NotANumber, TimeLimit, TrainingError, UsageError
from replicate.likelihood.ais import ais, schedule
from replicate.likelihood.dequantisation import Preprocessed
from replicate.likelihood.estimator import log_likelihood
from replicate.metrics.quality import FEATURE_METRICS
from replicate.model import DataInfo, Family, Model, ModelEntry, Training
from replicate.registry import MODELS, models
from replicate.resume import Journal, State, resumable
from replicate.runs.effort import EVALUATION
from replicate.runs.evaluate import Evaluator
from replicate.runs.execute import execute
from replicate.runs.guard import METHODS, guarded
from replicate.runs.seeds import Streams
from replicate.runs.spec import make_spec
from replicate.runs.subjects import build_model
from replicate.runs.training import train
from replicate.sde import VP
from replicate.tasks.base import Task
from replicate.tasks.densities import two_moons
from replicate.tasks.loading import load_task, unsupported

CPU = torch.device("cpu")
LEVELS = 5
FEW = replace(EVALUATION["smoke"], langevin_steps=3, langevin_chains=20, samples=60, transport_points=40, map_points=4)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int, dim: int = 3) -> Tensor:
    return torch.randint(0, LEVELS, (n, dim), generator=gen(n)).float()


INFO = DataInfo(3, "levels", LEVELS)
TABLE = Task("hundred", "", INFO, rows(200), rows(50), rows(100))


class Plug(Model):
    """A well-behaved plug-in with every capability; `spoiled` maps a method to what spoils its answer."""

    capabilities = frozenset({"log_prob", "importance_weights", "energy", "annealing", "diffusion", "score", "sample"})
    sde = VP()

    def __init__(self, info: DataInfo = INFO, **spoiled: Callable[[Any], Any]) -> None:
        super().__init__()
        self.dim, self.spoiled = info.dim, spoiled
        self.theta = nn.Parameter(torch.zeros(info.dim))

    def _give(self, method: str, out: Any) -> Any:
        return self.spoiled.get(method, lambda out: out)(out)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self._give("loss", 0.5 * (batch - self.theta).square().sum(1).mean())

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self._give("validation_loss", 0.5 * (batch - self.theta).square().sum(1).mean())

    def log_prob(self, x: Tensor) -> Tensor:
        return self._give("log_prob", -0.5 * (x - self.theta).square().sum(1) - math.log(LEVELS))

    def log_weights(self, x: Tensor, k: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(len(x), k, generator=generator)
        return self._give("log_weights", z - 0.5 * x.square().sum(1)[:, None])

    def energy(self, x: Tensor) -> Tensor:
        return self._give("energy", 0.5 * (x - self.theta).square().sum(1))

    def score(self, x: Tensor) -> Tensor:
        return self._give("score", self.theta - x)

    def score_at(self, x: Tensor, t: Tensor) -> Tensor:
        return self._give("score_at", -x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, self.dim)
        return self._give("sample", torch.randint(0, LEVELS, shape, generator=generator).float())

    def samplers(self) -> dict[str, Any]:
        return self._give("samplers", {"other": lambda n, g: self._give("other", (self.sample(n, g), 7))})

    def base_log_z(self) -> float:
        return self._give("base_log_z", 0.0)

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self._give("base_sample", torch.randn(n, self.dim, generator=generator))

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._give("anneal", (x.sum(1) * (beta_next - beta), x))


X = rows(10)
#: a call of each method as the suite makes it
CALLS: dict[str, Callable[[Model], Any]] = {
    "loss": lambda m: m.loss(X, gen()),
    "validation_loss": lambda m: m.validation_loss(X, gen()),
    "log_prob": lambda m: m.log_prob(X),
    "log_weights": lambda m: m.log_weights(X, 4, gen()),
    "energy": lambda m: m.energy(X),
    "score": lambda m: m.score(X),
    "score_at": lambda m: m.score_at(X, torch.ones(10)),  # type: ignore[operator]
    "sample": lambda m: m.sample(6, gen()),
    "base_sample": lambda m: m.base_sample(6, gen()),
    "samplers": lambda m: m.samplers(),
    "other": lambda m: m.samplers()["other"](6, gen()),
    "base_log_z": lambda m: m.base_log_z(),
    "anneal": lambda m: m.anneal(X, 0.0, 0.5, gen()),
}
SHAPES = {
    **dict.fromkeys(("loss", "validation_loss"), "()"),
    **dict.fromkeys(("log_prob", "energy"), "(10,)"),
    **dict.fromkeys(("score", "score_at"), "(10, 3)"),
    **dict.fromkeys(("sample", "base_sample"), "(6, 3)"),
    "log_weights": "(10, 4)",
}
#: how an answer that is one tensor may be wrong, and how the line says so
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one axis more": (lambda out: out.unsqueeze(-1), "float32 tensor of shape"),
    "another size": (lambda out: torch.cat([out.reshape(-1), out.reshape(-1)]), "float32 tensor of shape"),
    "integers": (lambda out: out.long(), "int64 tensor"),
    "truth values": (lambda out: out > 0, "bool tensor"),
    "complex": (lambda out: out.to(torch.complex64), "complex64 tensor"),
    "numpy": (lambda out: out.detach().numpy(), "ndarray"),
    "a list": (lambda out: out.tolist(), "returned a"),
    "a pair": (lambda out: (out, out), "a tuple of (a float32 tensor"),
    "nothing": (lambda out: None, "None"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", SHAPES)
def test_wrong_answer_is_one_line_with_method_found_and_expected(method: str, wrong: str) -> None:
    spoil, found = WRONG[wrong]
    with pytest.raises(ModelError) as caught:
        CALLS[method](guarded(Plug(INFO, **{method: spoil}), INFO))
    line = str(caught.value)
    assert line.startswith(f"Plug.{method} returned ")
    assert found in line
    assert line.endswith(f"; expected a real floating point tensor of shape {SHAPES[method]}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("method", "spoil", "says"),
    [
        ("anneal", lambda out: out[0], "Plug.anneal returned a float32 tensor"),
        ("anneal", lambda out: (*out, 1), "Plug.anneal returned a tuple of "),
        (
            "anneal",
            lambda out: (out[0][:, None], out[1]),
            "anneal (increments) returned a float32 tensor of shape (10, 1)",
        ),
        ("anneal", lambda out: (out[0], out[1][:5]), "anneal (states) returned a float32 tensor of shape (5, 3)"),
        ("base_log_z", lambda out: torch.zeros(1), "Plug.base_log_z returned a float32 tensor of shape (1,)"),
        ("base_log_z", lambda out: math.nan, "base_log_z returned a float, nan; expected a finite number"),
        ("base_log_z", lambda out: None, "base_log_z returned None"),
        ("samplers", lambda out: list(out), "samplers returned a list"),
        ("samplers", lambda out: {"a b\n": out["other"]}, "samplers returned a dict"),
        ("samplers", lambda out: {"other": 3}, "samplers returned a dict"),
        ("other", lambda out: out[0], "samplers()['other'] returned a float32 tensor"),
        ("other", lambda out: (out[0][:3], 7), "samplers()['other'] returned a float32 tensor of shape (3, 3)"),
        ("other", lambda out: (out[0], math.nan), "samplers()['other'] returned a float, nan"),
    ],
)
def test_wrong_answer_that_is_no_single_tensor_is_one_line(method: str, spoil: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        CALLS[method](guarded(Plug(INFO, **{method: spoil}), INFO))
    assert says in str(caught.value)


def test_the_right_answers_are_those_of_the_bare_model() -> None:
    bare = Plug()
    model = guarded(copy.deepcopy(bare), INFO)
    assert set(CALLS) == {*METHODS, "other"}
    assert (type(model).__name__, type(model).__module__, isinstance(model, Plug)) == ("Plug", __name__, True)
    assert model.state_dict().keys() == bare.state_dict().keys()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert float(other.log_prob(X)[0].detach()) != float(model.log_prob(X)[0].detach())
    for method in SHAPES:
        assert torch.equal(CALLS[method](model), CALLS[method](bare)), method
    with pytest.raises(ModelError):
        copy.deepcopy(guarded(Plug(log_prob=lambda out: out[:, None]), INFO)).log_prob(X)


def test_a_method_that_the_model_calls_with_more_arguments_may_answer_otherwise() -> None:
    class Rich(Plug):
        def sample(self, n: int, generator: torch.Generator, path: bool = False) -> Any:
            return [torch.zeros(n, 3)] * 2 if path else self.sample(n, generator, path=True)[-1]

    assert guarded(Rich(), INFO).sample(4, gen()).shape == (4, 3)


def test_methods_set_on_the_instance_and_a_class_with_a_hook_are_checked_as_well() -> None:
    class Hooked(Plug):
        def __init_subclass__(cls, needed: int) -> None:
            raise AssertionError("not for the suite")

    model = Hooked()
    model.log_prob = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"Hooked.log_prob returned a float32 tensor of shape \(10, 3\)"):
        guarded(model, INFO).log_prob(X)


class Keeps(Plug):
    """A module whose extra state is no tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def _having(**attributes: Any) -> Model:
    model = Plug()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.Linear(2, 2), "build returned a Linear, Linear(in_features=2"),
        (lambda: None, "build returned None; it must return a replicate.model.Model"),
        (lambda: Plug, "build returned a type, <class"),
        (lambda: _having(capabilities=["sample"]), "Plug.capabilities is ['sample']; it must be a frozenset"),
        (lambda: _having(capabilities="sample"), "Plug.capabilities is 'sample'"),
        (lambda: _having(capabilities={"logprob"}), "'logprob', which the suite does not know; did you mean log_prob?"),
        (lambda: _having(nfe=None), "Plug.nfe is None"),
        (lambda: _having(nfe=math.nan), "Plug.nfe is nan"),
        (lambda: _having(score=nn.Linear(3, 3)), "Plug has a part named score, which its method of that name hides"),
        (lambda: _having(net=nn.LazyLinear(3)), "Plug has a parameter net.weight without a shape"),
        (Keeps, "Keeps keeps a dict, {'seen': 3} as _extra_state in its state"),
        (lambda: _having(part=Keeps()), "Plug keeps a dict, {'seen': 3} as part._extra_state in its state"),
        (lambda: _having(part=nn.Buffer(torch.eye(3).to_sparse())), "as part in its state, which is saved as dense"),
    ],
)
def test_wrong_declaration_is_one_line_when_the_model_is_built(build: Callable[[], Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        guarded(build(), INFO)
    assert says in str(caught.value)


@pytest.mark.parametrize("capability", sorted(Plug.capabilities))
def test_capability_without_its_methods_is_one_line_when_the_model_is_built(capability: str) -> None:
    class Empty(Model):
        capabilities = frozenset({capability})

    with pytest.raises(ModelError, match=f"Empty declares the capability '{capability}' and has no "):
        guarded(Empty(), INFO)


def test_a_tensor_as_extra_state_and_a_score_by_autograd_are_accepted() -> None:
    class Good(Model):
        capabilities = frozenset({"log_prob", "score"})

        def log_prob(self, x: Tensor) -> Tensor:
            return -x.square().sum(1)

        def get_extra_state(self) -> Tensor:
            return torch.ones(2)

        def set_extra_state(self, state: Any) -> None:
            pass

    assert torch.equal(guarded(Good(), INFO).score(X), -2 * X)


@pytest.mark.parametrize("name", sorted(models()))
def test_every_model_of_the_suite_is_guarded_and_keeps_its_name(name: str) -> None:
    entry = models()[name]
    task = next(t for t in ("two-moons", "digits", "digits-binary") if not unsupported(entry, load_task(t)))
    model = build_model(make_spec(name, task), load_task(task), Streams(task, name, 0))
    inner = model.inner if isinstance(model, Preprocessed) else model
    assert type(inner).__mro__[1].__name__ == type(inner).__name__
    assert inner.family == entry.family


# -- a plug-in's runs


def entry(make: Callable[..., Model], task: Task = TABLE, **training: Any) -> ModelEntry:
    settings = Training(**{"steps": 4, "batch_size": 16, **training})
    return ModelEntry("reference", "a plug-in", "none", make, frozenset({task.info.domain}), training=settings)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run a plug-in's model on a task from its spec to its record; return the rows by metric."""

    def run(make: Callable[..., Model], task: Task = TABLE, **training: Any) -> dict[str, Any]:
        monkeypatch.setitem(MODELS.found, "plug", entry(make, task, **training))
        for module in ("spec", "subjects"):
            monkeypatch.setattr(f"replicate.runs.{module}.load_task", lambda name, seed=0: task)
            monkeypatch.setattr(f"replicate.runs.{module}.data_sha256", lambda name, seed=0: task.sha256())
        record = execute(make_spec("plug", task.name, 0, "smoke"), None, CPU)
        return {**record, "rows": {row["metric"]: row for row in record["measurements"]}}

    return run


def sampling(task: Task = TABLE, **spoiled: Callable[[Any], Any]) -> Callable[..., Model]:
    """What builds a plug-in with a likelihood and a sampler."""

    def make(info: DataInfo) -> Model:
        model = Plug(info, **spoiled)
        model.capabilities = frozenset({"log_prob", "sample"})
        return model

    return make


def fails(error: BaseException) -> Callable[[Any], Any]:
    def fail(out: Any) -> Any:
        raise error

    return fail


SAMPLES = ("c2st", *FEATURE_METRICS, "sample_ms", "nfe")


def test_a_log_prob_with_one_axis_too_many_ends_the_run_and_gives_no_number(run: Callable[..., Any]) -> None:
    with pytest.raises(
        ModelError, match=r"Plug.log_prob returned a float32 tensor of shape \(100, 1\); expected .*\(100,\)"
    ):
        run(sampling(log_prob=lambda out: out[:, None]))


@pytest.mark.parametrize("capability", ["log_prob", "importance_weights", "diffusion"])
def test_it_is_found_behind_the_preprocessing_too(capability: str) -> None:
    method = {"log_prob": "log_prob", "importance_weights": "log_weights", "diffusion": "score_at"}[capability]
    inner = Plug(INFO, **{method: lambda out: out[..., None]})
    inner.capabilities, inner.family = frozenset({capability}), "reference"  # type: ignore[misc]
    model = Preprocessed(guarded(inner, INFO), INFO)
    with pytest.raises(ModelError, match=f"Plug.{method} returned"):
        log_likelihood(model, TABLE.test, FEW, gen())


def test_annealing_with_increments_of_another_shape_is_one_line() -> None:
    model = guarded(Plug(anneal=lambda out: (out[0][:, None], out[1])), INFO)
    with pytest.raises(ModelError, match=r"anneal \(increments\)"):
        ais(model, 10, schedule(3), gen())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out[: len(out) // 2], "Plug.sample returned a float32 tensor of shape (100, 3); expected"),
        (lambda out: torch.cat([out, out]), "Plug.sample returned a float32 tensor of shape (400, 3); expected"),
        (lambda out: out[:, :2], "Plug.sample returned a float32 tensor of shape (200, 2); expected"),
        (lambda out: out.long(), "Plug.sample returned a int64 tensor"),
        (lambda out: None, "Plug.sample returned None"),
        (lambda out: out * math.nan, "the sampler diverged"),
        (lambda out: out + math.inf, "the sampler diverged"),
        (lambda out: out + 0.25, "the sampler gives values that are none of the levels 0 to 4, such as "),
        (lambda out: out - 9, "the sampler gives values that are none of the levels 0 to 4, such as -"),
        (lambda out: out + LEVELS, "the sampler gives values that are none of the levels 0 to 4, such as "),
        (fails(KeyError("x\x1b[31m\nsecond line")), r"the sampler raised KeyError: 'x\x1b[31m\nsecond line'"),
        (fails(NotImplementedError()), "the sampler raised NotImplementedError:"),
    ],
)
def test_sampler_that_fails_leaves_the_likelihood_and_gives_its_reason(
    run: Callable[..., Any], spoil: Callable[[Any], Any], reason: str
) -> None:
    found = run(sampling(sample=spoil))["rows"]
    assert found["nll"]["status"] == "ok"
    for metric in SAMPLES:
        assert found[metric]["status"].startswith(f"n/a: {reason}"), metric


@pytest.mark.parametrize(
    "error", [TimeLimit("longer than 1 s"), MemoryError(), OSError(28, "full"), RuntimeError("can't allocate memory")]
)
def test_limits_of_the_machine_are_no_answer_of_a_sampler(run: Callable[..., Any], error: Exception) -> None:
    with pytest.raises(type(error)):
        run(sampling(sample=fails(error)))


MOONS = load_task("two-moons")
PLANE = Task("moons", "", DataInfo(2, "continuous"), MOONS.train[:200], MOONS.valid[:50], MOONS.test[:50], two_moons())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: (out[0][:3], out[1]), "Plug.samplers()['other'] returned a float32 tensor of shape (3, 2)"),
        (lambda out: (out[0] * math.nan, out[1]), "the sampler diverged"),
        (fails(ZeroDivisionError("none")), "the sampler raised ZeroDivisionError: none"),
    ],
)
def test_further_sampler_that_fails_leaves_the_others(spoil: Callable[[Any], Any], reason: str) -> None:
    model = guarded(Plug(PLANE.info, other=spoil), PLANE.info)
    found = {m.metric: m for m in Evaluator(model, PLANE, FEW, Streams("moons", "plug", 0), CPU).measurements()}
    assert {found[m].status for m in ("nll", "w2", "w2:ula", "w2:mala")} == {"ok"}
    assert found["w2:other"].status.startswith(f"n/a: {reason}")


def test_pictures_survive_a_sampler_that_fails() -> None:
    for task in (TABLE, PLANE):
        model = guarded(Plug(task.info, sample=fails(ValueError("no"))), task.info)
        arrays = Evaluator(model, task, FEW, Streams(task.name, "plug", 0), CPU).arrays()
        assert "samples" not in arrays
        assert {"reference_samples", "grid_log_density"} & set(arrays)


def test_loop_that_an_error_left_is_no_ended_loop_after_a_resume() -> None:
    """A run that was killed after the sampler's error must fail there again and not continue with a partial chain."""

    def steps(out: Tensor) -> Tensor:
        state: State = {"x": out}
        for step in resumable("chain", 5, state):
            if step == 3:
                raise ValueError("no")
        return out

    model = guarded(Plug(PLANE.info, sample=steps), PLANE.info)
    journal = Journal(lambda state: None, shortest=0.0)
    with journal.active():
        reasons = [Evaluator(model, PLANE, FEW, Streams("moons", "plug", 0), CPU)._drawn(20)[1]]
        assert not journal.ended
        again = Journal(lambda state: None, {"ended": journal.ended, "cut": None}, shortest=0.0)
    with again.active():
        reasons.append(Evaluator(model, PLANE, FEW, Streams("moons", "plug", 0), CPU)._drawn(20)[1])
    assert reasons == ["the sampler raised ValueError: no"] * 2


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_likelihood_that_is_no_number_names_method_and_row(run: Callable[..., Any], value: float) -> None:
    def spoil(out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor([17, 40]), value) if len(out) == len(TABLE.test) else out

    with pytest.raises(NotANumber, match=r"nll .* Plug.log_prob .* at row 17 of the test split \(2 of 100 rows\)"):
        run(sampling(log_prob=spoil))


def test_score_that_is_no_number_names_method_and_row() -> None:
    model = guarded(Plug(PLANE.info, score=lambda out: out.index_fill(0, torch.tensor([5]), math.nan)), PLANE.info)
    with pytest.raises(NotANumber, match=r"Plug.score gives nan or infinity at row 5 of the test split \(1 of 50"):
        list(Evaluator(model, PLANE, FEW, Streams("moons", "plug", 0), CPU).measurements())


def test_likelihood_that_is_not_implemented_after_all_has_a_reason(run: Callable[..., Any]) -> None:
    found = run(sampling(log_prob=fails(NotImplementedError())))["rows"]
    assert found["nll"]["status"] == "n/a: the model gives no reason"
    assert found["c2st"]["status"] == "ok"


# -- labels


def labelled(name: str, info: DataInfo, train: Tensor, valid: Tensor, test: Tensor) -> Task:
    a, b, c = ((x[:, 0] > 1).long() for x in (train, valid, test))
    return Task(name, "", info, train, valid, test, labels=(a, b, c))


@pytest.mark.parametrize("info", [INFO, DataInfo(4, "levels", LEVELS, (2, 2)), DataInfo(64, "levels", LEVELS)])
def test_labels_on_other_data_than_digits_leave_the_rest_of_the_run(run: Callable[..., Any], info: DataInfo) -> None:
    parts = [rows(n, info.dim) for n in (100, 20, 50)]
    found = run(sampling(), labelled("labelled", info, *parts))["rows"]
    assert (found["c2st"]["status"], found["nll"]["status"]) == ("ok", "ok")
    for metric in FEATURE_METRICS:
        assert found[metric]["status"] == "n/a: there is no classifier for these data; its images are 8x8, in levels"


def test_few_test_rows_have_a_reason_in_place_of_sample_metrics(run: Callable[..., Any]) -> None:
    info = DataInfo(64, "levels", LEVELS, (8, 8))
    parts = [rows(n, 64) for n in (100, 20, 3)]
    found = run(sampling(), labelled("few", info, *parts))["rows"]
    assert found["nll"]["status"] == "ok"
    assert found["c2st"]["status"].startswith("n/a: c2st needs two sets (n, D) with n >= 5")
    assert found["recall"]["status"].startswith("n/a: ")


# -- training


class Detached(Plug):
    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch.square().mean()


class Elsewhere(Plug):
    """Its loss depends on a tensor that is no parameter of the model."""

    def __init__(self, info: DataInfo = INFO) -> None:
        super().__init__(info)
        self.lost = [nn.Parameter(torch.ones(3))]

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return (batch * self.lost[0]).square().mean()


@pytest.mark.parametrize("kind", [Detached, Elsewhere])
@pytest.mark.parametrize("behind", [False, True])
def test_loss_that_does_not_depend_on_the_weights_is_one_line(kind: type[Plug], behind: bool) -> None:
    model: Model = guarded(kind(), INFO)
    if behind:
        model.family = "reference"  # type: ignore[misc]
        model = Preprocessed(model, INFO)
    with pytest.raises(ModelError, match=f"{kind.__name__}.loss returned a loss that does not depend on the weights"):
        train(model, TABLE.train, TABLE.valid, Training(steps=3), Streams("t", "m", 0))


class Odd(Plug):
    """Its validation losses are those of a list, one after the other, and improve with nothing."""

    values: ClassVar[list[float]]
    family: ClassVar[Family] = "reference"

    def __init__(self, info: DataInfo = INFO) -> None:
        super().__init__(info)
        self.capabilities, self.left = frozenset({"log_prob", "sample"}), iter(self.values)

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return batch.new_tensor(next(self.left))


@pytest.mark.parametrize(
    ("values", "kept", "best"),
    [
        ([3.0, math.inf, 2.0, 4.0], [(1, 3.0), (3, 2.0), (4, 4.0)], 3),
        ([math.inf, 3.0, 4.0, math.nan], [(2, 3.0), (3, 4.0)], 2),
        ([3.0, -math.inf, 4.0, 5.0], [(1, 3.0), (3, 4.0), (4, 5.0)], 1),
    ],
)
def test_validation_loss_that_is_no_finite_number_is_neither_selected_nor_recorded(
    capsys: pytest.CaptureFixture[str], values: list[float], kept: list[tuple[int, float]], best: int
) -> None:
    Odd.values = values
    settings = Training(steps=4, validate_every=1)
    history = train(guarded(Odd(), INFO), TABLE.train, TABLE.valid, settings, Streams("t", "m", 0))
    assert (history.valid, history.best_step) == (kept, best)
    said = capsys.readouterr().err
    for step, value in enumerate(values, 1):
        assert (f"the validation loss is {value} at step {step}: " in said) == (not math.isfinite(value))


@pytest.mark.parametrize("values", [[math.inf] * 4, [math.nan] * 4, [math.nan, math.inf, -math.inf, math.nan]])
def test_run_without_any_finite_validation_loss_ends_in_one_line(values: list[float]) -> None:
    Odd.values = values
    settings = Training(steps=4, validate_every=1)
    with pytest.raises(TrainingError, match="no validation loss was a finite number; lower lr"):
        train(guarded(Odd(), INFO), TABLE.train, TABLE.valid, settings, Streams("t", "m", 0))


# -- the suite's own models


def test_the_model_that_regresses_on_the_true_score_is_refused_where_nobody_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(20, 2, generator=gen())
    table = Task("table", "", DataInfo(2, "continuous"), x, x, x)
    assert make_spec("sm-explicit", "two-moons").preprocessing == "none"
    for task in (table, TABLE):
        monkeypatch.setattr("replicate.runs.spec.load_task", lambda name, seed=0, task=task: task)
        with pytest.raises(
            UsageError, match="sm-explicit cannot run on t: it needs a task whose true density is known"
        ):
            make_spec("sm-explicit", "t")


SCORE_MODELS = sorted(name for name, e in models().items() if e.family == "score")


@pytest.mark.parametrize("name", SCORE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_models_sample_in_the_dtype_of_their_weights(name: str, dtype: torch.dtype) -> None:
    few = {"langevin_steps": 3, "steps_per_level": 2, "sample_steps": 2}
    few = {key: value for key, value in few.items() if key in models()[name].params}
    spec = make_spec(name, "two-moons", 0, "smoke", settings=few)
    model = build_model(spec, MOONS, Streams("two-moons", name, 0)).to(dtype)
    model.initialise(MOONS.train[:100].to(dtype), gen())
    drawn = [model.sample(5, gen()), *(sampler(5, gen())[0] for sampler in model.samplers().values())]
    for x in drawn:
        assert (x.dtype, tuple(x.shape)) == (dtype, (5, 2))


def test_both_precisions_start_from_the_same_draws() -> None:
    drawn = {}
    for dtype in (torch.float32, torch.float64):
        model = build_model(make_spec("dsm", "two-moons", 0, "smoke"), MOONS, Streams("two-moons", "dsm", 0)).to(dtype)
        assert isinstance(model, Preprocessed)
        model.inner.nfe = 0  # no step: the start itself
        sde = VP()
        sde.dtype = dtype
        drawn[dtype] = model.inner.sample(4, gen()), sde.prior_sample(4, 2, gen())
    for single, double in zip(*drawn.values(), strict=True):
        assert torch.equal(single.double(), double)
