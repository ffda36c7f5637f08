"""What is added to a clipped sum."""

from ._base import AbstractNoise as AbstractNoise
from ._correlated import CorrelatedGaussian as CorrelatedGaussian
from ._gaussian import IndependentGaussian as IndependentGaussian
from ._laplace import Laplace as Laplace
