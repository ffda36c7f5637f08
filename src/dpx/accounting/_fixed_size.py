"""Batches of a fixed size: privacy amplification under replacement of one example."""

import math

import numpy as np

from ._distributions import LossDistribution, LossPmf, gaussian_scale, poisson_gaussian

_DUST = 1e-15


def gaussian_profile(epsilons: np.ndarray, noise_multiplier: float) -> np.ndarray:
    r"""$\delta(\varepsilon)$ of a Gaussian mechanism (Balle and Wang 2018), with the digits of its tail."""
    from scipy.special import log_ndtr

    middle = epsilons * noise_multiplier
    first = log_ndtr(0.5 / noise_multiplier - middle)
    second = epsilons + log_ndtr(-0.5 / noise_multiplier - middle)
    return np.exp(first) * -np.expm1(np.minimum(second - first, 0.0))


def fixed_size_gaussian(
    num_examples: int, batch_size: int, noise_multiplier: float, replace: bool, interval: float
) -> LossDistribution:
    r"""The privacy loss of one Gaussian step on a batch of fixed size, when one example is replaced.

    With $\eta$ the probability that the example is in the batch at all, $\delta(\log(1 + \eta (e^\varepsilon - 1)))$ is at most
    $\sum_k w_k \delta_k(\varepsilon)$, where $w_k$ is the probability that it is there $k$ times and $\delta_k$ the profile of a Gaussian
    mechanism between sums $2 k$ apart: a replaced example moves a sum of vectors of norm 1 by up to 2. The bound is convex in
    $e^\varepsilon$ and that of a symmetric relation, so that a pair of distributions exists which has it as its profile and composes.

    At $\varepsilon \ge 0$ the term of $k$ is $w_k / \eta$ times the profile of $(1 - \eta) N(0, \sigma^2) + \eta N(2 k, \sigma^2)$ against
    $N(0, \sigma^2)$, so the positive losses are those of that mixture; the negative ones follow by symmetry, and what is left loses nothing.

    ??? cite "Reference"

        Balle, Barthe and Gaboardi, *Privacy amplification by subsampling: tight analyses via couplings and divergences*, NeurIPS 2018,
        theorems 9 and 10; Zhu, Dong and Wang, AISTATS 2022, proposition 10.
    """
    times, weights, rest = _participations(num_examples, batch_size, replace)
    share = _share(num_examples, batch_size, replace)
    positive, infinity = np.zeros(0), rest
    for k, weight in zip(times, weights, strict=True):
        pmf = poisson_gaussian(noise_multiplier / (2 * k), share, interval).remove
        found = pmf.mass[max(0, 1 - pmf.lowest) :] * (weight / share)
        longer, shorter = (positive, found) if len(positive) > len(found) else (found, positive)
        positive = longer.copy()
        positive[: len(shorter)] += shorter
        infinity += pmf.infinity * (weight / share)
    top = len(positive)
    mass = np.zeros(2 * top + 1)
    mass[top + 1 :] = positive
    mass[:top] = (positive * np.exp(-interval * np.arange(1, top + 1)))[::-1]
    mass[top] = max(0.0, 1.0 - infinity - float(mass.sum()))
    pmf = LossPmf(interval, -top, mass, infinity)
    return LossDistribution(pmf, pmf)


def fixed_size_scale(num_examples: int, batch_size: int, noise_multiplier: float, replace: bool) -> tuple[float, float]:
    """Standard deviation and extent of the privacy loss, for its grid."""
    share = _share(num_examples, batch_size, replace)
    most = _participations(num_examples, batch_size, replace)[0][-1]
    spread, _ = gaussian_scale(noise_multiplier / 2, share, False)
    return spread, 2 * gaussian_scale(noise_multiplier / (2 * most), share, False)[1]


def _share(num_examples: int, batch_size: int, replace: bool) -> float:
    """The probability that an example is in a batch at all."""
    if num_examples == 1:
        return 1.0
    return -math.expm1(batch_size * math.log1p(-1 / num_examples)) if replace else batch_size / num_examples


def _participations(num_examples: int, batch_size: int, replace: bool) -> tuple[list[int], list[float], float]:
    """How many times an example can be in a batch, with what probability, and the probability of all that is left out."""
    if not replace:
        return [1], [batch_size / num_examples], 0.0
    from scipy.stats import binom

    most = 1
    while most < batch_size and binom.sf(most, batch_size, 1 / num_examples) > _DUST:
        most += 1
    times = list(range(1, most + 1))
    weights = [float(binom.pmf(k, batch_size, 1 / num_examples)) for k in times]
    return times, weights, float(binom.sf(most, batch_size, 1 / num_examples))
