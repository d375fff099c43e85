"""Normalising flows: affine coupling and rational-quadratic spline coupling.

Papers:
    [1] Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2017, arXiv:1605.08803.
    [2] Durkan, Bekasov, Murray, Papamakarios: Neural spline flows, 2019, arXiv:1906.04032.
    [3] Kingma, Dhariwal: Glow, 2018, arXiv:1807.03039 (the LU-parametrised linear layer, section 3.2).

A flow maps data x to z ~ N(0, I) through invertible layers, so that
log p(x) = log N(z; 0, I) + sum over layers of log |det dy/dx| (the change of variables, [1] eq. 2-3).

Deviations:
    - Vectors, not images: fully connected conditioners, no squeezing and no multi-scale factoring.
    - The first layer is a fixed affine whitening fitted to the training split, so that training starts from the
      best Gaussian and the couplings learn only what a Gaussian cannot say. [1] and [2] start from the raw data.
    - [1] uses batch normalisation between couplings; here the whitening and the LU layers take its place.
    - Every layer starts as the identity (zero-initialised last layers).
    - Spline slopes are 1 at both ends of the interval, as in [2] section 3.1, so the tails are the identity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.layers import dropout, from_settings
from replicate.model import DataInfo, Model, ModelEntry, Training


@dataclass(frozen=True)
class Shape:
    """The shape of every conditioner of a flow.

    Attributes:
        hidden: width.
        blocks: residual blocks h + W silu(dropout(h)).
        dropout: rate, in training only.
        sharpness: factor on the first layer's initial weights and biases. A network of one or two inputs with
            torch's own start is nearly linear over unit-scale data and learns fine structure slowly.
    """

    hidden: int = 64
    blocks: int = 1
    dropout: float = 0.0
    sharpness: float = 1.0


class Conditioner(nn.Module):
    """Residual network from the kept dimensions to the parameters of a coupling.

    The last layer starts at zero: the coupling starts with all parameters 0.

    Args:
        inputs, outputs: numbers of features.
        shape: of the network.
    """

    def __init__(self, inputs: int, outputs: int, shape: Shape) -> None:
        super().__init__()
        self.rate = shape.dropout
        self.first = nn.Linear(inputs, shape.hidden)
        self.blocks = nn.ModuleList(nn.Linear(shape.hidden, shape.hidden) for _ in range(shape.blocks))
        self.last = nn.Linear(shape.hidden, outputs)
        with torch.no_grad():
            self.first.weight.mul_(shape.sharpness)
            self.first.bias.mul_(shape.sharpness)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map x (n, inputs) to (n, outputs); dropout only where a generator is given."""
        h = self.first(x)
        for block in self.blocks:
            h = h + block(dropout(F.silu(h), self.rate, generator))
        return self.last(dropout(F.silu(h), self.rate, generator))


class Layer(nn.Module):
    """An invertible map of (n, D) to (n, D)."""

    def initialise(self, x: Tensor) -> None:
        """Data-dependent initialisation from the layer's inputs x (n, D) on the training split."""

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (y (n, D), log |det dy/dx| (n,)); a generator switches dropout on."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """Map y (n, D) to x (n, D)."""
        raise NotImplementedError


class Whitening(Layer):
    """y = W (x - mean) with W C W^T = 1, C the training covariance; fixed once fitted.

    The symmetric W = C^(-1/2) keeps every y_d as close to x_d as a whitening can (Kessy et al. 2018, 1512.00809),
    so that dimensions keep their meaning; the principal one has the principal components for dimensions, so that
    well separated modes show in the few last ones.

    Args:
        dim: D.
        principal: which of the two.
        shrinkage: of C towards its diagonal, where there are fewer examples than an estimate of C asks for.
    """

    mean: Tensor
    weight: Tensor
    unweight: Tensor
    logdet: Tensor

    def __init__(self, dim: int, principal: bool = False, shrinkage: float = 0.0) -> None:
        super().__init__()
        self.principal, self.shrinkage = principal, shrinkage
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("unweight", torch.eye(dim))
        self.register_buffer("logdet", torch.zeros(()))

    def initialise(self, x: Tensor) -> None:
        covariance = torch.cov(x.T.double())
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * covariance.diagonal().diag()
        variance, basis = torch.linalg.eigh(covariance)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = basis * largest.sign()  # an eigenvector's sign is the solver's choice: make it ours
        variance = variance.clamp_min(1e-8)  # a direction without spread must not be blown up without bound
        self.mean.copy_(x.mean(0))
        back = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) if self.principal else basis.T
        self.weight.copy_(basis * variance.rsqrt() @ back)
        self.unweight.copy_((basis * variance.sqrt() @ back).T)
        self.logdet.copy_(-0.5 * variance.log().sum())

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) @ self.weight, self.logdet.expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        return y @ self.unweight + self.mean


class LULinear(Layer):
    """y = L U x + b with unit lower triangular L and upper triangular U ([3] eq. 10 without its permutation).

    The couplings' changing splits take the permutation's place. log |det| = sum log |U_dd|, and U_dd = exp(s_d)
    keeps the map invertible. All parameters 0 is the identity.
    """

    identity: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(dim, dim))
        self.upper = nn.Parameter(torch.zeros(dim, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("identity", torch.eye(dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + self.identity
        upper = self.upper.triu(1) + self.log_diagonal.exp().diag()
        return lower, upper

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        return F.linear(x, lower @ upper, self.bias), self.log_diagonal.sum().expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self._factors()
        inner = torch.linalg.solve_triangular(lower, (y - self.bias).T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inner, upper=True).T


class Transform:
    """How a coupling moves single numbers, each by `size` parameters of its own; at parameters 0 none moves."""

    size: int

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (..) with parameters (.., size) to (y (..), log |dy/dx| (..))."""
        raise NotImplementedError

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        """Map y (..) with parameters (.., size) back to x (..)."""
        raise NotImplementedError


class Coupling(Layer):
    """Dimensions `kept` pass unchanged and decide how the others move ([1] eq. 4-5).

    Args:
        dim: D.
        kept: indices of the dimensions that pass unchanged.
        transform: of a moved dimension.
        shape: of the conditioner.
    """

    kept: Tensor
    moved: Tensor
    order: Tensor

    def __init__(self, dim: int, kept: Sequence[int], transform: Transform, shape: Shape) -> None:
        super().__init__()
        moved = [d for d in range(dim) if d not in set(kept)]
        if not moved:
            raise ValueError("a coupling needs at least one dimension to move")
        self.transform = transform
        self.register_buffer("kept", torch.tensor(list(kept), dtype=torch.int64))
        self.register_buffer("moved", torch.tensor(moved, dtype=torch.int64))
        self.register_buffer("order", torch.tensor([*kept, *moved], dtype=torch.int64).argsort())
        self.conditioner = Conditioner(len(kept), len(moved) * transform.size, shape)

    def _parameters_of(self, kept: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Parameters (n, moved, size) from the kept dimensions (n, kept)."""
        return self.conditioner(kept, generator).view(len(kept), -1, self.transform.size)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([kept, moved], 1)[:, self.order]

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        kept = x[:, self.kept]
        y, logdet = self.transform.forward(x[:, self.moved], self._parameters_of(kept, generator))
        return self._join(kept, y), logdet.sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        kept = y[:, self.kept]
        return self._join(kept, self.transform.inverse(y[:, self.moved], self._parameters_of(kept)))


class Affine(Transform):
    """y = exp(s) x + t ([1] eq. 7) with s = bound tanh(raw / bound), so that no scale can run away."""

    def __init__(self, bound: float = 3.0) -> None:
        self.size, self.bound = 2, bound

    def _log_scale(self, raw: Tensor) -> Tensor:
        return self.bound * torch.tanh(raw / self.bound)

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = parameters.unbind(-1)
        s = self._log_scale(raw)
        return torch.addcmul(shift, x, s.exp()), s

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        raw, shift = parameters.unbind(-1)
        return (y - shift) * torch.exp(-self._log_scale(raw))


class Spline(Transform):
    """Monotone rational-quadratic splines on [-bound, bound], the identity outside.

    Args:
        bins: K; each moved number takes K widths, K heights and K - 1 inner slopes ([2] section 3.1).
        bound: half width B of the interval.
    """

    #: smallest bin, as a share of the interval, and smallest slope
    SMALLEST_BIN = 1e-4
    SMALLEST_SLOPE = 1e-3
    _UNIT = math.log(math.expm1(1 - SMALLEST_SLOPE))

    def __init__(self, bins: int = 8, bound: float = 4.0) -> None:
        self.size, self.bins, self.bound = 3 * bins - 1, bins, bound

    def _sizes(self, parameters: Tensor) -> Tensor:
        """Parameters (n, m, 3K - 1) -> widths and heights of the bins (n, m, 2, K); each K sum to 2B."""
        k = self.bins
        share = parameters[..., : 2 * k].unflatten(-1, (2, k)).softmax(-1)
        return 2 * self.bound * (self.SMALLEST_BIN + (1 - k * self.SMALLEST_BIN) * share)

    def _bin(self, value: Tensor, axis: int, parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the bin of each `value` (n, m) along axis 0 (x) or 1 (y).

        Returns:
            left edge x_k, width w, lower edge y_k, height h, slopes at both ends; each (n, m).
        """
        size = self._sizes(parameters)
        right = size.cumsum(-1) - self.bound
        inner = right[..., axis, :-1].detach().contiguous()
        index = torch.searchsorted(inner, value.detach().unsqueeze(-1), right=True)
        pair = index.unsqueeze(-2).expand(*index.shape[:-1], 2, 1)
        size, right = size.gather(-1, pair).squeeze(-1), right.gather(-1, pair).squeeze(-1)
        w, h = size.unbind(-1)
        x_k, y_k = (right - size).unbind(-1)
        raw = F.pad(parameters[..., 2 * self.bins :], (1, 1)).gather(-1, torch.cat([index, index + 1], -1))
        d0, d1 = (F.softplus(raw + self._UNIT) + self.SMALLEST_SLOPE).unbind(-1)  # raw 0 is slope 1
        return x_k, w, y_k, h, d0, d1

    def forward(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """[2] eq. 4 and 5, in logarithms."""
        inside = x.abs() < self.bound
        x_in = x.clamp(-self.bound, self.bound)
        x_k, w, y_k, h, d0, d1 = self._bin(x_in, 0, parameters)
        s = h / w
        xi = (x_in - x_k) / w
        cross = xi * (1 - xi)
        denominator = s + (d1 + d0 - 2 * s) * cross
        y = y_k + h * (s * xi.square() + d0 * cross) / denominator
        numerator = d1 * xi.square() + 2 * s * cross + d0 * (1 - xi).square()
        logdet = 2 * (s.log() - denominator.log()) + numerator.log()
        return torch.where(inside, y, x), torch.where(inside, logdet, 0.0)

    def inverse(self, y: Tensor, parameters: Tensor) -> Tensor:
        """[2] eq. 6-8: the root of a quadratic, in the form that does not cancel."""
        inside = y.abs() < self.bound
        y_in = y.clamp(-self.bound, self.bound)
        x_k, w, y_k, h, d0, d1 = self._bin(y_in, 1, parameters)
        s = h / w
        bend = (y_in - y_k) * (d1 + d0 - 2 * s)
        a = h * (s - d0) + bend
        b = h * d0 - bend
        c = -s * (y_in - y_k)
        discriminant = (b.square() - 4 * a * c).clamp_min(0)
        xi = 2 * c / (-b - discriminant.sqrt())
        return torch.where(inside, x_k + xi * w, y)


def transform_of(coupling: str, bins: int, bound: float) -> Transform:
    """Return the transform of that name.

    Raises:
        ValueError: no such coupling.
    """
    if coupling not in ("affine", "spline"):
        raise ValueError(f"coupling is {coupling!r}; it must be 'affine' or 'spline'")
    return Affine(bound) if coupling == "affine" else Spline(bins, bound)


class Flow(Model):
    """Layers from data to a standard normal.

    Args:
        dim: D.
        layers: applied in this order to data.
    """

    family = "flow"
    capabilities = frozenset({"log_prob", "score", "sample"})
    layers: Sequence[Layer]

    def __init__(self, dim: int, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.dim = dim
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))

    @torch.no_grad()
    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        x = train
        for layer in self.layers:
            layer.initialise(x)
            x, _ = layer(x)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Map x (n, D) to (z (n, D), log |det dz/dx| (n,)); a generator switches dropout on."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, logdet = layer(x, generator)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Map z (n, D) to x (n, D)."""
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z

    def log_prob(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z, logdet = self(x, generator)
        return logdet - 0.5 * z.square().sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean negative log-likelihood in nats, with dropout."""
        return -self.log_prob(batch, generator).mean()

    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        return -self.log_prob(batch).mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        parameter = next(self.parameters())
        z = torch.randn(n, self.dim, generator=generator, device=parameter.device, dtype=parameter.dtype)
        return self.inverse(z)


def splits(dim: int, count: int) -> list[list[int]]:
    """Return the kept dimensions of `count` couplings.

    Pairs of complementary halves, so that every dimension moves in each pair; each pair splits by another bit
    of the dimension's number (odd/even, then pairs, fours, ..), so that any two dimensions get to see each other.
    """
    bits = max(1, (dim - 1).bit_length())
    result = []
    for i in range(count):
        bit, parity = (i // 2) % bits, i % 2
        result.append([d for d in range(dim) if (d >> bit) % 2 == parity])
    return result


@dataclass(frozen=True)
class FlowSettings(Shape):
    """Settings of a flow of vectors; see `Shape`, `transform_of` and `Whitening`."""

    coupling: str = "spline"
    couplings: int = 4
    bins: int = 16
    bound: float = 4.0
    principal: bool = False
    shrinkage: float = 0.0


def build(info: DataInfo, s: FlowSettings) -> Flow:
    """Build a flow: whitening, then the couplings, with an LU layer between their pairs.

    Example:
        Before training it is the data's Gaussian fit, whose NLL on N(3, 4 I) is 2/2 log(2 pi e 4) = 4.224 nats:

        >>> g = torch.Generator().manual_seed(0)
        >>> x = 3 + 2 * torch.randn(2000, 2, generator=g)
        >>> for make in (build_realnvp, build_spline_flow):
        ...     flow = make(DataInfo(2, "continuous"), couplings=2, hidden=8)
        ...     flow.initialise(x, g)
        ...     print(round(float(-flow.log_prob(x).detach().mean()), 1))
        4.2
        4.2
    """
    layers: list[Layer] = [Whitening(info.dim, s.principal, s.shrinkage)]
    for i, kept in enumerate(splits(info.dim, s.couplings)):
        if i % 2 == 0 and i > 0:
            layers.append(LULinear(info.dim))
        layers.append(Coupling(info.dim, kept, transform_of(s.coupling, s.bins, s.bound), s))
    return Flow(info.dim, layers)


build_realnvp = from_settings(build, FlowSettings, coupling="affine", couplings=8, bound=3.0)
build_spline_flow = from_settings(build, FlowSettings)


#: 1000 images: what limits the fit is overfitting, so dropout, and the step that validation likes best
_DISCRETE = {"batch_size": 250, "lr": 2e-3, "validate_every": 50, "dropout": 0.3}

REALNVP = ModelEntry(
    family="flow",
    about="affine coupling flow",
    paper="Dinh, Sohl-Dickstein, Bengio 2017, 1605.08803",
    build=build_realnvp,
    domains=frozenset({"continuous"}),
    needs_dim=2,  # a coupling moves one part by another
    params={"couplings": 8, "hidden": 64, "blocks": 1},
    training=Training(steps=600, batch_size=512, lr=3e-3, ema=0.99),
    overrides={
        **{f"mixture-{dim}": {"principal": True} for dim in (32, 64)},
        "levels": {**_DISCRETE, "steps": 400},
        "bits": {**_DISCRETE, "steps": 300},
    },
)

#: two splines of many bins say any conditional density of one number given another
_PLANE = {"couplings": 2, "blocks": 2, "bins": 48, "sharpness": 3.0, "steps": 700}

_SMOOTH = {"blocks": 1, "bins": 8, "sharpness": 1.0}

#: few modes in many dimensions lie in the span of the first principal components
_SPREAD = {**_SMOOTH, "couplings": 2, "principal": True, "steps": 300}

#: tables of thousands of rows are soon learned by heart
_TABLE = {**_SMOOTH, "hidden": 128, "dropout": 0.2, "batch_size": 128, "weight_decay": 0.1, "validate_every": 50}

SPLINE_FLOW = ModelEntry(
    family="flow",
    about="rational-quadratic spline coupling flow",
    paper="Durkan, Bekasov, Murray, Papamakarios 2019, 1906.04032",
    build=build_spline_flow,
    domains=frozenset({"continuous"}),
    needs_dim=2,  # a coupling moves one part by another
    params={"couplings": 4, "hidden": 64, "blocks": 1, "bins": 8},
    training=Training(steps=500, batch_size=512, lr=3e-3, ema=0.99),
    overrides={
        "continuous": _PLANE,
        **{f"mixture-{dim}": _SPREAD for dim in (8, 32, 64)},
        "levels": {**_DISCRETE, "steps": 550},
        "bits": {**_DISCRETE, "steps": 400},
        # 400 rows do not determine the covariance of 500 dimensions
        "nips": {"shrinkage": 0.8, "lr": 5e-4, "couplings": 2, "steps": 150},
        "mushrooms": {"dropout": 0.1, "steps": 1000},
        "red-wine": {**_TABLE, "couplings": 6, "hidden": 64, "steps": 400},
        "white-wine": {**_TABLE, "lr": 2e-3, "steps": 600},
        "parkinsons": dict(_TABLE, couplings=6, blocks=2, bins=12, dropout=0.1, batch_size=256, steps=1000),
    },
)
