"""How clipped sums are computed: a choice of speed, never of result."""

from ._auto import Auto as Auto
from ._base import (
    AbstractGradientMethod as AbstractGradientMethod,
    ClippedSum as ClippedSum,
    LeafPlan as LeafPlan,
)
from ._explain import (
    Check as Check,
    Explanation as Explanation,
    comparison as comparison,
    explanation as explanation,
)
from ._ghost import (
    EinsumUse as EinsumUse,
    ScatterUse as ScatterUse,
    Use as Use,
    ghost_check as ghost_check,
    ghost_rule as ghost_rule,
)
from ._ghost_method import Ghost as Ghost
from ._microbatch import microbatch_count as microbatch_count
from ._reach import unreached_leaves as unreached_leaves, watched as watched
from ._vectorized import Vectorized as Vectorized
