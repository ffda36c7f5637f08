"""DP events as trees: with plain Python numbers, as lists of (event, count), and as JSON."""

import functools
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import described

Parts = tuple[tuple[Any, int], ...]

_TYPE = "type"


@functools.cache
def _known_events() -> dict[str, Any]:
    from dp_accounting import DpEvent, dp_event

    from .. import _events

    found = [*vars(dp_event).values(), *vars(_events).values()]
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, DpEvent) and c is not DpEvent}


def canonical(event: Any, call: str = "event_or_plan") -> Any:
    """The same event with Python numbers and tuples throughout, so that equal events are equal, hashable, and accounted for alike.

    Raises `ValueError` for what is no event, or holds a number that no mechanism has.
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
    return cls(**fields)


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


def to_jsonable(event: Any) -> dict[str, Any]:
    """A canonical event as nested dictionaries of JSON values."""
    import attr

    name = type(event).__name__
    if _known_events().get(name) is not type(event):
        raise ValueError(
            f"Events of type `{type(event).__module__}.{name}` cannot be written down: nobody could read them again."
        )

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        if isinstance(value, float) and math.isinf(value):
            return "Infinity"  # JSON has no such number
        return to_jsonable(value) if attr.has(type(value)) else value

    return {_TYPE: name, **{field.name: plain(getattr(event, field.name)) for field in attr.fields(type(event))}}


def from_jsonable(record: Any) -> Any:
    """The event of `to_jsonable`. Types are looked up in a list, so that a file cannot name code to run."""
    import attr

    if not isinstance(record, Mapping) or not isinstance(record.get(_TYPE), str):
        raise ValueError(f"An event was expected, with a `{_TYPE}`; got {record!r}.")
    name = record[_TYPE]
    cls = _known_events().get(name)
    if cls is None:
        raise ValueError(
            f"Events of type {name!r} are not known to this version of dpx: it cannot say what they cost. Use the version that wrote the file."
        )
    fields = {key: value for key, value in record.items() if key != _TYPE}
    expected = {field.name for field in attr.fields(cls)}
    # fields that an event has got since a file was written have a default, which means what it meant then
    missing = {field.name for field in attr.fields(cls) if field.default is attr.NOTHING} - set(fields)
    if missing or not set(fields) <= expected:
        raise ValueError(f"`{name}` has the fields {sorted(expected)}; got {sorted(fields)}.")

    def revived(value: Any) -> Any:
        if isinstance(value, Mapping):
            return from_jsonable(value)
        return [revived(v) for v in value] if isinstance(value, list) else value

    return canonical(cls(**{key: revived(value) for key, value in fields.items()}))
