"""The comparison of each profile: which models run on which tasks, over how many seeds."""

from dataclasses import dataclass

from replicate.registry import model_entry, models
from replicate.runs.spec import RunSpec, make_spec
from replicate.tasks.loading import load_task, task_entry, unsupported
from replicate.validation import check_profile

PLANE = ("two-gaussians", "eight-gaussians", "two-moons", "rings")
#: densities that standard leaves to the full profile
MORE_PLANE, MORE_DIMENSIONS = ("pinwheel", "spirals", "checkerboard"), ("mixture-2", "mixture-64")
#: real tables with ten folds, and binary sets with a split of their own
TABLES, BINARY = ("red-wine", "white-wine", "parkinsons"), ("mushrooms", "dna", "nips")

#: one model per family, for the growth of error and cost with the dimension
ACROSS_DIMENSIONS = ("causal-conv", "spline-flow", "vae", "neural-ebm", "sde-vp", "truth")

#: siblings of sde-vp, with its network and objective but another prior and noise range: in a paper's claims
SIBLINGS = ("sde-ve", "sde-subvp")

#: models of bits, without gated-pixelcnn, which costs most
OF_BITS = ("causal-conv", "vae", "iwae", "rbm-cd", "rbm-pcd", "marginals", "mixture-em", "truth")

#: scores of one noise level give no log p on data, and the exact trace costs one pass per dimension
ONE_LEVEL = ("sm-explicit", "sm-implicit", "dsm", "dsm-energy", "ssm", "ssm-vr")

#: trained by any objective; the papers' experiments compare these objectives
ANY_OBJECTIVE = ("energy",)

#: models of real tables, binary sets and images, for the full profile and papers' experiments
NADES = ("nade", "eonade", "made")
OF_REAL_DATA = (*NADES, "maf", "image-realnvp", "glow", "image-spline-flow", "conv-ebm")
OF_TABLES = ("causal-conv", "eonade", "made", "spline-flow", "maf", "vae", "neural-ebm", "sde-vp", "gaussian-mixture")
OF_BINARY = ("causal-conv", *NADES, "spline-flow", "iwae", "rbm-pcd", "sde-vp", "mixture-em", "marginals")

#: models of smoke's digits: at least one of each family, so that every kind of estimator runs
SMOKE = ("causal-conv", "spline-flow", "vae", "neural-ebm", "rbm-pcd", "ncsn", "sde-vp", "gaussian-mixture", "truth")


@dataclass(frozen=True)
class Part:
    """Each of `models`, or all but `without` where none is named, on each task it supports, over seeds 0 .. seeds-1."""

    tasks: tuple[str, ...]
    seeds: int
    models: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


COMPARISON: dict[str, tuple[Part, ...]] = {
    "smoke": (
        Part(("two-gaussians",), 1, without=(*SIBLINGS, *OF_REAL_DATA)),
        Part(("digits",), 1, SMOKE),
        Part(("digits-binary",), 1, ("iwae", "rbm-cd", "mixture-em")),
    ),
    "standard": (
        Part(PLANE, 3, without=(*ONE_LEVEL, *SIBLINGS, *ANY_OBJECTIVE, *OF_REAL_DATA, "iwae", "realnvp")),
        Part(("two-gaussians",), 3, ONE_LEVEL),
        Part(("two-gaussians", "rings"), 3, ("realnvp",)),
        Part(("mixture-8", "mixture-32"), 3, ACROSS_DIMENSIONS),
        Part(("digits",), 3, without=(*ONE_LEVEL, *SIBLINGS, *ANY_OBJECTIVE, *OF_REAL_DATA)),
        Part(("digits-binary",), 3, OF_BITS),
    ),
    "full": (
        Part((*MORE_PLANE, *MORE_DIMENSIONS), 3, ACROSS_DIMENSIONS),
        Part(("digits-shuffled",), 3, ACROSS_DIMENSIONS),
        Part(TABLES, 10, OF_TABLES),
        Part(BINARY, 3, OF_BINARY),
    ),
}


def absent_tasks(profile: str) -> dict[str, str]:
    """Return the tasks of a profile's comparison that this machine cannot load, with the reason."""
    names = dict.fromkeys(name for part in COMPARISON[profile] for name in part.tasks)
    return {name: why for name in names if (why := task_entry(name).absent())}


def compared_runs(profile: str, device: str = "cpu", seeds: int | None = None) -> list[RunSpec]:
    """Return all runs of a profile's comparison in a fixed order, without tasks whose files are absent.

    Args:
        seeds: overrides the number of seeds of every part.

    Raises:
        UsageError: no such profile.
    """
    check_profile(profile)
    specs: list[RunSpec] = []
    away = absent_tasks(profile)
    for part in COMPARISON[profile]:
        for task in (name for name in part.tasks if name not in away):
            names = part.models or sorted(set(models()) - set(part.without))
            for name in (n for n in names if unsupported(model_entry(n), load_task(task)) is None):
                specs += (make_spec(name, task, seed, profile, device) for seed in range(seeds or part.seeds))
    return specs
