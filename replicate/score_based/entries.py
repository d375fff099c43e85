"""The entries of the score-based models, with their default settings.

Noise levels and step sizes are in standard deviations of the data: models see standardised inputs.
"""

from dataclasses import replace
from functools import partial

from replicate.model import ModelEntry, Training
from replicate.score_based import diffusion, single
from replicate.score_based.ncsn import build_ncsn
from replicate.sde import VE, VP, SubVP

CONTINUOUS = frozenset({"continuous"})

_NETWORK = {"hidden": 64, "depth": 3, "activation": "silu"}
_LANGEVIN = {"langevin_steps": 1000, "step_size": 0.005}
_SINGLE = Training(steps=1000, batch_size=256, lr=1e-2, betas=(0.9, 0.99), ema=0.99)

SM_IMPLICIT = ModelEntry(
    family="score",
    about="implicit score matching, exact trace",
    paper="Hyvarinen 2005, JMLR 6",
    build=partial(single.build, single.ImplicitModel),
    domains=CONTINUOUS,
    params={**_NETWORK, **_LANGEVIN},
    training=_SINGLE,
)

SSM = replace(
    SM_IMPLICIT,
    about="sliced score matching",
    paper="Song et al. 2019, 1905.07088",
    build=partial(single.build, single.SlicedModel),
)

SSM_VR = replace(
    SSM, about="sliced score matching, variance reduced", build=partial(single.build, single.SlicedVRModel)
)

DSM = replace(
    SM_IMPLICIT,
    about="denoising score matching at one noise level",
    paper="Vincent 2011, Neural Computation 23",
    build=partial(single.build, single.DenoisingModel),
    params={**_NETWORK, **_LANGEVIN, "sigma": 0.05},
)

DSM_ENERGY = replace(
    DSM, about="denoising score matching, s = -grad f", build=partial(single.build, single.DenoisingEnergyModel)
)

_NOISE_NET = {"hidden": 128, "depth": 3, "features": 64, "max_frequency": 12.0}
_NOISE_NET |= {"width": 0.1, "shrinkage": 0.0, "dropout": 0.0}
_LEVELS = {"sigma_max": 5.0, "sigma_min": 0.03, "levels": 10}
_ANNEALED = {"steps_per_level": 20, "step_size": 0.3, "denoise": True}

NCSN = ModelEntry(
    family="score",
    about="noise-conditional score network, annealed Langevin",
    paper="Song and Ermon 2019, 1907.05600",
    build=build_ncsn,
    domains=CONTINUOUS,
    params={**_LEVELS, **_ANNEALED, **_NOISE_NET},
    training=Training(steps=500, batch_size=256, lr=6e-3, betas=(0.9, 0.99), ema=0.99),
)

#: many dimensions: no input frequencies, and noise levels where correlated data of unit scale change most
_WIDE = {"features": 0, "location": -0.7, "scale": 1.0, "width": 0.3}
_DIGITS = {**_WIDE, "width": 0.1, "hidden": 256, "depth": 2, "dropout": 0.2, "shrinkage": 0.1}
_DIGITS |= {"steps": 2000, "lr": 3e-3, "validate_every": 100}

#: real tables
_TABLE = {**_WIDE, "dropout": 0.1, "steps": 2000, "lr": 2e-3, "validate_every": 250}

_PROPOSAL = {"weighting": "likelihood", "location": -2.2, "scale": 0.7, "uniform": 0.1}
_DIFFUSION = {**_PROPOSAL, "sample_steps": 32, **_NOISE_NET}

SDE_VP = ModelEntry(
    family="score",
    about="score SDE, variance preserving",
    paper="Song et al. 2021, 2011.13456",
    build=partial(diffusion.build, VP),
    domains=CONTINUOUS,
    params={"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3, **_DIFFUSION},
    training=Training(steps=1000, batch_size=256, lr=6e-3, betas=(0.9, 0.99), ema=0.995),
    overrides={
        "levels": _DIGITS,
        "bits": _DIGITS,
        "mixture-8": _WIDE,
        "mixture-32": _WIDE,
        "mixture-64": _WIDE,
        "red-wine": {**_TABLE, "weight_decay": 0.3},
        # the Gaussian fit, not too narrow for them, models the rows that are ten and more standard deviations away
        "white-wine": {**_TABLE, "lr": 4e-3, "steps": 3000, "reach": 4.0, "shrinkage": 0.1},
        "parkinsons": {**_TABLE, "dropout": 0.05, "weight_decay": 0.3, "steps": 3000, "reach": 4.0},
        "mushrooms": {"dropout": 0.05, "steps": 4000},
        "nips": {"shrinkage": 0.8, "steps": 800, "weight_decay": 1.0},
    },
)

SDE_VE = replace(
    SDE_VP,
    about="score SDE, variance exploding",
    build=partial(diffusion.build, VE),
    params={"sigma_min": 0.01, "sigma_max": 50.0, **_DIFFUSION},
)

SDE_SUBVP = replace(
    SDE_VP,
    about="score SDE, sub-VP",
    build=partial(diffusion.build, SubVP),
    params={"beta_min": 0.1, "beta_max": 20.0, "t_min": 0.03, **_DIFFUSION},
)
