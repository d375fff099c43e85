"""Densities whose log p, score and sampler are exact, so that every error of a model can be measured.

All but one are mixtures of Gaussians with one shared covariance. A curve (moon, ring, arm, spiral) is a row of narrow
isotropic Gaussians no further apart than their standard deviation sd: with a spacing h <= sd the density along the
curve ripples by 2 exp(-2 pi^2 sd^2 / h^2) <= 6e-9 (Poisson summation), so it looks like a smeared curve while log p
and score keep their closed forms.

Sources of the shapes, rescaled to a box of about [-4, 4]^2; the widths are ours:
    two-gaussians: Song and Ermon 2019 (arXiv:1907.05600), section 3.2.2 and figure 3.
    eight-gaussians: the ring of Metz et al. 2017 (arXiv:1611.02163), with wider Gaussians.
    two-moons: scikit-learn's `make_moons`.
    pinwheel: Johnson et al. 2016 (arXiv:1603.06277).
    rings, spirals, checkerboard: as in Grathwohl et al. 2019 (arXiv:1810.01367), three rings in place of four.
    mixture-D: ours.
"""

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from replicate.model import DataInfo
from replicate.tasks.base import Density, Task, TaskEntry

SIZES = {"train": 50_000, "valid": 5_000, "test": 10_000}
#: standard deviation across every curve
CURVE_SD = 0.2
#: part of the tasks' definition: another value is another data set
DATA_SEED = "scoreboard-densities-1"
#: at 6.5 standard deviations a Gaussian's tail holds 4e-11: under 1e-8 over the 2 x 64 faces of the largest box
BOX_SDS = 6.5
#: rows evaluated at once, to keep the (rows, components) matrices in the cache
CHUNK = 4096


class GaussianMixture:
    """p(x) = sum_k w_k N(x; mu_k, Sigma) with one Sigma for all components.

    Everything is evaluated in float64 and returned in the dtype of x: in float32 the expanded square below would
    lose four digits where the components are narrow.

    Args:
        means: mu, shape (K, D).
        covariance: Sigma, shape (D, D), positive definite.
        weights: w, shape (K,), positive; normalised here.
        modes: for each component the index of its mode, shape (K,), int64; by default each is a mode of its own.
    """

    smooth = True

    def __init__(self, means: Tensor, covariance: Tensor, weights: Tensor, modes: Tensor | None = None) -> None:
        self.means = means.double()
        self.covariance = covariance.double()
        self.weights = weights.double() / weights.double().sum()
        self.modes = torch.arange(len(means)) if modes is None else modes
        self.dim = means.shape[1]
        self.half_width = float(self.means.abs().max() + BOX_SDS * self.covariance.diagonal().max().sqrt())
        self.narrowest = float(torch.linalg.eigvalsh(self.covariance).min().sqrt())
        self.factor = torch.linalg.cholesky(self.covariance)
        eye = torch.eye(self.dim, dtype=torch.float64)
        self._whiten = torch.linalg.solve_triangular(self.factor, eye, upper=False).T.contiguous()  # y = x @ L^-T
        self._centres = self.means @ self._whiten
        log_norm = 0.5 * self.dim * math.log(2 * math.pi) + self.factor.diagonal().log().sum()
        self._offset = self.weights.log() - log_norm - 0.5 * self._centres.square().sum(1)
        self._members = torch.nn.functional.one_hot(self.modes).double()
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """(whitening matrix, whitened means, offsets, mode membership) on a device, copied there once."""
        if device not in self._placed:
            parts = (self._whiten, self._centres, self._offset, self._members)
            self._placed[device] = tuple(p.to(device) for p in parts)
        return self._placed[device]

    def _log_joint(self, y: Tensor) -> Tensor:
        """Log w_k N(x; mu_k, Sigma) of whitened y (n, D), shape (n, K): -|y - c_k|^2 / 2 expanded into a matmul."""
        _, centres, offset, _ = self._on(y.device)
        return torch.addmm(offset, y, centres.T) - 0.5 * y.square().sum(1, keepdim=True)

    def _by_chunk(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([part(rows) for rows in x.double().split(CHUNK)])

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density in nats of x (n, D), shape (n,), in x's dtype."""
        whiten = self._on(x.device)[0]
        return self._by_chunk(lambda rows: self._log_joint(rows @ whiten).logsumexp(1), x).to(x.dtype)

    def score(self, x: Tensor) -> Tensor:
        """Exact score of x (n, D), shape (n, D): Sigma^-1 (sum_k p(k | x) mu_k - x)."""
        whiten, centres, _, _ = self._on(x.device)

        def part(rows: Tensor) -> Tensor:
            y = rows @ whiten
            return (self._log_joint(y).softmax(1) @ centres - y) @ whiten.T

        return self._by_chunk(part, x).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n exact samples, shape (n, D), float32, on the generator's device.

        Drawn in float64 and then rounded: what the last bits of log, cos and a matmul are differs between
        processors, and rounding hides it, so that the data sets are the same everywhere.
        """
        device = generator.device
        # by inverting the cumulative weights; the last is left out, so that rounding cannot make a K-th component
        edges = self.weights.cumsum(0)[:-1].to(device)
        k = torch.searchsorted(
            edges, torch.rand(n, generator=generator, dtype=torch.float64, device=device), right=True
        )
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64, device=device)
        return (self.means.to(device)[k] + noise @ self.factor.T.to(device)).float()

    def mode_weights(self) -> Tensor:
        """Probability of each mode, shape (M,), float64."""
        return self.weights @ self._members

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the mode with the largest posterior probability given x (n, D), shape (n,), int64."""
        whiten, _, _, members = self._on(x.device)
        return self._by_chunk(lambda rows: (self._log_joint(rows @ whiten).softmax(1) @ members).argmax(1), x)


class Checkerboard:
    """Uniform on 8 of the 4 x 4 cells of [-4, 4)^2, those whose column and row number add to an even number.

    log p is constant inside a cell and -inf outside. The score is 0 inside the cells; it does not exist on their
    edges (all the shape is there) nor outside, where it is given as nan. Score-based comparisons with the truth
    mean nothing here, which is what `smooth = False` says.
    """

    dim = 2
    smooth = False
    half_width = 4.0
    narrowest = 2.0
    #: side of a cell; rows and columns are numbered 0..3 from -4
    side = 2.0

    def __init__(self) -> None:
        index = torch.arange(4)
        grid = torch.cartesian_prod(index, index)
        #: (column, row) of each filled cell, shape (8, 2)
        self.cells = grid[grid.sum(1) % 2 == 0]

    def _inside(self, x: Tensor) -> Tensor:
        cell = ((x + self.half_width) / self.side).floor()
        on_board = ((cell >= 0) & (cell < 4)).all(1)
        return on_board & (cell.sum(1) % 2 == 0)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density in nats of x (n, 2), shape (n,): -log 32 in the cells and -inf elsewhere."""
        outside = torch.full_like(x[:, 0], -math.inf)
        return outside.masked_fill(self._inside(x), -math.log(len(self.cells) * self.side**2))

    def score(self, x: Tensor) -> Tensor:
        """0 inside the cells and nan outside them, shape (n, 2); no score exists on an edge."""
        return torch.full_like(x, math.nan).masked_fill(self._inside(x)[:, None], 0.0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n exact samples, shape (n, 2), float32, on the generator's device.

        Uniform on a lattice of 2^20 points a side that float32 holds exactly and that never touches an edge:
        a rounded uniform could land in an empty neighbour.
        """
        device = generator.device
        cell = torch.randint(len(self.cells), (n,), generator=generator, device=device)
        lattice = torch.randint(2**20, (n, 2), generator=generator, device=device)
        within = (lattice.double() + 0.5) / 2**20
        return ((self.cells.to(device)[cell] + within) * self.side - self.half_width).float()

    def mode_weights(self) -> Tensor:
        """1/8 for each filled cell, shape (8,), float64."""
        return torch.full((len(self.cells),), 1 / len(self.cells), dtype=torch.float64)

    def mode_of(self, x: Tensor) -> Tensor:
        """Return the filled cell whose centre is nearest to x (n, 2), shape (n,), int64."""
        centres = (self.cells.to(x.device, x.dtype) + 0.5) * self.side - self.half_width
        return (x[:, None, :] - centres).square().sum(2).argmin(1)


def _isotropic(sd: float, dim: int = 2) -> Tensor:
    return sd**2 * torch.eye(dim, dtype=torch.float64)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def _curves(curves: list[Tensor], curve_weights: list[float], along: Tensor | None = None) -> GaussianMixture:
    """Smear each curve (points of shape (n_i, 2)) by CURVE_SD; every curve is a mode of the mixture.

    Args:
        curves: points no further apart than CURVE_SD.
        curve_weights: probability of each curve.
        along: relative weights of a curve's points, the same for all curves; equal by default.
    """
    shares = [torch.ones(len(c), dtype=torch.float64) if along is None else along for c in curves]
    weights = torch.cat([w * s / s.sum() for w, s in zip(curve_weights, shares, strict=True)])
    modes = torch.cat([torch.full((len(c),), i) for i, c in enumerate(curves)])
    return GaussianMixture(torch.cat(curves), _isotropic(CURVE_SD), weights, modes)


def two_gaussians() -> GaussianMixture:
    """1/5 N((-5, -5), I) + 4/5 N((5, 5), I): the score barely sees the weights, Langevin chains get them wrong."""
    return GaussianMixture(torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), _isotropic(1.0), torch.tensor([1.0, 4.0]))


def eight_gaussians() -> GaussianMixture:
    """Eight equal Gaussians of standard deviation 0.5 on a circle of radius 4."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return GaussianMixture(_polar(torch.full_like(angle, 4.0), angle), _isotropic(0.5), torch.ones(8))


def two_moons() -> GaussianMixture:
    """Two interleaved half circles of radius 2.6, centred on the origin as a pair; each moon is a mode."""
    angle = _linspace(0.0, math.pi, 48)
    upper = _polar(torch.ones_like(angle), angle)
    lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
    middle = torch.tensor([0.5, 0.25], dtype=torch.float64)
    return _curves([2.6 * (upper - middle), 2.6 * (lower - middle)], [0.5, 0.5])


def rings() -> GaussianMixture:
    """Three concentric circles of radii 1.1, 2.4 and 3.7 with probabilities 0.2, 0.3 and 0.5; each is a mode."""
    circles = []
    for radius in (1.1, 2.4, 3.7):
        n = math.ceil(2 * math.pi * radius / CURVE_SD)
        angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        circles.append(_polar(torch.full_like(angle, radius), angle))
    return _curves(circles, [0.2, 0.3, 0.5])


def pinwheel() -> GaussianMixture:
    """Five arms: radius 1 + 0.3 z with z standard normal within +-2, turned by exp(radius) / 4, scaled by 2.2."""
    z = _linspace(-2.0, 2.0, 48)
    radius = 1.0 + 0.3 * z
    twist = 0.25 * radius.exp()
    arms = [2.2 * _polar(radius, twist + 2 * math.pi * i / 5) for i in range(5)]
    return _curves(arms, [0.2] * 5, along=(-0.5 * z.square()).exp())


def spirals() -> GaussianMixture:
    """Two Archimedean arms r = 4 angle / (3 pi) from angle pi/2 to 3 pi, uniform along their length."""
    fine = _linspace(0.5 * math.pi, 3.0 * math.pi, 4001)
    # arc length of r = c t is c * (t sqrt(1 + t^2) + asinh t) / 2; inverted by interpolation between fine points
    length = fine * (1 + fine.square()).sqrt() + fine.asinh()
    target = _linspace(float(length[0]), float(length[-1]), 96)
    right = torch.searchsorted(length, target).clamp(1, len(fine) - 1)
    share = (target - length[right - 1]) / (length[right] - length[right - 1])
    angle = fine[right - 1] + share * (fine[right] - fine[right - 1])
    arm = _polar(angle * (4.0 / (3.0 * math.pi)), angle)
    return _curves([arm, -arm], [0.5, 0.5])


def mixture(dim: int) -> GaussianMixture:
    """Weights 0.5, 0.3, 0.2 in D dimensions; what there is to learn grows with D and the overlap does not.

    Sigma_ij = 0.6^|i - j|. The three means form a triangle of Mahalanobis side 5 (neighbours overlap by 0.6 %) that
    is spread evenly over all coordinates: its plane is that of the two lowest DCT-II rows in whitened space.
    The mixture's mean is 0.

    Args:
        dim: D >= 2.
    """
    index = torch.arange(dim, dtype=torch.float64)
    covariance = 0.6 ** (index[:, None] - index).abs()
    level = torch.full_like(index, 1 / math.sqrt(dim))
    slope = math.sqrt(2 / dim) * (math.pi * (index + 0.5) / dim).cos()
    corners = _polar(torch.full((3,), 5 / math.sqrt(3), dtype=torch.float64), _linspace(0.0, 4 * math.pi / 3, 3))
    means = corners @ torch.stack([level, slope]) @ torch.linalg.cholesky(covariance).T
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(means - weights @ means, covariance, weights)


def data_seed(task: str, part: str) -> int:
    """Return the 63-bit seed of a part ("train", "valid", "test") of a task's data."""
    text = "\x1f".join([DATA_SEED, task, part])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _load(name: str, about: str, make: Callable[[], Density]) -> Task:
    density = make()
    train, valid, test = (
        density.sample(n, torch.Generator().manual_seed(data_seed(name, part))) for part, n in SIZES.items()
    )
    return Task(name, about, DataInfo(density.dim, "continuous"), train, valid, test, density=density)


def _entry(name: str, about: str, make: Callable[[], Density], dim: int = 2, series: str = "") -> TaskEntry:
    info = DataInfo(dim, "continuous")
    return TaskEntry(about, partial(_load, name, about, make), "density", info=info, series=series)


def _mixture(dim: int) -> TaskEntry:
    about = f"three correlated Gaussians in {dim} dimensions"
    return _entry(f"mixture-{dim}", about, partial(mixture, dim), dim, series="mixture")


TWO_GAUSSIANS = _entry("two-gaussians", "1/5 at (-5, -5) and 4/5 at (5, 5), unit covariance", two_gaussians)
EIGHT_GAUSSIANS = _entry("eight-gaussians", "eight Gaussians on a circle", eight_gaussians)
TWO_MOONS = _entry("two-moons", "two interleaved half circles", two_moons)
RINGS = _entry("rings", "three concentric circles of unequal weight", rings)
PINWHEEL = _entry("pinwheel", "five twisted arms", pinwheel)
SPIRALS = _entry("spirals", "two spiral arms", spirals)
CHECKERBOARD = _entry("checkerboard", "uniform on alternate squares; no score at the edges", Checkerboard)
MIXTURE_2, MIXTURE_8, MIXTURE_32, MIXTURE_64 = map(_mixture, (2, 8, 32, 64))
