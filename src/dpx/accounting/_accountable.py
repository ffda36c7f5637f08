"""What can be accounted for: an event, and for whom it holds."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import equinox as eqx

from ._neighbours import Adjacency

if TYPE_CHECKING:
    from dp_accounting import DpEvent


@runtime_checkable
class Accountable(Protocol):
    """Anything that says what it costs, and for which neighbours and which unit that holds: a plan, a ledger, a `Release`."""

    @property
    def event(self) -> "DpEvent":
        """The DP event of all of it."""
        ...

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets are."""
        ...

    @property
    def unit(self) -> str:
        """What is protected."""
        ...


class Release(eqx.Module):
    """A DP event together with the neighbours and the unit that it holds for, so that a ledger can refuse what does not add up.

    **Arguments:**

    - `event`: a DP event of `dp_accounting`.
    - `adjacency`: what neighbouring data sets are.
    - `unit`: what is protected.
    """

    event: Any = eqx.field(static=True)
    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
