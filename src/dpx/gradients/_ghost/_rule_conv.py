"""Convolutions, through patches of the input."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._use import EinsumUse, Use, first_operand, ghost_rule


@ghost_rule("conv_general_dilated")
def conv(use: Use) -> EinsumUse | None:
    r"""Stride, padding, dilation of input and kernel, and feature groups, in any number of dimensions and any layout.

    With $X_{n,s,k,c}$ the input pixel under kernel offset $k$ at output position $s$ (a view of the padded input, zero where the
    window leaves it), $y_{n,s,o} = \sum_{k,c} W_{o,c,k} X_{n,s,k,c}$: a matrix product over sequence $(n, s)$.
    """
    if use.operand != 1 or use.params["batch_group_count"] != 1:
        return None
    lhs_spec, rhs_spec, out_spec = use.params["dimension_numbers"]
    rhs, out = use.inputs[1].shape, use.output.shape
    groups = use.params["feature_group_count"]
    spatial = len(lhs_spec) - 2
    # kernel: the axis of output features is split in (groups, features of a group)
    at = rhs_spec[0]
    parameter_shape = (*rhs[:at], groups, rhs[at] // groups, *rhs[at + 1 :])
    shifted = lambda j: j if j < at else j + 1
    group_axis, feature_axis, channel_axis = at, at + 1, shifted(rhs_spec[1])
    kernel_axes = tuple(shifted(j) for j in rhs_spec[2:])
    # output: likewise
    at = out_spec[1]
    output_shape = (*out[:at], groups, out[at] // groups, *out[at + 1 :])
    sequence = {j: -1 - n for n, j in enumerate((out_spec[0], *out_spec[2:]))}
    output_axes: list[tuple[int, ...]] = [
        (sequence[j],) if j in sequence else (group_axis, feature_axis) for j in range(len(out))
    ]

    expand = _patches(
        lhs_spec,
        tuple(rhs[j] for j in rhs_spec[2:]),
        tuple(out[j] for j in out_spec[2:]),
        groups,
        use.params["window_strides"],
        use.params["padding"],
        use.params["lhs_dilation"],
        use.params["rhs_dilation"],
    )
    # (n, groups, channels of a group, kernel..., positions...)
    captured_axes = (-1, group_axis, channel_axis, *kernel_axes, *(-2 - n for n in range(spatial)))
    return EinsumUse(first_operand, captured_axes, sum(output_axes, ()), parameter_shape, output_shape, expand)


def _patches(
    lhs_spec, kernel, positions, groups, strides, padding, lhs_dilation, rhs_dilation
) -> Callable[[Array], Array]:
    """One spatial axis after the other, so that a k by k kernel takes 2k slices rather than k squared."""

    def expand(x: Array) -> Array:
        x = jnp.transpose(x, lhs_spec)
        n, channels = x.shape[:2]
        config = [(0, 0, 0), (0, 0, 0)]
        config += [(low, high, d - 1) for (low, high), d in zip(padding, lhs_dilation, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
        for done, size in enumerate(kernel):
            # axes: n, channels, kernel offsets done, positions done, spatial axes to do
            axis = 2 + 2 * done
            starts = [offset * rhs_dilation[done] for offset in range(size)]
            span = (positions[done] - 1) * strides[done] + 1
            windows = [lax.slice_in_dim(x, start, start + span, strides[done], axis) for start in starts]
            x = jnp.stack(windows, axis=2 + done)
        return x.reshape(n, groups, channels // groups, *kernel, *positions)

    return expand
