"""MAF: a flow of autoregressive steps, each a masked network with the order of the one before turned round.

Followed: Papamakarios, Pavlakou and Murray 2017, Masked autoregressive flow for density estimation, 1705.07057, and its
released code: rectified units whose degrees run through 1 .. D - 1 in turn, or lie evenly there where the units are
fewer (the code draws them), the dimensions first in their given order.
One block is MADE with a Gaussian for each conditional, the paper's own baseline.

Deviations:
    - An actnorm (Kingma, Dhariwal 2018, 1807.03039) stands behind each block where the paper has batch normalisation,
      which makes the density of a training example depend on its batch mates.
    - Every block starts as the identity, and the log scales lie between -bound and bound.
    - Decoupled weight decay in place of a penalty in the loss.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.flow import Flow, Layer
from baselines.image_flow import ActNorm
from baselines.layers import dropout
from baselines.made import MaskedLinear, build_masks
from replicate.model import DataInfo, ModelEntry, Training


class MaskedNet(nn.Module):
    """Shift and raw log scale of each dimension, functions of the dimensions before it.

    The last layer starts at zero.

    Args:
        dim: D.
        hidden: units of a layer.
        layers: hidden layers, at least 1.
        rate: of dropout, in training only.
        reach: r, where the network sees r tanh(x / r): what it answers far from all data is what it answers at r; 0 for
            x as it is.
    """

    def __init__(self, dim: int, hidden: int, layers: int, rate: float, reach: float = 0.0) -> None:
        super().__init__()
        self.rate, self.reach = rate, reach
        most = max(1, dim - 1)
        degrees = torch.arange(hidden) % most if hidden >= most else torch.arange(hidden) * most // hidden
        *below, last, _ = build_masks(torch.arange(dim)[None], degrees.expand(1, layers, -1), size=2)
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in below)
        self.last = MaskedLinear(last)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (shift (n, D), raw log scale (n, D)); dropout only where a generator is given."""
        h = self.reach * torch.tanh(x / self.reach) if self.reach else x
        for layer in self.hidden:
            h = dropout(F.relu(layer(h, 0)), self.rate, generator)
        shift, raw = self.last(h, 0).unflatten(1, (-1, 2)).unbind(-1)
        return shift, raw


class Autoregression(Layer):
    """y_i = (x_i - m_i) exp(-a_i), m_i and a_i functions of x_1 .. x_{i-1} (1705.07057, eq. 4 turned round).

    Args:
        net: gives m and a.
        bound: of |a|.
    """

    def __init__(self, net: MaskedNet, bound: float) -> None:
        super().__init__()
        self.net, self.bound = net, bound

    def _parameters_at(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        shift, raw = self.net(x, generator)
        return shift, self.bound * torch.tanh(raw / self.bound)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        shift, a = self._parameters_at(x, generator)
        return (x - shift) * torch.exp(-a), -a.sum(-1)

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """One pass of the network for each dimension."""
        x = torch.zeros_like(y)
        for i in range(y.shape[1]):
            shift, a = self._parameters_at(x)
            x[:, i] = y[:, i] * a[:, i].exp() + shift[:, i]
        return x


class Reverse(Layer):
    """The dimensions in the opposite order."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y.flip(1)


def build_maf(
    info: DataInfo,
    blocks: int = 5,
    hidden: int = 128,
    layers: int = 2,
    dropout: float = 0.0,
    bound: float = 5.0,
    reach: float = 0.0,
) -> Flow:
    """Build blocks of autoregression and actnorm, the dimensions reversed between them.

    Args:
        info: continuous data.
        blocks: how many; 1 is MADE.
        hidden, layers, dropout, reach: see `MaskedNet`.
        bound: see `Autoregression`.

    Example:
        Before training it is the data's Gaussian fit, whose NLL on N(3, 4 I) is 2/2 log(2 pi e 4) = 4.224 nats:

        >>> g = torch.Generator().manual_seed(0)
        >>> x = 3 + 2 * torch.randn(2000, 2, generator=g)
        >>> flow = build_maf(DataInfo(2, "continuous"), blocks=2, hidden=8)
        >>> flow.initialise(x, g)
        >>> round(float(-flow.log_prob(x).detach().mean()), 1)
        4.2
    """
    made: list[Layer] = []
    for block in range(blocks):
        made += [Reverse()] if block else []
        made += [Autoregression(MaskedNet(info.dim, hidden, layers, dropout, reach), bound), ActNorm(info.dim, sides=0)]
    flow = Flow(info.dim, made)
    flow.nfe = info.dim * blocks
    return flow


MAF = ModelEntry(
    family="flow",
    about="masked autoregressive flow, affine conditionals",
    paper="Papamakarios, Pavlakou, Murray 2017, 1705.07057",
    build=build_maf,
    domains=frozenset({"continuous"}),
    params={"blocks": 5, "hidden": 128, "layers": 2, "dropout": 0.1, "bound": 5.0},
    training=Training(
        steps=1500, batch_size=256, lr=1e-3, warmup=100, weight_decay=0.01, grad_clip=20.0, ema=0.99, validate_every=100
    ),
    overrides={
        "red-wine": {"dropout": 0.2, "weight_decay": 0.1, "batch_size": 100, "lr": 2e-3},
        # rows ten and more standard deviations away, where a network left to itself continued to 1e13 nats
        "white-wine": {"weight_decay": 0.1, "batch_size": 128, "lr": 2e-3, "steps": 2000, "reach": 4.0},
        "parkinsons": {"dropout": 0.0, "reach": 4.0},
    },
)
