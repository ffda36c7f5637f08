"""The privacy ledger: what several private releases from the same data cost together."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx

from .._checks import at_least_zero, described, flag, nonempty_text, positive_int, probability
from .._files import write_text_atomically
from .._round import round_epsilon, round_up
from .._types import Integer, RealScalarLike
from ..events import canonical, composed, parts
from ._accountable import Accountable
from ._ledger_json import LedgerEntry, read, written
from ._neighbours import NEIGHBOURS, AccountantName, Adjacency, Neighbours, check_accountant, check_adjacency
from ._questions import delta, epsilon

if TYPE_CHECKING:
    from dp_accounting import DpEvent


_MSG_MOVING_PARTS = (
    "`PrivacyLedger.spend(part={part!r})` under `adjacency='replace_one'`: a unit that is replaced by one of another part leaves one part and enters "
    "the other, so that both pay. If the part of every place in the data is public and fixed beforehand, and who is replaced keeps the place, say "
    "`PrivacyLedger('replace_one', fixed_parts=True)`; or use 'replace_special'."
)


class PrivacyLedger(eqx.Module):
    r"""What private releases that ran one after another cost together.

    ```python
    ledger = dpx.accounting.PrivacyLedger("add_or_remove_one")
    ledger = ledger.spend(plan, label="training").spend(GaussianDpEvent(20.0), label="mean age")
    print(ledger.epsilon(delta=1e-5))
    ledger.save("ledger.json")
    ```

    A ledger is never changed: `spend` returns a longer one. Equal events are accounted for together wherever they stand, so that a
    thousand single steps cost no more to account for than one entry of a thousand.

    Releases from disjoint parts of the data, such as the sites of a study, cost the most that one part costs, not the sum:
    `ledger.spend(plan, part="oslo").spend(plan, part="rome")`. What has no part is on all of the data and counts for every part.

    !!! success "Guarantee"

        `epsilon` and `delta` are upper bounds for all entries together, where each may depend on the results of earlier ones. What each
        entry costs, and how many there are, must not: for that, see `dpx.accounting.PrivacyFilter`. Entries of another adjacency or unit are
        refused. What `save` wrote, `load` reads back without changing a bit of any number.

    *Parts.* Every unit belongs to at most one part, by a rule that looks at that unit alone (its site, a hash of its identifier) and at nothing
    that was learnt from the data of others; what runs on a part sees the units of that part and results of earlier releases. Then two neighbours
    differ in one unit $x$ of one part $p$ (under `"replace_special"` the empty unit keeps the place of $x$), and are equal in all other
    parts. Given the results so far, a release from another part has the same distribution for both: it is a post-processing of those
    results, and costs nothing. So the pair is told apart by the entries of $p$ and those of all the data alone, whose composition bounds $\delta$ at
    every $\varepsilon$; the maximum over $p$ holds whichever part $x$ is in. $\square$ Under `"replace_one"` a unit could move from part to part, and
    both would pay: parts are refused unless `fixed_parts` says that it cannot.

    **Arguments:**

    - `adjacency`: what neighbouring data sets are: `"add_or_remove_one"`, `"replace_one"` or `"replace_special"`.
    - `unit`: what is protected, e.g. `"example"` or `"user"`.
    - `entries`: what has been spent; leave it to `spend`.
    - `fixed_parts`: whether the part of every place in the data is public and fixed, so that a replaced unit stays in its part. The guarantee
        then speaks of such replacements only.

    ??? cite "Reference"

        Composition: Dong, Roth and Su 2022; Koskela, Jälkö and Honkela 2020 (privacy loss distributions); Mironov 2017 (Rényi). Disjoint parts:
        McSherry, *Privacy integrated queries*, SIGMOD 2009.
    """

    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    entries: tuple[LedgerEntry, ...] = eqx.field(static=True)
    fixed_parts: bool = eqx.field(static=True)

    def __init__(
        self,
        adjacency: Neighbours,
        unit: str = "example",
        entries: tuple[LedgerEntry, ...] = (),
        *,
        fixed_parts: bool = False,
    ):
        adjacency = self.adjacency = check_adjacency(adjacency)
        self.unit = nonempty_text("PrivacyLedger(unit=...)", unit)
        if not isinstance(entries, tuple | list) or not all(isinstance(entry, LedgerEntry) for entry in entries):
            raise ValueError(
                f"`PrivacyLedger(entries=...)` must be the entries of another ledger; got {described(entries)}. Use `ledger.spend(...)`."
            )
        self.entries = tuple(entries)
        self.fixed_parts = flag("PrivacyLedger(fixed_parts=...)", fixed_parts)
        for entry in self.entries:
            positive_int("PrivacyLedger(entries=...): count", entry.count)
            self._check_part(entry.part)

    def spend(
        self,
        event_or_plan: "DpEvent | Accountable",
        count: Integer = 1,
        label: str | None = None,
        *,
        steps: Integer | None = None,
        part: str | None = None,
    ) -> "PrivacyLedger":
        """The ledger after one more release.

        **Arguments:**

        - `event_or_plan`: a DP event of `dp_accounting`, which is taken to hold under the ledger's adjacency, or anything that has an `event`,
            an `adjacency` and a `unit`: a plan, a `Release`, or another ledger.
        - `count`: how many times it ran.
        - `label`: a note.
        - `steps`: of a plan, that only so many of its first steps ran. Decided beforehand, or by nothing that the data had a say in.
        - `part`: the part of the data that it ran on, which has no unit in common with other parts.

        **Raises:** `ValueError` if adjacency or unit differ.
        """
        count = positive_int("PrivacyLedger.spend(count=...)", count)
        label = None if label is None else nonempty_text("PrivacyLedger.spend(label=...)", label)
        self._check_part(part)
        event: Any = event_or_plan
        if hasattr(event, "adjacency"):
            for name in ("adjacency", "unit"):
                theirs, ours = getattr(event_or_plan, name, None), getattr(self, name)
                if theirs != ours:
                    raise ValueError(
                        f"`PrivacyLedger.spend(...)`: the ledger's `{name}` is {ours!r} and that of what is spent {theirs!r}. Guarantees about "
                        "different neighbours do not add up; keep one ledger for each."
                    )
            event = event.event if steps is None else _first_steps(event, steps)
        elif steps is not None:
            _first_steps(event_or_plan, steps)
        event = canonical(event)
        entries = self.entries
        if entries and entries[-1].event == event and (entries[-1].label, entries[-1].part) == (label, part):
            entries, count = entries[:-1], entries[-1].count + count
        entries = (*entries, LedgerEntry(event, count, label, part))
        return PrivacyLedger(self.adjacency, self.unit, entries, fixed_parts=self.fixed_parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts, in the order of their first entries."""
        return tuple(dict.fromkeys(entry.part for entry in self.entries if entry.part is not None))

    def event_of(self, part: str | None) -> "DpEvent":
        """One DP event for all that a unit of a part (of None: of no part) has been in, equal events counted together."""
        import dp_accounting as da

        runs = tuple(
            da.SelfComposedDpEvent(entry.event, entry.count) for entry in self.entries if entry.part in (None, part)
        )
        return composed(parts(da.ComposedDpEvent(list(runs))))

    @property
    def event(self) -> "DpEvent":
        """One DP event for everything, equal parts counted together. Raises `ValueError` if there are parts: each has its own, `event_of(part)`."""
        if self.parts:
            raise ValueError(
                f"This ledger has parts, {', '.join(map(repr, self.parts))}, of which each has an event of its own: ask `event_of(part)`, or spend "
                "the entries one by one."
            )
        return self.event_of(None)

    def epsilon(self, delta: RealScalarLike, accountant: AccountantName | None = None) -> float:
        r"""An upper bound on $\varepsilon$ at `delta` for all entries together, for whichever part a unit is in.

        **Arguments:**

        - `delta`: $\delta$, strictly between 0 and 1.
        - `accountant`: `"pld"` or `"rdp"`; by default the first of them that knows all entries.
        """
        return max(self.epsilon_by_part(delta, accountant).values(), default=0.0)

    def epsilon_by_part(
        self, delta: RealScalarLike, accountant: AccountantName | None = None
    ) -> dict[str | None, float]:
        r"""$\varepsilon$ at `delta` for the units of each part; under None where nothing has parts. Empty if nothing was spent."""
        target = probability("PrivacyLedger.epsilon(delta=...)", delta)

        def of(part: str | None) -> float:
            event = self.event_of(part)
            return self._answer(
                lambda name: epsilon(event, target, adjacency=self.adjacency, accountant=name), accountant
            )

        return {part: of(part) for part in self.parts or (None,)} if self.entries else {}

    def delta(self, epsilon: RealScalarLike, accountant: AccountantName | None = None) -> float:
        r"""An upper bound on $\delta$ at `epsilon` for all entries together; arguments as for `epsilon`."""
        number = at_least_zero("PrivacyLedger.delta(epsilon=...)", epsilon)

        def of(part: str | None) -> float:
            event = self.event_of(part)
            return self._answer(
                lambda name: delta(event, number, adjacency=self.adjacency, accountant=name), accountant
            )

        return max(of(part) for part in self.parts or (None,)) if self.entries else 0.0

    def _check_part(self, part: Any) -> None:
        if part is None:
            return
        if not isinstance(part, str) or not part:
            raise ValueError(f"`PrivacyLedger.spend(part=...)` must be the name of a part; got {described(part)}.")
        if self.adjacency == "replace_one" and not self.fixed_parts:
            raise ValueError(_MSG_MOVING_PARTS.format(part=part))

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
        """The ledger in plain English: what was spent, and what it costs together; epsilon and delta rounded up."""
        stated = round_up(probability("PrivacyLedger.statement(delta=...)", delta))
        costs = self.epsilon_by_part(delta)
        total = max(costs.values(), default=0.0)
        neighbours = NEIGHBOURS[self.adjacency].format(unit=self.unit)
        lines = [
            f"All releases together are ({round_epsilon(total)}, {stated})-differentially private for one {self.unit}; "
            f"neighbouring data sets: {neighbours} (adjacency `{self.adjacency}`).",
            "",
        ]
        if self.parts:
            lines[1:1] = [
                "",
                f"Assumed: the parts of the data have no {self.unit} in common, and which part a {self.unit} is in depends on nothing but itself"
                f"{', and does not change when it is replaced' if self.fixed_parts else ''}. Units of one part pay for what ran on it and on all of "
                f"the data: {', '.join(f'{part} epsilon {round_epsilon(cost)}' for part, cost in costs.items())}.",
            ]
        for entry in self.entries:
            times = f"{entry.count:,} x " if entry.count > 1 else ""
            where = f" (on {entry.part})" if entry.part is not None else ""
            lines.append(
                f"- {entry.label + ': ' if entry.label else ''}{times}{textwrap.shorten(str(entry.event), 200)}{where}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The ledger as JSON, numbers to the last bit. Raises `ValueError` if an event is of a type that nobody could read again."""
        return written(self.adjacency, self.unit, self.entries, self.fixed_parts)

    @classmethod
    def from_json(cls, text: str) -> "PrivacyLedger":
        """The ledger that `to_json` wrote. Raises `ValueError`, saying what is wrong, for anything else."""
        adjacency, unit, entries, fixed_parts = read(text)
        return cls(adjacency, unit, entries, fixed_parts=fixed_parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the ledger, for its owner alone to read: a crash leaves the old file or the new one, never half of one."""
        write_text_atomically(path, self.to_json() + "\n", mode=0o600)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PrivacyLedger":
        """The ledger that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _first_steps(plan: Any, steps: Any) -> "DpEvent":
    if not hasattr(plan, "event_after"):
        raise ValueError(
            f"`PrivacyLedger.spend(steps={steps!r})` goes with a plan, which knows what its first steps cost; got {type(plan).__name__}. For an "
            "event that ran several times give `count=`."
        )
    return plan.event_after(steps)
