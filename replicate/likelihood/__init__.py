"""Estimate log p(x) and log Z, each with its kind: exact, a bound, or an estimate."""
