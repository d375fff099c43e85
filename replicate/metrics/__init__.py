"""Distances and scores between samples, densities and data."""
