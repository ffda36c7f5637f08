"""The default method."""

from jaxtyping import Array, Bool

from .._types import Examples, FactorsFromNorms, Params, PerExampleLoss, Quantise
from ._base import AbstractGradientMethod, ClippedSum, LeafPlan
from ._ghost_method import Ghost


class Auto(AbstractGradientMethod):
    """Chooses for every use of every parameter the cheapest rule, one gradient per example among them: `Ghost()` as it comes.

    **Arguments:**

    None.
    """

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
        return Ghost().clipped_sum(loss, params, examples, mask, labels, order, factors, quantise)

    def explain(self, loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[LeafPlan, ...]:
        return Ghost().explain(loss, params, examples)
