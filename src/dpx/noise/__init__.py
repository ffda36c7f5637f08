"""What is added to a clipped sum."""

from ._base import (
    AbstractNoise as AbstractNoise,
    check_noise as check_noise,
)
from ._correlated import CorrelatedGaussian as CorrelatedGaussian
from ._discrete import DiscreteGaussian as DiscreteGaussian
from ._gaussian import IndependentGaussian as IndependentGaussian
from ._independent import (
    AbstractIndependentNoise as AbstractIndependentNoise,
    AbstractIntegerNoise as AbstractIntegerNoise,
)
from ._laplace import Laplace as Laplace
from ._rounding import Rounding as Rounding
