"""Langevin dynamics and its relatives: samplers that need a score."""
