"""The bias of contrastive divergence, computed exactly from transition matrices on a grid."""

import numpy as np
from scipy.optimize import root

from replicate.experiments import Run, experiment
from replicate.model import Estimate


def skewed(line: np.ndarray) -> np.ndarray:
    """Return a mixture of two unequal Gaussians on the points of a line, as probabilities."""
    left, right = np.exp(-0.5 * ((line + 1.2) / 0.5) ** 2), np.exp(-0.5 * ((line - 1.5) / 0.8) ** 2)
    density = 0.65 / 0.5 * left + 0.35 / 0.8 * right
    return density / density.sum()


def metropolis(log_p: np.ndarray, line: np.ndarray, step: float) -> np.ndarray:
    """Return the transition matrix (n, n) of random-walk Metropolis on a line (n,); it leaves exp(log_p) invariant.

    Its rows sum to 1. `step` is the standard deviation of the symmetric proposal; log_p (n,) needs no constant.
    """
    proposal = np.exp(-0.5 * ((line[:, None] - line[None, :]) / step) ** 2)
    proposal /= proposal.sum(1).max()  # symmetric; the chain stays with the probability that a row lacks
    np.fill_diagonal(proposal, 0.0)
    move = proposal * np.exp(np.minimum(0.0, log_p[None, :] - log_p[:, None]))
    return move + np.diag(1 - move.sum(1))


def moments(p: np.ndarray, line: np.ndarray) -> tuple[float, float]:
    """Return mean and variance of probabilities p on the points of a line."""
    mean = line @ p
    return mean, line**2 @ p - mean**2


def maximum_likelihood(p: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return the natural parameters (a, b) at which exp(a x + b x^2) has the moments of the data p."""
    mean, variance = moments(p, line)
    return np.array([mean / variance, -0.5 / variance])


def fixed_point(p: np.ndarray, line: np.ndarray, k: int, step: float) -> np.ndarray:
    """Find natural parameters (a, b) of exp(a x + b x^2) at which the mean CD-k update on the data p vanishes.

    The update is E_p phi - E_{p T^k} phi with phi = (x, x^2) and T the transition matrix at (a, b). As k goes to
    infinity it is that of maximum likelihood, which matches both moments.

    Raises:
        RuntimeError: none was found.
    """
    phi = np.stack([line, line**2])

    def update(theta: np.ndarray) -> np.ndarray:
        kernel = metropolis(theta @ phi, line, step)
        moved = p
        for _ in range(k):
            moved = moved @ kernel
        return phi @ (p - moved)

    found = root(update, maximum_likelihood(p, line), tol=1e-12)
    if not np.abs(update(found.x)).max() < 1e-8:
        raise RuntimeError(f"CD-{k} has no fixed point near maximum likelihood: {found.message}")
    return found.x


def log_mass(theta: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return the log of the model's probabilities on the points of the line, (n,)."""
    value = theta[0] * line + theta[1] * line**2
    return value - np.logaddexp.reduce(value)


ABOUT = "fixed points of contrastive divergence by transition matrices: its bias against k, exactly"


@experiment("energies-cd-bias", about=ABOUT, family="ebm", seeds=1, smoke={"points": 81}, precision="float64")
def cd_bias(run: Run, *, points: int = 161, half_width: float = 6.0, step: float = 0.5, doublings: int = 5) -> None:
    """Measure what CD-k loses at its fixed point against maximum likelihood, for several k."""
    line = np.linspace(-half_width, half_width, points)
    data = skewed(line)
    least = data @ (np.log(data) - log_mass(maximum_likelihood(data, line), line))
    lost, variance = {}, moments(data, line)[1]
    for k in (2**i for i in range(doublings + 1)):
        theta = fixed_point(data, line, k, step)
        lost[k] = float(data @ (np.log(data) - log_mass(theta, line)) - least)
        run.measure(f"kl_lost:cd-{k}", Estimate.exact(lost[k], "nats"))
        run.measure(f"variance_ratio:cd-{k}", Estimate.exact(-0.5 / theta[1] / variance, "ratio"))
    axes = ("k", "KL lost against maximum likelihood (nats)")
    curve = {"CD-k": (list(lost), list(lost.values()))}
    run.curves("bias", "what contrastive divergence loses, exactly", axes, curve, log="xy")
