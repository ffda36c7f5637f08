"""How one equation uses a parameter, and the registry of rules that say so."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array


class Use(eqx.Module):
    """One equation of the loss, in which exactly one operand is a parameter. All shapes are those of ONE example.

    **Arguments:**

    - `params`: the parameters of the primitive, as JAX's documentation of `jax.lax` names them.
    - `operand`: the position of the parameter among the operands.
    - `inputs`: shape and dtype of every operand.
    - `output`: shape and dtype of the result.
    """

    params: Mapping[str, Any] = eqx.field(static=True)
    operand: int = eqx.field(static=True)
    inputs: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    output: jax.ShapeDtypeStruct = eqx.field(static=True)


class EinsumUse(eqx.Module):
    r"""A use whose gradient is an Einstein sum of a captured array $E$ and the output's cotangent $\dot y$.

    $$G_{\text{parameter}} = \sum_{\text{sequence}} E_{\ldots} \, \dot y_{\ldots}$$

    Every axis is named by an integer. Axis $j \ge 0$ is axis $j$ of the parameter; a negative number is a *sequence* axis, which
    is summed over and must occur in both $E$ and $\dot y$. A parameter axis in both is a batch axis of the product.

    **Arguments:**

    - `capture`: `(*other operands) -> E` for one example, evaluated in the forward pass; what it returns is kept in memory.
    - `captured_axes`: the axes of `expand(E)`.
    - `output_axes`: the axes of $\dot y$ after it was reshaped to `output_shape`.
    - `parameter_shape`: shape of the parameter in which axes are counted, where it must be split first; by default as it is.
    - `output_shape`: likewise for $\dot y$.
    - `expand`: applied to one example's $E$ when the gradient is formed (patches of an image); by default nothing.
    """

    capture: Callable[..., Array] = eqx.field(static=True)
    captured_axes: tuple[int, ...] = eqx.field(static=True)
    output_axes: tuple[int, ...] = eqx.field(static=True)
    parameter_shape: tuple[int, ...] | None = eqx.field(static=True, default=None)
    output_shape: tuple[int, ...] | None = eqx.field(static=True, default=None)
    expand: Callable[[Array], Array] | None = eqx.field(static=True, default=None)


class ScatterUse(eqx.Module):
    r"""A use that reads rows of the parameter: row `ids[s]` along `axis` receives the cotangent $\dot y_s$.

    **Arguments:**

    - `capture`: `(*other operands) -> ids`, integers of any shape, one for each row read. Rows outside the parameter get nothing.
    - `axis`: the parameter's axis that `ids` index.
    - `output_axes`: the axes of $\dot y$ after it was reshaped to `output_shape`, named as in `EinsumUse`; the negative ones
        are those of `ids`, in order.
    - `output_shape`: see `output_axes`.
    """

    capture: Callable[..., Array] = eqx.field(static=True)
    axis: int = eqx.field(static=True)
    output_axes: tuple[int, ...] = eqx.field(static=True)
    output_shape: tuple[int, ...] | None = eqx.field(static=True, default=None)


Rule = Callable[[Use], EinsumUse | ScatterUse | None]

_RULES: dict[str, Rule] = {}


def ghost_rule(primitive: str) -> Callable[[Rule], Rule]:
    """Registers the rule of a primitive, by name, for `dpx.Ghost`.

    A rule gets a `Use` and returns an `EinsumUse` or a `ScatterUse`, or None where it does not apply: then the parameter is
    differentiated per example, which is always right. The equation must be linear in the parameter.

    ```python
    @ghost_rule("my_matvec")  # y = W x
    def _(use):
        return EinsumUse(capture=lambda x: x, captured_axes=(1,), output_axes=(0,)) if use.operand == 0 else None
    ```
    """

    def register(rule: Rule) -> Rule:
        _RULES[primitive] = rule
        return rule

    return register


def first_operand(e: Array, *_: Array) -> Array:
    """Captures the first of the other operands. Sites that share a capture function and its operands share what is captured."""
    return e


def find_use(primitive: str, use: Use) -> EinsumUse | ScatterUse | None:
    """What the registered rule says of `use`; None if there is no rule or it does not apply."""
    rule = _RULES.get(primitive)
    return None if rule is None else rule(use)
