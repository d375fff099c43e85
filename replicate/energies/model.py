"""Combine any energy network and any objective into a model of the suite.

The energy tilts the data's Gaussian fit, f(x) = -log p0(x) + g(x) (Xie et al. 2016, 1602.03264, tilt a fixed one), so
that exp(-f) can be normalised while g grows at most linearly, noise contrast begins at log Z = 0, and the path
log f_beta = log p0 - beta g leads from exact samples to the model: annealed importance sampling and the sampler follow
it by Metropolis-adjusted Langevin in the coordinates where p0 is N(0, I), between independence proposals from p0.

The state of the objective (chains, noise, log Z) is trained and saved with the model. The model does not use the log Z
that a noise-contrastive objective learns: the suite measures log Z by quadrature or annealing, as for every energy.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from replicate.energies import objectives
from replicate.energies.objectives import METHODS, Objective
from replicate.errors import UsageError
from replicate.model import DataInfo, Family, Model, ModelEntry, Training
from replicate.registry import model_entry, unknown
from replicate.sampling.langevin import mala

#: the square on which `ml` normalises, in standard deviations of the data, and its points per axis
BOX, POINTS = 5.0, 60
#: Langevin steps at beta = 0 in dimension 1: 1.65^2 D^(-1/3) is the optimum on a Gaussian (Roberts and Rosenthal 1998)
GAUSSIAN_STEP = 1.65**2


class EnergyNet(nn.Module):
    """The multilayer perceptron g(x) with SiLU and a last layer that starts at zero: x (n, D) -> (n,).

    Args:
        dim: D.
        hidden, layers: width and number of hidden layers.
        waves: the first layer has Fourier features of trainable projections, drawn from N(0, waves^2), in place of
            SiLU, so that a small network can have narrow shapes (Tancik et al. 2020, 2006.10739, keep them fixed); 0
            for none.
    """

    def __init__(self, dim: int, hidden: int, layers: int, waves: float = 0.0) -> None:
        super().__init__()
        self.wave_numbers = nn.Parameter(waves * torch.randn(dim, hidden // 2)) if waves else None
        widths = [hidden if waves else dim] + [hidden] * (layers - bool(waves))
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.wave_numbers is not None:
            phase = x @ self.wave_numbers
            x = torch.cat([phase.sin(), phase.cos()], 1)
        for layer in self.hidden:
            x = nn.functional.silu(layer(x))
        return self.head(x).squeeze(1)


class TrainedEnergy(Model):
    """The model p(x) = p0(x) exp(-g(x)) / Z: p0 is the data's Gaussian fit, g any network, the objective any.

    Args:
        network: g, (n, D) -> (n,), growing at most linearly; x is in the model's coordinates.
        objective: any `Objective`.
        info: continuous data of about unit scale.
        moves: Langevin steps per annealing step and per step of `sample` after it.
        jumps: take an independence step before and after them, with draws of p0; of no use in many dimensions.
        step_size: eps of the Langevin steps at the model, in squared standard deviations of p0.
        annealing, after: temperatures of `sample`, and steps at the model after them.

    Raises:
        ValueError: the data are bits.
    """

    family: ClassVar[Family] = "ebm"
    capabilities = frozenset({"energy", "score", "annealing", "sample"})

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        info: DataInfo,
        moves: int = 2,
        jumps: bool = True,
        step_size: float = 0.1,
        annealing: int = 100,
        after: int = 100,
    ) -> None:
        super().__init__()
        if info.domain != "continuous" and info.levels is None:
            raise ValueError(f"an energy of a Gaussian base needs continuous data, not {info.domain}")
        self.network, self.objective = network, objective
        self.moves, self.jumps, self.step_size = moves, jumps, step_size
        self.annealing, self.after = annealing, after
        self.first_step = GAUSSIAN_STEP * info.dim ** (-1 / 3)
        self.nfe = (annealing + after) * (moves + 1 + 2 * jumps)
        self.base = objectives.FittedGaussian()
        self.base.mean, self.base.chol = torch.zeros(info.dim), torch.eye(info.dim)
        self.inverse: Tensor = nn.Buffer(torch.eye(info.dim))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Fit the base, then prepare the objective."""
        self.base.fit(train, generator)
        identity = torch.eye(train.shape[1], dtype=train.dtype, device=train.device)
        self.inverse.copy_(torch.linalg.solve_triangular(self.base.chol, identity, upper=False))
        self.objective.prepare(train, generator)

    def _base_energy(self, u: Tensor) -> Tensor:
        """Return -log p0 at x = m + L u, from u (n, D); shape (n,)."""
        log_z = 0.5 * u.shape[1] * math.log(2 * math.pi) - self.inverse.diagonal().log().sum()
        return 0.5 * u.square().sum(1) + log_z

    def energy(self, x: Tensor) -> Tensor:
        return self._base_energy((x - self.base.mean) @ self.inverse.T) + self.network(x)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective.loss(self.energy, batch, generator)

    # log f_beta(x) = log p0(x) - beta g(x)
    def base_log_z(self) -> float:
        """Return 0: the base is normalised."""
        return 0.0

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.base.sample(n, generator)

    @torch.no_grad()
    def _transition(self, x: Tensor, beta: float, generator: torch.Generator) -> Tensor:
        """Take Langevin steps at beta between two independence steps from x (n, D): a palindrome, hence reversible."""
        mean, chol = self.base.mean, self.base.chol

        def whitened(u: Tensor) -> Tensor:
            return self._base_energy(u) + beta * self.network(mean + u @ chol.T)

        def energy(x: Tensor) -> Tensor:
            return whitened((x - mean) @ self.inverse.T)

        def jump(x: Tensor) -> Tensor:
            return objectives.independence_step(energy, self.base, x, generator) if self.jumps else x

        target = objectives.LogDensity(whitened)
        eps = self.first_step ** (1 - beta) * self.step_size**beta
        u = (jump(x) - mean) @ self.inverse.T
        u = mala(target.value, target.score, u, self.moves, eps, generator).samples
        return jump(mean + u @ chol.T)

    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            increment = (beta - beta_next) * self.network(x).double()
        return increment, self._transition(x, beta_next, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Anneal base samples to the model, then continue at the model; (n, D)."""
        x = self.base_sample(n, generator)
        for beta in (*((k + 1) / self.annealing for k in range(self.annealing)), *[1.0] * self.after):
            x = self._transition(x, beta, generator)
        return x


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of all objectives; each objective reads its own.

    Attributes:
        k: steps per update of the chains (cd, pcd, short-run).
        move_step: eps of a Langevin step, in squared units of x.
        adjusted: whether it is Metropolis-adjusted.
        chains: persistent chains (pcd).
        jumps: their steps begin with an independence proposal from the data's Gaussian (pcd).
        sigma: noise level of denoising (dsm).
        contrast: sigma of the conditional kernel (cnce).
        ratio: noise draws per example (nce, cnce, flow-nce).
        bandwidth: of the kernel, in median distances (ksd).
        flow_couplings, flow_steps: size and fit of the noise flow (flow-nce).
    """

    k: int = 1
    move_step: float = 0.05
    adjusted: bool = True
    chains: int = 256
    jumps: bool = False
    sigma: float = 0.05
    contrast: float = 0.5
    ratio: int = 2
    bandwidth: float = 0.3
    flow_couplings: int = 6
    flow_steps: int = 300


def build_objective(name: str, dim: int, **settings: Any) -> Objective:
    """Build an objective for data of unit scale.

    Args:
        name: one of `METHODS`.
        dim: D.
        settings: fields of `ObjectiveSettings`.

    Raises:
        UsageError: there is no such objective, or it is ml and the data are not in the plane.

    Example:
        >>> build_objective("dsm", 2, sigma=0.1).sigma
        0.1
    """
    s = ObjectiveSettings(**settings)
    kernel, gaussian = objectives.langevin_move(s.move_step, s.adjusted), objectives.FittedGaussian()
    jumping = objectives.with_independence(kernel, gaussian) if s.jumps else kernel
    makers: dict[str, Callable[[], Objective]] = {
        "ml": lambda: objectives.MaximumLikelihood(objectives.Quadrature(BOX, POINTS)),
        "cd": lambda: objectives.ContrastiveDivergence(kernel, s.k),
        "pcd": lambda: objectives.PersistentCD(jumping, s.k, s.chains, gaussian),
        "short-run": lambda: objectives.ShortRun(kernel, s.k, gaussian),
        "ism": objectives.ImplicitScoreMatching,
        "dsm": lambda: objectives.DenoisingScoreMatching(s.sigma),
        "ssm": objectives.SlicedScoreMatching,
        "nce": lambda: objectives.NoiseContrastive(gaussian, s.ratio),
        "cnce": lambda: objectives.ConditionalNoiseContrastive(s.contrast, s.ratio),
        "ksd": lambda: objectives.MinimumKSD(s.bandwidth),
        "flow-nce": lambda: objectives.FlowContrastive(_flow(dim, s.flow_couplings), s.flow_steps, s.ratio),
    }
    if name not in makers:
        raise unknown("objective", name, METHODS, f"Set objective to one of {', '.join(METHODS)}.")
    if name == "ml" and dim != 2:
        raise UsageError(
            f"objective 'ml' needs log Z by quadrature, which requires 2 dimensions, and the data have {dim}. "
            f"Set objective to one of {', '.join(m for m in METHODS if m != 'ml')}."
        )
    return makers[name]()


def _flow(dim: int, couplings: int) -> Model:
    return model_entry("realnvp").build(DataInfo(dim, "continuous"), couplings=couplings, hidden=32)


def build(
    info: DataInfo, *, objective: str, hidden: int, layers: int, waves: float, step_size: float, **settings: Any
) -> TrainedEnergy:
    """Build a multilayer perceptron and the objective of that name with its settings, of which both read `jumps`."""
    network = EnergyNet(info.dim, hidden, layers, waves)
    trained_by = build_objective(objective, info.dim, **settings)
    return TrainedEnergy(network, trained_by, info, jumps=settings["jumps"], step_size=step_size)


ENERGY = ModelEntry(
    family="ebm",
    about="neural energy tilting a Gaussian, trained by any objective",
    paper="Song and Kingma 2021, 2101.03288",
    build=build,
    domains=frozenset({"continuous"}),
    params={
        **{"objective": "nce", "hidden": 64, "layers": 3, "waves": 1.0, "step_size": 0.05},
        **asdict(ObjectiveSettings(jumps=True)),
    },
    training=Training(steps=1500, batch_size=256, lr=5e-3, betas=(0.9, 0.99), ema=0.99),
)
