"""Measure how far a model or its samples are from the data or the truth."""
