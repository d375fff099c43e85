"""Plain references: what any model has to beat. All give exact log p and are fitted in `initialise`, without steps.

Papers: Dempster, Laird and Rubin 1977 (EM) for both mixtures; Parzen 1962 for the kernel density. The Gaussian
mixture is fitted by scikit-learn and evaluated here; the rest is fitted here.

Departures:
- Continuous marginals are one Gaussian a dimension: the row shows what dependence and shape are worth together.
- The mixture of categoricals maximises the posterior under Dirichlet priors centred on the training marginals;
  without them a thousand images leave most levels of most components at probability zero.
- The kernel density keeps at most `SUPPORT` training points and picks its bandwidth on held-out training points.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import Tensor

from replicate.model import DataInfo, Family, Model, ModelEntry, Training

LOG_2PI = math.log(2 * math.pi)
#: most kernels of the kernel density
SUPPORT = 5000
#: most held-out rows that choose its bandwidth
HELD = 500
#: rows that the kernel density compares with all its kernels at a time
ROWS = 1000


def smoothed_frequencies(train: Tensor, levels: int, pseudo_count: float) -> Tensor:
    """Frequencies (D, levels) of the levels in train (n, D), with `pseudo_count` added to every count."""
    counts = F.one_hot(train.long(), levels).sum(0).double() + pseudo_count
    return counts / counts.sum(1, keepdim=True)


def sample_levels(p: Tensor, generator: torch.Generator) -> Tensor:
    """One level for each row of probabilities p (n, D, L), shape (n, D)."""
    n, d, levels = p.shape
    return torch.multinomial(p.reshape(n * d, levels), 1, replacement=True, generator=generator).view(n, d)


class Reference(Model):
    """A model with exact log p that is fitted in `initialise`; its score on continuous data is autograd's."""

    family: ClassVar[Family] = "reference"

    def __init__(self, info: DataInfo) -> None:
        super().__init__()
        self.info = info
        self.capabilities = frozenset({"log_prob", "sample"})
        if info.domain == "continuous":
            self.capabilities |= {"score"}

    @property
    def levels(self) -> int:
        """Number of levels of discrete data."""
        assert self.info.levels is not None
        return self.info.levels


class GaussianMarginals(Reference):
    """Independent N(mean_d, std_d^2)."""

    mean: Tensor
    std: Tensor

    def __init__(self, info: DataInfo) -> None:
        super().__init__(info)
        self.register_buffer("mean", torch.zeros(info.dim))
        self.register_buffer("std", torch.ones(info.dim))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.mean.copy_(train.mean(0))
        self.std.copy_(train.std(0, unbiased=False).clamp_min(1e-6))

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * LOG_2PI).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn((n, self.info.dim), generator=generator, device=self.mean.device)
        return self.mean + self.std * noise


class LevelMarginals(Reference):
    """Independent categoricals: frequencies smoothed by `pseudo_count` a level."""

    log_p: Tensor

    def __init__(self, info: DataInfo, pseudo_count: float = 0.5) -> None:
        super().__init__(info)
        self.pseudo_count = pseudo_count
        self.register_buffer("log_p", torch.full((info.dim, self.levels), -math.log(self.levels)))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        self.log_p.copy_(smoothed_frequencies(train, self.levels, self.pseudo_count).log())

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_p.gather(1, x.long().T).sum(0)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        p = self.log_p.exp().expand(n, -1, -1)
        return sample_levels(p, generator).to(self.log_p.dtype)


def build_marginals(info: DataInfo, pseudo_count: float = 0.5) -> Model:
    """Independent marginals in the data's own domain."""
    return GaussianMarginals(info) if info.domain == "continuous" else LevelMarginals(info, pseudo_count)


class CategoricalMixture(Reference):
    """p(x) = sum_k w_k prod_d p_kd(x_d), fitted by EM; on bits a mixture of Bernoullis.

    Args:
        info: bits or levels.
        components: K.
        strength: pseudo-counts of each Dirichlet prior, shared out by the training marginals.
        iterations: EM steps.
    """

    log_w: Tensor
    log_p: Tensor
    objective: Tensor

    def __init__(self, info: DataInfo, components: int = 20, strength: float = 20.0, iterations: int = 60) -> None:
        super().__init__(info)
        self.strength, self.iterations = strength, iterations
        self.register_buffer("log_w", torch.full((components,), -math.log(components)))
        self.register_buffer("log_p", torch.full((components, info.dim, self.levels), -math.log(self.levels)))
        self.register_buffer("objective", torch.zeros(iterations, dtype=torch.float64), persistent=False)

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """EM from responsibilities that tie each component to one random training row.

        `objective` keeps, for each step, the log posterior per example that the step started from.
        """
        k = len(self.log_w)
        onehot = F.one_hot(train.long(), self.levels).double().flatten(1)
        centre = smoothed_frequencies(train, self.levels, 0.5)
        rows = torch.randperm(len(train), generator=generator, device=train.device)[torch.arange(k) % len(train)]
        start = 0.5 * onehot[rows].view(k, *centre.shape) + 0.5 * centre
        log_w, log_p = self.log_w.double(), start.log()
        for i in range(self.iterations):
            joint = onehot @ log_p.flatten(1).T + log_w
            evidence = joint.logsumexp(1, keepdim=True)
            prior = self.strength * (centre * log_p).sum()
            self.objective[i] = (evidence.sum() + prior) / len(train)
            responsibility = (joint - evidence).exp()
            # M step: the posterior modes
            mass = responsibility.sum(0)
            counts = (responsibility.T @ onehot).view(-1, *centre.shape) + self.strength * centre
            log_w, log_p = (mass / mass.sum()).log(), (counts / (mass + self.strength)[:, None, None]).log()
        self.log_w.copy_(log_w)
        self.log_p.copy_(log_p)

    def log_prob(self, x: Tensor) -> Tensor:
        onehot = F.one_hot(x.long(), self.levels).to(self.log_p.dtype).flatten(1)
        return (onehot @ self.log_p.flatten(1).T + self.log_w).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.log_w.exp(), n, replacement=True, generator=generator)
        return sample_levels(self.log_p.exp()[k], generator).to(self.log_p.dtype)


class FullGaussianMixture(Reference):
    """p(x) = sum_k w_k N(x; mu_k, Sigma_k), fitted by scikit-learn's EM.

    Args:
        info: continuous data.
        components: K.
        covariance: "full" (one for each component) or "tied" (one for all).
        ridge: variance added to every dimension of every covariance in each M step.
        fit_rows: most training rows that the fit uses, drawn at random.
    """

    log_w: Tensor
    means: Tensor
    whiten: Tensor

    def __init__(
        self,
        info: DataInfo,
        components: int = 40,
        covariance: str = "full",
        ridge: float = 1e-4,
        fit_rows: int = 20_000,
    ) -> None:
        super().__init__(info)
        if covariance not in ("full", "tied"):
            raise ValueError(f"covariance is {covariance!r}; it must be full or tied")
        self.covariance, self.ridge, self.fit_rows = covariance, ridge, fit_rows
        self.register_buffer("log_w", torch.full((components,), -math.log(components)))
        self.register_buffer("means", torch.zeros(components, info.dim))
        #: upper triangular P_k with P_k P_k^T = Sigma_k^-1
        self.register_buffer("whiten", torch.eye(info.dim).repeat(components, 1, 1))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        device = train.device
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
        rows = torch.randperm(len(train), generator=generator, device=device)[: self.fit_rows]
        fit = GaussianMixture(
            len(self.log_w), covariance_type=self.covariance, reg_covar=self.ridge, max_iter=200, random_state=seed
        ).fit(train[rows].double().cpu().numpy())
        self.log_w.copy_(torch.from_numpy(fit.weights_).log())
        self.means.copy_(torch.from_numpy(fit.means_))
        self.whiten.copy_(torch.from_numpy(fit.precisions_cholesky_).expand(self.whiten.shape))

    def log_prob(self, x: Tensor) -> Tensor:
        z = torch.einsum("nkd,kde->nke", x[:, None] - self.means, self.whiten)
        log_det = self.whiten.diagonal(dim1=1, dim2=2).log().sum(1)
        joint = self.log_w + log_det - 0.5 * z.square().sum(-1) - 0.5 * self.info.dim * LOG_2PI
        return joint.logsumexp(1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.log_w.exp(), n, replacement=True, generator=generator)
        noise = torch.randn((n, self.info.dim, 1), generator=generator, device=self.means.device)
        # Sigma = P^-T P^-1, so P^-T noise has covariance Sigma
        return self.means[k] + torch.linalg.solve_triangular(self.whiten.mT[k], noise, upper=False).squeeze(-1)


class KernelDensity(Reference):
    """p(x) = (1/n) sum_i N(x; c_i, h^2 I) over at most `SUPPORT` training rows c_i.

    h is the best of `BANDWIDTHS` by the likelihood of held-out training rows (a fifth, at most `HELD`). All
    distances are taken in double precision: narrow kernels lose nats in single precision.
    """

    BANDWIDTHS: ClassVar[list[float]] = [10 ** (-2.0 + 0.1 * i) for i in range(27)]
    costly_score = True
    centres: Tensor
    bandwidth: Tensor

    def __init__(self, info: DataInfo) -> None:
        super().__init__(info)
        self.register_buffer("centres", torch.zeros(1, info.dim))
        self.register_buffer("bandwidth", torch.ones(()))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        rows = train[torch.randperm(len(train), generator=generator, device=train.device)]
        held = min(HELD, len(rows) // 5)
        square = self._squares(rows[:held], rows[held:][:SUPPORT])
        scores = torch.stack([self._log_mean(square, h).mean() for h in self.BANDWIDTHS])
        self.bandwidth.fill_(self.BANDWIDTHS[int(scores.argmax())])
        self.centres = rows[:SUPPORT].clone()

    @staticmethod
    def _squares(x: Tensor, centres: Tensor) -> Tensor:
        """Squared distances (n, m) of x (n, D) to centres (m, D), in double precision."""
        a, b = x.double(), centres.double()
        return (a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)).clamp_min(0)

    def _log_mean(self, square: Tensor, h: Tensor | float) -> Tensor:
        """Return log of the mean kernel, shape (n,), for squared distances (n, m)."""
        h = torch.as_tensor(h, dtype=torch.float64, device=square.device)
        norm = math.log(square.shape[1]) + self.info.dim * (h.log() + 0.5 * LOG_2PI)
        return (-0.5 * square / h.square()).logsumexp(1) - norm

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Make room for as many centres as were saved: their number is known only after fitting."""
        saved = state_dict.get(f"{prefix}centres", self.centres)
        self.centres = self.centres.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def log_prob(self, x: Tensor) -> Tensor:
        parts = [self._log_mean(self._squares(part, self.centres), self.bandwidth) for part in x.split(ROWS)]
        return torch.cat(parts).to(x.dtype)

    def score(self, x: Tensor) -> Tensor:
        """sum_i r_i(x) (c_i - x) / h^2 with responsibilities r: autograd of `log_prob` without its memory."""
        parts = []
        for part in x.detach().split(ROWS):
            r = (-0.5 * self._squares(part, self.centres) / self.bandwidth.double().square()).softmax(1)
            parts.append((r @ self.centres.double() - part) / self.bandwidth.double().square())
        return torch.cat(parts).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        device = self.centres.device
        i = torch.randint(len(self.centres), (n,), generator=generator, device=device)
        noise = torch.randn((n, self.info.dim), generator=generator, device=device)
        return self.centres[i] + self.bandwidth * noise


MARGINALS = ModelEntry(
    family="reference",
    about="independent marginals: smoothed frequencies, or one Gaussian a dimension",
    paper="none: the floor of any comparison",
    build=build_marginals,
    domains=frozenset({"continuous", "levels", "bits"}),
    training=Training(steps=0),
)
BERNOULLI_MIXTURE = ModelEntry(
    family="reference",
    about="mixture of Bernoullis or categoricals by EM",
    paper="Dempster, Laird and Rubin 1977, J. R. Stat. Soc. B 39(1)",
    build=CategoricalMixture,
    domains=frozenset({"levels", "bits"}),
    params={"components": 20, "strength": 20.0, "iterations": 60},
    training=Training(steps=0),
    overrides={"bits": {"components": 80, "strength": 2.0}},
)
GAUSSIAN_MIXTURE = ModelEntry(
    family="reference",
    about="Gaussian mixture with full covariances by EM",
    paper="Dempster, Laird and Rubin 1977, J. R. Stat. Soc. B 39(1)",
    build=FullGaussianMixture,
    domains=frozenset({"continuous"}),
    params={"components": 40, "covariance": "full", "ridge": 1e-5},
    training=Training(steps=0),
    overrides={
        # a thousand images determine one covariance of 64 dimensions, not forty
        "levels": {"covariance": "tied", "ridge": 0.02},
        "bits": {"covariance": "tied", "ridge": 0.02},
        **{f"mixture-{d}": {"components": 10, "covariance": "tied"} for d in (8, 32, 64)},
        "red-wine": {"components": 10, "ridge": 0.03},
        "white-wine": {"components": 20, "ridge": 0.01},
        "parkinsons": {"components": 20, "ridge": 0.003},
    },
)
KDE = ModelEntry(
    family="reference",
    about="Gaussian kernel density, bandwidth by held-out training points",
    paper="Parzen 1962, Ann. Math. Stat. 33(3)",
    build=KernelDensity,
    domains=frozenset({"continuous"}),
    training=Training(steps=0),
)
