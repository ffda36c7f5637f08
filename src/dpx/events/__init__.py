"""DP events as data: our event classes, the one normal form, JSON. No numerics.

Our classes are looked up when they are asked for, since they import `dp_accounting`, which takes two seconds: name them inside the function
that needs them.
"""

from typing import TYPE_CHECKING, Any

from ._json import from_jsonable as from_jsonable, to_jsonable as to_jsonable
from ._tree import (
    Parts as Parts,
    canonical as canonical,
    composed as composed,
    parts as parts,
    reduced as reduced,
    uncoupled as uncoupled,
)

if TYPE_CHECKING:
    from ._kinds import (
        CoupledDpEvent as CoupledDpEvent,
        FixedSizeSampledGaussianDpEvent as FixedSizeSampledGaussianDpEvent,
        GaussianMixtureOfBinsDpEvent as GaussianMixtureOfBinsDpEvent,
        MinSepSampledDpEvent as MinSepSampledDpEvent,
        RandomAllocationDpEvent as RandomAllocationDpEvent,
    )


def __getattr__(name: str) -> Any:
    if not name.endswith("DpEvent"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _kinds

    return getattr(_kinds, name)
