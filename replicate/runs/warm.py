"""Imports, facts about the machine and trained classifiers that the pool's server reads once, for runs to inherit."""

import gc
import io
import os
from contextlib import redirect_stderr

import torch

from replicate.registry import models
from replicate.runs.evaluate import digit_features
from replicate.runs.execute import prepare_process
from replicate.runs.identity import remember_plug_ins
from replicate.runs.paper import papers
from replicate.runs.provenance import driver_version, provenance, source_version
from replicate.runs.server import CLASSIFY
from replicate.tasks.loading import load_task, tasks

with redirect_stderr(io.StringIO()):  # the command itself says what its imports and git give reason for
    models()
    tasks()
    papers()
    source_version()
remember_plug_ins()
provenance(prepare_process("cpu"))  # switching deterministic kernels on imports a second's worth of torch
driver_version()
if not torch.cuda.is_available():  # with a GPU, autograd starts threads that a child would not have
    for task in filter(None, os.environ.get(CLASSIFY, "").split(",")):
        digit_features(load_task(task))
gc.freeze()  # no child, nor the end of this process, need look through what was imported
