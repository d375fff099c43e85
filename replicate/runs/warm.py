"""Imported once by the pool's server: whatever every run would import or ask again, it inherits instead."""

from replicate import registry
from replicate.runs.execute import prepare_process
from replicate.runs.provenance import driver_version, provenance

registry.models()
registry.tasks()
registry.papers()
provenance(prepare_process("cpu"))  # switching deterministic kernels on imports a second's worth of torch
driver_version()
