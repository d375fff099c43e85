"""Papamakarios, Pavlakou, Murray 2017: Masked autoregressive flow for density estimation, 1705.07057; its tables.

The claims are defined and wait for data: POWER, GAS, HEPMASS and BSDS300 as the authors preprocessed them, and
MINIBOONE's training rows. The Gaussian rows then need gaussian-mixture with one component, the RealNVP rows the
registered realnvp; MADE and MAF are not in the suite. The paper prints log-likelihoods, the suite measures NLL.
"""

from __future__ import annotations

from pathlib import Path

from replicate.papers.base import Paper

PAPER = Paper("maf", Path(__file__).with_suffix(".toml"))
