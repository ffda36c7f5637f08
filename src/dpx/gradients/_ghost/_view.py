"""Values that are a rearrangement of one parameter, so that a gradient with respect to them has the same norm."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array


class View(eqx.Module):
    """A value computed from one leaf by casts, transposes, reshapes and slices only.

    `base` is the leaf after `steps`; axis `j` of the value is axis `axes[j]` of the base. The other axes of the base, `stack`, are
    those that enclosing scans iterate over, outermost first.

    **Arguments:**

    - `leaf`: which leaf.
    - `steps`: `("reshape", shape)`, `("transpose", permutation)` and `("slice", starts, limits, strides)`, from leaf to base.
    - `shape`: of the base.
    - `axes`: see above.
    - `stack`: see above.
    - `depths`: for each stacked axis, how many scans enclose the scan that iterates over it.
    """

    leaf: int = eqx.field(static=True)
    steps: tuple = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)
    stack: tuple[int, ...] = eqx.field(static=True, default=())
    depths: tuple[int, ...] = eqx.field(static=True, default=())

    @property
    def value_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[j] for j in self.axes)

    def transpose(self, permutation) -> "View":
        axes = tuple(self.axes[j] for j in permutation)
        return View(self.leaf, self.steps, self.shape, axes, self.stack, self.depths)

    def unstack(self, depth: int) -> "View":
        """The slice that one step of a scan over the first axis sees, the scan being inside `depth` others."""
        stack = (*self.stack, self.axes[0])
        return View(self.leaf, self.steps, self.shape, self.axes[1:], stack, (*self.depths, depth))

    def reshape(self, shape) -> "View":
        if tuple(shape) == self.value_shape:
            return self
        view = self._in_order()
        lead = view.shape[: len(view.stack)]
        return view._then(("reshape", (*lead, *shape)), (*lead, *shape))

    def slice(self, starts, limits, strides) -> "View":
        view = self._in_order()
        lead = view.shape[: len(view.stack)]
        starts, limits = (0,) * len(lead) + tuple(starts), (*lead, *limits)
        strides = (1,) * len(lead) + tuple(strides)
        shape = tuple(-(-(b - a) // s) for a, b, s in zip(starts, limits, strides, strict=True))
        return view._then(("slice", starts, limits, strides), shape)

    def apply(self, leaf: Array) -> Array:
        """The base, from the leaf. Linear, and its transpose preserves norms."""
        for name, *arguments in self.steps:
            if name == "reshape":
                leaf = leaf.reshape(arguments[0])
            elif name == "transpose":
                leaf = jnp.transpose(leaf, arguments[0])
            else:
                starts, limits, strides = arguments
                leaf = leaf[tuple(slice(a, b, s) for a, b, s in zip(starts, limits, strides, strict=True))]
        return leaf

    def is_disjoint(self, other: "View") -> bool:
        """Whether the two are certain to share no number. Only leading slices of the leaf are compared."""
        for one, two in zip(self.steps, other.steps, strict=False):
            if one[0] != "slice" or two[0] != "slice":
                return False
            for a, b, c, d in zip(one[1], one[2], two[1], two[2], strict=True):
                if b <= c or d <= a:
                    return True
            if one != two:
                return False
        return False

    def _in_order(self) -> "View":
        """The same value with the stacked axes first and then its own, in order."""
        order = (*self.stack, *self.axes)
        if order == tuple(range(len(order))):
            return self
        return self._then(("transpose", order), tuple(self.shape[j] for j in order))

    def _then(self, step, shape) -> "View":
        lead = len(self.stack)
        axes, stack = tuple(range(lead, len(shape))), tuple(range(lead))
        return View(self.leaf, (*self.steps, step), shape, axes, stack, self.depths)


def whole(leaf: int, shape: tuple[int, ...]) -> View:
    """The leaf itself."""
    return View(leaf, (), shape, tuple(range(len(shape))))


def view_through(primitive: str, params, view: View, shapes) -> tuple[View, ...] | None:
    """What the results of an equation that only rearranges `view` are; None if it does anything else."""
    if primitive in ("convert_element_type", "copy", "copy_p"):
        return (view,)
    if primitive == "transpose":
        return (view.transpose(params["permutation"]),)
    if primitive == "reshape" and params.get("dimensions") is None:
        return (view.reshape(shapes[0]),)
    if primitive in ("squeeze", "expand_dims"):
        return (view.reshape(shapes[0]),)
    if primitive == "broadcast_in_dim" and math.prod(shapes[0]) == math.prod(view.value_shape):
        # axes keep their order, so that only unit axes can be new
        return (view.reshape(shapes[0]),)
    if primitive == "slice":
        strides = params["strides"] or (1,) * len(view.axes)
        return (view.slice(params["start_indices"], params["limit_indices"], strides),)
    if primitive == "split":
        axis, start, out = params["axis"], 0, []
        for size in params["sizes"]:
            starts = [0] * len(view.axes)
            limits = list(view.value_shape)
            starts[axis], limits[axis] = start, start + int(size)
            start += int(size)
            out.append(view.slice(starts, limits, (1,) * len(view.axes)))
        return tuple(out)
    return None
