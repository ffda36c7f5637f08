"""The ghost engine as a gradient method."""

import os
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool

from .._checks import positive_float, positive_int
from .._tree import leaf_paths
from .._types import Examples, FactorsFromNorms, Params, PerExampleLoss, Quantise
from ._base import AbstractGradientMethod, ClippedSum, LeafPlan
from ._ghost import batch_that_fits, clipped_sum_of, ghost_plan, trace_example
from ._microbatch import in_microbatches
from ._vectorized import Vectorized


class Ghost(AbstractGradientMethod):
    """Finds the norms without the gradients: one forward and one backward pass over the batch, for any loss.

    The loss is traced to a program; wherever it multiplies, convolves or looks up a parameter, the norm of an example's gradient and
    the clipped sum are computed from the operands. Parameters used in any other way are differentiated per example.

    **Arguments:**

    - `microbatch_size`: how many examples are processed at once; by default all.
    - `memory_budget`: bytes that may be held for clipping, beyond ordinary backpropagation, or a fraction (below 1) of the device's
        memory. Rules and, if need be, the microbatch and a second pass are chosen to stay below.
    """

    microbatch_size: int | None = eqx.field(static=True)
    memory_budget: int | float | None = eqx.field(static=True)

    def __init__(self, microbatch_size: int | None = None, memory_budget: int | float | None = None):
        name = "Ghost(microbatch_size=...)"
        self.microbatch_size = None if microbatch_size is None else positive_int(name, microbatch_size)
        if memory_budget is not None:
            memory_budget = positive_float("Ghost(memory_budget=...)", memory_budget)
        self.memory_budget = memory_budget

    def clipped_sum(
        self,
        loss: PerExampleLoss,
        params: Params,
        examples: Examples,
        mask: Bool[Array, " batch"],
        labels: tuple[int, ...],
        order: int,
        factors: FactorsFromNorms,
        quantise: Quantise | None = None,
    ) -> ClippedSum:
        if quantise is not None:  # nothing can be rounded that is never computed
            method = Vectorized(self.microbatch_size)
            return method.clipped_sum(loss, params, examples, mask, labels, order, factors, quantise)
        budget = _bytes(self.memory_budget)
        program = trace_example(loss, params, examples)
        size, passes = self.microbatch_size, 1
        if size is None:
            size, passes = batch_that_fits(program, mask.shape[0], budget, order)

        def compute(examples, mask):
            options: Any = {"order": order, "memory_budget": budget, "passes": passes}
            return clipped_sum_of(program, params, examples, mask, labels, factors, **options)

        return in_microbatches(compute, examples, mask, size)

    def explain(self, loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[LeafPlan, ...]:
        rows = ghost_plan(loss, params, examples, memory_budget=_bytes(self.memory_budget))
        return tuple(LeafPlan(path, *row) for path, row in zip(leaf_paths(params), rows, strict=True))


def _bytes(budget: int | float | None) -> int | None:
    if budget is None or budget >= 1:
        return None if budget is None else int(budget)
    stats = jax.local_devices()[0].memory_stats() or {}
    # the CPU has no limit of its own
    limit = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(budget * limit)
