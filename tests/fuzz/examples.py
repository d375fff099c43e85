"""Small whole specs and records, to be damaged."""

from __future__ import annotations

import json
from typing import Any

from replicate.runs.record import seal
from replicate.runs.spec import AnySpec, ExperimentSpec, make_spec

RUN = make_spec("realnvp", "two-moons", profile="smoke")
EXPERIMENT = ExperimentSpec(
    model="toy",
    family="score",
    task="toy-run",
    seed=1,
    profile="smoke",
    precision="float64",
    device="cuda",
    params={"steps": 100, "rate": 0.5, "mode": "tied", "fast": False},
    data_sha256="",
)


def row(metric: str, value: float | None, status: str = "ok") -> dict[str, Any]:
    """One measurement of a record."""
    number = {"value": value, "stderr": None, "kind": "exact", "unit": "nats", "n": 100}
    return {"split": "test", "metric": metric, "status": status, **(number if value else dict.fromkeys(number))}


def record_of(spec: AnySpec, **more: Any) -> dict[str, Any]:
    """A small whole record."""
    return seal(
        {
            "run_id": spec.run_id(),
            "spec": spec.as_dict(),
            "measurements": [row("nll", 1.5), row("w2:ula", 0.25), row("kl", None, "n/a: no density")],
            "provenance": {"commit": "c", "threads": 1, "tf32": False, "sittings": [{"device": "cpu", "seconds": 1.5}]},
            "about": "a model",
            "paper": "Nobody 2020",
            **more,
        }
    )


PLOT = {
    "name": "curve",
    "title": "A curve",
    "x_label": "step",
    "y_label": "loss",
    "lines": [{"label": "a", "x": [1, 2, 3], "y": [1.0, None, 0.5]}],
    "style": "line",
    "log_x": False,
    "log_y": True,
    "levels": {"printed": 1.0},
}
HISTORY = {"train": [[10, 1.5], [20, 1.25]], "valid": [[20, 1.5]], "best_step": 20, "seconds": 0.5}
RECORDS = [record_of(RUN, history=HISTORY, weights_sha256="a" * 64), record_of(EXPERIMENT, plots=[PLOT])]
SPECS = [RUN.as_dict(), EXPERIMENT.as_dict()]
TEXT_OF_RECORDS = [(json.dumps(r, indent=1, sort_keys=True) + "\n").encode() for r in RECORDS]
