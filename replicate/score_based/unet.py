"""A small U-Net that predicts the noise in images, with the call of `networks.NoiseNet`.

After Ho et al. 2020 (2006.11239, appendix B): residual blocks with GroupNorm and SiLU at three resolutions, the noise
level added inside each block, nearest upsampling and a convolution, zero padding. Like `NoiseNet` it is the exact
answer of the data's Gaussian fit plus a learned residual, and training starts at the fit.

The network sees the image three times: centred pixels, the image denoised by the fit, and sines and cosines of the
pixels down to a period of one level, without which it cannot see the place of a pixel between two levels (Kingma et al.
2021, 2107.00630, appendix C). Each of these is damped by its expectation under the noise, as in
`networks.InputFeatures`.

Deviations: no attention and no dropout, one skip connection per resolution, and no operation that CUDA computes in
another order from call to call: nearest upsampling is a copy whose gradient is a sum.
"""

import math

import torch
from torch import Tensor, nn

from replicate.score_based.networks import GaussianFit, LevelFeatures

#: channels at each resolution, in units of the first
MULTIPLIERS = (1, 2, 4)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return GroupNorm of at most 8 groups, of 4 channels at least."""
    return nn.GroupNorm(math.gcd(8, max(1, channels // 4)), channels)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set weights and bias of a layer to 0; return it."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """The block h + conv silu norm (conv silu norm h + W level): (n, inputs, H, W), (n, E) -> (n, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.shift = nn.Linear(embedding, outputs)
        leave = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))  # the block starts as its skip connection
        self.leave = nn.Sequential(group_norm(outputs), nn.SiLU(), leave)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        inside = self.enter(h) + self.shift(level)[:, :, None, None]
        return self.skip(h) + self.leave(inside)


class Stage(nn.Module):
    """Two blocks in sequence: (n, inputs, H, W), (n, E) -> (n, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = Block(inputs, outputs, embedding), Block(outputs, outputs, embedding)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        return self.second(self.first(h, level), level)


class Upsample(nn.Module):
    """Four copies of every pixel, then a convolution: (n, inputs, H, W) -> (n, outputs, 2 H, 2 W)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        n, channels, height, width = h.shape
        wide = h[:, :, :, None, :, None].expand(n, channels, height, 2, width, 2)
        return self.conv(wide.reshape(n, channels, 2 * height, 2 * width))


class UNet(nn.Module):
    """A U-Net: images (n, inputs, H, W) and embedded noise levels (n, E) -> (n, 1, H, W); 0 before training.

    Each resolution has one stage on the way down and one on the way up, the lowest a stage and a block.
    """

    def __init__(self, inputs: int, width: int, embedding: int) -> None:
        super().__init__()
        channels = [width * m for m in MULTIPLIERS]
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        before = width
        for c in channels:
            self.down.append(Stage(before, c, embedding))
            self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1) if c != channels[-1] else nn.Identity())
            before = c
        self.middle = Block(before, before, embedding)
        for c in channels[-2::-1]:
            self.grow.append(Upsample(before, c))
            self.up.append(Stage(2 * c, c, embedding))
            before = c
        self.last = nn.Sequential(group_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, 1, 3, padding=1)))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h, passed = self.first(x), []
        for stage, shrink in zip(self.down, self.shrink, strict=True):
            passed.append(stage(h, level))
            h = shrink(passed[-1])
        h = self.middle(h, level)
        for grow, stage, skip in zip(self.grow, self.up, passed[-2::-1], strict=True):
            h = stage(torch.cat([grow(h), skip], dim=1), level)
        return self.last(h)


class PixelFeatures(nn.Module):
    """Fourier features: sin and cos of pixels, periods of 1, 2, 4, .. levels, damped by their expectation under noise.

    Args:
        octaves: number of periods.
        spacing: between neighbouring levels, in units of y.
    """

    def __init__(self, octaves: int, spacing: float) -> None:
        super().__init__()
        self.frequencies: Tensor = nn.Buffer(2 * math.pi / (spacing * 2.0 ** torch.arange(octaves)))

    def forward(self, y: Tensor, rho: Tensor) -> Tensor:
        """Map y (n, D) and rho (n, 1) to features (n, 2 octaves, D)."""
        phase = y[:, None] * self.frequencies[:, None]
        damping = (-0.5 * (rho * self.frequencies).square()).exp()[:, :, None]
        return torch.cat([phase.sin() * damping, phase.cos() * damping], dim=1)


class NoiseUNet(nn.Module):
    """The noise eps(y, log rho) in images y = x + rho z, predicted by the Gaussian fit plus a U-Net.

    The formula is that of `NoiseNet`, with its symbols: in the fit's eigenbasis, w = U'(y - m) and v = l + rho^2,

        eps = (rho / v) w + sqrt(l / v) rho / sqrt(rho^2 + width^2) U'F

    where F is the U-Net's image of unit scale.

    Args:
        image: height and width, each a multiple of 4.
        channels: of the first resolution.
        octaves: periods of the pixel features; 0 for none.
        spacing: between neighbouring levels in units of y, the shortest of these periods.
        width: the finest structure expected, in units of y.
        shrinkage: of the Gaussian fit's covariance.

    Raises:
        ValueError: the image cannot be halved twice.
    """

    def __init__(
        self,
        image: tuple[int, int],
        channels: int = 32,
        octaves: int = 6,
        spacing: float = 2 / 256,
        width: float = 5e-4,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        halved = 2 ** (len(MULTIPLIERS) - 1)
        if image[0] % halved or image[1] % halved:
            raise ValueError(f"images of {image[0]}x{image[1]} cannot be halved twice; sides must be multiples of 4")
        self.image, self.width = image, width
        self.gaussian = GaussianFit(image[0] * image[1], shrinkage)
        self.features = PixelFeatures(octaves, spacing)
        embedding = 4 * channels
        self.level = nn.Sequential(LevelFeatures(), nn.Linear(LevelFeatures.COUNT, embedding), nn.SiLU())
        self.net = UNet(2 + 2 * octaves, channels, embedding)

    def forward(self, y: Tensor, log_rho: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map y (n, D) and log_rho (n,) to eps (n, D); nothing here is random, the call alone has a generator."""
        rho = log_rho.exp()[:, None]
        w = self.gaussian.to_basis(y)
        variance = self.gaussian.variance
        total = variance + rho.square()
        gain = (variance / total).sqrt() * rho / (rho.square() + self.width**2).sqrt()
        denoised = self.gaussian.from_basis(variance / total * w)
        residual = self._unet(y, denoised, rho, log_rho) @ self.gaussian.basis
        return self.gaussian.from_basis(rho / total * w + gain * residual)

    def _unet(self, y: Tensor, denoised: Tensor, rho: Tensor, log_rho: Tensor) -> Tensor:
        """Return F (n, D); `denoised` is the fit's E[x | y] - m."""
        size = self.gaussian.variance.mean()
        noised_size = (size + rho.square()).sqrt()
        seen = torch.stack([(y - self.gaussian.mean) / noised_size, denoised / size.sqrt()], dim=1)
        seen = torch.cat([seen, self.features(y, rho)], dim=1)
        return self.net(seen.unflatten(2, self.image), self.level(log_rho)).flatten(1)
