"""NADE: one hidden layer shared by all conditionals, in one order of the dimensions or in all of them.

Followed: Larochelle and Murray 2011, The Neural Autoregressive Distribution Estimator (AISTATS), for bits in one fixed
order; Uria, Murray and Larochelle 2014, A Deep and Tractable Density Estimator, 1310.1757, for one deep network that
serves every order, on bits and, with mixtures of Gaussians (RNADE, 1306.0186), on continuous data.

Deviations. There is no layer-wise pretraining. Weights start as torch.nn.Linear's do, except that the deep network
starts as He et al. (2015, 1502.01852) say on bits, where it reads mostly zeros: after 600 steps on dna that is worth 3
nats. Output biases of bits start at the training marginals, as in the authors' code. No probability is clamped; their
code keeps it between 5e-5 and 1 - 5e-5. The split points of a batch are spread evenly over 1..D: each alone is still
uniform, so that the loss has the paper's expectation and less variance.

The activation before each dimension is a cumulative sum over the dimensions. It is computed in blocks, each of them one
product of matrices: there is no loop over D in training, and torch's own float cumulative sum may not be called on
CUDA where kernels must be deterministic.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.autoregressive import GaussianMixture, Head
from baselines.layers import dropout
from replicate.model import DataInfo, Model, ModelEntry, Training

#: dimensions whose activations are computed in one product, and examples scored at a time
BLOCK, ROWS = 32, 1000
#: orderings of the ensemble that choose the best step
VALIDATION_ORDERINGS = 8


class Bernoulli:
    """A bit, given the logit of its being 1."""

    size = 1

    def initial_bias(self) -> Tensor:
        return torch.zeros(1)

    def log_prob(self, parameters: Tensor, x: Tensor) -> Tensor:
        return F.logsigmoid((2 * x - 1) * parameters.squeeze(-1))

    def sample(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        p = parameters.squeeze(-1).sigmoid()
        return (torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype) < p).to(p.dtype)


def head_for(info: DataInfo, components: int) -> Head:
    """Return the distribution of one dimension: a bit's, or a mixture of `components` Gaussians."""
    return Bernoulli() if info.domain == "bits" else GaussianMixture(components)


def marginal_logits(train: Tensor) -> Tensor:
    """Logits (D,) of the means of bits (n, D), clipped to [0.001, 0.999]."""
    return torch.logit(train.mean(0).clamp(0.001, 0.999))


def log_mean_density(log_p: Tensor) -> Tensor:
    """Return log of the mean of K densities, from the log p of whole examples (.., K) to (..)."""
    return log_p.logsumexp(-1) - math.log(log_p.shape[-1])


def activations(x: Tensor, weight: Tensor, offset: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """offset_d + sum_{i < d} x_i weight_i for every position d, block by block.

    Args:
        x: (n, D), in the order of the sum.
        weight, offset: (D, H).

    Yields:
        (positions of the block, their activations (n, positions, H)).
    """
    before = x.new_zeros(len(x), weight.shape[1])
    for first in range(0, x.shape[1], BLOCK):
        here = slice(first, min(first + BLOCK, x.shape[1]))
        part = x[:, here]
        past = part.unsqueeze(1) * x.new_ones(part.shape[1], part.shape[1]).tril(-1)
        yield here, past @ weight[here] + before.unsqueeze(1) + offset[here]
        before = before + part @ weight[here]


class FixedOrderNADE(Model):
    """p(x_o(d) = 1 | x_o(<d)) = sigmoid(b_d + V_d sigmoid(c + sum_{i < d} W_i x_o(i))) on bits (2011, eq. 6 to 8).

    Args:
        info: of bits.
        hidden: H.
        order: the permutation o of 0..D-1 in which dimensions are predicted; as they come by default.

    Raises:
        ValueError: `order` is no permutation.
    """

    family = "autoregressive"
    capabilities = frozenset({"log_prob", "sample"})
    order: Tensor

    def __init__(self, info: DataInfo, hidden: int = 500, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dim = self.nfe = info.dim
        order = list(range(info.dim) if order is None else order)
        if sorted(order) != list(range(info.dim)):
            raise ValueError(f"order must hold each of 0..{info.dim - 1} once")
        self.register_buffer("order", torch.tensor(order))
        scale = info.dim**-0.5
        # rows of the weights are in the order of prediction
        self.weight = nn.Parameter(scale * (2 * torch.rand(info.dim, hidden) - 1))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.output = nn.Parameter(hidden**-0.5 * (2 * torch.rand(info.dim, hidden) - 1))
        self.output_bias = nn.Parameter(torch.zeros(info.dim))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Output biases at the marginals of the training bits."""
        with torch.no_grad():
            self.output_bias.copy_(marginal_logits(train)[self.order])

    def logits(self, x: Tensor) -> Tensor:
        """Bits (n, D) -> logits (n, D), column d that of dimension order[d]; it depends on those before it only."""
        offset = self.bias.expand(self.dim, -1)
        parts = [
            torch.einsum("ndh,dh->nd", a.sigmoid(), self.output[here])
            for here, a in activations(x[:, self.order], self.weight, offset)
        ]
        return torch.cat(parts, 1) + self.output_bias

    def _log_prob(self, x: Tensor) -> Tensor:
        return F.logsigmoid((2 * x[:, self.order] - 1) * self.logits(x)).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.cat([self._log_prob(part) for part in x.split(ROWS)])

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean NLL in nats."""
        return -self.log_prob(batch).mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        x = self.bias.new_zeros(n, self.dim)
        a = self.bias.expand(n, -1)
        for d in range(self.dim):
            logit = a.sigmoid() @ self.output[d] + self.output_bias[d]
            bit = Bernoulli().sample(logit.unsqueeze(-1), generator)
            x[:, self.order[d]] = bit
            a = a + bit.unsqueeze(-1) * self.weight[d]
        return x


def spread_splits(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return n numbers of observed dimensions (n, 1), each uniform on 0..dim-1 and together spread evenly."""
    u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    spread = (u + torch.arange(n, device=generator.device) / n) % 1
    return (spread * dim).long().clamp_max(dim - 1).unsqueeze(1)


def random_masks(observed: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """For each number of `observed` (n, 1) a uniformly random set of so many of the dimensions: 1 inside, (n, dim)."""
    u = torch.rand((len(observed), dim), generator=generator, device=generator.device)
    return (u.argsort(1).argsort(1) < observed).to(u.dtype)


class OrderAgnosticNADE(Model):
    """One network for the conditionals of every order; its density is the mean of those of K recorded orders.

    The network reads x where it is observed, and which dimensions are (the mask), and gives the distribution of each
    dimension that is not. For order o, p_o(x) = prod_d p(x_o(d) | x_o(<d)) is exact and normalised, and so is the
    ensemble's (1/K) sum_o p_o(x). Means of logits over orders would be no conditionals of one distribution.

    Args:
        info: of bits or continuous data.
        hidden: units of a layer.
        layers: hidden layers, at least 1.
        orderings: K random permutations, drawn now and kept with the weights.
        components: Gaussians of each continuous dimension.
        dropout: rate in the hidden layers.
    """

    family = "autoregressive"
    orderings: Tensor

    def __init__(
        self,
        info: DataInfo,
        hidden: int = 500,
        layers: int = 2,
        orderings: int = 8,
        components: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = self.nfe = info.dim
        self.p, self.bits = dropout, info.domain == "bits"
        self.capabilities = frozenset({"log_prob", "sample"} if self.bits else {"log_prob", "sample", "score"})
        self.head = head_for(info, components)
        self.input = nn.Linear(2 * info.dim, hidden)
        inner = [nn.Linear(hidden, hidden) for _ in range(layers - 1)]
        for layer in (self.input, *inner) if self.bits else ():
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.inner = nn.ModuleList(inner)
        scale = 0.1 * hidden**-0.5
        self.output = nn.Parameter(scale * torch.randn(info.dim, self.head.size, hidden))
        self.output_bias = nn.Parameter(self.head.initial_bias().repeat(info.dim, 1))
        self.register_buffer("orderings", torch.stack([torch.randperm(info.dim) for _ in range(orderings)]))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Output biases of bits at the marginals of the training split."""
        if self.bits:
            with torch.no_grad():
                self.output_bias.copy_(marginal_logits(train).unsqueeze(-1))

    def _hidden(self, a: Tensor, generator: torch.Generator | None) -> Tensor:
        """Activations of the first layer (.., H) -> units of the last (.., H)."""
        h = dropout(F.relu(a), self.p, generator)
        for layer in self.inner:
            h = dropout(F.relu(layer(h)), self.p, generator)
        return h

    def _conditionals(self, x: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return log p(x_i | x where mask is 1) of every dimension i, (n, D); it means something where mask is 0."""
        h = self._hidden(self.input(torch.cat([x * mask, mask], 1)), generator)
        parameters = F.linear(h, self.output.flatten(0, 1)).view(len(x), self.dim, -1) + self.output_bias
        return self.head.log_prob(parameters.flatten(0, 1), x.flatten()).view_as(x)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Estimate the mean NLL over all orders without bias, in nats (1310.1757, eq. 10 and 11).

        For each example: a random number d of 1..D, d - 1 random dimensions observed, and D / (D - d + 1) times the
        summed NLL of the others.
        """
        observed = spread_splits(len(batch), self.dim, generator)
        mask = random_masks(observed, self.dim, generator).to(batch.dtype)
        log_p = self._conditionals(batch, mask, generator if self.training else None)
        weight = self.dim / (self.dim - observed.squeeze(1)).to(batch.dtype)
        return -(weight * (log_p * (1 - mask)).sum(1)).mean()

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """NLL of the ensemble of the first `VALIDATION_ORDERINGS` orders."""
        return -log_mean_density(self.log_prob_by_order(batch, self.orderings[:VALIDATION_ORDERINGS])).mean()

    def _log_prob_in(self, x: Tensor, order: Tensor) -> Tensor:
        """Return log p_o(x) under one order (D,), shape (n,)."""
        weight, flag = (part[order] for part in self.input.weight.T.split(self.dim))
        before = torch.ones(self.dim, self.dim, dtype=x.dtype, device=x.device).tril(-1)
        offset = before @ flag + self.input.bias
        output, bias, seen = self.output[order], self.output_bias[order], x[:, order]
        total = x.new_zeros(len(x))
        for here, a in activations(seen, weight, offset):
            parameters = torch.einsum("ndh,dsh->nds", self._hidden(a, None), output[here]) + bias[here]
            log_p = self.head.log_prob(parameters.flatten(0, 1), seen[:, here].flatten())
            total = total + log_p.view(len(x), -1).sum(1)
        return total

    def log_prob_in(self, x: Tensor, order: Tensor) -> Tensor:
        """Return log p_o(x) under one order (D,), exact, in nats: x (n, D) -> (n,)."""
        return torch.cat([self._log_prob_in(part, order) for part in x.split(ROWS)])

    def log_prob_by_order(self, x: Tensor, orderings: Tensor) -> Tensor:
        """Return log p of x (n, D) under each of the orders (K, D), shape (n, K)."""
        return torch.stack([self.log_prob_in(x, order) for order in orderings], 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log of the mean density over the recorded orders, (n,)."""
        return log_mean_density(self.log_prob_by_order(x, self.orderings))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Each example from one of the recorded orders, drawn uniformly."""
        device = self.output.device
        which = torch.randint(len(self.orderings), (n,), generator=generator, device=device)
        weight, flag = self.input.weight.T.split(self.dim)
        x = self.output.new_zeros(n, self.dim)
        a = self.input.bias.expand(n, -1)
        for d in range(self.dim):
            now = self.orderings[which, d]
            h = self._hidden(a, None)
            parameters = torch.einsum("nh,nsh->ns", h, self.output[now]) + self.output_bias[now]
            value = self.head.sample(parameters, generator)
            x[torch.arange(n, device=device), now] = value
            a = a + value.unsqueeze(-1) * weight[now] + flag[now]
        return x


NADE = ModelEntry(
    family="autoregressive",
    about="NADE: one hidden layer shared by all conditionals, dimensions in the order given",
    paper="Larochelle and Murray 2011, AISTATS",
    build=FixedOrderNADE,
    domains=frozenset({"bits"}),
    params={"hidden": 500},
    training=Training(steps=800, batch_size=64, lr=3e-3, warmup=50, weight_decay=0.1, ema=0.98, validate_every=50),
    overrides={"dna": {"lr": 5e-3}, "mushrooms": {"steps": 2000, "lr": 5e-3}, "nips": {"hidden": 100, "steps": 400}},
)

#: where few inputs decide, width counts more than depth
_WIDE = {"layers": 1, "orderings": 16}

EONADE = ModelEntry(
    family="autoregressive",
    about="deep NADE trained for every order, mean density of several orders, mixture-of-Gaussians head",
    paper="Uria, Murray and Larochelle 2014, 1310.1757",
    build=OrderAgnosticNADE,
    domains=frozenset({"continuous", "bits"}),
    params={"hidden": 128, "layers": 2, "orderings": 8, "components": 10, "dropout": 0.0},
    training=Training(
        steps=3000, batch_size=128, lr=5e-3, warmup=50, weight_decay=0.1, grad_clip=20.0, ema=0.99, validate_every=250
    ),
    overrides={
        "bits": {"hidden": 500, "layers": 1, "steps": 2000, "lr": 2e-3},
        # small and soon learned by heart; the two others still gain when these steps end
        "red-wine": {"hidden": 512, "dropout": 0.1, "orderings": 32, "batch_size": 100, "lr": 3e-3},
        "white-wine": {"hidden": 300, "orderings": 32, "steps": 4000, "batch_size": 256},
        "parkinsons": {"hidden": 300, "layers": 3, "orderings": 32, "steps": 6000, "batch_size": 256},
        "dna": {**_WIDE, "hidden": 1000, "steps": 3000, "validate_every": 500},
        "mushrooms": {**_WIDE, "hidden": 256, "steps": 8000, "lr": 3e-3, "weight_decay": 0.0, "validate_every": 2000},
        "nips": {"dropout": 0.3, "orderings": 16, "steps": 800, "validate_every": 100},
    },
)
