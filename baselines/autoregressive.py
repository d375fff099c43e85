"""Autoregressive models: log p(x) = sum_i log p(x_i | x_1, .., x_{i-1}), exact by construction.

Followed: Tomczak, Deep Generative Modeling (2022), chapter 2 (1-D causal convolution); van den Oord et al. 2016,
Conditional Image Generation with PixelCNN Decoders, 1606.05328 (vertical and horizontal stacks, gated units).

Deviations. Nothing is masked: what the network reads is shifted by one position, and every convolution sees only the
present and the past of its axis. Each position has a learned bias at the input and at the output, because the
dimensions of our data are not translation invariant. The 1-D network is residual, pre-activated and dilated, reads
continuous data as Fourier features and ends in a mixture of Gaussians there. In the PixelCNN the vertical stack is
residual as well, and dropout is at the gated units of the horizontal stack.

Training and sampling share one code path: a convolution with a memory of its last inputs gives, chunk by chunk, what it
gives on the whole.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.layers import dropout
from replicate.model import DataInfo, Model, ModelEntry, Training

#: the last inputs of every convolution, while a sample is drawn
Memory = dict[nn.Module, Tensor]
#: rows and columns of an image
Place = tuple[slice, slice]


class Head(Protocol):
    """A family of distributions of one number, given `size` parameters."""

    size: int

    def initial_bias(self) -> Tensor:
        """Parameters (size,) of a broad distribution on data of unit scale, the network's output before training."""

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Map parameters (n, size) and x (n,) to the log density or log mass in nats (n,)."""

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one value (n,) per row of parameters (n, size)."""


class Categorical:
    """Free probabilities of the levels 0..levels-1."""

    def __init__(self, levels: int) -> None:
        self.size = levels

    def initial_bias(self) -> Tensor:
        return torch.zeros(self.size)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return -F.cross_entropy(parameters, x.long(), reduction="none")

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.multinomial(parameters.softmax(-1), 1, generator=generator)
        return draw.squeeze(-1).to(parameters.dtype)


class GaussianMixture:
    """sum_k w_k N(x; m_k, s_k^2) with s_k > floor, so that the likelihood is bounded."""

    def __init__(self, components: int, floor: float = 1e-3) -> None:
        self.components, self.floor = components, floor
        self.size = 3 * components

    def initial_bias(self) -> Tensor:
        k = self.components
        return torch.cat([torch.zeros(k), torch.linspace(-2, 2, k), torch.full((k,), -0.7)])

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, mean, raw = parameters.chunk(3, -1)
        return logits.log_softmax(-1), mean, F.softplus(raw) + self.floor

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        log_weight, mean, std = self._split(parameters)
        z = (x[:, None] - mean) / std
        return (log_weight - std.log() - 0.5 * z.square()).logsumexp(-1) - 0.5 * math.log(2 * math.pi)

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        log_weight, mean, std = self._split(parameters)
        k = torch.multinomial(log_weight.exp(), 1, generator=generator)
        noise = torch.randn(k.shape, generator=generator, device=k.device, dtype=mean.dtype)
        return (mean.gather(1, k) + std.gather(1, k) * noise).squeeze(-1)


class FourierFeatures(nn.Module):
    """x -> (x, sin(w_j x), cos(w_j x)) with w_j = (pi / 4) 2^j; shapes (n, ..) -> (n, size, ..)."""

    frequencies: Tensor

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 4 * 2.0 ** torch.arange(octaves))
        self.size = 2 * octaves + 1

    def forward(self, x: Tensor) -> Tensor:
        angle = x.unsqueeze(-1) * self.frequencies
        return torch.cat([x.unsqueeze(-1), angle.sin(), angle.cos()], -1).movedim(-1, 1)


class Thermometer(nn.Module):
    """Level -> (1[x >= 1], .., 1[x >= levels - 1], 1); shapes (n, ..) -> (n, levels, ..).

    Levels are ordered, and neighbours share most of this code, which a one-hot code does not tell: on digits it is
    worth 0.6 nats on the test split. The constant tells the first level from the empty space around the data.
    """

    thresholds: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.arange(1, levels) - 0.5)
        self.size = levels

    def forward(self, x: Tensor) -> Tensor:
        code = F.pad((x.unsqueeze(-1) > self.thresholds).to(x.dtype), (0, 1), value=1.0)
        return code.movedim(-1, 1)


class CausalConv(nn.Module):
    """A convolution of (n, C, H, W) that sees the present and the past of one axis.

    Args:
        channels_in, channels_out: C before and after.
        kernel: (height, width); along the axis it reaches back, across it, it is centred and must be odd.
        axis: 2 (past = rows above) or 3 (past = columns to the left).
        dilation: along axis 3.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: tuple[int, int], axis: int, dilation: int = 1
    ) -> None:
        super().__init__()
        self.axis = axis
        self.reach = (kernel[axis - 2] - 1) * dilation
        padding = (0, kernel[1] // 2) if axis == 2 else (kernel[0] // 2, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, padding=padding, dilation=(1, dilation))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """Any chunk of the axis; the past is zero, or what the memory holds and then is extended by x."""
        past = None if memory is None else memory.get(self)
        if past is None:
            x = F.pad(x, (0, 0, self.reach, 0) if self.axis == 2 else (self.reach, 0))
        else:
            x = torch.cat([past, x], self.axis)
        if memory is not None:
            memory[self] = x.narrow(self.axis, x.shape[self.axis] - self.reach, self.reach)
        return self.conv(x)


def shifted(x: Tensor, axis: int) -> Tensor:
    """Return x moved by one position along an axis: zeros enter, the last position leaves."""
    return F.pad(x, (0, 0, 1, -1) if axis == 2 else (1, -1))


class Autoregressive(Model):
    """What the models of this module share: from conditionals to log p."""

    family = "autoregressive"
    head: Head

    def __init__(self, info: DataInfo, components: int, octaves: int) -> None:
        super().__init__()
        self.dim = self.nfe = info.dim
        self.embed: FourierFeatures | Thermometer
        if info.domain == "continuous":
            self.head = GaussianMixture(components)
            self.embed = FourierFeatures(octaves)
            self.capabilities = frozenset({"log_prob", "sample", "score"})
        else:
            assert info.levels is not None
            self.head = Categorical(info.levels)
            self.embed = Thermometer(info.levels)
            self.capabilities = frozenset({"log_prob", "sample"})

    def conditionals(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Head parameters (n, D, head.size); those of dimension i depend on x[:, :i] only.

        Args:
            x: (n, D).
            generator: draws the dropout masks; no dropout without it.
        """
        raise NotImplementedError

    def log_prob(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        parameters = self.conditionals(x, generator)
        return self.head.log_prob(parameters.flatten(0, 1), x.flatten()).view(x.shape).sum(-1)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean negative log-likelihood in nats, with dropout while the model is in training mode."""
        return -self.log_prob(batch, generator if self.training else None).mean()


class CausalConvBlock(nn.Module):
    """h + dropout(linear(act(conv(act(h))))) at every position."""

    def __init__(self, width: int, kernel: int, dilation: int, p: float) -> None:
        super().__init__()
        self.p = p
        self.conv = CausalConv(width, width, (1, kernel), axis=3, dilation=dilation)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor, memory: Memory | None, generator: torch.Generator | None) -> Tensor:
        inner = F.silu(self.conv(F.silu(h), memory))
        return h + dropout(self.mix(inner), self.p, generator)


class CausalConvNet(Autoregressive):
    """1-D causal convolutions over the dimensions in order (Tomczak 2022, chapter 2).

    The D dimensions are an image of height 1. Kernels are cut to D, dilations to what D positions can use.
    """

    def __init__(
        self,
        info: DataInfo,
        width: int = 64,
        layers: int = 4,
        kernel: int = 7,
        dropout: float = 0.0,
        components: int = 20,
        octaves: int = 6,
    ) -> None:
        super().__init__(info, components, octaves)
        kernel = min(kernel, info.dim)
        self.input = CausalConv(self.embed.size, width, (1, kernel), axis=3)
        self.position = nn.Parameter(0.1 * torch.randn(width, 1, info.dim))
        dilations = [2**i if 2**i * (kernel - 1) < info.dim else 1 for i in range(layers)]
        self.blocks = nn.ModuleList(CausalConvBlock(width, kernel, d, dropout) for d in dilations)
        self.output = nn.Conv2d(width, self.head.size, 1)
        self.output_bias = nn.Parameter(self.head.initial_bias()[:, None, None].repeat(1, 1, info.dim))

    def _columns(
        self, features: Tensor, start: int, memory: Memory | None, generator: torch.Generator | None
    ) -> Tensor:
        """Shifted features (n, F, 1, w) of positions start..start+w-1 -> head parameters (n, w, head.size)."""
        here = slice(start, start + features.shape[3])
        h = self.input(features, memory) + self.position[..., here]
        for block in self.blocks:
            h = block(h, memory, generator)
        return (self.output(F.silu(h)) + self.output_bias[..., here]).squeeze(2).transpose(1, 2)

    def conditionals(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._columns(shifted(self.embed(x.unsqueeze(1)), 3), 0, None, generator)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.continued(self.position.new_zeros(n, 0), generator)

    @torch.no_grad()
    def continued(self, given: Tensor, generator: torch.Generator) -> Tensor:
        """Exact draws (n, D - m) of what comes after the first m dimensions, which are given, (n, m)."""
        memory: Memory = {}
        features, drawn = self.position.new_zeros(len(given), self.embed.size, 1, 1), []
        if given.shape[1]:
            self._columns(shifted(self.embed(given.unsqueeze(1)), 3), 0, memory, None)
            features = self.embed(given[:, -1, None, None])
        for i in range(given.shape[1], self.dim):
            drawn.append(self.head.sample(self._columns(features, i, memory, None).squeeze(1), generator))
            features = self.embed(drawn[-1][:, None, None])
        return torch.stack(drawn, dim=1)


def gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels (1606.05328, eq. 2)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class VerticalLayer(nn.Module):
    """A layer of the vertical stack, which sees the rows above (1606.05328, figure 2, left)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = CausalConv(width, 2 * width, (kernel // 2 + 1, kernel), axis=2)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)

    def forward(self, v: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Rows of v (n, C, h, W) -> (its next rows, the message to the horizontal stack (n, 2 C, h, W))."""
        inner = self.conv(v, memory)
        return v + gate(inner), self.link(inner)


class HorizontalLayer(nn.Module):
    """A layer of the horizontal stack, which sees the row's left part (1606.05328, figure 2, right)."""

    def __init__(self, width: int, kernel: int, p: float) -> None:
        super().__init__()
        self.p = p
        self.conv = CausalConv(width, 2 * width, (1, kernel // 2 + 1), axis=3)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor, message: Tensor, memory: Memory | None, generator: torch.Generator | None) -> Tensor:
        """Columns of h (n, C, h, w) and the vertical stack's message there -> its next columns."""
        inner = gate(self.conv(h, memory) + message)
        return h + self.mix(dropout(inner, self.p, generator))


class GatedPixelCNN(Autoregressive):
    """2-D causal convolutions in a vertical and a horizontal stack (1606.05328), on images of levels or bits.

    Raises:
        ValueError: the data are not images.
    """

    def __init__(self, info: DataInfo, width: int = 32, layers: int = 5, kernel: int = 3, dropout: float = 0.3) -> None:
        super().__init__(info, components=0, octaves=0)
        if info.image is None:
            raise ValueError("gated-pixelcnn needs images; use causal-conv for data without rows and columns")
        self.image = height, columns = info.image
        self.p = dropout
        self.vertical_in = CausalConv(self.embed.size, width, (kernel // 2 + 1, kernel), axis=2)
        self.horizontal_in = CausalConv(self.embed.size, width, (1, kernel // 2 + 1), axis=3)
        self.vertical_position = nn.Parameter(0.1 * torch.randn(width, height, columns))
        self.horizontal_position = nn.Parameter(0.1 * torch.randn(width, height, columns))
        self.vertical = nn.ModuleList(VerticalLayer(width, kernel) for _ in range(layers))
        self.horizontal = nn.ModuleList(HorizontalLayer(width, kernel, dropout) for _ in range(layers))
        self.hidden = nn.Conv2d(width, width, 1)
        self.output = nn.Conv2d(width, self.head.size, 1)
        self.output_bias = nn.Parameter(self.head.initial_bias()[:, None, None].repeat(1, height, columns))

    def _rows(self, features: Tensor, start: int, memory: Memory | None) -> list[Tensor]:
        """Features (n, F, h, W), shifted down, of rows start.. -> what each layer tells the horizontal stack."""
        v = self.vertical_in(features, memory) + self.vertical_position[:, start : start + features.shape[2]]
        told = []
        for layer in self.vertical:
            v, message = layer(v, memory)
            told.append(message)
        return told

    def _pixels(
        self, features: Tensor, told: list[Tensor], at: Place, memory: Memory | None, generator: torch.Generator | None
    ) -> Tensor:
        """Features (n, F, h, w), shifted right, and the vertical stack's word -> head parameters (n, h * w, size)."""
        h = self.horizontal_in(features, memory) + self.horizontal_position[:, *at]
        for layer, message in zip(self.horizontal, told, strict=True):
            h = layer(h, message, memory, generator)
        h = dropout(F.silu(self.hidden(F.silu(h))), self.p, generator)
        return (self.output(h) + self.output_bias[:, *at]).flatten(2).transpose(1, 2)

    def conditionals(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        features = self.embed(x.view(-1, *self.image))
        told = self._rows(shifted(features, 2), 0, None)
        return self._pixels(shifted(features, 3), told, (slice(None), slice(None)), None, generator)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        height, width = self.image
        rows: Memory = {}
        x = self.output_bias.new_zeros(n, height, width)
        above = x.new_zeros(n, self.embed.size, 1, width)
        for r in range(height):
            told = self._rows(above, r, rows)
            columns: Memory = {}
            left = x.new_zeros(n, self.embed.size, 1, 1)
            for c in range(width):
                here = [message[..., c : c + 1] for message in told]
                parameters = self._pixels(left, here, (slice(r, r + 1), slice(c, c + 1)), columns, None)
                x[:, r, c] = self.head.sample(parameters.squeeze(1), generator)
                left = self.embed(x[:, r : r + 1, c : c + 1])
            above = self.embed(x[:, r : r + 1])
        return x.flatten(1)


#: digits: stopped on validation, on average weights
_IMAGES = {"dropout": 0.3, "batch_size": 50, "lr": 2e-3, "weight_decay": 0.1, "grad_clip": 20.0, "validate_every": 50}

#: real tables: as images, with a mixture head; fewer rows than the densities have, soon learned by heart
_TABLE = {"width": 64, "components": 10, "batch_size": 100, "lr": 4e-3, "weight_decay": 0.1, "validate_every": 50}

CAUSAL_CONV = ModelEntry(
    family="autoregressive",
    about="1-D causal convolution over the dimensions in order, softmax or mixture-of-Gaussians head",
    paper="Tomczak 2022, Deep Generative Modeling, chapter 2",
    build=CausalConvNet,
    domains=frozenset({"continuous", "levels", "bits"}),
    params={"width": 48, "layers": 2, "kernel": 7, "dropout": 0.0, "components": 16, "octaves": 6},
    training=Training(steps=650, batch_size=256, lr=8e-3, warmup=50, grad_clip=5.0, ema=0.98),
    overrides={
        "levels": {**_IMAGES, "width": 64, "layers": 3, "steps": 700},
        "bits": {**_IMAGES, "width": 32, "layers": 3, "steps": 400, "lr": 4e-3},
        "mixture-8": {"steps": 400, "lr": 6e-3, "components": 8, "octaves": 2},
        "mixture-32": {"steps": 400, "lr": 6e-3, "batch_size": 128, "components": 4, "octaves": 1},
        "mixture-64": {"steps": 400, "lr": 6e-3, "batch_size": 128, "components": 4, "octaves": 1},
        "red-wine": {**_TABLE, "octaves": 0, "dropout": 0.4, "steps": 800, "lr": 3e-3},
        "white-wine": {**_TABLE, "octaves": 0, "dropout": 0.2, "steps": 1500, "validate_every": 100},
        "parkinsons": {**_TABLE, "octaves": 2, "dropout": 0.1, "steps": 2000, "validate_every": 100},
        "mushrooms": {"steps": 1500, "dropout": 0.1, "validate_every": 100},
        "dna": {"steps": 800, "validate_every": 100},
    },
)

GATED_PIXELCNN = ModelEntry(
    needs_image=True,
    family="autoregressive",
    about="2-D causal convolution in two gated stacks, softmax head",
    paper="van den Oord et al. 2016, 1606.05328",
    build=GatedPixelCNN,
    domains=frozenset({"levels", "bits"}),
    params={"width": 32, "layers": 5, "kernel": 3, "dropout": 0.3},
    training=Training(
        steps=700, batch_size=50, lr=2e-3, warmup=50, weight_decay=0.1, grad_clip=20.0, ema=0.98, validate_every=50
    ),
    overrides={"bits": {"width": 24, "layers": 4, "steps": 300, "lr": 4e-3}},
)
