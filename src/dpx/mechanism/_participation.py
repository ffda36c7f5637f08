"""In which steps an example may take part, as it was given."""

from typing import Any

from .._checks import described, positive_int
from .._types import Participation


def check_participation(call: str, participation: Any) -> Participation:
    """In which steps an example may take part; by default in all."""
    if participation is None:
        return Participation(1, None)
    if not isinstance(participation, tuple) or len(participation) != 2:
        raise ValueError(
            f"`{call}` must be a `Participation(min_separation, max_participations)`; got {described(participation)}."
        )
    separation, most = participation
    positive_int(f"{call[:-1]}: min_separation", separation)
    return Participation(separation, None if most is None else positive_int(f"{call[:-1]}: max_participations", most))
