"""The kit that a paper's author imports: declare an experiment, measure, draw, train."""

from replicate.fitting import Check, Fit, fit
from replicate.runs.experiment import Experiment, Line, Plot, Run, experiment
from replicate.runs.paper import ModelRuns, Paper

__all__ = ["Check", "Experiment", "Fit", "Line", "ModelRuns", "Paper", "Plot", "Run", "experiment", "fit"]
