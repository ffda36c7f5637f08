"""The ghost engine: clipped sums of per-example gradients without the gradients. Derived in docs/ghost.md."""

from . import _rule_conv as _rule_conv, _rule_dot as _rule_dot, _rule_gather as _rule_gather
from ._engine import (
    batch_that_fits as batch_that_fits,
    clipped_sum_of as clipped_sum_of,
    ghost_clipped_sum as ghost_clipped_sum,
    trace_example as trace_example,
)
from ._report import ghost_check as ghost_check, ghost_plan as ghost_plan
from ._use import EinsumUse as EinsumUse, ScatterUse as ScatterUse, Use as Use, ghost_rule as ghost_rule
