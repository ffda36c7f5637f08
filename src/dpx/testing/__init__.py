"""Properties of parts: laws that a clipping, a noise, a strategy, a sampler, a metric, a gradient method, a loss or a plan must obey, and inputs that
break them. `dpx` checks its own parts with them; check yours.

A check raises `AssertionError`, which names the law that is broken and shows how. Nothing of this needs `hypothesis` but the strategies that draw
inputs, which import it when they are called (`pip install 'dpx[testing]'`).
"""

from ._clipping import check_clipping as check_clipping
from ._gradient_method import check_gradient_method as check_gradient_method
from ._hypothesis import (
    batches as batches,
    gradients as gradients,
    hostile_floats as hostile_floats,
    masks as masks,
    models as models,
    plans as plans,
)
from ._loss import check_loss as check_loss
from ._metric import check_metric as check_metric
from ._noise import check_noise as check_noise
from ._plan import check_plan as check_plan
from ._sampler import check_sampler as check_sampler
from ._strategy import check_strategy as check_strategy
from ._zoo import ZooLoss as ZooLoss
