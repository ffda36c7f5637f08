"""From a DP event to the distribution of its privacy loss."""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ._allocation import random_allocation
from ._correlated_bins import mixture_of_bins
from ._distributions import (
    LossDistribution,
    LossPmf,
    from_dp_accounting,
    mixture,
    nothing,
    poisson_gaussian,
    poisson_gaussian_replaced,
)
from ._event_tree import canonical, composed, parts
from ._fixed_size import fixed_size_gaussian
from ._monte_carlo import min_sep_distribution, samples_for

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_COARSER = 16

_MSG_PRESENCE = (
    "{name} can be accounted for only where one unit is added, removed or emptied: the pair of distributions that dominates it is known for "
    "`adjacency='add_or_remove_one'` and `'replace_special'`, not for {adjacency!r}."
)
_MSG_FIXED_SIZE = (
    "Sampling of a fixed size can be accounted for with `adjacency='replace_one'` or `'replace_special'`: the batches of everybody depend on how "
    "many examples there are, so none can be added or removed."
)


def relation(adjacency: str) -> Any:
    """`dp_accounting`'s name for an adjacency."""
    from dp_accounting import NeighboringRelation

    return NeighboringRelation[adjacency.upper()]


def strict(event: Any) -> Any:
    """The same event with Python numbers throughout and Gaussians on one sample folded into one: dp_accounting's Rényi accountant drops such a
    composition where its multiplier is not a `float`, and its other one does not know it."""
    import dp_accounting as da

    from .._events import CoupledDpEvent, GaussianMixtureOfBinsDpEvent

    match event:
        case da.SelfComposedDpEvent():
            return da.SelfComposedDpEvent(strict(event.event), int(event.count))
        case da.ComposedDpEvent():
            return da.ComposedDpEvent(tuple(strict(e) for e in event.events))  # pyright: ignore[reportArgumentType]
        case CoupledDpEvent():
            return CoupledDpEvent(strict(event.event), float(event.failure_probability))
        case da.PoissonSampledDpEvent(event=da.SelfComposedDpEvent() | da.ComposedDpEvent()):
            return da.PoissonSampledDpEvent(float(event.sampling_probability), _folded(event.event))
        case da.SampledWithoutReplacementDpEvent(event=da.SelfComposedDpEvent() | da.ComposedDpEvent()):
            size, sample = int(event.source_dataset_size), int(event.sample_size)
            return da.SampledWithoutReplacementDpEvent(size, sample, _folded(event.event))
        case GaussianMixtureOfBinsDpEvent():
            gram = tuple(map(tuple, np.asarray(event.gram, np.float64).tolist()))
            return GaussianMixtureOfBinsDpEvent(float(event.noise_multiplier), gram)
    return canonical(event)


def _folded(event: Any) -> Any:
    """A composition as one event: Gaussians are together exactly one Gaussian, of the sum of their precisions."""
    import dp_accounting as da

    pairs = parts(canonical(event))
    if not all(isinstance(part, da.GaussianDpEvent) and part.noise_multiplier > 0 for part, _ in pairs):
        return composed(pairs)
    total = math.fsum(count * part.noise_multiplier**-2 for part, count in pairs)
    return da.GaussianDpEvent(total**-0.5 * (1 - 1e-14)) if total else da.NoOpDpEvent()


def has_truncation(event: Any) -> bool:
    """Whether batches are cut somewhere in `event`."""
    import dp_accounting as da

    return any(isinstance(part, da.TruncatedSubsampledGaussianDpEvent) for part, _ in parts(event))


def surrogate(event: Any) -> Any:
    """An event that Rényi accounting knows and that costs about as much, which only guesses are made from: where to look, how fine."""
    import dp_accounting as da

    from .. import _events

    def sampled(probability: float, multiplier: float, count: int) -> Any:
        gaussian = da.GaussianDpEvent(multiplier)
        once = da.PoissonSampledDpEvent(probability, gaussian) if probability < 1 else gaussian
        return da.SelfComposedDpEvent(once, count)

    match event:
        case da.SelfComposedDpEvent():
            return da.SelfComposedDpEvent(surrogate(event.event), event.count)
        case da.ComposedDpEvent():
            return da.ComposedDpEvent(tuple(surrogate(e) for e in event.events))  # pyright: ignore[reportArgumentType]
        case _events.CoupledDpEvent():
            return surrogate(event.event)
        case da.PoissonSampledDpEvent(event=da.dp_event.ZCDpEvent(rho=rho)) if rho > 0:
            return sampled(event.sampling_probability, (2 * rho) ** -0.5, 1)
        case da.TruncatedSubsampledGaussianDpEvent():
            return sampled(event.sampling_probability, event.noise_multiplier, 1)
        case _events.RandomAllocationDpEvent():
            return sampled(1 / event.bins, event.noise_multiplier, event.bins)
        case _events.FixedSizeSampledGaussianDpEvent():
            return sampled(event.batch_size / event.num_examples, event.noise_multiplier / 2, 1)
        case _events.GaussianMixtureOfBinsDpEvent():
            bins = max(1, len(event.gram) // max(1, sum(g > 1e-3 for g in event.gram[0])))
            return sampled(1 / bins, event.noise_multiplier, bins)
        case _events.MinSepSampledDpEvent():
            p, separation = event.sampling_probability, event.min_separation
            share = separation * p / (1 + (separation - 1) * p)
            return sampled(share, event.noise_multiplier, -(-event.steps // separation))
    return event


def distribution_of(event: "DpEvent", adjacency: str, interval: float, samples: int | None = None) -> LossDistribution:
    """The pessimistic privacy loss of `event`, whose numbers are Python's; raises `ValueError` where none is known.

    `samples` of what is simulated are drawn, by default enough for a delta of 1e-4.
    """
    total = nothing(interval)
    for part, count in parts(composed(parts(event))):
        run = _one(part, adjacency, interval, samples).self_compose(count)
        total = run if total is nothing(interval) else total.compose(run)
    return total


@functools.lru_cache(maxsize=32)
def _one(event: Any, adjacency: str, interval: float, samples: int | None = None) -> LossDistribution:
    import dp_accounting as da

    from .. import _events

    match event:
        case da.NonPrivateDpEvent():
            return _infinite(interval)
        case da.GaussianDpEvent():
            multiplier = event.noise_multiplier / (2 if adjacency == "replace_one" else 1)
            # a Gaussian's losses in either direction have one distribution
            return _symmetric(poisson_gaussian(multiplier, 1.0, interval)) if multiplier > 0 else _infinite(interval)
        case da.PoissonSampledDpEvent(event=da.GaussianDpEvent(noise_multiplier=multiplier)) if (
            0 < event.sampling_probability < 1 and multiplier > 0
        ):
            build = poisson_gaussian_replaced if adjacency == "replace_one" else poisson_gaussian
            return build(multiplier, event.sampling_probability, interval)
        case da.PoissonSampledDpEvent(sampling_probability=1.0):
            return distribution_of(event.event, adjacency, interval, samples)
        case da.TruncatedSubsampledGaussianDpEvent() if event.noise_multiplier > 0 and event.sampling_probability > 0:
            return _truncated(event, adjacency, interval)
        case _events.RandomAllocationDpEvent():
            _need_presence("Random allocation", adjacency)
            return random_allocation(event.noise_multiplier, event.bins, interval)
        case _events.GaussianMixtureOfBinsDpEvent():
            _need_presence("Balls-in-bins sampling", adjacency)
            return mixture_of_bins(float(event.noise_multiplier), event.gram, interval)
        case _events.FixedSizeSampledGaussianDpEvent():
            if adjacency == "add_or_remove_one":
                raise ValueError(_MSG_FIXED_SIZE)
            return fixed_size_gaussian(
                event.num_examples, event.batch_size, event.noise_multiplier, event.replace, interval
            )
        case _events.CoupledDpEvent():
            inner = distribution_of(event.event, adjacency, interval, samples)
            return LossDistribution(inner.remove, inner.add, inner.coupling + event.failure_probability)
        case _events.MinSepSampledDpEvent():
            return min_sep_distribution(event, adjacency, interval, samples or samples_for(1e-4))
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(relation(adjacency), value_discretization_interval=interval)
    if not accountant.supports(event):
        raise ValueError(
            f"No privacy loss distribution is known for {event} under `adjacency={adjacency!r}`. Another adjacency, `accountant='rdp'`, or "
            "Poisson sampling with Gaussian noise may be."
        )
    accountant.compose(event)
    return _infinite(interval) if accountant._contains_non_dp_event else from_dp_accounting(accountant._pld)


def _need_presence(name: str, adjacency: str) -> None:
    if adjacency == "replace_one":
        raise ValueError(_MSG_PRESENCE.format(name=name, adjacency=adjacency))


def _infinite(interval: float) -> LossDistribution:
    return _symmetric(LossDistribution(pmf := LossPmf(interval, 0, np.zeros(1), 1.0), pmf))


def _symmetric(distribution: LossDistribution) -> LossDistribution:
    return LossDistribution(distribution.remove, distribution.remove)


def _truncated(event: Any, adjacency: str, interval: float) -> LossDistribution:
    """Poisson sampling where the batch is not cut, and where it is, at worst a replacement at twice the distance.

    The numbers are those of `dp_accounting.pld.privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism`; the losses of batches
    that are cut, wide and rare, live on a coarser grid, which costs a fraction of the time and is pessimistic all the same.
    """
    import dp_accounting as da
    from scipy.stats import binom

    size, q, most, multiplier = (
        event.dataset_size,
        event.sampling_probability,
        event.truncated_batch_size,
        event.noise_multiplier,
    )
    uncut = _one(da.PoissonSampledDpEvent(q, da.GaussianDpEvent(multiplier)), adjacency, interval)
    # that a batch is cut, given that the example was sampled, and that it is kept, given that it is cut
    cut = float(binom.sf(most - 1, size - 1, q))
    if cut == 0:
        return uncut
    kept = float(binom.sf(most, size, q)) * most / cut / size
    replaced = da.PoissonSampledDpEvent(kept, da.GaussianDpEvent(multiplier / 2))
    coarse = _one(replaced, "replace_one", _COARSER * interval)
    directions = []
    for plain, wide in ((uncut.remove, coarse.remove), (uncut.add, coarse.add)):
        mass = np.zeros(_COARSER * (len(wide.mass) - 1) + 1)
        mass[::_COARSER] = wide.mass
        fine = LossPmf(interval, _COARSER * wide.lowest, mass, wide.infinity)
        directions.append(mixture([(1 - cut, plain), (cut, fine)]))
    return LossDistribution(*directions)
