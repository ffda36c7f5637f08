"""The default method."""

from jaxtyping import Array, Bool

from .._types import Examples, FactorsFromNorms, Params, PerExampleLoss
from ._base import AbstractGradientMethod, ClippedSum, LeafPlan
from ._vectorized import Vectorized


class Auto(AbstractGradientMethod):
    """Chooses the method; today that is `Vectorized()`.

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
    ) -> ClippedSum:
        return Vectorized().clipped_sum(loss, params, examples, mask, labels, order, factors)

    def explain(self, loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[LeafPlan, ...]:
        return Vectorized().explain(loss, params, examples)
