"""How clipped sums are computed: a choice of speed, never of result."""

from ._auto import Auto as Auto
from ._base import (
    AbstractGradientMethod as AbstractGradientMethod,
    ClippedSum as ClippedSum,
    LeafPlan as LeafPlan,
)
from ._vectorized import Vectorized as Vectorized
