"""Synthetic runs for tests of the report: plausible numbers, pictures and failures, no training."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from replicate.model import Training
from replicate.runs.effort import Evaluation
from replicate.runs.record import seal

#: what README's headline stands between
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"
EVIL = "<script>alert('a_b%&')</script>"
MODELS = {
    "pixelcnn": "autoregressive",
    "causal-conv": "autoregressive",
    "realnvp": "flow",
    "spline-flow": "flow",
    "iwae": "vae",
    "rbm-pcd": "ebm",
    "neural-energy": "ebm",
    "vp-sde": "score",
    EVIL: "score",
    "truth": "reference",
    "kde": "reference",
}
QUALITY = {"truth": 0.0, "spline-flow": 0.012, "vp-sde": 0.018, "causal-conv": 0.02, "realnvp": 0.05, "iwae": 0.2}
DATA_KINDS = {
    "autoregressive": "exact",
    "flow": "upper_bound",
    "vae": "upper_bound",
    "ebm": "estimate",
    "score": "estimate",
}


def row(metric: str, value: float | None, kind: str | None, unit: str = "nats", status: str = "ok") -> dict[str, Any]:
    """One measurement as a record holds it."""
    stderr = None if value is None else 0.01 * abs(value)
    n = None if value is None else 1000
    keys = ("split", "metric", "value", "stderr", "kind", "unit", "n", "status")
    return dict(
        zip(keys, ("test", metric, value, stderr, kind, unit if value is not None else None, n, status), strict=True)
    )


def spec_of(model: str, family: str, task: str, seed: int) -> dict[str, Any]:
    """A spec with all the keys of a real one."""
    return {
        "model": model,
        "task": task,
        "family": family,
        "seed": seed,
        "profile": "smoke",
        "precision": "float32",
        "device": "cpu",
        "preprocessing": "none",
        "params": {"width": 64},
        "training": json.loads(json.dumps(asdict(Training(steps=200)))),
        "data_sha256": hashlib.sha256(task.encode()).hexdigest(),
        "results_version": 1,
        "evaluation": asdict(Evaluation(samples=1000)),
    }


def run_id_of(spec: dict[str, Any]) -> str:
    """The run id that the contract asks for."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def truth_log_density(x: np.ndarray) -> np.ndarray:
    """Log density of two Gaussians, of x (..., 2)."""
    a = np.log(0.2) - 0.5 * ((x + 2) ** 2).sum(-1)
    b = np.log(0.8) - 0.5 * ((x - 2) ** 2).sum(-1)
    return np.logaddexp(a, b) - np.log(2 * np.pi)


def density_measurements(model: str, task: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Measurements of a density task."""
    dim = int(task.rpartition("-")[2]) if task.startswith("mixture") else 2
    error = QUALITY.get(model, 0.1) * dim / 2
    jitter = 1 + 0.1 * rng.standard_normal()
    kind = "estimate" if model == "vp-sde" else "exact"
    rows = [
        row("nll", 2.8 + error * jitter, kind),
        row("kl", error * jitter, kind),
        row("w2", 0.2 + error * jitter, "estimate", "data units"),
        row("mmd", 2e-4 + 0.01 * error, "estimate", "squared kernel distance"),
        row("mode_weight_error", 0.02 * jitter, "estimate", "total variation"),
    ]
    if model == "kde":
        rows.append(row("fisher_divergence", None, None, status="n/a: the model has no score | <b>none</b>"))
    else:
        rows.append(row("fisher_divergence", 3 * error * jitter, "exact", "per squared data unit"))
        for sampler in ("ula", "mala"):
            rows.append(row(f"w2:{sampler}", 0.3 * jitter, "estimate", "data units"))
            rows.append(row(f"nfe:{sampler}", 300, "exact", "network evaluations"))
    return rows


def data_measurements(model: str, family: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Measurements of an image task."""
    if model == "causal-conv":
        return [row(m, None, None, status="n/a: no likelihood on images") for m in ("nll", "bits_per_dim")]
    nll = {"autoregressive": 80.3, "flow": 92.1, "vae": 90.4, "ebm": 105.0, "score": 94.2}.get(family, 130.0)
    nll += 0.3 * rng.standard_normal()
    kind = DATA_KINDS.get(family, "exact")
    return [
        row("nll", nll, kind),
        row("bits_per_dim", nll / 64 / math.log(2), kind, "bits/dim"),
        row("c2st", 0.6 + 0.02 * rng.standard_normal(), "estimate", "accuracy"),
        row("frechet", 3 + rng.standard_normal() ** 2, "estimate", "squared feature units"),
        *(
            row(m, 0.7 + 0.02 * rng.standard_normal(), "estimate", "fraction")
            for m in ("precision", "recall", "coverage")
        ),
        *([row("ais_ess", 80.0, "estimate", "chains")] if family == "ebm" else []),
    ]


def arrays_of(model: str, task: str, rng: np.random.Generator, points: int = 24) -> dict[str, np.ndarray]:
    """What seed 0 keeps for pictures."""
    if task.startswith("digits"):
        images = rng.integers(0, 17, (40, 64)).astype(np.float32)
        return {"samples": images, "levels": np.asarray(17.0), "reference_samples": images[::-1]}
    if task.startswith("mixture"):
        return {"samples": rng.standard_normal((50, int(task.rpartition("-")[2])))}
    axis = np.linspace(-6, 6, points)
    coarse = np.linspace(-6, 6, points // 2)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    grid = truth_log_density(np.stack([x, y], -1) + 0.3 * QUALITY.get(model, 0.1))
    v, u = np.meshgrid(coarse, coarse, indexing="ij")
    at = np.stack([u, v], -1)
    steps = 1e-4 * np.eye(2)
    score = np.stack([(truth_log_density(at + s) - truth_log_density(at - s)) / 2e-4 for s in steps], -1)
    path = np.cumsum(0.3 * rng.standard_normal((30, 12, 2)), 0) + rng.standard_normal((1, 12, 2)) * 3
    out = {"samples": rng.standard_normal((300, 2)) + 2, "path": path, "grid_score": score, "score_axis": coarse}
    return out if model == "kde" else {**out, "grid_log_density": grid, "grid_axis": axis}


def write_run(folder: Path, model: str, family: str, task: str, seed: int, points: int = 24) -> str:
    """One whole run; returns its id."""
    spec = spec_of(model, family, task, seed)
    run_id = run_id_of(spec)
    rng = np.random.default_rng(int(run_id[:12], 16))
    rows = (
        data_measurements(model, family, rng) if task.startswith("digits") else density_measurements(model, task, rng)
    )
    costs = {"train_seconds": "seconds", "sample_ms": "milliseconds", "peak_memory_mb": "megabytes"}
    rows += [
        row(m, 5 * len(model) ** 2 / 40 * float(np.exp(0.1 * rng.standard_normal())), "exact", unit)
        for m, unit in costs.items()
    ]
    rows += [row("parameters", 12345, "exact", "parameters"), row("nfe", 64, "exact", "network evaluations")]
    curve = [[s, 3 + 4 * math.exp(-s / 40) + 0.05 * float(rng.standard_normal())] for s in range(10, 201, 10)]
    record = {
        "run_id": run_id,
        "spec": spec,
        "about": f"{model} & friends",
        "paper": "Nobody 2020, 2001.00001",
        "measurements": rows,
        "history": {
            "train": [] if family == "reference" else curve,
            "valid": curve[::5],
            "best_step": 160,
            "seconds": 3.0,
        },
        "provenance": {
            "commit": "c" * 40,
            "dirty": "",
            "device": "Test CPU",
            "torch": "2.13.0",
            "python": "3.12",
            "threads": 1,
            "platform": "Linux",
            "started": "2026-01-01T00:00:00+00:00",
            "finished": f"2026-01-01T00:0{seed}:30+00:00",
        },
    }
    place = folder / run_id
    place.mkdir(parents=True)
    (place / "record.json").write_text(json.dumps(seal(record)))
    if seed == 0:
        np.savez_compressed(place / "arrays.npz", **arrays_of(model, task, rng, points))
    return run_id


def write_failure(folder: Path, model: str, family: str, task: str, seed: int) -> str:
    """One failed run; returns its id."""
    spec = spec_of(model, family, task, seed)
    run_id = run_id_of(spec)
    (folder / run_id).mkdir(parents=True)
    failure = {
        "run_id": run_id,
        "spec": spec,
        "error": "TrainingError: the loss became nan <b>",
        "traceback_tail": "line\n<i>",
    }
    (folder / run_id / "failure.json").write_text(json.dumps(failure))
    return run_id


def write_runs(
    folder: Path, tasks: tuple[str, ...], seeds: int = 3, models: dict[str, str] = MODELS, points: int = 24
) -> Path:
    """A whole sweep with two failures of the hostile model and one unfinished run."""
    for task in tasks:
        for model, family in models.items():
            if task.startswith("digits") and model == "truth":
                continue
            for seed in range(seeds):
                if model == EVIL and task == tasks[0] and 0 < seed < 3:
                    write_failure(folder, model, family, task, seed)
                else:
                    write_run(folder, model, family, task, seed, points)
    (folder / ("0" * 64)).mkdir()
    (folder / "version.json").write_text("{}")
    return folder


TASKS = ("two-gaussians", "mixture-2", "mixture-8", "digits")
#: what the tests of whole builds need, and no more: every kind of table and figure once
SMALL = {m: f for m, f in MODELS.items() if m in {"pixelcnn", "spline-flow", "rbm-pcd", EVIL, "truth", "kde"}}
