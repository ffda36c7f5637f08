"""The entries of a ledger, and the ledger as JSON: what older versions wrote is read, and what they can read stays as it was."""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import positive_int
from ..events import from_jsonable, to_jsonable

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_FORMAT = "dpx.accounting.PrivacyLedger"
# and the fields of an entry; 2 has parts
_VERSIONS = {1: {"event", "count", "label"}, 2: {"event", "count", "label", "part"}}


class LedgerEntry(NamedTuple):
    """One line of a ledger.

    **Arguments:**

    - `event`: what ran.
    - `count`: how many times in a row.
    - `label`: a note for the reader; it does not change the cost.
    - `part`: the part of the data that it ran on; None for all of it.
    """

    event: "DpEvent"
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    label: str | None
    part: str | None = None


def written(adjacency: str, unit: str, entries: tuple[LedgerEntry, ...], fixed_parts: bool) -> str:
    """A ledger as JSON, numbers to the last bit. Raises `ValueError` if an event is of a type that nobody could read again."""
    # what older versions can read stays as it was
    version = 2 if fixed_parts or any(entry.part is not None for entry in entries) else 1
    record: dict[str, Any] = {
        "format": _FORMAT,
        "version": version,
        "adjacency": adjacency,
        "unit": unit,
        "entries": [
            {key: value for key, value in zip(LedgerEntry._fields, entry, strict=True) if key in _VERSIONS[version]}
            | {"event": to_jsonable(entry.event)}
            for entry in entries
        ],
    }
    if version == 2:
        record["fixed_parts"] = fixed_parts
    return json.dumps(record, indent=2, allow_nan=False)


def read(text: str) -> tuple[Any, str, tuple[LedgerEntry, ...], bool]:
    """The adjacency, unit, entries and `fixed_parts` of the ledger that `written` wrote. Raises `ValueError`, saying what is wrong."""
    try:
        record = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`PrivacyLedger.from_json(...)`: this is not JSON: {error}.") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"`PrivacyLedger.from_json(...)`: this is no privacy ledger (`format` must be {_FORMAT!r}).")
    version = record.get("version")
    if type(version) is not int or version not in _VERSIONS:
        raise ValueError(
            f"`PrivacyLedger.from_json(...)`: version {version!r} of the format; this dpx reads versions {', '.join(map(str, _VERSIONS))}."
        )
    keys = {"format", "version", "adjacency", "unit", "entries"} | ({"fixed_parts"} if version == 2 else set())
    is_typed = isinstance(record.get("entries"), list) and isinstance(record.get("unit"), str)
    if set(record) != keys or not is_typed or not isinstance(record.get("fixed_parts", False), bool):
        raise ValueError(
            f"`PrivacyLedger.from_json(...)`: a ledger of version {version} has the fields {sorted(keys)}; got {sorted(record)}."
        )
    entries = tuple(_entry(e, _VERSIONS[version]) for e in record["entries"])
    return record["adjacency"], record["unit"], entries, record.get("fixed_parts", False)


def _entry(record: Any, fields: set[str]) -> LedgerEntry:
    if not isinstance(record, dict) or set(record) != fields:
        raise ValueError(f"`PrivacyLedger.from_json(...)`: an entry has {', '.join(sorted(fields))}; got {record!r}.")
    count, label, part = record["count"], record["label"], record.get("part")
    if isinstance(count, bool) or not (label is None or isinstance(label, str)):
        raise ValueError(
            f"`PrivacyLedger.from_json(...)`: an entry has an integer count and a text label; got {record!r}."
        )
    count = positive_int("PrivacyLedger.from_json(...): count", count)
    return LedgerEntry(from_jsonable(record["event"]), count, label, part)
