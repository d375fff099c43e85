"""Data with a fixed split, and the truth where it is known."""
