"""MADE: an autoencoder whose masked weights leave each output the inputs before it.

Followed: Germain, Gregor, Murray and Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation,
1502.03509, and its released code: rectified units, a direct connection from inputs to outputs, orthogonal start, random
orders of the inputs, and in training one set of an order and a connectivity after the other, step by step.

Deviations. Output biases of bits start at the training marginals. Continuous data, which the paper does not have, get a
mixture of Gaussians a dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.layers import dropout
from baselines.nade import head_for, log_mean_density, marginal_logits
from replicate.model import DataInfo, Model, ModelEntry, Training


def draw_degrees(dim: int, hidden: int, layers: int) -> Tensor:
    """Degrees (layers, hidden), uniform from the least degree of the layer below to D - 2 (1502.03509, section 4.2)."""
    least, degrees = 0, []
    for _ in range(layers):
        degrees.append(torch.randint(least, max(least + 1, dim - 1), (hidden,)))
        least = int(degrees[-1].min())
    return torch.stack(degrees)


def build_masks(ranks: Tensor, degrees: Tensor, size: int) -> list[Tensor]:
    """Masks (M, outputs, inputs) of the hidden layers, the output layer and the direct connection.

    Args:
        ranks: of the inputs, (M, D).
        degrees: of the hidden units, (M, layers, hidden).
        size: outputs of a dimension.
    """
    below, masks = ranks, []
    for layer in degrees.unbind(1):
        masks.append(below.unsqueeze(1) <= layer.unsqueeze(2))
        below = layer
    outputs = ranks.repeat_interleave(size, 1).unsqueeze(2)
    return [*masks, below.unsqueeze(1) < outputs, ranks.unsqueeze(1) < outputs]


class MaskedLinear(nn.Linear):
    """A linear layer whose weights are masked by one of M sets; orthogonal start, zero biases.

    Args:
        mask: (M, outputs, inputs) of bool. It is not kept with the weights: ranks and degrees are, of which it is made.
        bias: whether there are biases.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__(mask.shape[2], mask.shape[1], bias)
        self.register_buffer("mask", mask, persistent=False)
        nn.init.orthogonal_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, which: int | Tensor) -> Tensor:  # type: ignore[override]
        """Through the masks of one set: its number, or a tensor (1,) with it, for which no GPU has to be waited for."""
        mask = self.mask[which] if isinstance(which, int) else self.mask.index_select(0, which)[0]
        return F.linear(x, self.weight * mask, self.bias)


class MaskedAutoencoder(Model):
    """log p(x) = log (1/M) sum_m p_m(x), each p_m an exact product of conditionals under one set of masks.

    A set has a rank for each input (its place in the order) and a degree for each hidden unit. A unit sees the inputs
    of rank <= degree and the units below of degree <= its own; the output of rank r sees the units of degree < r and,
    through the direct connection, the inputs of rank < r (1502.03509, eq. 12 and 13). All masks are built once.

    Args:
        info: of bits or continuous data.
        hidden: units of a layer.
        layers: hidden layers, at least 1.
        masks: M sets, drawn now; their ranks and degrees are kept with the weights.
        components: Gaussians of each continuous dimension.
        dropout: rate in the hidden layers.
    """

    family = "autoregressive"
    ranks: Tensor
    degrees: Tensor
    turn: Tensor

    def __init__(
        self,
        info: DataInfo,
        hidden: int = 500,
        layers: int = 1,
        masks: int = 1,
        components: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = self.nfe = info.dim
        self.sets, self.p, self.bits = masks, dropout, info.domain == "bits"
        self.capabilities = frozenset({"log_prob", "sample"} if self.bits else {"log_prob", "sample", "score"})
        self.head = head_for(info, components)
        self.register_buffer("ranks", torch.stack([torch.randperm(info.dim) for _ in range(masks)]))
        self.register_buffer("degrees", torch.stack([draw_degrees(info.dim, hidden, layers) for _ in range(masks)]))
        # the set of the next training step
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        *below, last, direct = build_masks(self.ranks, self.degrees, self.head.size)
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in below)
        self.output = MaskedLinear(last)
        self.direct = MaskedLinear(direct, bias=False)
        with torch.no_grad():
            self.output.bias.copy_(self.head.initial_bias().repeat(info.dim))
        self.register_load_state_dict_post_hook(lambda model, keys: model.rebuild())

    def rebuild(self) -> None:
        """Masks of the ranks and degrees that were loaded."""
        layers = [layer for layer in self.modules() if isinstance(layer, MaskedLinear)]
        for layer, mask in zip(layers, build_masks(self.ranks, self.degrees, self.head.size), strict=True):
            layer.mask.copy_(mask)

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Output biases of bits at the marginals of the training split."""
        if self.bits:
            with torch.no_grad():
                self.output.bias.copy_(marginal_logits(train))

    def conditionals(self, x: Tensor, which: int | Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Head parameters (n, D, size) under set `which`; those of a dimension depend on the inputs of lower rank only.

        Args:
            x: (n, D).
            which: 0..M-1, or a tensor (1,) with it.
            generator: draws the dropout masks; no dropout without it.
        """
        h = x
        for layer in self.hidden:
            h = dropout(F.relu(layer(h, which)), self.p, generator)
        out = self.output(h, which) + self.direct(x, which)
        return out.view(len(x), self.dim, self.head.size)

    def _log_prob_under(self, x: Tensor, which: int | Tensor, generator: torch.Generator | None = None) -> Tensor:
        parameters = self.conditionals(x, which, generator)
        return self.head.log_prob(parameters.flatten(0, 1), x.flatten()).view_as(x).sum(1)

    def log_prob_by_set(self, x: Tensor) -> Tensor:
        """Return the exact log p_m(x) of each set of masks in nats: x (n, D) -> (n, M)."""
        return torch.stack([self._log_prob_under(x, m) for m in range(self.sets)], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log of the mean density over the sets, (n,)."""
        return log_mean_density(self.log_prob_by_set(x))

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean NLL in nats under the set whose turn it is."""
        return -self._log_prob_under(batch, self.turn.view(1), generator if self.training else None).mean()

    def after_step(self, generator: torch.Generator) -> None:
        """Switch to the next set of masks."""
        self.turn.copy_((self.turn + 1) % self.sets)

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """NLL of the mean density over the sets."""
        return -self.log_prob(batch).mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Each example from one of the sets, drawn uniformly."""
        which = torch.randint(self.sets, (n,), generator=generator, device=self.ranks.device)
        x = self.output.weight.new_zeros(n, self.dim)
        for m in range(self.sets):
            rows = (which == m).nonzero().squeeze(1)
            part = x[rows]
            for d in self.ranks[m].argsort().tolist() if len(rows) else ():
                part[:, d] = self.head.sample(self.conditionals(part, m)[:, d], generator)
            x[rows] = part
        return x


_TABLE: dict[str, float] = {"hidden": 256, "layers": 2, "batch_size": 100, "validate_every": 500}
_BITS: dict[str, float] = {"hidden": 512, "batch_size": 100}

MADE = ModelEntry(
    family="autoregressive",
    about="MADE: masked autoencoder, mean density over its sets of masks, mixture-of-Gaussians head",
    paper="Germain et al. 2015, 1502.03509",
    build=MaskedAutoencoder,
    domains=frozenset({"continuous", "bits"}),
    params={"hidden": 200, "layers": 1, "masks": 8, "components": 10, "dropout": 0.0},
    training=Training(
        steps=1500, batch_size=128, lr=5e-3, warmup=50, weight_decay=0.1, grad_clip=20.0, ema=0.99, validate_every=100
    ),
    overrides={
        # fewer rows want more orders: with each set of masks a row looks new
        "red-wine": {**_TABLE, "masks": 32, "dropout": 0.1, "steps": 4000, "validate_every": 200},
        "white-wine": {**_TABLE, "masks": 4, "dropout": 0.1, "lr": 4e-3, "steps": 5000},
        "parkinsons": {**_TABLE, "masks": 4, "dropout": 0.05, "lr": 8e-3, "steps": 8000},
        "mushrooms": {**_BITS, "dropout": 0.2, "weight_decay": 0.03, "lr": 8e-3, "steps": 6000, "validate_every": 500},
        "dna": {**_BITS, "masks": 4, "dropout": 0.6, "weight_decay": 0.01, "lr": 3e-3},
        "nips": {**_BITS, "hidden": 256, "masks": 4, "dropout": 0.5, "weight_decay": 1.0, "lr": 2e-3, "steps": 400},
    },
)
