"""DP events to and from JSON values, numbers to the last bit."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from ._tree import canonical

_TYPE = "type"


@functools.cache
def _known_events() -> dict[str, Any]:
    from dp_accounting import DpEvent, dp_event

    from . import _kinds

    found = [*vars(dp_event).values(), *vars(_kinds).values()]
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, DpEvent) and c is not DpEvent}


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
