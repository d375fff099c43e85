"""From a trained model to measurements: the same protocol for every family, by capability.

Each measurement is an `Estimate` or the reason why there is none. Nothing here can disturb training: it runs
afterwards, on generators of its own.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from replicate.errors import ModelError, NotANumber, TimeLimit
from replicate.likelihood.estimator import CHUNK, log_likelihood
from replicate.metrics.classifier import c2st
from replicate.metrics.divergences import fisher_divergence, kl
from replicate.metrics.features import DIGITS, FeatureClassifier, image_features
from replicate.metrics.features import TASKS as IMAGES
from replicate.metrics.quality import FEATURE_METRICS, feature_metrics
from replicate.metrics.samples import DISTANCES, mode_weight_error
from replicate.model import Estimate, LogLikelihood, Model
from replicate.resume import may_fail
from replicate.runs.effort import Evaluation
from replicate.runs.seeds import Streams, stream_seed
from replicate.sampling.langevin import Chain, mala, ula
from replicate.tasks.base import Density, Task
from replicate.validation import harmless

#: Langevin paths that the report draws
PATHS = 12
#: characters of a reason that come from elsewhere
REASON = 300
#: the method that gives log p, by the capability that is used first
LOG_P = {"log_prob": "log_prob", "importance_weights": "log_weights", "energy": "energy", "diffusion": "score_at"}


@dataclass(frozen=True)
class Measurement:
    """One row of measurements.csv before the run's own columns are added.

    Attributes:
        estimate: the number, or None where there is none.
        status: "ok" or "n/a: " and the reason.
    """

    metric: str
    estimate: Estimate | None
    status: str = "ok"
    split: str = "test"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        e = self.estimate
        numbers = {f.name: getattr(e, f.name) if e else None for f in fields(Estimate)}
        if e:  # no negative zero; an unknown error is null, since JSON has no nan
            numbers |= {"value": e.value + 0.0, "stderr": None if math.isnan(e.stderr) else e.stderr}
        return {"split": self.split, "metric": self.metric, **numbers, "status": self.status}


Measurements = Iterator[Measurement]
T = TypeVar("T")


def na(metric: str, reason: str) -> Measurement:
    """Return a metric that this model does not have, with the reason."""
    return Measurement(metric, None, f"n/a: {one_line(reason) or 'the model gives no reason'}")


def one_line(text: object) -> str:
    """Return text from elsewhere as one short line that is safe in a terminal."""
    return harmless(" ".join(str(text).split()))[:REASON]


def measured(metric: str, compute: Callable[[], Estimate]) -> Measurement:
    """Return what is computed, or the reason why these samples have no such number."""
    try:
        return Measurement(metric, compute())
    except ValueError as reason:  # too few of them, say
        return na(metric, str(reason))


def attempted(sample: Callable[[], T]) -> tuple[T | None, str]:
    """Return sample() and "", or None and the reason where the sampler failed; limits of the machine are no reason."""
    try:
        with may_fail():
            return sample(), ""
    except (TimeLimit, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except ModelError as error:
        return None, str(error)
    except Exception as error:
        if "allocate memory" in str(error):  # torch's on a CPU has no type of its own
            raise
        return None, f"the sampler raised {type(error).__name__}: {error}"


def count(metric: str, value: float, unit: str) -> Measurement:
    """Return a measurement without sampling error."""
    return Measurement(metric, Estimate.exact(value, unit))


def timed(device: torch.device, f: Callable[[], Any]) -> tuple[Any, float]:
    """f()'s result and its wall seconds, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = f()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class Evaluator:
    """One trained model on one task; iterate `measurements()`, then `arrays()` for the report's pictures."""

    model: Model
    task: Task
    settings: Evaluation
    streams: Streams
    device: torch.device
    #: log p of every test example by the task's name, once it is measured; of data, not of densities
    examples: dict[str, LogLikelihood] = field(default_factory=dict)
    #: sha256 of the weights of each classifier that judged samples, by the task that it was trained on
    classifiers: dict[str, str] = field(default_factory=dict)

    def measurements(self) -> Measurements:
        """Every measurement of this model on this task."""
        if self.task.density is not None:
            yield from self._density_likelihood(self.task.density)
            yield from self._density_samples(self.task.density)
            yield from self._samplers(self.task.density)
        else:
            yield from self._data_likelihood()
            yield from self._data_samples()
        yield count("parameters", sum(p.numel() for p in self.model.parameters()), "parameters")

    # -- densities whose truth is known

    def _log_likelihood(self, x: Tensor) -> LogLikelihood:
        generator, density = self.streams.fresh("evaluation"), self.task.density
        if density is None:
            return log_likelihood(self.model, x, self.settings, generator)
        k, steps = self.settings.density_importance_samples, self.settings.density_ais_steps
        effort = replace(self.settings, importance_samples=k, ais_steps=steps)
        # twice the box that holds the truth: a model may put mass where the truth has none
        half_width = 2 * density.half_width if self.task.info.dim == 2 else None
        return log_likelihood(self.model, x, effort, generator, half_width)

    def _require_finite(self, values: Tensor, x: Tensor, metric: str, method: str) -> None:
        """Check a model's answers (n,) or (n, D) at the first rows x (n, D) of the test split.

        Raises:
            NotANumber: one of them is nan or infinite.
        """
        bad = (~values.isfinite()).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
        if bad:
            row, name = x[bad[0]], type(getattr(self.model, "inner", self.model)).__name__
            raise NotANumber(
                f"{metric} is no number: {name}.{method} gives nan or infinity at row {bad[0]} of the test split "
                f"({len(bad)} of {len(x)} rows), where x is between {float(row.min()):g} and {float(row.max()):g}; "
                "look there for an overflow, a logarithm of 0 or a division by 0"
            )

    def _test_likelihood(self, x: Tensor) -> LogLikelihood:
        found = self._log_likelihood(x)
        has = getattr(self.model, "inner", self.model).capabilities
        self._require_finite(found.values, x, "nll", next((m for c, m in LOG_P.items() if c in has), "energy"))
        return found

    def _density_likelihood(self, truth: Density) -> Measurements:
        x = self.task.test[: self.settings.test_points].to(self.device)
        try:
            log_q = self._test_likelihood(x)
        except NotImplementedError as reason:
            yield from (na(metric, str(reason)) for metric in ("nll", "kl"))
        else:
            yield Measurement("nll", -log_q.mean())
            yield Measurement("kl", kl(LogLikelihood(truth.log_prob(x), "exact"), log_q))
            yield from (Measurement(name, e) for name, e in log_q.details.items())
        if not truth.smooth:
            yield na("fisher_divergence", "the truth has no score at its edges")
        elif "score" not in self.model.capabilities:
            yield na("fisher_divergence", "the model has no score")
        else:
            scores = torch.cat([self.model.score(part).detach() for part in x.split(CHUNK)])
            self._require_finite(scores, x, "fisher_divergence", "score")
            yield Measurement("fisher_divergence", fisher_divergence(scores, truth.score(x)))

    def _density_samples(self, truth: Density) -> Measurements:
        n = self.settings.samples
        found, reason = self._drawn(n)
        if found is None:
            yield from (na(metric, reason) for metric in (*DISTANCES, "mode_weight_error", "sample_ms", "nfe"))
            return
        x, seconds = found
        yield from self._sample_quality(truth, x, "")
        yield count("sample_ms", 1000 * seconds / n, "milliseconds")
        yield count("nfe", self.model.nfe, "network evaluations")

    def _drawn(self, n: int) -> tuple[tuple[Tensor, float] | None, str]:
        """Draw n samples by the model's own sampler; return them with the seconds, or None and the reason."""
        if "sample" not in self.model.capabilities:
            return None, "the model has no sampler of its own"
        generator = self.streams.fresh("sample")
        return attempted(lambda: timed(self.device, lambda: self.model.sample(n, generator).detach()))

    def _sample_quality(self, truth: Density, x: Tensor, suffix: str) -> Measurements:
        reference = self.task.test.to(self.device)
        m = min(self.settings.transport_points, len(x), len(reference))
        if not bool(torch.isfinite(x).all()):
            yield from (na(m + suffix, "the sampler diverged") for m in (*DISTANCES, "mode_weight_error"))
            return
        for metric, distance in DISTANCES.items():
            yield measured(metric + suffix, partial(distance, x[:m], reference[:m]))
        weights = truth.mode_weights()
        if weights is None:
            yield na("mode_weight_error" + suffix, "the truth has no modes")
        else:
            yield Measurement("mode_weight_error" + suffix, mode_weight_error(truth.mode_of(x), weights.to(x.device)))

    # -- any model with a score, under any Langevin sampler

    def _start(self, chains: int) -> Tensor:
        """Draw Langevin's start: a centred Gaussian as wide as the data, which ignores the modes' weights."""
        generator = self.streams.fresh("langevin-start")
        z = torch.randn((chains, self.task.info.dim), generator=generator, device=self.device)
        return z.to(self.task.train.dtype) * float(self.task.train.square().mean().sqrt())

    def _given(self, truth: Density, chains: int) -> tuple[Tensor, int, float, torch.Generator]:
        """Return the start, steps, step size (a fifth of the narrowest variance biases it by 5 %) and generator."""
        step, generator = 0.2 * truth.narrowest**2, self.streams.fresh("langevin")
        return self._start(chains), self.settings.langevin_steps, step, generator

    def _ula(self, truth: Density, chains: int, record_every: int = 0) -> Chain:
        return ula(self.model.score, *self._given(truth, chains), record_every=record_every)

    def _mala(self, truth: Density, chains: int) -> Chain:
        exact = "log_prob" in self.model.capabilities
        log_f = self.model.log_prob if exact else (lambda x: -self.model.energy(x))
        return mala(log_f, self.model.score, *self._given(truth, chains))

    def _samplers(self, truth: Density) -> Measurements:
        """Measure Langevin samplers, and those that a model offers beside its own: predictor-corrector, say."""
        if self.task.info.dim != 2 or not truth.smooth or self.model.costly_score:
            return
        has, chains = self.model.capabilities, self.settings.langevin_chains
        if "score" in has:
            yield from self._sampler(truth, "ula", lambda: self._ula(truth, chains))
        if "score" in has and has & {"log_prob", "energy"}:
            yield from self._sampler(truth, "mala", lambda: self._mala(truth, chains))
        for name, sample in self.model.samplers().items():
            yield from self._sampler(truth, name, partial(sample, chains, self.streams.fresh(f"sample-{name}")))

    def _sampler(self, truth: Density, name: str, sample: Callable[[], Chain | tuple[Tensor, int]]) -> Measurements:
        drawn, reason = attempted(partial(timed, self.device, sample))
        if drawn is None:
            names = (*DISTANCES, "mode_weight_error", "nfe", "sample_ms")
            yield from (na(f"{metric}:{name}", reason) for metric in names)
            return
        found, seconds = drawn
        x, nfe = (found.samples, found.nfe) if isinstance(found, Chain) else found
        yield from self._sample_quality(truth, x.detach(), f":{name}")
        yield count(f"nfe:{name}", nfe, "network evaluations")
        yield count(f"sample_ms:{name}", 1000 * seconds / len(x), "milliseconds")

    # -- data

    def _data_likelihood(self) -> Measurements:
        x = self.task.test.to(self.device)
        try:
            log_p = self._test_likelihood(x)
        except NotImplementedError as reason:
            yield from (na(metric, str(reason)) for metric in ("nll", "bits_per_dim"))
            return
        self.examples[self.task.name] = log_p
        nll = -log_p.mean()
        yield Measurement("nll", nll)
        yield Measurement("bits_per_dim", nll.times(1 / (self.task.info.dim * float(np.log(2))), "bits/dim"))
        yield from (Measurement(name, e) for name, e in log_p.details.items())

    def _data_samples(self) -> Measurements:
        names = ("c2st", *FEATURE_METRICS, "sample_ms", "nfe")
        n, test = self.settings.data_samples, self.task.test.to(self.device)
        found, reason = self._drawn(n)
        reason = reason or self._unusable(found[0] if found else test)
        if found is None or reason:
            yield from (na(metric, reason) for metric in names)
            return
        x, seconds = found
        m = min(n, len(test))
        yield measured("c2st", lambda: c2st(x[:m], test[:m], self.streams.fresh("c2st")))
        yield from self._features(x, test)
        yield count("sample_ms", 1000 * seconds / n, "milliseconds")
        yield count("nfe", self.model.nfe, "network evaluations")

    def _unusable(self, x: Tensor) -> str:
        """Return why samples (n, D) of data cannot be measured, or ""."""
        if not bool(torch.isfinite(x).all()):
            return "the sampler diverged"
        top = (self.task.info.levels or 2) - 1
        wrong = (x != x.round()) | (x < 0) | (x > top)
        if self.task.info.domain == "continuous" or not bool(wrong.any()):
            return ""
        return f"the sampler gives values that are none of the levels 0 to {top}, such as {float(x[wrong][0]):g}"

    def _features(self, x: Tensor, test: Tensor) -> Measurements:
        """Measure samples x (n, D) in the features of a classifier of the task's labels."""
        reason, info = "", self.task.info
        if self.task.labels is None:
            reason = "there are no labels to train a classifier's features on"
        elif self.task.name not in IMAGES and not (info.image == (DIGITS.side, DIGITS.side) and info.levels):
            reason = f"there is no classifier for these data; its images are {DIGITS.side}x{DIGITS.side}, in levels"
        else:
            classifier = task_features(self.task)
            self.classifiers[self.task.name] = classifier.sha256
            fake, real = classifier.features(x.cpu()), classifier.features(test.cpu())
            try:
                yield from (Measurement(name, e) for name, e in feature_metrics(real, fake).items())
            except ValueError as few:
                reason = str(few)
        if reason:
            yield from (na(metric, reason) for metric in FEATURE_METRICS)

    # -- what the report draws

    def arrays(self) -> dict[str, np.ndarray]:
        """Return maps, samples and paths for the report; of one seed only, since they are pictures."""
        out: dict[str, np.ndarray] = {}
        drawn, _ = self._drawn(100 if self.task.density is None else 1_000)
        if drawn is not None:
            out["samples"] = drawn[0].cpu().numpy()
        if self.task.density is None:
            out["levels"] = np.asarray(self.task.info.levels)
            out["reference_samples"] = self.task.test[:100].numpy()
        elif self.task.info.dim == 2:
            out.update(self._maps(self.task.density))
        return {k: v.astype(np.float32) for k, v in out.items()}

    def _maps(self, truth: Density) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {}
        span = float(self.task.test.abs().max()) * 1.05  # half the side of a square of all test points, and a margin
        x, axis = plane(span, self.settings.map_points, self.device)
        with suppress(NotImplementedError):
            values = self._log_likelihood(x).values
            out["grid_log_density"] = values.reshape(len(axis), -1).cpu().numpy()
            out["grid_axis"] = axis.numpy()
        if "score" in self.model.capabilities and truth.smooth and not self.model.costly_score:
            x, axis = plane(span, self.settings.field_points, self.device)
            out["grid_score"] = self.model.score(x).detach().reshape(len(axis), len(axis), 2).cpu().numpy()
            out["score_axis"] = axis.numpy()
            path = self._ula(truth, PATHS, record_every=max(1, self.settings.langevin_steps // 50)).path
            assert path is not None
            out["path"] = path.detach().cpu().numpy()
        return out


def plane(half_width: float, points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Grid of (points^2, 2) positions, rows along x2 and columns along x1, and its axis (points,)."""
    axis = torch.linspace(-half_width, half_width, points)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1).to(device), axis


_FEATURES: dict[str, FeatureClassifier] = {}


def task_features(task: Task) -> FeatureClassifier:
    """Return the feature classifier of a task with labels."""
    return image_features(task.name) if task.name in IMAGES else digit_features(task)


def digit_features(task: Task) -> FeatureClassifier:
    """Return the feature classifier of 8x8 digits, trained once per process under a fixed seed."""
    key = f"{task.name} {task.sha256()}"  # the folds of a task have one name and other rows
    if key not in _FEATURES:
        assert task.labels is not None
        assert task.info.levels is not None
        seed = stream_seed(task.name, "features") % 2**31
        design = replace(DIGITS, white=task.info.levels - 1)  # digits-binary are digits too
        _FEATURES[key] = FeatureClassifier.train(design, task.train, task.labels[0], seed)
    return _FEATURES[key]
