"""Energy-based models trained by contrastive divergence: restricted Boltzmann machines and a neural energy.

RBM. Hinton (2002), Training products of experts by minimizing contrastive divergence, Neural Computation 14 (CD-k);
Tieleman (2008), Training RBMs using approximations to the likelihood gradient, ICML (persistent CD); softmax visible
units as in Salakhutdinov, Mnih & Hinton (2007), ICML, sec. 2; annealing path from the base-rate model of Salakhutdinov
& Murray (2008), ICML, sec. 3. Deviations: hidden and visible units enter the interaction minus fixed offsets (the data
mean and 1/2; Montavon & Mueller 2012), which describes the same set of distributions and conditions the gradient;
the level of a 17-level unit acts on the hidden units through its first few cosines (all 16 give the full softmax
RBM), because neighbouring grey levels mean nearly the same; Adam instead of SGD with momentum.

Neural energy. Du & Mordatch (2019), 1903.08689 (persistent Langevin negatives); Nijkamp et al. (2019), 1904.09770.
Deviations: the energy tilts a tractable base, f(x) = -log p0(x) + g(x), with p0 a Gaussian (mixture) fitted to the
training split (Xie et al. 2016, 1602.03264 tilt a fixed Gaussian); negatives come from Metropolis-adjusted Langevin
at temperature 1, with independent proposals from p0 mixed in, from chains that start as exact samples of p0 = the
model before its first step; they are neither restarted nor noised. So the chain targets the model itself and its log
Z can be bracketed by annealing from p0. On densities g begins with a layer of sines (Tancik et al. 2020), without
which it smooths narrow shapes away.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.layers import from_settings
from replicate.model import DataInfo, Family, Model, ModelEntry, Training


class AnnealedEnergy(Model):
    """An energy whose log Z can be annealed; validation does so with `check`: (chains, annealing steps)."""

    family: ClassVar[Family] = "ebm"
    check: tuple[int, int]

    @torch.no_grad()
    def annealed(self, n: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (log weights (n,) in float64, x (n, D)) of base samples after so many even steps to the model."""
        x = self.base_sample(n, generator)
        total = torch.zeros(n, dtype=torch.float64, device=x.device)
        for k in range(steps):
            increment, x = self.anneal(x, k / steps, (k + 1) / steps, generator)
            total += increment
        return total, x

    @torch.no_grad()
    def validation_loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean energy plus log Z of a short annealing run: an estimate of the NLL in nats, slightly too low."""
        total, _ = self.annealed(*self.check, generator)
        log_z = torch.logsumexp(total, 0) - math.log(len(total)) + self.base_log_z()
        return self.energy(batch).mean() + log_z


def _level_features(levels: int, count: int) -> Tensor:
    """Return the features of each level for the hidden units, shape (levels, count): 0/1 for bits, else cosines."""
    if levels == 2:
        return torch.tensor([[0.0], [1.0]])
    place = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    order = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.cos(math.pi * place[:, None] * order).float()


def _draw_levels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw per softmax unit by inverting its distribution function; logits (n, D, L) -> integers (n, D)."""
    p = (logits - logits.amax(2, keepdim=True)).exp()
    cdf = p.cumsum(2)
    u = torch.rand(cdf.shape[:2], generator=generator, device=cdf.device, dtype=cdf.dtype) * cdf[..., -1]
    return (cdf[..., :-1] <= u[..., None]).sum(2).to(cdf.dtype)


def _bernoulli(p: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype) < p).to(p.dtype)


def _softplus_change(pre: Tensor, beta: float, beta_next: float) -> Tensor:
    """softplus(beta_next pre) - softplus(beta pre), summed over the last dimension in float64.

    log1p(sigmoid(b q) expm1(d q)) with q = -|pre| and d > 0 has no cancellation: the change itself, not the two large
    softplus values, carries the rounding error of `pre`'s dtype.
    """
    low, step = min(beta, beta_next), abs(beta_next - beta)
    q = -pre.abs()
    change = step * pre.relu() + torch.log1p(torch.sigmoid(low * q) * torch.expm1(step * q))
    return math.copysign(1.0, beta_next - beta) * change.sum(-1, dtype=torch.float64)


class RBM(AnnealedEnergy):
    """Restricted Boltzmann machine with Bernoulli hidden and Bernoulli or softmax visible units.

    f(v) = exp(-F(v)) with the free energy F(v) = -sum_d b[d, v_d] - sum_j softplus(c_j + sum_d phi(v_d) . W[d, :, j]).
    A Bernoulli unit is a softmax over two levels with phi = (0, 1).

    Args:
        info: discrete data.
        hidden: number of hidden units H.
        features: cosines of the level per visible unit (levels - 1 spans the full softmax RBM); ignored for bits.
        gibbs: k, full Gibbs sweeps per negative phase.
        chains: persistent chains; 0 starts the negatives at the data (CD-k).
        sweeps: (annealing steps, Gibbs sweeps after them) of `sample`.
        check: (chains, annealing steps) of the log Z inside `validation_loss`.
    """

    capabilities = frozenset({"energy", "annealing", "sample"})
    phi: Tensor
    base_bias: Tensor
    offset: Tensor
    replay: Tensor

    def __init__(
        self,
        info: DataInfo,
        hidden: int = 200,
        features: int = 4,
        gibbs: int = 1,
        chains: int = 0,
        sweeps: tuple[int, int] = (300, 100),
        check: tuple[int, int] = (100, 200),
    ) -> None:
        super().__init__()
        if info.levels is None:
            raise ValueError("an RBM needs discrete data; use neural-ebm on continuous data")
        self.gibbs, self.sweeps, self.check = gibbs, sweeps, check
        self.nfe = sum(self.sweeps)
        self.register_buffer("phi", _level_features(info.levels, features))
        width = info.dim * self.phi.shape[1]
        self.weights = nn.Parameter(0.01 * torch.randn(width, hidden))
        self.bias_change = nn.Parameter(torch.zeros(info.dim, info.levels))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("base_bias", torch.zeros(info.dim, info.levels))
        self.register_buffer("offset", torch.zeros(width))
        self.register_buffer("replay", torch.zeros(chains, info.dim))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Visible biases at the log base rates (half a count a level), offsets at the data mean, chains at the base."""
        counts = F.one_hot(train.long(), self.phi.shape[0]).sum(0) + 0.5
        self.base_bias.copy_((counts / counts.sum(1, keepdim=True)).log())
        self.offset.copy_(self._features(train).mean(0))
        self.replay.copy_(self.base_sample(len(self.replay), generator))

    def _features(self, x: Tensor) -> Tensor:
        """Return phi of every unit, shape (n, D * features), in the weights' dtype."""
        return self.phi[x.long()].flatten(1)

    def biases(self) -> tuple[Tensor, Tensor]:
        """(b of shape (D, L), c of shape (H,)) of the plain RBM, with the offsets multiplied out."""
        shift = (self.weights.sum(1) / 2).view(len(self.base_bias), -1)
        return self.base_bias + self.bias_change - shift @ self.phi.T, self.hidden_bias - self.offset @ self.weights

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """(W of shape (D, L, H), b of shape (D, L), c of shape (H,)) of the plain softmax RBM."""
        dim, hidden = len(self.base_bias), self.weights.shape[1]
        w = torch.einsum("lf,dfj->dlj", self.phi, self.weights.view(dim, -1, hidden))
        return w, *self.biases()

    def free_energy(self, x: Tensor) -> Tensor:
        """F(x) = -log sum_h exp(-E(x, h)), shape (n,)."""
        b, c = self.biases()
        onehot = F.one_hot(x.long(), len(self.phi)).to(b.dtype).flatten(1)
        pre = c + self._features(x).to(b.dtype) @ self.weights
        return -onehot @ b.flatten() - F.softplus(pre).sum(1)

    def energy(self, x: Tensor) -> Tensor:
        return self.free_energy(x)

    def _draw_visible(self, hidden: Tensor, bias: Tensor, beta: float, generator: torch.Generator) -> Tensor:
        """Draw x ~ softmax(bias + beta * phi W h), shape (n, D)."""
        drive = (beta * hidden @ self.weights.T).view(len(hidden), *bias.shape[:1], -1)
        return _draw_levels(bias + drive @ self.phi.T, generator)

    @torch.no_grad()
    def gibbs_sweeps(self, x: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
        """Return x (n, D) after that many draws of h given x and x given h."""
        b, c = self.biases()
        for _ in range(sweeps):
            h = _bernoulli(torch.sigmoid(c + self._features(x) @ self.weights), generator)
            x = self._draw_visible(h, b, 1.0, generator)
        return x

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean free energy of data minus that of negatives, whose gradient is the CD-k / PCD update."""
        if len(self.replay):
            self.replay.copy_(self.gibbs_sweeps(self.replay, self.gibbs, generator))
            negatives = self.replay
        else:
            negatives = self.gibbs_sweeps(batch, self.gibbs, generator)
        both = self.free_energy(torch.cat([batch, negatives]))
        return both[: len(batch)].mean() - both[len(batch) :].mean()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Anneal base samples to the model, then run Gibbs sweeps; (n, D). nfe counts both."""
        annealing, after = self.sweeps
        return self.gibbs_sweeps(self.annealed(n, annealing, generator)[1], after, generator)

    # log f_beta(v) = ((1 - beta) b0 + beta b)(v) + sum_j softplus(beta pre_j(v))
    def base_log_z(self) -> float:
        """H log 2 plus the log partition function of the independent base-rate model."""
        return self.weights.shape[1] * math.log(2) + float(torch.logsumexp(self.base_bias.double(), 1).sum())

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return _draw_levels(self.base_bias.expand(n, -1, -1), generator)

    @torch.no_grad()
    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weight increment and one Gibbs sweep at beta_next: two matrix products."""
        b, c = self.biases()
        pre = c + self._features(x) @ self.weights
        change = (b - self.base_bias).double()
        tilt = change.expand(len(x), -1, -1).gather(2, x.long()[..., None]).sum((1, 2))
        increment = (beta_next - beta) * tilt + _softplus_change(pre, beta, beta_next)
        h = _bernoulli(torch.sigmoid(beta_next * pre), generator)
        return increment, self._draw_visible(h, torch.lerp(self.base_bias, b, beta_next), beta_next, generator)


class GaussianMixture(nn.Module):
    """Tractable base: a mixture of Gaussians with full covariances, fitted by EM.

    Covariances are shrunk towards the pooled within-component one (an inverse-Wishart prior worth `prior` examples)
    and that one towards its diagonal, then widened by `inflation`^2.
    """

    log_weight: Tensor
    mean: Tensor
    factor: Tensor
    inverse: Tensor

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        self.register_buffer("log_weight", torch.full((components,), -math.log(components)))
        self.register_buffer("mean", torch.zeros(components, dim))
        self.register_buffer("factor", torch.eye(dim).repeat(components, 1, 1))
        self.register_buffer("inverse", torch.eye(dim).repeat(components, 1, 1))

    def fit(self, x: Tensor, generator: torch.Generator, prior: float, inflation: float, rounds: int = 40) -> None:
        """EM from randomly chosen centres on x (n, D); a mixture sees at most 10,000 rows.

        Raises:
            ValueError: a component sits on copies of one row, and no prior keeps its covariance regular.
        """
        k = len(self.mean)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        self.mean.copy_(x[order[:k]])
        if k == 1:
            rounds = 1
        else:
            x = x[order[:10_000]]
        for _ in range(rounds):
            self._m_step(x, torch.softmax(self._joint(x), 1), prior)
        self.factor.mul_(inflation)
        self.inverse.div_(inflation)

    def _m_step(self, x: Tensor, r: Tensor, prior: float) -> None:
        r, x = r.double(), x.double()
        count = r.sum(0) + 1e-6
        mean = (r.T @ x) / count[:, None]
        scatter = torch.stack([(x - m).T @ ((x - m) * w[:, None]) for m, w in zip(mean, r.T, strict=True)])
        pooled = scatter.sum(0) / len(x)
        diagonal = torch.diag(pooled.diagonal())
        pooled = (len(x) * pooled + prior * diagonal) / (len(x) + prior)
        pooled = pooled + 1e-6 * diagonal.mean() * torch.eye(len(pooled), dtype=x.dtype, device=x.device)
        covariance = pooled[None] if len(mean) == 1 else (scatter + prior * pooled) / (count + prior)[:, None, None]
        try:
            factor = torch.linalg.cholesky(covariance)
        except torch.linalg.LinAlgError:
            why = "a component of the Gaussian mixture has a singular covariance, as copies of one row give it"
            raise ValueError(f"{why}; set prior > 0 (now {prior:g})") from None
        self.log_weight.copy_((count / count.sum()).log())
        self.mean.copy_(mean)
        self.factor.copy_(factor)
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand_as(factor)
        self.inverse.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))

    def _joint(self, x: Tensor) -> Tensor:
        """Return log weight_k N(x; k), shape (n, K)."""
        z = torch.einsum("kij,nkj->nki", self.inverse, x[:, None] - self.mean)
        logdet = self.inverse.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.log_weight + logdet - 0.5 * z.square().sum(2) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log density of x (n, D), shape (n,)."""
        return torch.logsumexp(self._joint(x), 1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n exact samples, shape (n, D)."""
        k = torch.multinomial(self.log_weight.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.mean.shape[1], generator=generator, device=k.device, dtype=self.mean.dtype)
        return self.mean[k] + torch.einsum("nij,nj->ni", self.factor[k], z)


class Waves(nn.Module):
    """x -> (sin Wx, cos Wx) with trainable W ~ N(0, frequency^2): lets a small network draw narrow shapes (n, 2 count).

    Tancik et al. 2020, 2006.10739 keep W fixed.
    """

    def __init__(self, dim: int, count: int, frequency: float) -> None:
        super().__init__()
        self.wave_numbers = nn.Parameter(frequency * torch.randn(dim, count))

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.wave_numbers
        return torch.cat([phase.sin(), phase.cos()], 1)


@dataclass(frozen=True)
class NeuralSettings:
    """Settings of `NeuralEBM`.

    Attributes:
        hidden, layers: width and number of hidden layers of g.
        frequency: standard deviation of the wave numbers where g's first layer is sines; 0 for a plain first layer.
        components: Gaussians in the base.
        prior: examples that the base's covariance prior is worth.
        inflation: factor on the base's standard deviations.
        chains: persistent chains.
        moves: Metropolis-Hastings steps per training step and per annealing step.
        jump: probability that a step proposes a fresh base sample instead of a Langevin move.
        bound: b, where g is b tanh(network / b): nothing gets more than e^b times its density under the base, log Z
            lies in (-b, b), and annealing can follow; 0 for no bound, g = network.
        sweeps: (annealing steps, steps at the model after them) of `sample`.
        check: (chains, annealing steps) of the log Z inside `validation_loss`.
    """

    hidden: int = 128
    layers: int = 3
    frequency: float = 0.0
    components: int = 1
    prior: float = 0.0
    inflation: float = 1.1
    chains: int = 512
    moves: int = 2
    jump: float = 0.3
    bound: float = 0.0
    sweeps: tuple[int, int] = (100, 50)
    check: tuple[int, int] = (500, 50)


class NeuralEBM(AnnealedEnergy):
    """p(x) = p0(x) exp(-g(x)) / Z with a Gaussian (mixture) base p0 and a multilayer perceptron g.

    Args:
        info: continuous data of unit scale.
        s: see `NeuralSettings`.
    """

    capabilities = frozenset({"energy", "score", "annealing", "sample"})
    replay: Tensor
    spread: Tensor
    log_step: Tensor

    def __init__(self, info: DataInfo, s: NeuralSettings) -> None:
        super().__init__()
        self.prior, self.inflation, self.jump, self.bound = s.prior, s.inflation, s.jump, s.bound
        self.moves, self.sweeps, self.check = s.moves, s.sweeps, s.check
        self.nfe = sum(s.sweeps) * (s.moves + 1)
        waves = Waves(info.dim, s.hidden // 2, s.frequency) if s.frequency else None
        widths = [s.hidden if waves else info.dim] + [s.hidden] * (s.layers - bool(waves))
        blocks = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(widths)]
        head = nn.Linear(s.hidden, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.g = nn.Sequential(*([waves] if waves else []), *blocks, head)
        self.base = GaussianMixture(info.dim, s.components)
        self.register_buffer("replay", torch.zeros(s.chains, info.dim))
        self.register_buffer("spread", torch.eye(info.dim))
        # log Langevin step at beta = 0 and beta = 1; 1.65^2 D^(-1/3) is the optimum on a Gaussian (Roberts &
        # Rosenthal 1998)
        self.register_buffer("log_step", torch.full((2,), math.log(1.65**2 * info.dim ** (-1 / 3))))

    def initialise(self, train: Tensor, generator: torch.Generator) -> None:
        """Fit the base, start the chains as its exact samples and take its covariance as the preconditioner."""
        self.base.fit(train, generator, self.prior, self.inflation)
        self.replay.copy_(self.base.sample(len(self.replay), generator))
        within = self.base.factor @ self.base.factor.mT
        self.spread.copy_(torch.linalg.cholesky((self.base.log_weight.exp()[:, None, None] * within).sum(0)))

    def tilt(self, x: Tensor) -> Tensor:
        """g(x), shape (n,)."""
        out: Tensor = self.g(x).squeeze(1)
        return self.bound * torch.tanh(out / self.bound) if self.bound else out

    def energy(self, x: Tensor) -> Tensor:
        return self.tilt(x) - self.base.log_prob(x)

    def _evaluate(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """(log f_beta(x) (n,), g(x) (n,), preconditioned score L^T grad log f_beta(x) (n, D)), all detached."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            g = self.tilt(x)
            log_f = self.base.log_prob(x) - beta * g
            (grad,) = torch.autograd.grad(log_f.sum(), x)
        return log_f.detach(), g.detach(), grad @ self.spread

    def _move(self, x: Tensor, beta: float, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Metropolis-Hastings steps that leave f_beta invariant and are reversible.

        Each chain tosses a coin between x' ~ p0 and Langevin at temperature 1 in the coordinates u = L^-1 x,
        u' = u + (eps / 2) score(u) + sqrt(eps) z, and accepts by the Metropolis-Hastings ratio.

        Returns:
            (x (n, D), g at the x that came in (n,), acceptance probabilities of the last step's Langevin moves with
            nan for the others (n,)).
        """
        eps = torch.lerp(self.log_step[0], self.log_step[1], beta).exp()
        log_f, g, score = self._evaluate(x, beta)
        first, accept = g, torch.ones_like(g)
        for _ in range(moves):
            z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            coin, u = torch.rand(2, len(x), generator=generator, device=x.device, dtype=x.dtype)
            shift = eps / 2 * score + eps.sqrt() * z
            jump = coin < self.jump
            proposal = x + shift @ self.spread.T
            if self.jump:
                proposal = torch.where(jump[:, None], self.base.sample(len(x), generator), proposal)
            log_f_new, g_new, score_new = self._evaluate(proposal, beta)
            back = (shift + eps / 2 * score_new) / eps.sqrt()
            langevin = log_f_new - log_f + (z.square().sum(1) - back.square().sum(1)) / 2
            ratio = torch.where(jump, beta * (g - g_new), langevin)
            accept = torch.where(jump, math.nan, ratio.clamp(max=0).exp())
            taken = u.log() < ratio
            x = torch.where(taken[:, None], proposal, x)
            score = torch.where(taken[:, None], score_new, score)
            log_f, g = torch.where(taken, log_f_new, log_f), torch.where(taken, g_new, g)
        return x, first, accept

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Mean energy of data minus that of the persistent chains after `moves` steps."""
        moved, _, accept = self._move(self.replay, 1.0, self.moves, generator)
        self.replay.copy_(moved)
        # Robbins-Monro towards 57 % acceptance; training only: while weights are annealed the steps stay fixed
        self.log_step[1] += 0.05 * (accept.nanmean() - 0.57)
        data, negatives = self.tilt(torch.cat([batch, moved])).split([len(batch), len(moved)])
        return data.mean() - negatives.mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Anneal base samples to the model, then go on at the model; (n, D). nfe counts every gradient."""
        annealing, after = self.sweeps
        return self._move(self.annealed(n, annealing, generator)[1], 1.0, after * self.moves, generator)[0]

    # log f_beta(x) = log p0(x) - beta g(x)
    def base_log_z(self) -> float:
        """0: the base is normalised."""
        return 0.0

    def base_sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.base.sample(n, generator)

    @torch.no_grad()
    def anneal(self, x: Tensor, beta: float, beta_next: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Weight increment and `moves` Metropolis-Hastings steps at beta_next with that temperature's fixed step."""
        moved, g, _ = self._move(x, beta_next, self.moves, generator)
        return (beta - beta_next) * g.double(), moved


#: CD-k raises spurious modes far from the data unless the weights stay small: stronger decay and fewer steps than PCD
RBM_CD = ModelEntry(
    family="ebm",
    about="restricted Boltzmann machine, contrastive divergence",
    paper="Hinton 2002, Neural Computation 14(8)",
    build=RBM,
    domains=frozenset({"levels", "bits"}),
    params={"hidden": 200, "features": 3, "gibbs": 10, "chains": 0},
    training=Training(steps=1000, batch_size=100, lr=1e-3, weight_decay=1.0, ema=0.998, validate_every=250),
    overrides={"bits": {"gibbs": 5, "steps": 2000, "lr": 2e-3, "weight_decay": 0.1, "validate_every": 500}},
)

RBM_PCD = replace(
    RBM_CD,
    about="restricted Boltzmann machine, persistent contrastive divergence",
    paper="Tieleman 2008, ICML",
    params={"hidden": 200, "features": 3, "gibbs": 1, "chains": 200},
    training=Training(steps=3000, batch_size=100, lr=2e-3, weight_decay=0.1, ema=0.998, validate_every=1000),
    # 400 rows
    overrides={"nips": {"steps": 600, "weight_decay": 1.0, "validate_every": 200}},
)

#: many dimensions: a fresh sample of p0 is never accepted
WIDE: dict[str, Any] = {"frequency": 0.0, "jump": 0.0, "hidden": 128, "layers": 2, "steps": 1300, "lr": 2e-3}

#: real tables, narrow in some directions: a base that is narrow there leaves less to an energy, and within bounds it
#: cannot run off where there are no data
_TABLE = dict(WIDE, components=10, inflation=1.2, bound=10.0, weight_decay=0.1, steps=1500, validate_every=300)

_LEVELS = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.1, "steps": 1500, "validate_every": 500}

NEURAL_EBM = ModelEntry(
    family="ebm",
    about="neural energy tilting a Gaussian base, persistent Langevin negatives",
    paper="Du & Mordatch 2019, 1903.08689",
    build=from_settings(NeuralEBM, NeuralSettings),
    domains=frozenset({"continuous"}),
    params={
        "hidden": 64,
        "layers": 3,
        "frequency": 2.0,
        "components": 1,
        "inflation": 1.1,
        "chains": 256,
        "moves": 1,
        "jump": 0.5,
    },
    # less momentum than usual: the chains lag behind the weights, and momentum turns that lag into oscillation
    training=Training(steps=1300, batch_size=256, lr=3e-3, betas=(0.5, 0.99), ema=0.99),
    overrides={
        # what is narrow in two dimensions is not in many: sines would only add noise
        "mixture-8": {"frequency": 0.0, "jump": 0.3},
        "mixture-32": WIDE,
        "mixture-64": WIDE,
        "red-wine": {**_TABLE, "prior": 50.0},
        # without a prior a component of the base can sit on copies of one row, and the two sides of log Z part by nats
        "white-wine": {**_TABLE, "lr": 1e-3, "bound": 5.0, "prior": 5.0},
        "parkinsons": {**_TABLE, "lr": 5e-4, "weight_decay": 0.3, "bound": 5.0, "prior": 5.0},
        "levels": {**WIDE, **_LEVELS, "hidden": 256, "inflation": 1.02, "moves": 2, "check": (100, 100)},
    },
)
