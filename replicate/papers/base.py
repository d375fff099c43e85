"""A paper as the suite knows it: claims as data, experiments as functions, and the runs that both need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from replicate.papers.claims import Claim, ClaimError, PaperClaims, read_claims, resolved
from replicate.runs.experiment import Experiment


@dataclass(frozen=True)
class ModelRuns:
    """Registered models that a claim measures on a task of the comparison.

    Attributes:
        models, tasks: names; every model runs on every task.
        seeds: how many.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        key: short name, that of its module.
        claims_file: the TOML beside the module.
        experiments: what its claims measure.
        model_runs: by profile, runs of registered models that its claims measure.
    """

    key: str
    claims_file: Path
    experiments: tuple[Experiment, ...] = ()
    model_runs: Mapping[str, tuple[ModelRuns, ...]] = field(default_factory=dict)

    def claims(self) -> PaperClaims:
        """The claims, read and checked.

        Raises:
            ClaimError: the file is not as `replicate.papers.claims` asks, or names an experiment that is not here.
        """
        read = read_claims(self.claims_file)
        if read.key != self.key:
            raise ClaimError(f"{self.claims_file}: key is {read.key!r}; its module says {self.key!r}")
        known = {e.name for e in self.experiments}
        for claim in read.claims:
            if claim.experiment and claim.experiment not in known:
                names = ", ".join(sorted(known)) or "none"
                raise ClaimError(
                    f"{self.claims_file}: claim {claim.id} names experiment {claim.experiment!r}; there are {names}"
                )
        return replace(read, claims=tuple(self._with_needs(claim) for claim in read.claims))

    def _with_needs(self, claim: Claim) -> Claim:
        """The claim with what its experiments need; the file says so of what no experiment here measures."""
        measures = (resolved(m, claim, self.key).split("/")[0] for m in (claim.measure, claim.minus, claim.over))
        asked = list(dict.fromkeys(measures))
        found = next((e.needs for name in asked for e in self.experiments if e.name == name and e.needs), "")
        return replace(claim, needs=found) if found else claim
