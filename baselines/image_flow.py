"""Multi-scale flows of images: RealNVP, Glow, and Glow's steps with rational-quadratic spline couplings.

Papers:
    [1] Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017, arXiv:1605.08803.
    [2] Kingma, Dhariwal: Glow, 2018, arXiv:1807.03039.
    [3] Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, arXiv:1906.04032.

A scale is a squeeze from (C, H, W) to (4C, H/2, W/2) and `depth` steps, each an actnorm, a mixing of the channels and a
coupling; then half of the channels leave for the prior and the other half goes on to the next scale ([1] section 3.6).
28 x 28 pixels are squeezed to 14 x 14 and 7 x 7: nothing is padded, and log p is that of the pixels given.

Deviations:
    - [1] takes checkerboard couplings before the squeeze and channel-wise ones behind it. A checkerboard of an image is
      half of the channels behind a squeeze, so that both are couplings of channels here, at half the resolution.
    - Actnorm ([2] section 3.1) where [1] has batch normalisation, which makes a density depend on its batch mates.
    - The prior is standard normal. [2] gives what leaves at a scale a mean and a deviation from what stays; the last
      coupling before does the same.
    - The conditioners are residual networks in all three; [2] has two hidden layers of 512 channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.flow import Flow, Layer, Shape, Transform, transform_of
from baselines.layers import dropout, from_settings
from replicate.model import DataInfo, ModelEntry, Training

#: training images that the actnorms are initialised from
INITIAL = 1_024
#: the pixels of a 2 x 2 square in the order of the channels that a squeeze makes: the first two are one colour of the
#: checkerboard, the first and the third one row
SQUARE = ((0, 0), (1, 1), (0, 1), (1, 0))
#: orders of the four blocks of channels behind a squeeze
SWAPPED, BY_ROWS = (2, 3, 0, 1), (0, 2, 1, 3)


# --- layers of (n, C, H, W), each with log |det| of shape (n,) --------------------------------------------------------


class Squeeze(Layer):
    """(n, C, H, W) -> (n, 4C, H/2, W/2): the pixels of every 2 x 2 square become channels ([1] section 3.6)."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return torch.cat([x[:, :, r::2, c::2] for r, c in SQUARE], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        n, channels, height, width = y.shape
        x = y.new_empty(n, channels // 4, 2 * height, 2 * width)
        for (r, c), part in zip(SQUARE, y.chunk(4, 1), strict=True):
            x[:, :, r::2, c::2] = part
        return x


class ActNorm(Layer):
    """y = exp(s) (x + b), one s and b a channel, which start so that y has mean 0 and deviation 1 ([2] section 3.1).

    Args:
        channels: C.
        sides: of the images behind the channels; 0 for vectors (n, C).
    """

    def __init__(self, channels: int, sides: int = 2) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, *[1] * sides))
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * sides))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), 1)
        self.bias.copy_(-mean.view_as(self.bias))
        self.log_scale.copy_(-std.clamp_min(1e-6).log().view_as(self.bias))  # a channel may be constant

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        places = x[0, 0].numel()
        return (x + self.bias) * self.log_scale.exp(), (places * self.log_scale.sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * torch.exp(-self.log_scale) - self.bias


class Reorder(Layer):
    """The four blocks of channels behind a squeeze in another order, which stays as it is.

    Args:
        order: block i of y is block order[i] of x.
    """

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        blocks = x.chunk(4, 1)
        return torch.cat([blocks[i] for i in self.order], 1), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        blocks = y.chunk(4, 1)
        return torch.cat([blocks[self.order.index(i)] for i in range(4)], 1)


class Conv1x1(Layer):
    """y = W x over the channels of each pixel, W = P L (U + diag(exp(s))) with signs, log |det W| = sum s ([2] eq. 10).

    P and the signs are those of a random rotation's decomposition and stay; L, U and s start there.

    Args:
        channels: C.
    """

    permutation: Tensor
    sign: Tensor
    identity: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.float())
        self.upper = nn.Parameter(upper.float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.register_buffer("identity", torch.eye(channels))

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + self.identity
        upper = self.upper.triu(1) + (self.sign * self.log_diagonal.exp()).diag()
        return lower, upper

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        weight = self.permutation @ lower @ upper
        logdet = x.shape[2] * x.shape[3] * self.log_diagonal.sum()
        return F.conv2d(x, weight[:, :, None, None]), logdet.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self._factors()
        rows = self.permutation.T @ y.flatten(2)
        rows = torch.linalg.solve_triangular(lower, rows, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, rows, upper=True).view_as(y)


class ResidualBlock(nn.Module):
    """h + dropout(1x1 conv(relu(3x3 conv(relu(h)))))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.rate = shape.dropout
        self.wide = nn.Conv2d(shape.hidden, shape.hidden, 3, padding=1)
        self.mix = nn.Conv2d(shape.hidden, shape.hidden, 1)

    def forward(self, h: Tensor, generator: torch.Generator | None) -> Tensor:
        inner = self.mix(F.relu(self.wide(F.relu(h))))
        return h + dropout(inner, self.rate, generator)


class ResNet(nn.Module):
    """From the kept channels to the parameters of a coupling; the last layer starts at zero.

    Args:
        inputs, outputs: channels.
        shape: of the network; its `sharpness` is for vectors and is not used.
        places: (H, W) where every place has biases of its own, which start at zero; None for none.
    """

    def __init__(self, inputs: int, outputs: int, shape: Shape, places: tuple[int, int] | None) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, shape.hidden, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(shape.hidden, *places)) if places else None
        self.blocks = nn.ModuleList(ResidualBlock(shape) for _ in range(shape.blocks))
        self.last = nn.Conv2d(shape.hidden, outputs, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map x (n, inputs, H, W) to (n, outputs, H, W); dropout only where a generator is given."""
        h = self.first(x)
        if self.position is not None:
            h = h + self.position
        for block in self.blocks:
            h = block(h, generator)
        return self.last(F.relu(h))


class ImageCoupling(Layer):
    """The first half of the channels passes unchanged and decides how the second half moves.

    Args:
        channels: C.
        transform: of a moved value.
        shape, places: of the conditioner, see `ResNet`.
    """

    def __init__(
        self, channels: int, transform: Transform, shape: Shape, places: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.transform = transform
        self.resnet = ResNet(channels // 2, channels // 2 * transform.size, shape, places)

    def _of(self, kept: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Parameters (n, C/2, H, W, size) from the kept channels (n, C/2, H, W)."""
        return self.resnet(kept, generator).unflatten(1, (-1, self.transform.size)).movedim(2, -1)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, 1)
        y, logdet = self.transform.forward(moved.contiguous(), self._of(kept, generator))
        return torch.cat([kept, y], 1), logdet.flatten(1).sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        kept, moved = y.chunk(2, 1)
        return torch.cat([kept, self.transform.inverse(moved.contiguous(), self._of(kept))], 1)


# --- the model -------------------------------------------------------------------------------------------------------


class ImageFlow(Flow):
    """From images to a standard normal of as many dimensions.

    Args:
        image: (height, width).
        scales: the layers of each scale, in the order in which they are applied to images (n, 1, height, width). Half
            of the channels leaves after every scale but the last.
    """

    costly_score = True
    scales: Sequence[Sequence[Layer]]

    def __init__(self, image: tuple[int, int], scales: Sequence[Sequence[Layer]]) -> None:
        super().__init__(image[0] * image[1], ())  # its layers stand in the scales
        self.image = image
        self.scales = cast(Sequence[Sequence[Layer]], nn.ModuleList(nn.ModuleList(layers) for layers in scales))

    @torch.no_grad()
    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Actnorms from the first images of a random order."""
        chosen = torch.randperm(len(train), generator=generator, device=train.device)[:INITIAL]
        h = train[chosen].view(-1, 1, *self.image)
        for layers in self.scales:
            for layer in layers:
                layer.initialise(h)
                h, _ = layer(h)
            h, _ = h.chunk(2, 1)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (z (n, D), log |det dz/dx| (n,)); what leaves first comes first in z."""
        h, total = x.view(-1, 1, *self.image), x.new_zeros(len(x))
        left: list[Tensor] = []
        for scale, layers in enumerate(self.scales):
            for layer in layers:
                h, logdet = layer(h, generator)
                total = total + logdet
            if scale + 1 < len(self.scales):
                h, leaving = h.chunk(2, 1)
                left.append(leaving.flatten(1))
        return torch.cat([*left, h.flatten(1)], 1), total

    def inverse(self, z: Tensor) -> Tensor:
        last = len(self.scales) - 1
        halves = [self.dim // 2 ** (scale + 1) for scale in range(last)]
        *left, rest = z.split([*halves, self.dim // 2**last], 1)
        height, width = (side // 2 ** (last + 1) for side in self.image)
        h = rest.view(len(z), -1, height, width)
        for scale, layers in reversed(list(enumerate(self.scales))):
            if scale < last:
                h = torch.cat([h, left[scale].view_as(h)], 1)
            for layer in reversed(layers):
                h = layer.inverse(h)
        return h.flatten(1)


def mixing(permutation: str, channels: int, depth: int) -> list[list[Layer]]:
    """Return the layers before the coupling of each step of a scale.

    "mask": the two colours of the checkerboard take turns, then the two rows of its squares. "conv1x1": learned.

    Raises:
        ValueError: no such permutation.
    """
    if permutation == "conv1x1":
        return [[Conv1x1(channels)] for _ in range(depth)]
    if permutation == "mask":
        made: list[list[Layer]] = [[]]
        made += [[Reorder(BY_ROWS if step == (depth + 1) // 2 else SWAPPED)] for step in range(1, depth)]
        return made
    raise ValueError(f"permutation is {permutation!r}; it must be 'mask' or 'conv1x1'")


@dataclass(frozen=True)
class ImageFlowSettings:
    """Settings of an image flow.

    Attributes:
        coupling: "affine" with log scales between -bound and bound, or "spline" with so many bins on [-bound, bound].
        permutation: see `mixing`.
        scales: at most; no more than the sides of the image can be halved.
        depth: steps a scale.
        hidden, blocks, dropout: see `Shape`.
        positions: the conditioners know where in the image they are.
    """

    coupling: str
    permutation: str
    scales: int = 2
    depth: int = 4
    hidden: int = 32
    blocks: int = 1
    dropout: float = 0.0
    positions: bool = False
    bound: float = 4.0
    bins: int = 8


def build(info: DataInfo, s: ImageFlowSettings) -> ImageFlow:
    """Build an image flow.

    Raises:
        ValueError: the data are not images of even sides, or an option has an unknown value.

    Example:
        Before training it is the data's Gaussian fit, whose NLL on N(3, 4 I) is 4/2 log(2 pi e 4) = 8.448 nats:

        >>> g = torch.Generator().manual_seed(0)
        >>> x = 3 + 2 * torch.randn(2000, 4, generator=g)
        >>> flow = build(DataInfo(4, "continuous", image=(2, 2)), ImageFlowSettings("affine", "mask", depth=2))
        >>> flow.initialise(x, g)
        >>> round(float(-flow.log_prob(x).detach().mean()), 1)
        8.5
    """
    transform = transform_of(s.coupling, s.bins, s.bound)
    if info.image is None or any(side % 2 for side in info.image):
        found = "these data are no images" if info.image is None else f"these have {info.image[0]} x {info.image[1]}"
        raise ValueError(f"an image flow needs images of even sides, and {found}; use realnvp or spline-flow")
    shape, made = Shape(s.hidden, s.blocks, s.dropout), list[list[Layer]]()
    height, width = info.image
    while len(made) < s.scales and not (height % 2 or width % 2):
        height, width, channels = height // 2, width // 2, 4 << len(made)
        places = (height, width) if s.positions else None
        layers: list[Layer] = [Squeeze()]
        for mixed in mixing(s.permutation, channels, s.depth):
            layers += [ActNorm(channels), *mixed, ImageCoupling(channels, transform, shape, places)]
        made.append(layers)
    return ImageFlow(info.image, made)


IMAGE_REALNVP = ModelEntry(
    family="flow",
    about="multi-scale flow of images, affine couplings under fixed masks",
    paper="Dinh, Sohl-Dickstein, Bengio 2017, 1605.08803",
    build=from_settings(build, ImageFlowSettings, coupling="affine", permutation="mask"),
    domains=frozenset({"continuous"}),
    params={"scales": 2, "depth": 4, "hidden": 32, "blocks": 1, "dropout": 0.2, "positions": False, "bound": 4.0},
    # sized for 8x8 digits on a CPU
    training=Training(steps=600, batch_size=100, lr=2e-3, warmup=50, grad_clip=100.0, ema=0.99, validate_every=50),
    needs_image=True,
)

GLOW = replace(
    IMAGE_REALNVP,
    about="multi-scale flow of images, affine couplings and 1x1 convolutions",
    paper="Kingma, Dhariwal 2018, 1807.03039",
    build=from_settings(build, ImageFlowSettings, coupling="affine", permutation="conv1x1"),
)

IMAGE_SPLINE_FLOW = replace(
    IMAGE_REALNVP,
    about="multi-scale flow of images, spline couplings and 1x1 convolutions",
    paper="Durkan, Bekasov, Murray, Papamakarios 2019, 1906.04032",
    build=from_settings(build, ImageFlowSettings, coupling="spline", permutation="conv1x1"),
    params={**IMAGE_REALNVP.params, "positions": True, "bins": 8},
)
