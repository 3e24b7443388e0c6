"""Means of scores with what they are worth: standard errors, intervals by resampling prompts, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
"""Share of resamples that lie in an interval."""
_SEED = 0


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, its standard error, and the interval `low` to `high` of LEVEL (None of one prompt)."""

    mean: float
    error: float | None
    low: float | None
    high: float | None


def mean_of(scores: Sequence[float]) -> Mean:
    """The mean of scores of different prompts, whose resampling gives the interval (Efron 1979, percentiles)."""
    values = np.asarray(scores, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return Mean(float(values.mean()), None, None, None)
    drawn = np.random.default_rng(_SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    return Mean(float(values.mean()), error, float(low), float(high))


def difference_of(scores: Sequence[float], reference: Sequence[float]) -> Mean:
    """The mean difference to another model's scores of the same prompts: far narrower than that of two means."""
    return mean_of([a - b for a, b in zip(scores, reference, strict=True)])


def frechet(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """The Frechet distance between Gaussians with the mean and covariance of two sets of vectors [N, D].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982); the trace of the root is the sum of the roots
    of the eigenvalues of C1 C2.
    """
    apart = one.mean(axis=0) - other.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (one, other))
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None))
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * roots.sum())
