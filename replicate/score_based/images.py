"""Score-based models of images: U-Nets behind the suite's SDEs and NCSN, and two ways of dequantising pixels.

Pixels x in {0, .., L-1} become y = 2 (x + u) / L - 1 in [-1, 1], as in Song et al. 2021 (2011.13456): one map for all
pixels, so that convolutions see the same thing everywhere; the comparison's models of vectors have one map per pixel.

Noise u ~ U[0, 1) gives E_u[log p(y)] + D log(2 / L) <= log P(x). Variational dequantisation (Ho et al. 2019, Flow++,
1902.00275, section 3.1) learns q(u | x): E_q[log p(y) - log q(u | x)] + D log(2 / L) <= log P(x), which is the better
bound, since the choice of q includes the uniform one. As in ScoreFlow (2101.09258, section 5.2 and its code) q is
trained after the score model, which does not change any more.

Every SDE starts at noise of rho = 2e-4 in units of y, a fortieth of a level. The papers' VP starts at an eighth of one
(t = 1e-5). On a pixel that is always 0, as at MNIST's border, that blur of a uniform bin costs 0.18 bits, ours 0.04.

Deviations: the first noise level; q is affine couplings on a checkerboard in place of Flow++'s mixtures of logistics
with attention; noise levels are even in log rho, one stratified sample per batch; those of the models themselves are in
`diffusion` and `ncsn`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replicate.likelihood.dequantisation import Preprocessed
from replicate.model import DataInfo
from replicate.resume import State, resumable
from replicate.sampling.annealed import ScoreAtLevel
from replicate.sampling.langevin import Chain, langevin_step, standard_normal_like
from replicate.score_based.diffusion import DiffusionModel, LevelProposal, Weighting, level_range
from replicate.score_based.ncsn import NCSN
from replicate.score_based.networks import NoiseNet
from replicate.score_based.unet import NoiseUNet, zeroed
from replicate.sde import SDE, VE, VP, SubVP

#: noise over signal at the start of every SDE, in units of y; that of the papers' VP is 1e-3
FIRST_RHO = 2e-4


def first_time(sde: SDE, rho: float) -> float:
    """Return the time at which noise over signal is rho."""
    return float(sde.time_of(torch.tensor(math.log(rho), dtype=torch.float64)))


SDES: dict[str, SDE] = {
    "vp": VP(t_min=first_time(VP(), FIRST_RHO)),
    "subvp": SubVP(t_min=first_time(SubVP(), FIRST_RHO)),
    "ve": VE(FIRST_RHO, 50.0),
}


# -- models


def build_diffusion(
    info: DataInfo, sde: SDE, proposal: LevelProposal, weighting: Weighting, sample_steps: int, **network: Any
) -> DiffusionModel:
    """Build the suite's diffusion model with a U-Net; `network` are the settings of `NoiseUNet`."""
    return DiffusionModel(_unet(info, network), info.dim, sde, proposal, weighting, sample_steps)


def even_levels(sde: SDE) -> LevelProposal:
    """Return levels that are even in log rho: times in proportion to g^2 / sigma^2 (2101.09258, section 5.1)."""
    return LevelProposal(*level_range(sde), location=0.0, scale=1.0, uniform=1.0)


def build_ncsn(
    info: DataInfo,
    sigma_max: float,
    sigma_min: float,
    levels: int,
    steps_per_level: int,
    step_size: float,
    **network: Any,
) -> NCSN:
    """Build the suite's NCSN with a U-Net, without the denoising step; `network` are the settings of `NoiseUNet`."""
    net = _unet(info, network)
    return NCSN(net, info.dim, sigma_max, sigma_min, levels, steps_per_level, step_size, denoise=False)


def _unet(info: DataInfo, network: dict[str, Any]) -> NoiseNet:
    """Return a U-Net in the place of the MLP: the models use its call and its Gaussian fit alone."""
    assert info.image is not None
    assert info.levels is not None
    return cast(NoiseNet, NoiseUNet(info.image, spacing=2 / info.levels, **network))


# -- dequantisation


class VariationalDequantiser(nn.Module):
    """q(u | x) on (0, 1)^D with an exact log density: logistic noise, affine couplings, then the sigmoid.

    Each coupling moves the pixels of one colour of a checkerboard by a scale and a shift that a small convolutional
    network computes from the pixels of the other colour and from x. Before training it is the uniform distribution,
    since the sigmoid of logistic noise is uniform. Positions in the flow are float64, its networks are not.

    Args:
        image: height and width.
        levels: L.
        channels: of the networks.
        couplings: number of them.
    """

    #: bound on the log of a coupling's scale
    LARGEST = 2.0

    def __init__(self, image: tuple[int, int], levels: int, channels: int = 32, couplings: int = 4) -> None:
        super().__init__()
        self.image, self.levels = image, levels
        rows, columns = torch.arange(image[0])[:, None], torch.arange(image[1])
        board = ((rows + columns) % 2).double().flatten()
        self.colours: Tensor = nn.Buffer(torch.stack([board, 1 - board]))
        self.nets = nn.ModuleList(_coupling_net(channels) for _ in range(couplings))

    def sample(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw one u (n, D) for each row of integers x (n, D); return it and log q(u | x) in nats (n,), float64."""
        uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
        a = torch.logit(uniform.clamp_min(2.0**-54))
        log_q = log_logistic(a).sum(-1)
        for i in range(len(self.nets)):
            log_scale, shift = self._affine(i, a, x)
            a = a * log_scale.exp() + shift
            log_q = log_q - log_scale.sum(-1)
        return torch.sigmoid(a), log_q - log_logistic(a).sum(-1)  # du / da = sigmoid' = the logistic density

    def log_prob(self, u: Tensor, x: Tensor) -> Tensor:
        """Return log q(u | x) in nats (n,) of u (n, D), float64, by the inverse flow."""
        a = torch.logit(u.double())
        log_q = -log_logistic(a).sum(-1)
        for i in reversed(range(len(self.nets))):
            log_scale, shift = self._affine(i, a, x)
            a = (a - shift) * (-log_scale).exp()
            log_q = log_q - log_scale.sum(-1)
        return log_q + log_logistic(a).sum(-1)

    def _affine(self, i: int, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (log scale, shift) (n, D) of coupling i, 0 on the pixels that it reads."""
        read = self.colours[i % 2]
        seen = torch.stack([torch.tanh(0.25 * read * a), 2 * x.double() / (self.levels - 1) - 1], dim=1)
        weight = next(self.nets[i].parameters())
        raw, shift = self.nets[i](seen.unflatten(2, self.image).to(weight.dtype)).double().flatten(2).unbind(1)
        log_scale = self.LARGEST * torch.tanh(raw / self.LARGEST)
        return log_scale * (1 - read), shift * (1 - read)


def _coupling_net(channels: int) -> nn.Sequential:
    last = zeroed(nn.Conv2d(channels, 2, 3, padding=1))  # a coupling starts as the identity
    inner = [nn.Conv2d(2, channels, 3, padding=1), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*inner, last)


def log_logistic(a: Tensor) -> Tensor:
    """Return the log density of the standard logistic distribution, elementwise."""
    return F.logsigmoid(a) + F.logsigmoid(-a)


class ScaledLevels(nn.Module):
    """The map y = 2 (x + u) / L - 1, in the place of the comparison's maps to (0, 1)^D and to Gaussian marginals.

    Args:
        levels: L.
        dequantiser: of u; None draws it uniformly.
    """

    def __init__(self, levels: int, dequantiser: VariationalDequantiser | None = None) -> None:
        super().__init__()
        self.levels, self.dequantiser = levels, dequantiser

    def fit(self, train: Tensor, generator: torch.Generator) -> None:
        """Do nothing: the map is fixed."""

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Map integers x (n, D) to (y (n, D), log |det dy/dx| - log q(u | x) (n,)) with a fresh draw of u."""
        if self.dequantiser is None:
            u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float64)
            log_q = u.new_zeros(len(x))
        else:
            u, log_q = self.dequantiser.sample(x, generator)
        y = 2 * (x.double() + u) / self.levels - 1
        return y.to(x.dtype), (x.shape[1] * math.log(2 / self.levels) - log_q).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Map y (n, D) to integers 0..L-1 (n, D)."""
        return ((y.double() + 1) / 2 * self.levels).floor().clamp(0, self.levels - 1).to(y.dtype)


class DequantisedImages(Preprocessed):
    """A model of y with uniform u; the estimators of `replicate.likelihood` take it as any preprocessed model."""

    def __init__(self, inner: DiffusionModel | NCSN, info: DataInfo) -> None:
        super().__init__(inner, info)
        assert info.levels is not None
        self.transform = ScaledLevels(info.levels)  # type: ignore[assignment]  # the same three methods

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Fit the Gaussian on the CPU, so that its eigenvectors are the same on every device."""
        y, _ = self.transform(train, generator)
        self.inner.initialise(y.cpu(), generator)


class LearnedDequantisation(DequantisedImages):
    """Training of q(u | x) for a diffusion model that is trained and does not change any more.

    The loss is the part of the bound on -log P(x) that depends on u: the integral of E|eps - z|^2 over log rho plus
    log q. It leaves out the bound's two end terms, which hardly depend on u.
    """

    def __init__(self, inner: DiffusionModel, info: DataInfo, channels: int = 32, couplings: int = 4) -> None:
        super().__init__(inner, info)
        assert info.image is not None
        assert info.levels is not None
        inner.requires_grad_(False)
        dequantiser = VariationalDequantiser(info.image, info.levels, channels, couplings)
        self.transform = ScaledLevels(info.levels, dequantiser)  # type: ignore[assignment]

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Do nothing: the score model keeps its fit."""

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        y, log_volume = self.transform(batch, generator)
        return self.inner.validation_loss(y, generator) - log_volume.mean()

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return self.loss(batch, generator)


# -- inpainting


@torch.no_grad()
def inpaint(
    score_at: ScoreAtLevel,
    sigmas: Tensor,
    observed: Tensor,
    known: Tensor,
    start: Tensor,
    steps_per_level: int,
    step_size: float,
    generator: torch.Generator,
) -> Chain:
    """Run annealed Langevin dynamics with the known pixels pasted in: algorithm 2 of Song and Ermon 2019 (1907.05600).

    The noise of the known part is drawn once per level and pasted after every step, as printed and in the paper's code;
    the replication of that paper compares this with a draw at every step. At the end the known part is `observed` plus
    the last level's noise.

    Args:
        score_at, sigmas: as for `annealed_langevin`.
        observed: shape (n, D), of which only the known columns matter.
        known: which columns are known, shape (D,), bool.
        start: starting states, shape (n, D).
        steps_per_level, step_size, generator: as for `annealed_langevin`.

    Example:
        Two pixels that are always equal; the known one is 3, and the other follows it:

        >>> def score(x, sigma):
        ...     covariance = torch.ones(2, 2) * 25 + torch.eye(2) * float(sigma[0]) ** 2
        ...     return -x @ torch.linalg.inv(covariance)
        >>> observed, known = torch.full((500, 2), 3.0), torch.tensor([True, False])
        >>> g, sigmas = torch.Generator().manual_seed(0), torch.logspace(1, -1, 10)
        >>> chain = inpaint(score, sigmas, observed, known, torch.zeros(500, 2), 30, 0.005, g)
        >>> round(float(chain.samples[:, 1].mean()), 1)
        3.0
    """
    levels = [float(s) for s in sigmas]
    state: State = {"x": start, "pasted": observed, "generator": generator}
    steps = len(levels) * steps_per_level
    for step in resumable("inpainting", steps, state):
        level, x = levels[step // steps_per_level], state["x"]
        if step % steps_per_level == 0:
            state["pasted"] = observed + level * standard_normal_like(observed, generator)
            x = torch.where(known, state["pasted"], x)
        alpha = step_size * (level / levels[-1]) ** 2
        score = score_at(x, x.new_full((len(x),), level))
        x = langevin_step(x, score, alpha, standard_normal_like(x, generator))
        state["x"] = torch.where(known, state["pasted"], x)
    return Chain(state["x"], None, nfe=steps)
