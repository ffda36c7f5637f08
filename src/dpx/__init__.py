"""Differentially private machine learning in JAX and Equinox."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING, Any as _Any

from . import (
    accounting as accounting,
    data as data,
    gradients as gradients,
    metrics as metrics,
    optimizers as optimizers,
    random as random,
    sharding as sharding,
    strategies as strategies,
)
from ._sensitive import Sensitive as Sensitive
from ._types import Participation as Participation
from .clipping import (
    AbstractClipping as AbstractClipping,
    AdaptiveClipping as AdaptiveClipping,
    FlatClipping as FlatClipping,
    GroupClipping as GroupClipping,
    HardThresholdClipping as HardThresholdClipping,
    NoClipping as NoClipping,
    NormalizedClipping as NormalizedClipping,
    PSACClipping as PSACClipping,
    SlackClipping as SlackClipping,
)
from .gradients import (
    AbstractGradientMethod as AbstractGradientMethod,
    Auto as Auto,
    Ghost as Ghost,
    Vectorized as Vectorized,
)
from .noise import (
    AbstractNoise as AbstractNoise,
    CorrelatedGaussian as CorrelatedGaussian,
    DiscreteGaussian as DiscreteGaussian,
    IndependentGaussian as IndependentGaussian,
    Laplace as Laplace,
)
from .plan import PrivacyPlan as PrivacyPlan, dp_mf as dp_mf, dp_sgd as dp_sgd
from .private_gradient import (
    Check as Check,
    Diagnostics as Diagnostics,
    Explanation as Explanation,
    PrivateGradient as PrivateGradient,
    PrivateGradientState as PrivateGradientState,
    PrivateSum as PrivateSum,
    Result as Result,
    model_update as model_update,
)
from .problem import augment as augment
from .sampling import (
    AbstractSampler as AbstractSampler,
    BallsInBinsSampler as BallsInBinsSampler,
    CyclicPoissonSampler as CyclicPoissonSampler,
    FixedSizeSampler as FixedSizeSampler,
    MinSepSampler as MinSepSampler,
    PoissonSampler as PoissonSampler,
    RandomAllocationSampler as RandomAllocationSampler,
    ShuffleSampler as ShuffleSampler,
    UserSampler as UserSampler,
    bound_contributions as bound_contributions,
)
from .strategies import (
    AbstractStrategy as AbstractStrategy,
    BandedInverse as BandedInverse,
    BandedToeplitz as BandedToeplitz,
    BufferedToeplitz as BufferedToeplitz,
    ColumnNormalizedBanded as ColumnNormalizedBanded,
    DenseStrategy as DenseStrategy,
    GeometricStrategy as GeometricStrategy,
    Identity as Identity,
    SquareRootToeplitz as SquareRootToeplitz,
    TreeAggregation as TreeAggregation,
)

__version__ = _version("dpx")

if _TYPE_CHECKING:
    from . import auditing as auditing, testing as testing, training as training
    from .training import (
        Checkpoints as Checkpoints,
        StepInfo as StepInfo,
        Stop as Stop,
        Trainer as Trainer,
        TrainResult as TrainResult,
        TrainState as TrainState,
        load_published as load_published,
    )

_ROOMS = ("auditing", "testing", "training")
_TRAINING = ("Checkpoints", "StepInfo", "Stop", "Trainer", "TrainResult", "TrainState", "load_published")


def __getattr__(name: str) -> _Any:
    """Rooms, and names in them, that are imported when they are asked for: who only checks or accounts need not wait for them."""
    import importlib

    if name in _ROOMS:
        return importlib.import_module(f"dpx.{name}")
    if name in _TRAINING:
        return getattr(importlib.import_module("dpx.training"), name)
    raise AttributeError(f"module 'dpx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_TRAINING})
