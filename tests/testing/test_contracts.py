"""The contract tests that the package ships, on every registered model."""

from replicate.testing.contracts import *  # noqa: F403
