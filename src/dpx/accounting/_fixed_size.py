"""Batches of a fixed size: privacy amplification under replacement of one example."""

import math

import numpy as np

from ._distributions import LossDistribution, from_profile

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

    ??? cite "Reference"

        Balle, Barthe and Gaboardi, *Privacy amplification by subsampling: tight analyses via couplings and divergences*, NeurIPS 2018,
        theorems 9 and 10; Zhu, Dong and Wang, AISTATS 2022, proposition 10.
    """
    times, weights, rest = _participations(num_examples, batch_size, replace)
    share = -math.expm1(batch_size * math.log1p(-1 / num_examples)) if replace else batch_size / num_examples
    if num_examples == 1:
        share = 1.0

    def profile(epsilons: np.ndarray) -> np.ndarray:
        # e^base = 1 + (e^epsilon - 1) / eta
        base = np.where(epsilons < 1, np.log1p(np.expm1(epsilons) / share), epsilons - math.log(share))
        large = epsilons >= 1
        base[large] += np.log1p((share - 1) * np.exp(-epsilons[large]))
        total = np.full(len(epsilons), rest)
        for k, weight in zip(times, weights, strict=True):
            total += weight * gaussian_profile(base, noise_multiplier / (2 * k))
        return total

    # beyond the largest loss of the most frequent group that counts, what is left of delta counts as infinite
    high = 1.0
    while profile(np.array([high]))[0] > max(_DUST, 1.01 * rest) and high < 2e3:
        high *= 1.25
    return from_profile(profile, high, interval)


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
