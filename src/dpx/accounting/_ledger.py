"""The privacy ledger: what several private releases from the same data cost together."""

import json
import math
import os
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx

from .._checks import at_least_zero, described, nonempty_text, positive_int, probability
from .._types import RealScalarLike
from ._accountants import NEIGHBOURS, AccountantName, Adjacency, check_accountant, check_adjacency, delta, epsilon
from ._event_tree import canonical, composed, from_jsonable, parts, to_jsonable

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_FORMAT = "dpx.accounting.PrivacyLedger"
_VERSION = 1


class LedgerEntry(NamedTuple):
    """One line of a ledger.

    **Arguments:**

    - `event`: what ran.
    - `count`: how many times in a row.
    - `label`: a note for the reader; it does not change the cost.
    """

    event: "DpEvent"
    count: int
    label: str | None


class PrivacyLedger(eqx.Module):
    r"""What private releases that ran one after another on the same data cost together.

    ```python
    ledger = dpx.accounting.PrivacyLedger("add_or_remove_one")
    ledger = ledger.spend(plan, label="training").spend(GaussianDpEvent(20.0), label="mean age")
    print(ledger.epsilon(delta=1e-5))
    ledger.save("ledger.json")
    ```

    A ledger is never changed: `spend` returns a longer one. Equal events are accounted for together wherever they stand, so that a
    thousand single steps cost no more to account for than one entry of a thousand.

    !!! success "Guarantee"

        `epsilon` and `delta` are upper bounds for all entries together, where each may depend on the results of earlier ones. What each
        entry costs, and how many there are, must not: for that, see `dpx.accounting.PrivacyFilter`. Entries of another adjacency or unit are
        refused. What `save` wrote, `load` reads back without changing a bit of any number.

    **Arguments:**

    - `adjacency`: what neighbouring data sets are: `"add_or_remove_one"`, `"replace_one"` or `"replace_special"`.
    - `unit`: what is protected, e.g. `"example"` or `"user"`.
    - `entries`: what has been spent; leave it to `spend`.

    ??? cite "Reference"

        Composition: Dong, Roth and Su 2022; Koskela, Jälkö and Honkela 2020 (privacy loss distributions); Mironov 2017 (Rényi).
    """

    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    entries: tuple[LedgerEntry, ...] = eqx.field(static=True)

    def __init__(self, adjacency: str, unit: str = "example", entries: tuple[LedgerEntry, ...] = ()):
        check_adjacency(adjacency)
        self.adjacency = adjacency  # pyright: ignore[reportAttributeAccessIssue]
        self.unit = nonempty_text("PrivacyLedger(unit=...)", unit)
        if not isinstance(entries, tuple | list) or not all(isinstance(entry, LedgerEntry) for entry in entries):
            raise ValueError(
                f"`PrivacyLedger(entries=...)` must be the entries of another ledger; got {described(entries)}. Use `ledger.spend(...)`."
            )
        self.entries = tuple(entries)

    def spend(self, event_or_plan: Any, count: Any = 1, label: str | None = None) -> "PrivacyLedger":
        """The ledger after one more release.

        **Arguments:**

        - `event_or_plan`: a DP event of `dp_accounting`, which is taken to hold under the ledger's adjacency, or anything that has an `event`,
            an `adjacency` and a `unit`: a plan, or another ledger.
        - `count`: how many times it ran.
        - `label`: a note.

        **Raises:** `ValueError` if adjacency or unit differ.
        """
        count = positive_int("PrivacyLedger.spend(count=...)", count)
        label = None if label is None else nonempty_text("PrivacyLedger.spend(label=...)", label)
        event = event_or_plan
        if hasattr(event_or_plan, "adjacency"):
            for name in ("adjacency", "unit"):
                theirs, ours = getattr(event_or_plan, name, None), getattr(self, name)
                if theirs != ours:
                    raise ValueError(
                        f"`PrivacyLedger.spend(...)`: the ledger's `{name}` is {ours!r} and that of what is spent {theirs!r}. Guarantees about "
                        "different neighbours do not add up; keep one ledger for each."
                    )
            event = event_or_plan.event
        event = canonical(event)
        entries = self.entries
        if entries and entries[-1].event == event and entries[-1].label == label:
            entries, count = entries[:-1], entries[-1].count + count
        return PrivacyLedger(self.adjacency, self.unit, (*entries, LedgerEntry(event, count, label)))

    @property
    def event(self) -> "DpEvent":
        """One DP event for everything, equal parts counted together."""
        import dp_accounting as da

        runs = tuple(da.SelfComposedDpEvent(entry.event, entry.count) for entry in self.entries)
        return composed(parts(da.ComposedDpEvent(list(runs))))

    def epsilon(self, delta: RealScalarLike, accountant: AccountantName | None = None) -> float:
        r"""An upper bound on $\varepsilon$ at `delta` for all entries together.

        **Arguments:**

        - `delta`: $\delta$, strictly between 0 and 1.
        - `accountant`: `"pld"` or `"rdp"`; by default the first of them that knows all entries.
        """
        target = probability("PrivacyLedger.epsilon(delta=...)", delta)
        if not self.entries:
            return 0.0
        event = self.event
        return self._answer(lambda name: epsilon(event, target, adjacency=self.adjacency, accountant=name), accountant)

    def delta(self, epsilon: RealScalarLike, accountant: AccountantName | None = None) -> float:
        r"""An upper bound on $\delta$ at `epsilon` for all entries together; arguments as for `epsilon`."""
        target = at_least_zero("PrivacyLedger.delta(epsilon=...)", epsilon)
        if not self.entries:
            return 0.0
        event = self.event
        return self._answer(lambda name: delta(event, target, adjacency=self.adjacency, accountant=name), accountant)

    def _answer(self, question: Callable[[AccountantName], float], accountant: AccountantName | None) -> float:
        if accountant is not None:
            check_accountant(accountant, self.adjacency)
            return question(accountant)
        try:
            return question("pld")
        except ValueError as error:
            if self.adjacency == "replace_one":
                raise
            try:
                return question("rdp")
            except ValueError as other:
                raise ValueError(
                    f"No accountant knows all entries of this ledger. Privacy loss distributions: {error} Rényi: {other}"
                ) from None

    def statement(self, delta: RealScalarLike) -> str:
        """The ledger in plain English: what was spent, and what it costs together."""
        total = self.epsilon(delta)
        neighbours = NEIGHBOURS[self.adjacency].format(unit=self.unit)
        number = f"{probability('PrivacyLedger.statement(delta=...)', delta):g}"
        lines = [
            f"All releases together are ({_rounded_up(total)}, {number})-differentially private for one {self.unit}; neighbouring data sets: "
            f"{neighbours} (adjacency `{self.adjacency}`).",
            "",
        ]
        for entry in self.entries:
            times = f"{entry.count:,} x " if entry.count > 1 else ""
            lines.append(
                f"- {entry.label + ': ' if entry.label else ''}{times}{textwrap.shorten(str(entry.event), 200)}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The ledger as JSON, numbers to the last bit. Raises `ValueError` if an event is of a type that nobody could read again."""
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "adjacency": self.adjacency,
            "unit": self.unit,
            "entries": [
                {"event": to_jsonable(entry.event), "count": entry.count, "label": entry.label}
                for entry in self.entries
            ],
        }
        return json.dumps(record, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "PrivacyLedger":
        """The ledger that `to_json` wrote. Raises `ValueError`, saying what is wrong, for anything else."""
        try:
            record = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`PrivacyLedger.from_json(...)`: this is not JSON: {error}.") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise ValueError(
                f"`PrivacyLedger.from_json(...)`: this is no privacy ledger (`format` must be {_FORMAT!r})."
            )
        if record.get("version") != _VERSION:
            raise ValueError(
                f"`PrivacyLedger.from_json(...)`: version {record.get('version')!r} of the format; this dpx reads version {_VERSION}."
            )
        keys = {"format", "version", "adjacency", "unit", "entries"}
        if set(record) != keys or not isinstance(record["entries"], list) or not isinstance(record["unit"], str):
            raise ValueError(
                f"`PrivacyLedger.from_json(...)`: a ledger has the fields {sorted(keys)}; got {sorted(record)}."
            )
        return cls(record["adjacency"], record["unit"], tuple(_entry(e) for e in record["entries"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the ledger: a crash leaves the old file or the new one, never half of one."""
        path = Path(path)
        text = self.to_json() + "\n"
        handle, half = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, path)
        except BaseException:
            os.unlink(half)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrivacyLedger":
        """The ledger that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _entry(record: Any) -> LedgerEntry:
    if not isinstance(record, dict) or set(record) != {"event", "count", "label"}:
        raise ValueError(f"`PrivacyLedger.from_json(...)`: an entry has an event, a count and a label; got {record!r}.")
    count, label = record["count"], record["label"]
    if isinstance(count, bool) or not (label is None or isinstance(label, str)):
        raise ValueError(
            f"`PrivacyLedger.from_json(...)`: an entry has an integer count and a text label; got {record!r}."
        )
    count = positive_int("PrivacyLedger.from_json(...): count", count)
    return LedgerEntry(from_jsonable(record["event"]), count, label)


def _rounded_up(value: float) -> str:
    """Four decimals, never rounded down: what is stated must be a bound."""
    return f"{math.ceil(value * 1e4) / 1e4:.4f}" if math.isfinite(value) else "infinity"
