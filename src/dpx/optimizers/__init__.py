"""What differential privacy changes about the update: all of it is a function of private gradients, and costs nothing."""

from ._adam_bc import (
    ScaleByAdamBCState as ScaleByAdamBCState,
    adam_bc as adam_bc,
    scale_by_adam_bc as scale_by_adam_bc,
)
from ._average import (
    AbstractParameterAverage as AbstractParameterAverage,
    AverageState as AverageState,
    ExponentialAverage as ExponentialAverage,
    TailAverage as TailAverage,
    ema as ema,
    tail_average as tail_average,
)
from ._scale_then_privatize import (
    ScaleThenPrivatize as ScaleThenPrivatize,
    scale_then_privatize as scale_then_privatize,
)
