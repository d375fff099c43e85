"""A package with one model, as if installed, that tests edit between two calls."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: set in the environment, training fails at its tenth step
FAILING = "PLUGGED_MODEL_FAILS"

MODEL = """
import os

import torch

from replicate.model import Model, ModelEntry, Training

LOSS = 1.0


class Plugged(Model):
    family = "reference"
    capabilities = frozenset({"log_prob"})

    def __init__(self, info):
        super().__init__()
        self.theta, self.steps = torch.nn.Parameter(torch.zeros(2)), 0

    def loss(self, batch, generator):
        self.steps += len(batch) == 32  # not where it is validated
        if self.steps == 10 and os.environ.get("PLUGGED_MODEL_FAILS"):
            raise RuntimeError("interrupted")
        return LOSS * (batch - self.theta).square().sum(1).mean()

    def log_prob(self, x):
        return -(x - self.theta).square().sum(1)


ENTRY = ModelEntry("reference", "A model", "none", Plugged, frozenset({"continuous"}),
                   training=Training(steps=20, batch_size=32))
"""


def write_plug_in(folder: Path) -> None:
    """Lay the package into a folder, as an installer does."""
    about = folder / "plugged-0.1.dist-info"
    about.mkdir(parents=True)
    (folder / "plugged_model.py").write_text(MODEL)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[replicate.models]\nplugged = plugged_model:ENTRY\n")


def edit_loss(folder: Path) -> None:
    """Make another program of it, of the same length."""
    path = folder / "plugged_model.py"
    path.write_text(path.read_text().replace("LOSS = 1.0", "LOSS = 2.0"))


@contextmanager
def plugged(folder: Path) -> Iterator[None]:
    """Inside, this process finds and imports the plug-ins of a folder as a fresh one would."""
    from replicate.registry import MODELS
    from replicate.runs.identity import plug_in
    from replicate.runs.paper import PAPERS
    from replicate.tasks.loading import TASKS

    def forget() -> None:
        sys.modules.pop("plugged_model", None)
        importlib.invalidate_caches()
        plug_in.cache_clear()
        for kind in (MODELS, TASKS, PAPERS):
            kind.forget()

    sys.path.insert(0, str(folder))
    forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        forget()
