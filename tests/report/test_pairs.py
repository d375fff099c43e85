"""Likelihoods of test examples in records, and models paired by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from replicate.errors import RecordError
from replicate.model import LogLikelihood
from replicate.report.pairs import RESAMPLES, paired_table, resampled_means, scored
from replicate.report.records import RecordedRun
from replicate.runs.evaluate import digit_features
from replicate.runs.execute import execute
from replicate.runs.experiment import MAX_EXAMPLES, pack_examples, unpack_examples
from replicate.runs.record import check_record
from replicate.runs.spec import make_spec
from replicate.tasks.loading import load_task


def run(name: str, log_p: np.ndarray, seed: int = 0, kind: str = "exact", data: str = "d") -> RecordedRun:
    likelihood = LogLikelihood(torch.from_numpy(log_p), kind)  # type: ignore[arg-type]
    spec = {"model": name, "task": "t", "family": "flow", "seed": seed, "data_sha256": data}
    return RecordedRun("", spec, examples={"t": pack_examples(likelihood)})


@given(arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e6, 1e6)))
def test_packing_moves_no_value_by_more_than_half_a_step(values: np.ndarray) -> None:
    packed = pack_examples(LogLikelihood(torch.from_numpy(values), "exact"))
    step = (values.max() - values.min()) / 65535
    assert np.abs(unpack_examples(packed) - values).max() <= step / 2 + 1e-9 * np.abs(values).max()


@pytest.mark.parametrize("values", ["", "!", "AAA", "AA==", "AAAA" * (MAX_EXAMPLES)])
def test_text_that_is_no_packed_likelihood_is_refused(values: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack_examples({"low": 0.0, "span": 1.0, "values": values})


def test_seeds_are_averaged_and_folds_concatenated() -> None:
    a, b = np.arange(4.0), np.arange(4.0) + 2
    (averaged,) = scored([run("m", a, 0), run("m", b, 1)])["t"]
    assert np.allclose(averaged.nll, -(a + b) / 2, atol=1e-3)
    (folds,) = scored([run("m", b, 1, data="e"), run("m", a, 0)])["t"]
    assert np.allclose(folds.nll, -np.concatenate([a, b]), atol=1e-3)
    assert averaged.seeds == folds.seeds == 2


def test_the_interval_is_that_of_the_paired_differences() -> None:
    """Two models whose examples vary a hundred times more than their difference: the mean's own error of the latter."""
    generator = np.random.default_rng(0)
    hard = 100 * generator.normal(size=2000)
    gap = 0.5 + generator.normal(size=2000)
    (table,) = paired_table([run("good", hard), run("bad", hard - gap)])
    assert [row.cells[1] for row in table.rows] == ["good", "bad"]
    sign, value, low, high = str(table.rows[1].cells[6]).replace("[", "").replace("]", "").replace(",", "").split()
    wanted = stats.norm.interval(0.95, gap.mean(), gap.std() / np.sqrt(len(gap)))
    assert sign == "="
    assert [float(value), float(low), float(high)] == pytest.approx([gap.mean(), *wanted], abs=0.012)


def test_resampling_is_the_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(1).exponential(size=(400, 2))
    means = resampled_means(values, "a task")
    assert means.shape == (RESAMPLES, 2)
    assert means.std(0) == pytest.approx(values.std(0) / 20, rel=0.06)
    assert np.array_equal(means, resampled_means(values, "a task"))
    assert not np.array_equal(means, resampled_means(values, "another"))


@pytest.mark.parametrize(
    ("first", "second", "sign"),
    [
        ("exact", "exact", "="),
        ("lower_bound", "exact", ">="),
        ("exact", "lower_bound", "<="),
        ("estimate", "exact", "~"),
    ],
)
def test_the_sign_of_a_difference_is_that_of_its_kind(first: str, second: str, sign: str) -> None:
    """The second's NLL minus the first's, where a lower bound on log p is an upper bound of the NLL."""
    x = np.linspace(0, 1, 50)
    (table,) = paired_table([run("better", x + 1, kind=first), run("worse", x, kind=second)])
    assert str(table.rows[1].cells[6]).startswith(f"{sign} 1.000")


def test_one_model_alone_or_of_fewer_examples_is_not_paired() -> None:
    x = np.linspace(0, 1, 50)
    assert paired_table([run("a", x)]) == []
    (table,) = paired_table([run("a", x), run("b", x), run("c", x[:10])])
    assert [row.cells[1] for row in table.rows] == ["a", "b"]


def test_a_record_on_data_has_the_likelihood_of_every_test_example_and_the_classifier_of_its_samples() -> None:
    found = execute(make_spec("marginals", "digits-binary", 0, "smoke"), None, torch.device("cpu"))
    packed = found["examples"]["digits-binary"]
    (nll,) = [m["value"] for m in found["measurements"] if m["metric"] == "nll"]
    assert len(unpack_examples(packed)) == 447
    assert -unpack_examples(packed).mean() == pytest.approx(nll, abs=1e-3)
    for change in ({"span": -1.0}, {"values": "!"}, {"kind": "good"}, {"extra": 1}):
        with pytest.raises(RecordError, match="examples"):
            check_record({**found, "examples": {"digits-binary": {**packed, **change}}})
    judges = found["classifiers"]
    assert judges == {"digits-binary": digit_features(load_task("digits-binary")).sha256}
    for wrong in ({"digits-binary": "short"}, {"a\nb": judges["digits-binary"]}, ["digits-binary"]):
        with pytest.raises(RecordError, match="classifiers"):
            check_record({**found, "classifiers": wrong})
    with pytest.raises(RecordError, match="not a valid task name"):
        check_record({**found, "examples": {"a\nb": packed}})
