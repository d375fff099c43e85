"""Imported once by the pool's server: whatever every run would import again, it inherits instead."""

from replicate import registry

registry.models()
registry.tasks()
