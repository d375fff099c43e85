"""Convolutional energies of images: short-run Langevin chains from noise or from a replay buffer, and one with log Z.

Nijkamp, Hill, Zhu and Wu 2019, Learning non-convergent non-persistent short-run MCMC toward energy-based model,
1904.09770: chains of K steps from uniform noise, the released minimal code's network (a 3x3 convolution, then 4x4 ones
of stride 2 that double the channels), data with a little noise. Du and Mordatch 2019, Implicit generation and modeling
with energy-based models, 1903.08689: a replay buffer of chains, of which a share starts again from noise at each
update, and a penalty on the square of the energies. One restart probability tells the two apart: 1 is the first paper.

Temperature. The released update of 1904.09770 is x <- x + grad f(x) + 0.01 z: Langevin for exp(f / T) with T = 5e-5,
which no one calls the model. Here the network is the folded energy u = (eps / 2) U, as in Nijkamp et al. 2020
(1903.12370), so that U itself, at temperature 1 unless said, is the energy that the chains follow, in nats:

    x <- x - (eps / 2T) grad U(x) + sqrt(eps) z.

Deviations: SiLU in place of leaky ReLU, for a smooth score; the last layer starts at zero; Adam with decoupled weight
decay against growth of the weights (1903.08689 normalises them spectrally); noise starts uniform over the range of the
training data, whatever their units.

`TiltedConvEBM` is the variant whose likelihood can be had. A short run's energy need not have a finite Z at all; this
one tilts a Gaussian fitted to the data (Xie et al. 2016, 1602.03264), its chains are Metropolis-adjusted and never
restarted, and log Z is annealed from the Gaussian: all that is `baselines.ebm.NeuralEBM` with a convolutional tilt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from baselines.ebm import NeuralEBM, NeuralSettings
from replicate.model import DataInfo, Family, Model, ModelEntry, Training


def image_of(info: DataInfo) -> tuple[int, int]:
    """Height and width of the data.

    Raises:
        ValueError: the data are not images.
    """
    if info.image is None:
        raise ValueError("a convolutional energy needs images; use neural-ebm for data without rows and columns")
    return info.image


def conv_net(image: tuple[int, int], width: int, layers: int) -> nn.Sequential:
    """Map x (n, H W) to (n, 1): a 3x3 convolution, 4x4 ones of stride 2, and a linear layer that starts at 0.

    Args:
        image: (H, W).
        width: channels of the first layer; each of the following doubles them.
        layers: convolutions of stride 2, three in the released code; fewer where one pixel is left before.
    """
    height, columns = image
    blocks: list[nn.Module] = [nn.Unflatten(1, (1, height, columns)), nn.Conv2d(1, width, 3, padding=1), nn.SiLU()]
    for _ in range(layers):
        if min(height, columns) > 1:
            blocks += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.SiLU()]
            height, columns, width = height // 2, columns // 2, 2 * width
    head = nn.Linear(width * height * columns, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*blocks, nn.Flatten(), head)


class PixelScale(nn.Module):
    """a_d x_d + b_d with trainable a and b: pixels standardised one by one do not mean the same everywhere."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D)."""
        return self.scale * x + self.shift


def langevin(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int,
    step_size: float,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Return x (n, D) after unadjusted steps x <- x - (eps / 2T) grad U(x) + sqrt(eps) z, detached.

    On U = |x|^2 / 2 s^2 its stationary variance is T s^2 / (1 - eps / (4 T s^2)).

    Args:
        energy: U, (n, D) -> (n,), in nats.
        step_size: eps, in squared units of x.
        temperature: T.
    """
    x = x.detach()
    for _ in range(steps):
        with torch.enable_grad():
            at = x.requires_grad_(True)
            (slope,) = torch.autograd.grad(energy(at).sum(), at)
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x.detach() - step_size / (2 * temperature) * slope + step_size**0.5 * z
    return x


@dataclass(frozen=True)
class ConvSettings:
    """Settings of `ConvEBM`.

    Attributes:
        width, layers: of `conv_net`.
        chains: in the replay buffer, at least the batch's size.
        steps: K, Langevin steps before each update.
        langevin_sd: sqrt(eps), standard deviation of a step's noise; the papers' 0.01 is for data in [-1, 1].
        restart: probability that a chain starts again from uniform noise before its steps; at 1 nothing persists.
        temperature: T of the chains.
        noise: standard deviation of what is added to the data in training.
        penalty: on the mean squares of u at data and at chains, in u's own unit. It keeps the two less than 1 / penalty
            apart, which must be more than a chain falls on its way from noise: 0.1 is too much for 28x28 pixels.
    """

    width: int = 32
    layers: int = 3
    chains: int = 1000
    steps: int = 50
    langevin_sd: float = 0.01
    restart: float = 0.05
    temperature: float = 1.0
    noise: float = 0.03
    penalty: float = 0.001


class ConvEBM(Model):
    """exp(-U(x)), U = (2 / eps) u(x), learned from the ends of short chains; nothing says that it can be normalised.

    Args:
        info: images; `langevin_sd` and `noise` are in the data's units.
        s: see `ConvSettings`.
    """

    family: ClassVar[Family] = "ebm"
    capabilities = frozenset({"energy", "score", "sample"})
    replay: Tensor
    limits: Tensor

    def __init__(self, info: DataInfo, s: ConvSettings) -> None:
        super().__init__()
        if not 0 < s.restart <= 1:
            raise ValueError(f"restart is {s.restart}; it must be a probability above 0, or a chain never sees noise")
        self.steps, self.step_size, self.restart = s.steps, s.langevin_sd**2, s.restart
        self.temperature, self.noise, self.penalty = s.temperature, s.noise, s.penalty
        #: a chain of the buffer has seen this many steps on average since it was noise
        self.nfe = round(s.steps / s.restart)
        self.u = conv_net(image_of(info), s.width, s.layers)
        self.register_buffer("replay", torch.zeros(s.chains, info.dim))
        self.register_buffer("limits", torch.tensor([-1.0, 1.0]))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Read the data's range and start every chain as noise."""
        self.limits.copy_(torch.stack(train.aminmax()))
        self.replay.copy_(self.start(len(self.replay), generator))

    def start(self, n: int, generator: torch.Generator) -> Tensor:
        """Uniform noise over the range of the training data, (n, D)."""
        shape = (n, self.replay.shape[1])
        u = torch.rand(shape, generator=generator, device=self.limits.device, dtype=self.limits.dtype)
        return torch.lerp(self.limits[0], self.limits[1], u)

    def folded(self, x: Tensor) -> Tensor:
        """u(x) = (eps / 2) U(x), the network, (n,)."""
        out: Tensor = self.u(x)
        return out.squeeze(1)

    def energy(self, x: Tensor) -> Tensor:
        return 2 / self.step_size * self.folded(x)

    def run(self, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """Return x (n, D) after so many Langevin steps at the model's temperature."""
        return langevin(self.energy, x, steps, self.step_size, generator, self.temperature)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean u of data minus that of as many chains after K steps, and the penalty."""
        order = torch.randperm(len(self.replay), generator=generator, device=batch.device)[: len(batch)]
        again = torch.rand(len(order), generator=generator, device=batch.device) < self.restart
        fresh = self.start(len(order), generator)
        x = torch.where(again[:, None], fresh, self.replay[order])
        moved = self.run(x, self.steps, generator)
        self.replay[order] = moved
        z = torch.randn(batch.shape, generator=generator, device=batch.device, dtype=batch.dtype)
        data, negatives = self.folded(torch.cat([batch + self.noise * z, moved])).split([len(batch), len(moved)])
        return data.mean() - negatives.mean() + self.penalty * (data.square().mean() + negatives.square().mean())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Run chains from noise for the mean age of the buffer's chains and return their ends, (n, D)."""
        return self.run(self.start(n, generator), self.nfe, generator)


class TiltedConvEBM(NeuralEBM):
    """p(x) = p0(x) exp(-g(x)) / Z with a Gaussian p0 and a convolutional g.

    Args:
        info: images, each pixel of unit scale.
        width, layers: of `conv_net`.
        settings: of `NeuralEBM`: prior, inflation, chains, moves, sweeps, check.
    """

    def __init__(self, info: DataInfo, width: int = 8, layers: int = 2, **settings: Any) -> None:
        # no proposals from p0, which is never right in many dimensions; the perceptron is replaced
        super().__init__(info, NeuralSettings(hidden=1, layers=1, jump=0.0, **settings))
        self.g = nn.Sequential(PixelScale(info.dim), conv_net(image_of(info), width, layers))


CONV_EBM = ModelEntry(
    family="ebm",
    about="convolutional energy tilting a Gaussian base, persistent Langevin negatives",
    paper="Du and Mordatch 2019, 1903.08689; Nijkamp et al. 2019, 1904.09770",
    build=TiltedConvEBM,
    domains=frozenset({"continuous"}),
    needs_image=True,
    params={"width": 8, "layers": 2, "inflation": 1.02, "chains": 128, "moves": 2, "check": (100, 100)},
    training=Training(steps=1500, batch_size=128, lr=5e-3, weight_decay=0.1, ema=0.99, validate_every=500),
)
