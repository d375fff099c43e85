"""The likelihood baselines, one family a module; a plug-in that knows `replicate.model` and nothing else."""
