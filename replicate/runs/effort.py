"""How hard a run is evaluated: part of its spec, the same for every model of a profile."""

from dataclasses import dataclass, replace

from replicate.likelihood.estimator import Effort


@dataclass(frozen=True)
class Evaluation(Effort):
    """The likelihood estimators' effort, and sizes of everything else that is measured.

    Attributes:
        density_importance_samples: k of the importance-weighted bound on densities; `importance_samples` on data.
        density_ais_steps: temperatures of annealed importance sampling on densities; `ais_steps` on data.
        test_points: test examples scored on densities (all on data).
        samples: samples drawn for sample metrics on densities.
        data_samples: samples drawn for sample metrics on data.
        transport_points: samples on each side of the exact optimal transport problem.
        langevin_steps: steps of each Langevin sampler in the sampler comparison.
        langevin_chains: chains of each.
        map_points, field_points: grid points per axis of density and score-field maps (seed 0).
    """

    density_importance_samples: int = 50
    density_ais_steps: int = 200
    test_points: int = 5_000
    samples: int = 2_000
    data_samples: int = 1_000
    transport_points: int = 500
    langevin_steps: int = 100
    langevin_chains: int = 500
    map_points: int = 50
    field_points: int = 18


STANDARD = Evaluation()
_SMOKE = {
    **{"importance_samples": 20, "density_importance_samples": 20, "ais_chains": 32, "ais_steps": 20},
    **{"density_ais_steps": 20, "dequantisation_draws": 2, "ode_draws": 1, "ode_steps": 6, "quadrature_points": 60},
    **{"test_points": 500, "samples": 300, "data_samples": 200, "transport_points": 150},
    **{"langevin_steps": 20, "langevin_chains": 150, "map_points": 24, "field_points": 10},
}
EVALUATION = {
    "smoke": replace(STANDARD, **_SMOKE),
    "standard": STANDARD,
    "full": replace(STANDARD, importance_samples=5_000, ais_chains=256, ais_steps=2_000),
}
