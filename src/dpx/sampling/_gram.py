r"""Inner products of what an example of each bin adds to a matrix mechanism."""

import numpy as np

from ..strategies import AbstractStrategy, BandedToeplitz

_MOST_STEPS = 4096


def bins_gram(strategy: AbstractStrategy, steps: int, bins: int) -> np.ndarray:
    r"""$\langle m_i, m_j \rangle$ with $m_j = \sum_{i \equiv j \bmod b} C_{:, i}$, over the first `steps` rows of $C$, in float64.

    Whoever always contributes the same vector moves the sums the most only if no entry of $C$ is negative, so others raise. Banded Toeplitz
    matrices may have any number of steps, since their rows repeat; other matrices are written out, up to 4096 steps.
    """
    if isinstance(strategy, BandedToeplitz):
        coefficients = np.asarray(strategy.coefficients)
        _check_non_negative(strategy, coefficients)
        return _toeplitz_gram(coefficients, steps, bins)
    if steps > _MOST_STEPS:
        raise ValueError(
            f"`BallsInBinsSampler` with `{type(strategy).__name__}` can be accounted for up to {_MOST_STEPS} steps, for which its matrix is "
            f"written out; got {steps}. Use `BandedToeplitz`, which has no limit."
        )
    matrix = strategy.materialize(steps)
    _check_non_negative(strategy, matrix)
    columns = np.zeros((steps, bins))
    for bin_ in range(min(bins, steps)):
        columns[:, bin_] = matrix[:, bin_::bins].sum(1)
    return columns.T @ columns


def _toeplitz_gram(coefficients: np.ndarray, steps: int, bins: int) -> np.ndarray:
    """Row t holds, for every bin, the coefficients whose distance to t is a step of that bin: shifts of one vector once t has them all."""
    bands = len(coefficients)
    if bands > _MOST_STEPS:
        raise ValueError(f"`BallsInBinsSampler` can account for at most {_MOST_STEPS} bands; got {bands}.")
    start = min(steps, bands - 1)
    first = np.zeros((start, bins))
    for t in range(start):
        np.add.at(first[t], (t - np.arange(t + 1)) % bins, coefficients[: t + 1])
    folded = np.zeros(bins)
    np.add.at(folded, np.arange(bands) % bins, coefficients)
    later = folded[(np.arange(bins)[:, None] - np.arange(bins)) % bins]  # row r serves all t = r mod bins
    counts = np.bincount(np.arange(start, steps) % bins, minlength=bins).astype(float)
    return first.T @ first + later.T @ (counts[:, None] * later)


def _check_non_negative(strategy: AbstractStrategy, entries: np.ndarray) -> None:
    if entries.min() < 0:
        raise ValueError(
            f"Sampling amplifies correlated noise provably only if its strategy matrix has no negative entry; `{type(strategy).__name__}` has "
            f"{entries.min():.3g}. Use `BandedToeplitz.optimize(...)` or `.square_root(...)`, or `ShuffleSampler`."
        )
