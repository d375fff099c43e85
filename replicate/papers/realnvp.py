"""Dinh, Sohl-Dickstein, Bengio 2017: Density estimation using Real NVP, 1605.08803; its rows in bits per dimension.

The claims are defined and wait for a multi-scale flow of images and the image tasks. This suite's registered realnvp is
a flow of vectors without squeezing and multi-scale factoring; a number of it would not compare with these rows.
"""

from __future__ import annotations

from pathlib import Path

from replicate.papers.base import Paper

PAPER = Paper("realnvp", Path(__file__).with_suffix(".toml"))
