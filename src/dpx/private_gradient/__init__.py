"""Clip, sum, add noise, divide by a public number: `PrivateGradient`, and `PrivateSum` of anything else."""

from ._private_gradient import (
    Check as Check,
    Diagnostics as Diagnostics,
    Explanation as Explanation,
    PrivateGradient as PrivateGradient,
    PrivateGradientState as PrivateGradientState,
    Result as Result,
    Stated as Stated,
    stated_of as stated_of,
)
from ._private_sum import PrivateSum as PrivateSum, model_update as model_update
