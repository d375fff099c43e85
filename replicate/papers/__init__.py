"""One folder per paper: claims as data, experiments as functions."""
