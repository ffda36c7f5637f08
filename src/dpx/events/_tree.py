"""DP events as trees, and their one normal form.

Two things are done to an event, in this order, and nothing else:

- `canonical`: plain Python numbers and tuples, and checked. This form is kept and written down; equal events are equal and hashable.
- `reduced`: the same and, of events that cost the same, the one of which upper bounds are known. This form is accounted for.

Both leave alone what has been through them.
"""

import math
import operator
import types
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._checks import described

Parts = tuple[tuple[Any, int], ...]


def canonical(event: Any, call: str = "event_or_plan") -> Any:
    """The same event with Python numbers and tuples throughout, so that equal events are equal, hashable, and accounted for alike.

    Raises `ValueError` for what is no event, or holds a number that no mechanism has. The fields of an event class are numbers, events, or
    tuples of such, none of them negative; what else must hold, its `check` says.
    """
    import attr
    from dp_accounting import DpEvent

    if not isinstance(event, DpEvent):
        raise ValueError(f"`{call}` must be a DP event of `dp_accounting`, or a plan; got {described(event)}.")
    cls = type(event)
    fields = {
        field.name: _converted(field.type, getattr(event, field.name), f"{cls.__name__}({field.name}=...)")
        for field in attr.fields(cls)
    }
    plain = cls(**fields)
    _check(plain)
    return plain


def _converted(annotation: Any, value: Any, call: str) -> Any:
    """`value` as the annotated type: a number, an event, or a tuple of such."""
    if annotation in (int, float, bool):
        return _number(annotation, value, call)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        is_many = isinstance(value, Sequence | np.ndarray)
        choices = [a for a in arguments if (typing.get_origin(a) is not None) == is_many]
        return _converted(choices[0], value, call) if choices else value
    if arguments:
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise ValueError(f"`{call}` must be a sequence; got {value!r}.")
        if typing.get_args(arguments[0])[:1] == (float,) and len(value) > 8:
            # a matrix of inner products may have millions
            matrix = np.asarray(value, np.float64)
            if not np.all(matrix >= 0):
                raise ValueError(f"`{call}` must hold numbers of at least 0; got {matrix.min()}.")
            return tuple(map(tuple, matrix.tolist()))
        return tuple(_converted(arguments[0], element, call) for element in value)
    return canonical(value)


def _number(kind: type, value: Any, call: str) -> Any:
    if kind is bool:
        if value not in (True, False):
            raise ValueError(f"`{call}` must be True or False; got {value!r}.")
        return bool(value)
    try:
        number = operator.index(value) if kind is int else float(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"`{call}` must be {'an integer' if kind is int else 'a number'}; got {value!r}.") from None
    if not number >= 0:
        raise ValueError(f"`{call}` must be at least 0; got {number}.")
    return number


def parts(event: Any) -> Parts:
    """What a canonical event composes, equal events counted together, in the order of their first appearance."""
    import dp_accounting as da

    counts: dict[Any, int] = {}

    def walk(event: Any, count: int) -> None:
        match event:
            case da.NoOpDpEvent():
                pass
            case da.SelfComposedDpEvent():
                walk(event.event, count * event.count)
            case da.ComposedDpEvent():
                for e in event.events:
                    walk(e, count)
            case _:
                counts[event] = counts.get(event, 0) + count

    walk(event, 1)
    return tuple((e, n) for e, n in counts.items() if n > 0)


def composed(pairs: Parts) -> Any:
    """One event for all of `pairs`, cheap to account for: Gaussians, adaptive or not, are together exactly one Gaussian."""
    import dp_accounting as da

    gaussians = [(e, n) for e, n in pairs if isinstance(e, da.GaussianDpEvent) and e.noise_multiplier > 0]
    if len(gaussians) > 1:
        total = math.fsum(n * e.noise_multiplier**-2 for e, n in gaussians)
        # the sum's rounding must not add noise
        merged = da.GaussianDpEvent(total**-0.5 * (1 - 1e-14))
        pairs = ((merged, 1), *(pair for pair in pairs if pair not in gaussians))
    events = tuple(e if n == 1 else da.SelfComposedDpEvent(e, n) for e, n in pairs)
    if not events:
        return da.NoOpDpEvent()
    # a tuple, since lists have no hash and accountants remember what they have computed
    return events[0] if len(events) == 1 else da.ComposedDpEvent(typing.cast(Any, events))


def uncoupled(event: Any) -> tuple[float, Parts]:
    """The failure probabilities of all couplings together, and what a canonical event composes without them."""
    from ._kinds import CoupledDpEvent

    coupling = 0.0
    leaves: list[tuple[Any, int]] = []

    def walk(event: Any, count: int) -> None:
        nonlocal coupling
        for part, times in parts(event):
            if isinstance(part, CoupledDpEvent):
                coupling += count * times * part.failure_probability
                walk(part.event, count * times)
            else:
                leaves.append((part, count * times))

    walk(event, 1)
    return coupling, tuple(leaves)


def reduced(event: Any) -> Any:
    """The canonical event that costs the same as `event`, in forms of which upper bounds are known: whatever accounts for an event, accounts for
    this one.

    Gaussians on one sample are folded into one: dp_accounting's Rényi accountant drops such a composition where its multiplier is not a `float`,
    and its other one does not know it. Batches of a fixed size become the event of dpx, which takes the sensitivity of replacement for what it
    is. A mechanism without noise is not private, and one with infinite noise says nothing.
    """
    return _reduced(canonical(event))


def _check(event: Any) -> None:
    """Raises `ValueError` unless there is such a mechanism; its own parts have been checked."""
    import dp_accounting as da

    from ._kinds import check

    match event:
        case da.dp_event.RepeatAndSelectDpEvent():
            is_mean = 0 < event.mean < math.inf if math.isinf(event.shape) else 1 <= event.mean < math.inf
            check(is_mean, event, "`mean` must be finite and at least 1, or above 0 for a Poisson number of runs")
        case da.PoissonSampledDpEvent() | da.TruncatedSubsampledGaussianDpEvent():
            check(event.sampling_probability <= 1, event, "`sampling_probability` must be at most 1")
        case da.RandomizedResponseDpEvent():
            check(event.noise_parameter <= 1, event, "`noise_parameter` must be a probability")
            check(event.num_buckets >= 1, event, "`num_buckets` must be at least 1")
        case da.dp_event.MixtureOfGaussiansDpEvent():
            check(0 < len(event.sensitivities) == len(event.sampling_probs), event, "as many of one as of the other")
            check(abs(math.fsum(event.sampling_probs) - 1) < 1e-9, event, "`sampling_probs` must sum to 1")
            check(max(event.sensitivities) < math.inf, event, "`sensitivities` must be finite")
    own = getattr(event, "check", None)
    if own is not None:
        own()


def _reduced(event: Any) -> Any:
    import dp_accounting as da

    from ._kinds import CoupledDpEvent, with_noise

    match event:
        case da.SelfComposedDpEvent():
            return da.SelfComposedDpEvent(_reduced(event.event), event.count)
        case da.ComposedDpEvent():
            return da.ComposedDpEvent(tuple(_reduced(e) for e in event.events))  # pyright: ignore[reportArgumentType]
        case CoupledDpEvent():
            return CoupledDpEvent(_reduced(event.event), event.failure_probability)
        case da.dp_event.RepeatAndSelectDpEvent():
            return da.dp_event.RepeatAndSelectDpEvent(_reduced(event.event), event.mean, event.shape)
        case da.PoissonSampledDpEvent():
            return _reduced_poisson(event)
        case da.SampledWithoutReplacementDpEvent() | da.dp_event.SampledWithReplacementDpEvent():
            return _reduced_fixed_size(event)
        case da.GaussianDpEvent() | da.LaplaceDpEvent():
            return with_noise(event, event.noise_multiplier)
        case da.dp_event.DiscreteLaplaceDpEvent():
            # the parameter is the rate of decay, which no distribution has at 0
            if event.sensitivity == 0:
                return da.NoOpDpEvent()
            return event if 0 < event.noise_parameter < math.inf else da.NonPrivateDpEvent()
        case da.RandomizedResponseDpEvent():
            if event.num_buckets == 1:
                return da.NoOpDpEvent()
            return da.NonPrivateDpEvent() if event.noise_parameter == 0 else event
        case da.dp_event.MixtureOfGaussiansDpEvent():
            if max(event.sensitivities) == 0:
                return da.NoOpDpEvent()
            return with_noise(event, event.standard_deviation)
        case da.TruncatedSubsampledGaussianDpEvent():
            if 0 in (event.dataset_size, event.sampling_probability, event.truncated_batch_size):
                return da.NoOpDpEvent()  # nobody's data is used
            return with_noise(event, event.noise_multiplier)
    own = getattr(event, "reduced", None)
    found = event if own is None else own()
    # whatever it became is checked and reduced in its turn
    return event if found is event or found == event else reduced(found)


def _reduced_poisson(event: Any) -> Any:
    import dp_accounting as da

    if event.sampling_probability == 0:
        return da.NoOpDpEvent()
    inner = _reduced(event.event)
    if isinstance(inner, da.SelfComposedDpEvent | da.ComposedDpEvent):
        inner = _folded(inner)
    if event.sampling_probability == 1 or isinstance(inner, da.NoOpDpEvent | da.NonPrivateDpEvent):
        return inner
    return da.PoissonSampledDpEvent(event.sampling_probability, inner)


def _reduced_fixed_size(event: Any) -> Any:
    import dp_accounting as da

    from ._kinds import FixedSizeSampledGaussianDpEvent

    replace = isinstance(event, da.dp_event.SampledWithReplacementDpEvent)
    inner = _folded(_reduced(event.event))
    if isinstance(inner, da.NoOpDpEvent | da.NonPrivateDpEvent):
        return inner
    if not isinstance(inner, da.GaussianDpEvent):
        raise ValueError(
            f"Batches of a fixed size can be accounted for with Gaussian noise only; got {inner}. Use Poisson sampling."
        )
    size, sample = event.source_dataset_size, event.sample_size
    own = FixedSizeSampledGaussianDpEvent(size, sample, inner.noise_multiplier, replace)
    own.check()
    return own.reduced()


def _folded(event: Any) -> Any:
    """A composition as one event: Gaussians are together exactly one Gaussian, of the sum of their precisions."""
    import dp_accounting as da

    pairs = parts(event)
    if len(pairs) == 1 and pairs[0][1] == 1:
        return pairs[0][0]
    if any(isinstance(part, da.NonPrivateDpEvent) for part, _ in pairs):
        return da.NonPrivateDpEvent()
    if not all(isinstance(part, da.GaussianDpEvent) for part, _ in pairs):
        return composed(pairs)
    total = math.fsum(count * part.noise_multiplier**-2 for part, count in pairs)
    return da.GaussianDpEvent(total**-0.5 * (1 - 1e-14)) if total else da.NoOpDpEvent()
