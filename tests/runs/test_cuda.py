"""On a CUDA device every model runs, and two runs have the same bits."""

from __future__ import annotations

import pytest
import torch

from replicate.registry import models
from replicate.runs.execute import execute, prepare_process
from replicate.runs.spec import make_spec
from replicate.sweeps.comparison import ONE_LEVEL
from replicate.tasks.loading import load_task, unsupported

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("task", ["two-gaussians", "digits"])
@pytest.mark.parametrize("model", sorted(models()))
def test_every_model_is_deterministic_on_the_device(model: str, task: str) -> None:
    if unsupported(models()[model], load_task(task)) or (task == "digits" and model in ONE_LEVEL):
        pytest.skip("not a pair of the comparison")
    spec = make_spec(model, task, profile="smoke", device="cuda")
    device = prepare_process("cuda")
    first, second = (execute(spec, None, device) for _ in range(2))
    assert first["weights_sha256"] == second["weights_sha256"]
    for a, b in zip(first["measurements"], second["measurements"], strict=True):
        if a["metric"].split(":")[0] not in {"train_seconds", "sample_ms", "evaluate_seconds", "peak_memory_mb"}:
            assert a == b
