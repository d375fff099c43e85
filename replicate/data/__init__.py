"""Data files: what the suite knows of them, where they come from, how they are fetched, checked and read."""
