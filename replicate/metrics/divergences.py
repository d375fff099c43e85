"""Measure distances to a known truth from per-example values: Kullback-Leibler and Fisher divergence."""

from dataclasses import replace

from torch import Tensor

from replicate.model import Estimate, LogLikelihood


def kl(log_p: LogLikelihood, log_q: LogLikelihood) -> Estimate:
    """Estimate KL(p || q) = E_p[log p(x) - log q(x)] in nats, from values at draws of p.

    Args:
        log_p: exact log p of each draw, values (n,).
        log_q: the model's log q of the same draws, values (n,); a lower bound of log q gives an upper bound of KL.

    Returns:
        The mean with its standard error, of the kind of -log q.

    Raises:
        ValueError: log_p is not exact, or the shapes differ.

    Example:
        >>> import torch
        >>> log_p = LogLikelihood(torch.tensor([-1.0, -2.0]), "exact")
        >>> log_q = LogLikelihood(torch.tensor([-1.5, -2.5]), "lower_bound")
        >>> kl(log_p, log_q)
        Estimate(value=0.5, stderr=0.0, kind='upper_bound', unit='nats', n=2)
    """
    if log_p.kind != "exact":
        raise ValueError(f"the truth's log p must be exact; it is {log_p.kind!r}")
    if log_p.values.shape != log_q.values.shape:
        raise ValueError(f"log p has shape {tuple(log_p.values.shape)}, log q {tuple(log_q.values.shape)}")
    return -replace(log_q, values=log_q.values.double() - log_p.values.double()).mean()


def fisher_divergence(score_q: Tensor, score_p: Tensor) -> Estimate:
    """Estimate E_p |grad log q - grad log p|^2 from scores (n, D) at n draws of p (Hyvarinen 2005, without 1/2).

    Raises:
        ValueError: the shapes differ.

    Example:
        N(1, 1) against N(0, 1): the scores 1 - x and -x differ by 1 everywhere.

        >>> import torch
        >>> x = torch.linspace(-2, 2, 5)[:, None]
        >>> fisher_divergence(1 - x, -x).value
        1.0
    """
    if score_q.shape != score_p.shape:
        raise ValueError(f"the scores have shapes {tuple(score_q.shape)} and {tuple(score_p.shape)}")
    squared = (score_q.double() - score_p.double()).square().sum(-1)
    return Estimate.mean_of(squared, "estimate", "squared nats per squared unit")
