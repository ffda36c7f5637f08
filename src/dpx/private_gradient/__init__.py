"""Clip, sum, add noise, divide by a public number: `PrivateGradient`, and `PrivateSum` of anything else."""

from ..gradients import Check as Check, Explanation as Explanation
from ._diagnostics import Diagnostics as Diagnostics
from ._private_gradient import PrivateGradient as PrivateGradient
from ._private_sum import PrivateSum as PrivateSum, model_update as model_update
from ._rebuild import rebuilt_noise as rebuilt_noise
from ._state import PrivateGradientState as PrivateGradientState, Result as Result
from ._stated import Stated as Stated, stated_of as stated_of
