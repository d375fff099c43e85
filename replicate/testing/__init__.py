"""Tests that the package ships, for the authors of plug-ins: see `replicate.testing.contracts`."""
