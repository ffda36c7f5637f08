"""Poisson batches of which at most so many examples are kept."""

import math
from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent

from .._composition import single_loss
from .._rules import loss_rule, unchanged
from ._distribution import LossDistribution
from ._foreign import their_divergences
from ._gaussian import gaussian_scale, sampled_gaussian
from ._pair import NEGLIGIBLE, NOTHING, Attacks, GaussianMixturePair
from ._pmf import mixture

_MOST_COMPONENTS = 300


def _sizes(event: Any) -> tuple[int, int]:
    """Sizes of the larger of two neighbouring data sets: that of the event, which counts who is added, and without."""
    return event.dataset_size, max(1, event.dataset_size - 1)


def _cut(event: Any, size: int) -> tuple[float, float]:
    """The probability that a batch is cut, given that the example was sampled, and that it is sampled and kept, given that it is cut."""
    from scipy.stats import binom

    most, q = event.truncated_batch_size, event.sampling_probability
    cut = float(binom.sf(most - 1, size - 1, q))
    if cut == 0:
        return 0.0, 0.0
    kept = float(binom.sf(most, size, q)) * most / cut / size
    # less than with the fewest others, even where both probabilities are too small for floats
    return cut, min(kept or 1.0, q * most / (most + 1))


def _one_size(event: Any, size: int, adjacency: str, interval: float) -> LossDistribution:
    r"""Poisson sampling where the batch is not cut, and where it is, at worst an exchange for another example at twice the distance.

    `size` examples are in the larger of two neighbouring data sets. Of the others $Y \sim \text{Bin}(\text{size} - 1, q)$ are sampled, whatever
    the example does. If $Y$ is less than the largest batch $B$, nothing is cut. Otherwise the batch is full with or without the example. With
    probability $q B / (Y + 1)$ the example is in it, in the place of another, drawn at random: a mixture of $N(0)$ and $N(u)$, $|u| \le 2$, against
    $N(0)$ if the example is not there at all, and against a mixture of $N(0)$ and $N(w)$, $|w| \le 2$, if it is another. More examples are cut
    more often, but keep a place less often: neither of two sizes dominates the other, so that both must be asked.

    ??? cite "Reference"

        Ganesh et al., *Scaling up DP-SGD*, 2025 (arXiv:2508.15089).
    """
    sampled = lambda q, sigma: GaussianDpEvent(sigma) if q == 1 else PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    multiplier = event.noise_multiplier
    uncut = single_loss(sampled(event.sampling_probability, multiplier), adjacency, interval)
    cut, kept = _cut(event, size)
    if cut == 0:
        return uncut
    moved = "add_or_remove_one" if adjacency == "add_or_remove_one" else "replace_one"
    wide = single_loss(sampled(kept, multiplier / 2), moved, interval)
    return LossDistribution(
        mixture([(1 - cut, uncut.remove), (cut, wide.remove)]), mixture([(1 - cut, uncut.add), (cut, wide.add)])
    )


def _attacks(event: Any, adjacency: str) -> Attacks:
    r"""Poisson batches of which at most $B$ are kept, drawn uniformly.

    Either all others have no gradient, so that all that matters is how often the example is kept; or theirs is opposite to its own, so that where
    a batch is cut it takes one of their places, at twice the distance, while how many they are blurs what is seen.
    """
    from scipy.stats import binom

    if not (event.noise_multiplier > 0 and event.sampling_probability > 0):
        return NOTHING

    size, q, most, sigma = (
        event.dataset_size,
        event.sampling_probability,
        event.truncated_batch_size,
        event.noise_multiplier,
    )
    others = np.arange(size)
    weights = binom.pmf(others, size - 1, q)
    kept = float(np.dot(weights, np.minimum(1.0, most / (others + 1)))) * (1 - 1e-9)
    sign = -1.0 if adjacency == "replace_one" else 0.0
    plain = sampled_gaussian(sigma, min(1.0, q * kept), sign)
    likely = weights > NEGLIGIBLE
    if min(int(likely.sum()), most) > _MOST_COMPONENTS:
        return plain

    def sums(value: float | None) -> tuple[tuple[float, float], ...]:
        """What is seen of a data set in which the example adds `value`, or is not there."""
        found: dict[float, float] = {}

        def put(weight: float, mean: float) -> None:
            found[mean] = found.get(mean, 0.0) + weight

        for k, weight in zip(others[likely].tolist(), weights[likely].tolist(), strict=True):
            sampled = q if value is not None else 0.0
            put(weight * (1 - sampled), -float(min(k, most)))
            if value is None:
                continue
            stays = min(1.0, most / (k + 1))
            put(weight * q * stays, value - min(k, most - 1))
            put(weight * q * (1 - stays), -float(most))
        return tuple((w, m) for m, w in sorted(found.items()) if w > 0)

    other = {"add_or_remove_one": None, "replace_one": -1.0, "replace_special": 0.0}[adjacency]
    cut = GaussianMixturePair(sigma, sums(1.0), sums(other))
    return (*plain[0], cut), (*plain[1], cut.swapped)


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    q, multiplier = event.sampling_probability, event.noise_multiplier
    spread, extent = gaussian_scale(multiplier, q, adjacency == "replace_one")
    for size in _sizes(event):
        cut, kept = _cut(event, size)
        if cut > 0:
            wide, reach = gaussian_scale(multiplier / 2, kept, adjacency != "add_or_remove_one")
            spread, extent = max(spread, math.hypot(spread, math.sqrt(cut) * wide)), max(extent, reach)
    return spread, extent


@loss_rule(
    TruncatedSubsampledGaussianDpEvent,
    scale=_scale,
    renyi=their_divergences,
    attacks=_attacks,
    with_side_queries=unchanged,
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    larger, smaller = (_one_size(event, size, adjacency, interval) for size in _sizes(event))
    return larger if smaller is larger else LossDistribution(larger.remove, larger.add, 0.0, smaller)
