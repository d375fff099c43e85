"""Readers of what comes from outside, fed with damaged files: each gives a value or its own error, nothing else."""
