"""Differentially private machine learning in JAX and Equinox."""

from . import accounting as accounting, random as random, sharding as sharding
from ._sensitive import Sensitive as Sensitive
from ._types import Participation as Participation
from .clipping import AbstractClipping as AbstractClipping, FlatClipping as FlatClipping, NoClipping as NoClipping
from .gradients import AbstractGradientMethod as AbstractGradientMethod, Auto as Auto, Vectorized as Vectorized
from .noise import AbstractNoise as AbstractNoise, IndependentGaussian as IndependentGaussian, Laplace as Laplace
from .plan import PrivacyPlan as PrivacyPlan, dp_sgd as dp_sgd
from .private_gradient import (
    Diagnostics as Diagnostics,
    Explanation as Explanation,
    PrivateGradient as PrivateGradient,
    PrivateGradientState as PrivateGradientState,
    Result as Result,
)
from .sampling import AbstractSampler as AbstractSampler, PoissonSampler as PoissonSampler
