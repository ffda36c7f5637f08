"""Who is protected, by whose account: the names of adjacencies and accountants, and the checks of what is asked about."""

from typing import Any, Literal, get_args

from .._checks import described, probability, real_number

Adjacency = Literal["add_or_remove_one", "replace_one", "replace_special"]
AccountantName = Literal["pld", "rdp"]
NEIGHBOURS = {
    "add_or_remove_one": "one {unit} is added to or removed from the data",
    "replace_one": "one {unit} is replaced by any other",
    "replace_special": "one {unit} is replaced by an empty one, which contributes nothing (the size of the data is public)",
}


def check_delta(call: str, delta: Any) -> float:
    """Delta as a Python float: at least 0, where only pure differential privacy has an answer, and below 1."""
    return 0.0 if real_number(call, delta) == 0 else probability(call, delta)


def check_adjacency(adjacency: str, call: str = "") -> None:
    """Raises unless `adjacency` is one that can be accounted for; `call` is what was typed."""
    if not isinstance(adjacency, str) or adjacency not in get_args(Adjacency):
        where = f"`{call}(adjacency=...)`: " if call else ""
        raise ValueError(
            f"{where}`adjacency` must be one of {', '.join(map(repr, get_args(Adjacency)))}; got {described(adjacency)}."
        )


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
