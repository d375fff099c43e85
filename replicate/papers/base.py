"""What a paper's module declares; kept here because plug-ins import it by this path."""

from replicate.runs.paper import ModelRuns, Paper

__all__ = ["ModelRuns", "Paper"]
