"""Imported once by the pool's server: whatever every run would import again, it inherits instead."""

from replicate import registry
from replicate.runs.execute import prepare_process

registry.models()
registry.tasks()
registry.papers()
prepare_process("cpu")  # switching deterministic kernels on imports a second's worth of torch
