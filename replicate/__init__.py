"""Scoreboard: every family of generative model p(x) = exp(-f(x)) / Z through one protocol."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("scoreboard-replicate")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+source"
