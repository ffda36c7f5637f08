"""Batches of a fixed size: privacy amplification under replacement of one example."""

import math
from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent

from ...events import FixedSizeSampledGaussianDpEvent
from .._rules import MSG_NO_FORMULA, loss_rule, unchanged
from ._distribution import LossDistribution
from ._foreign import divergences_at_one, their_divergences, their_loss
from ._gaussian import gaussian_scale, poisson_gaussian
from ._pair import NEGLIGIBLE, NOTHING, Attacks, GaussianMixturePair
from ._pmf import LossPmf

_DUST = 1e-15
_MSG_FIXED_SIZE = (
    "Sampling of a fixed size can be accounted for with `adjacency='replace_one'` or `'replace_special'`: the batches of everybody depend on how "
    "many examples there are, so none can be added or removed."
)


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


def _fixed_size(size: int, sample: int, multiplier: float, replace: bool, adjacency: str) -> Attacks:
    """Others without a gradient, or, where the example is replaced by any other, all with one like the other's."""
    if replace:
        from scipy.stats import binom

        times = np.arange(min(sample, 200) + 1)
        chances = binom.pmf(times, sample, 1 / size)
        first = tuple((float(w), float(k)) for k, w in zip(times, chances, strict=True) if w > NEGLIGIBLE)
    else:
        first = ((1 - sample / size, 0.0), (sample / size, 1.0))
    far = tuple((w, 2 * m) for w, m in first)
    if adjacency == "replace_special":
        alone = GaussianMixturePair(multiplier, first, ((1.0, 0.0),))
        taken = GaussianMixturePair(
            multiplier, far, first
        )  # an example that is emptied takes the place of one that is not
        return (alone, alone.swapped, taken), (alone.swapped, alone, taken.swapped)
    second = tuple((w, -m) for w, m in first)
    opposite = GaussianMixturePair(multiplier, first, second)
    alike = GaussianMixturePair(multiplier, far, ((1.0, 0.0),))
    return (opposite, alike, alike.swapped), (opposite.swapped, alike.swapped, alike)


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    return fixed_size_scale(event.num_examples, event.batch_size, event.noise_multiplier, event.replace)


def _renyi(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    if event.replace:
        raise ValueError(MSG_NO_FORMULA.format(event="sampling with replacement"))
    if adjacency == "add_or_remove_one":
        raise ValueError(_MSG_FIXED_SIZE)
    # even an example that is emptied makes room for another in the batch, at up to twice the distance
    gaussian = GaussianDpEvent(event.noise_multiplier / 2)
    own = SampledWithoutReplacementDpEvent(event.num_examples, event.batch_size, gaussian)
    return divergences_at_one(own, adjacency, orders)


def _attacks(event: Any, adjacency: str) -> Attacks:
    if adjacency == "add_or_remove_one":
        return NOTHING
    return _fixed_size(event.num_examples, event.batch_size, event.noise_multiplier, event.replace, adjacency)


@loss_rule(
    FixedSizeSampledGaussianDpEvent,
    scale=_scale,
    renyi=_renyi,
    attacks=_attacks,
    with_side_queries=unchanged,
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    if adjacency == "add_or_remove_one":
        raise ValueError(_MSG_FIXED_SIZE)
    return fixed_size_gaussian(event.num_examples, event.batch_size, event.noise_multiplier, event.replace, interval)


def _their_attacks(event: Any, adjacency: str) -> Attacks:
    if not event.event.noise_multiplier > 0 or adjacency == "add_or_remove_one":
        return NOTHING
    size, sample = event.source_dataset_size, event.sample_size
    return _fixed_size(size, min(sample, size), event.event.noise_multiplier, False, adjacency)


# upper bounds know the event above, which this one is reduced to
loss_rule(
    SampledWithoutReplacementDpEvent,
    of=GaussianDpEvent,
    renyi=their_divergences,
    attacks=_their_attacks,
    with_side_queries=unchanged,
)(their_loss)
