"""Who is protected, by whose account: the names of adjacencies and accountants, and the checks of what is asked about."""

import enum
from typing import TYPE_CHECKING, Any, Literal, get_args

from .._checks import described, probability, real_number
from .._types import Adjacency as Adjacency

AccountantName = Literal["pld", "rdp"]
if TYPE_CHECKING:
    from dp_accounting import NeighboringRelation

    Neighbours = Adjacency | NeighboringRelation
else:
    Neighbours = Any
NEIGHBOURS = {
    "add_or_remove_one": "one {unit} is added to or removed from the data",
    "replace_one": "one {unit} is replaced by any other",
    "replace_special": "one {unit} is replaced by an empty one, which contributes nothing (the size of the data is public)",
}


def check_delta(call: str, delta: Any) -> float:
    """Delta as a Python float: at least 0, where only pure differential privacy has an answer, and below 1."""
    return 0.0 if real_number(call, delta) == 0 else probability(call, delta)


def check_adjacency(adjacency: Any, call: str = "") -> Adjacency:
    """The name of an adjacency that can be accounted for, which may be a member of dp_accounting's enumeration; `call` is what was typed."""
    if isinstance(adjacency, enum.Enum) and type(adjacency).__name__ == "NeighboringRelation":
        adjacency = adjacency.name.lower()
    if not isinstance(adjacency, str) or adjacency not in get_args(Adjacency):
        where = f"`{call}(adjacency=...)`: " if call else ""
        raise ValueError(
            f"{where}`adjacency` must be one of {', '.join(map(repr, get_args(Adjacency)))}; got {described(adjacency)}."
        )
    return adjacency  # pyright: ignore[reportReturnType]


def check_accountant(accountant: str, adjacency: str, call: str = "") -> None:
    """Raises unless `accountant` is known and proves its bound under `adjacency`; `call` is what was typed."""
    if not isinstance(accountant, str) or accountant not in get_args(AccountantName):
        where = f"`{call}(accountant=...)`: " if call else ""
        raise ValueError(f"{where}`accountant` must be 'pld' or 'rdp'; got {described(accountant)}.")
    if accountant == "rdp" and adjacency == "replace_one":
        raise ValueError(
            "`accountant='rdp'` cannot account for `adjacency='replace_one'`: Rényi accounting of dp_accounting takes the sensitivity of "
            "replacement for that of removal, half of what it is. Use `accountant='pld'`."
        )
