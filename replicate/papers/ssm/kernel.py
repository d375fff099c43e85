"""Deep kernel exponential families (section 5.1.1) and their objectives.

The model is Wenliang et al. 2019, 1811.08357: log p(x) = sum_m alpha_m k(x, z_m) + log q0(x) - log Z, with k a mixture
of Gaussian kernels on features that networks compute, inducing points z_m, and q0 = N(0, 4 I). For every objective here
the best alpha solves linear equations; kernels and inducing points are trained through that solution, by the loss on
examples that did not enter it.

Derivatives in x are taken only along directions, by carrying second-order Taylor expansions through the networks; exact
score matching takes the D coordinate directions, sliced score matching one random direction.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from replicate.score_based.matching import rademacher

#: variance of q0, and of the released code's importance proposal
BASE_VARIANCE = 4.0
#: log10 of the kernels' squared length scales at the start
LOG_SCALES = (0.0, 0.5185, 1.0)
#: rows at a time where nothing is trained
CHUNK = 500


class Expansion(NamedTuple):
    """phi(x + t v) around t = 0: first derivatives along K directions v per example, second ones along the last C.

    Value (P, n, H), first derivatives (P, n, K, H), the sum of the second ones (P, n, H), and C. Only the sum is
    needed, and only the sum is carried: layers are linear in them. All P networks are evaluated at once.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    curved: int

    def sum_of_squares(self, first: Tensor) -> Tensor:
        """Sum the squares of first derivatives (P, n, K, any) over the last C directions, (P, n, any)."""
        return first[:, :, first.shape[2] - self.curved :].square().sum(2)

    def inner(self, other: Tensor) -> Tensor:
        """Return <other, d> of each first derivative d with a vector (P, n, H) of its example, (P, n, K)."""
        return (self.first * other[:, :, None]).sum(-1)


def along(directions: Tensor, weight: Tensor) -> Tensor:
    """Map directions (P, n, K, I) through linear maps (P, I, O) to (P, n, K, O)."""
    return (directions.flatten(1, 2) @ weight).unflatten(1, directions.shape[1:3])


class Linear(nn.Module):
    """P linear maps."""

    def __init__(self, count: int, inputs: int, outputs: int, std: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(count, inputs, outputs))
        self.bias = nn.Parameter(std * torch.randn(count, 1, outputs)) if bias else None

    def forward(self, e: Expansion) -> Expansion:
        """Return the expansion of W phi + b."""
        value = e.value @ self.weight
        value = value if self.bias is None else value + self.bias
        return Expansion(value, along(e.first, self.weight), e.second @ self.weight, e.curved)


def through_softplus(e: Expansion) -> Expansion:
    """Return the expansion of log(1 + exp phi)."""
    gate = torch.sigmoid(e.value)
    second = gate * e.second + gate * (1 - gate) * e.sum_of_squares(e.first)
    return Expansion(nn.functional.softplus(e.value), gate[:, :, None] * e.first, second, e.curved)


class Features(nn.Module):
    """P networks of two hidden softplus layers with a linear path beside them: x (n, D) -> phi (P, n, H)."""

    def __init__(self, count: int, dim: int, hidden: int) -> None:
        super().__init__()
        std = hidden**-0.5
        self.layers = nn.ModuleList(Linear(count, inputs, hidden, std) for inputs in (dim, hidden, hidden))
        self.skip = Linear(count, dim, hidden, std, bias=False)
        self.count = count

    def expand(self, x: Tensor, v: Tensor, curved: int) -> Expansion:
        """Expand phi at x (n, D) along v (n, K, D), to second order for the last `curved` directions."""
        x, v = x.expand(self.count, -1, -1), v.expand(self.count, -1, -1, -1)
        start = Expansion(x, v, torch.zeros_like(x), curved)
        first, second, third = self.layers
        deep = third(through_softplus(second(through_softplus(first(start)))))
        wide = self.skip(start)
        return Expansion(deep.value + wide.value, deep.first + wide.first, deep.second + wide.second, curved)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(x, x.new_zeros(len(x), 0, x.shape[1]), 0).value


class Kernels(NamedTuple):
    """k(x, z_m) = sum_p w_p exp(-|phi_p(x) - c_pm|^2 / (2 l_p)) around the expansion of phi, of P networks.

    The centres are c (P, M, H), the width is l (P, 1, 1), and `each` are the P terms of k, (P, n, M).
    """

    phi: Expansion
    centres: Tensor
    width: Tensor
    each: Tensor

    def _slope(self, which: slice) -> Tensor:
        """Return <phi - c, d> for some of the first derivatives d of phi, (P, n, K, M), as one product."""
        first, inner = self.phi.first[:, :, which], self.phi.inner(self.phi.value)[:, :, which]
        ones = torch.ones_like(self.centres[..., :1])
        return along(torch.cat([first, inner[..., None]], -1), torch.cat([-self.centres, ones], -1).mT)

    def _bend(self, slope: Tensor) -> Tensor:
        """Return the factor of -k_p / l_p in the sum of second derivatives, (P, n, M), from slopes (P, n, K, M)."""
        e = self.phi
        bend = (e.value * e.second + e.sum_of_squares(e.first)).sum(-1, keepdim=True) - e.second @ self.centres.mT
        return bend - e.sum_of_squares(slope) / self.width

    def expansion(self) -> tuple[Tensor, Tensor]:
        """Return first derivatives of k (n, K, M) and the sum of the second ones (n, M)."""
        scaled = -self.each / self.width
        slope = self._slope(slice(None))
        first = torch.stack([s[:, None] * d for s, d in zip(scaled, slope, strict=True)]).sum(0)
        return first, (scaled * self._bend(slope)).sum(0)

    def first(self, alpha: Tensor) -> Tensor:
        """Return first derivatives (n, K) of sum_m alpha_m k(x, z_m): the sum over m comes first, without slopes."""
        a = -self.each * (alpha / self.width)
        return self.phi.inner(self.phi.value * a.sum(-1, keepdim=True) - a @ self.centres).sum(0)

    def second(self, alpha: Tensor) -> Tensor:
        """Return the sum of second derivatives of sum_m alpha_m k(x, z_m), (n,)."""
        slope = self._slope(slice(self.phi.first.shape[2] - self.phi.curved, None))
        return (-self.each * (alpha / self.width) * self._bend(slope)).sum((0, 2))


class DeepKernelFamily(nn.Module):
    """log p(x) = sum_m alpha_m k(x, z_m) - |x|^2 / 8 up to log Z.

    The z (M, D) start at the `inducing` points; H = `hidden` units per layer and features per kernel.
    """

    alpha: Tensor

    def __init__(self, inducing: Tensor, hidden: int) -> None:
        super().__init__()
        self.inducing = nn.Parameter(inducing.clone())
        self.features = Features(len(LOG_SCALES), inducing.shape[1], hidden)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALES))
        self.mixing = nn.Parameter(torch.zeros(len(LOG_SCALES)))
        self.log_ridge = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("alpha", torch.zeros(len(inducing)))

    def kernels(self, x: Tensor, v: Tensor, curved: int) -> Kernels:
        """Expand k(x, z_m) at x (n, D) along v (n, K, D), to second order for the last `curved` directions."""
        width, weight = 10 ** self.log_scale[:, None, None], self.mixing.softmax(0)[:, None, None]
        phi, centres = self.features.expand(x, v, curved), self.features(self.inducing)
        # multiplied out, without a tensor (n, M, H); rounding alone can make a distance negative
        squares = phi.value.square().sum(-1, keepdim=True) + centres.square().sum(-1)[:, None]
        distance = (squares - 2 * phi.value @ centres.mT).clamp_min(0)
        return Kernels(phi, centres, width, weight * torch.exp(-distance / (2 * width)))

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p + log Z in nats of x (n, D), shape (n,)."""
        k = self.kernels(x, x.new_zeros(len(x), 0, x.shape[1]), 0).each.sum(0)
        return k @ self.alpha - 0.5 * x.square().sum(1) / BASE_VARIANCE


class Slices(NamedTuple):
    """weight sum_k (v_k's - target_k)^2 / 2 over the first K' directions + sum_k v_k'(ds/dx)v_k over the last C.

    All objectives share this form: points x (n, D), directions v (n, K, D), targets (n, K'), and C.
    """

    x: Tensor
    v: Tensor
    target: Tensor
    curved: int
    weight: float = 1.0


Objective = Callable[[Tensor, torch.Generator], Slices]


def coordinate_directions(x: Tensor) -> Tensor:
    """Return e_1 .. e_D for every example, (n, D, D)."""
    return torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1, -1)


def exact(x: Tensor, draws: torch.Generator) -> Slices:
    """Slice implicit score matching: the trace is the sum over the coordinate directions."""
    return Slices(x, coordinate_directions(x), torch.zeros_like(x), x.shape[1])


def sliced(x: Tensor, draws: torch.Generator) -> Slices:
    """Draw one Rademacher projection per example (eq. 7)."""
    return Slices(x, rademacher(x, draws)[:, None], x.new_zeros(len(x), 1), 1)


def sliced_vr(x: Tensor, draws: torch.Generator) -> Slices:
    """Take the curvature along one Rademacher projection and the norm of the whole score (eq. 8)."""
    v = torch.cat([coordinate_directions(x), rademacher(x, draws)[:, None]], dim=1)
    return Slices(x, v, torch.zeros_like(x), 1)


def denoising(sigma: float) -> Objective:
    """Return the objective |sigma s(x + sigma z) + z|^2 / 2."""

    def objective(x: Tensor, draws: torch.Generator) -> Slices:
        z = torch.randn(x.shape, generator=draws, device=x.device, dtype=x.dtype)
        return Slices(x + sigma * z, coordinate_directions(x), -z / sigma, 0, sigma**2)

    return objective


class Quadratic(NamedTuple):
    """alpha'G alpha / 2 + b'alpha: an objective's mean over examples, without the terms that lack alpha."""

    g: Tensor
    b: Tensor

    def __call__(self, alpha: Tensor) -> Tensor:
        """Return its value, a scalar."""
        return 0.5 * alpha @ self.g @ alpha + self.b @ alpha

    def minimiser(self, log_ridge: Tensor) -> Tensor:
        """Return the alpha of least value plus 10^log_ridge |alpha|^2 / 2."""
        return self.solve(log_ridge, -self.b)

    def solve(self, log_ridge: Tensor, y: Tensor) -> Tensor:
        """Return (G + 10^log_ridge 1)^-1 y, solved in float64 whatever y's type: G is nearly singular."""
        eye = torch.eye(len(y), dtype=torch.float64, device=y.device)
        return torch.linalg.solve(self.g.double() + 10 ** log_ridge.double() * eye, y.double()).to(y.dtype)


def of_base(slices: Slices) -> tuple[Tensor, Tensor]:
    """Return q0's part: v_k' grad log q0 - target (n, K'), and the sum of its second derivatives over all examples."""
    fitted = slices.target.shape[1]
    residual = -(slices.v[:, :fitted] @ slices.x[:, :, None]).squeeze(-1) / BASE_VARIANCE - slices.target
    return residual, -slices.v[:, slices.v.shape[1] - slices.curved :].square().sum() / BASE_VARIANCE


def quadratic(model: DeepKernelFamily, slices: Slices) -> Quadratic:
    """Return the mean objective over the examples of `slices`, as a function of alpha."""
    n, fitted = slices.target.shape
    first, second = model.kernels(slices.x, slices.v, slices.curved).expansion()
    first = first[:, :fitted].flatten(0, 1)
    residual, _ = of_base(slices)
    g = slices.weight * (first.T @ first) / n
    return Quadratic(g, (slices.weight * (residual.flatten() @ first) + second.sum(0)) / n)


def mean_objective(model: DeepKernelFamily, slices: Slices, alpha: Tensor) -> Tensor:
    """Return the mean objective over the examples of `slices` at one alpha (M,), a scalar."""
    n, fitted = slices.target.shape
    kernels = model.kernels(slices.x, slices.v, slices.curved)
    residual, bend = of_base(slices)
    fit = 0.5 * slices.weight * (kernels.first(alpha)[:, :fitted] + residual).square().sum()
    return (fit + kernels.second(alpha).sum() + bend) / n


def loss_through_alpha(model: DeepKernelFamily, fitted: Slices, judged: Slices) -> Tensor:
    """Return a scalar with the gradient of mean_objective(judged, alpha), where alpha minimises that of `fitted`.

    With alpha = -A^-1 b, A = G + ridge 1, d alpha = -A^-1 (dA alpha + db), so that with w = A^-1 grad_alpha the part
    through alpha is -w' (dA alpha + db): the derivative of a number that needs no G.
    """
    with torch.no_grad():
        form = quadratic(model, fitted)
        alpha = form.minimiser(model.log_ridge)
    loss = mean_objective(model, judged, alpha.requires_grad_(True))
    (slope,) = torch.autograd.grad(loss, alpha, retain_graph=True)
    alpha = alpha.detach()
    w = form.solve(model.log_ridge.detach(), slope)
    n, count = fitted.target.shape
    kernels = model.kernels(fitted.x, fitted.v, fitted.curved)
    along_w, along_alpha = (kernels.first(c)[:, :count] for c in (w, alpha))
    product = fitted.weight * (along_w * (along_alpha + of_base(fitted)[0])).sum() + kernels.second(w).sum()
    return loss - product / n - 10**model.log_ridge * (w @ alpha)


@torch.no_grad()
def quadratic_over(model: DeepKernelFamily, objective: Objective, x: Tensor, draws: torch.Generator) -> Quadratic:
    """Return `quadratic` over all rows of x (n, D), chunk by chunk."""
    g, b = x.new_zeros(()), x.new_zeros(())
    for rows in x.split(CHUNK):
        part, share = quadratic(model, objective(rows, draws)), len(rows) / len(x)
        g, b = g + share * part.g, b + share * part.b
    return Quadratic(g, b)


@torch.no_grad()
def objective_over(
    model: DeepKernelFamily, objective: Objective, x: Tensor, alpha: Tensor, draws: torch.Generator
) -> float:
    """Return `mean_objective` over all rows of x (n, D), chunk by chunk."""
    return sum(len(r) / len(x) * float(mean_objective(model, objective(r, draws), alpha)) for r in x.split(CHUNK))
