r"""One site's contribution to the per-example gradients of a parameter, as factors that are multiplied as late as possible.

Axes are labelled: `"b"` the batch, a non-negative integer an axis of the parameter's base (see `View`), a negative integer a sequence
axis. An `Outer` term is $G_b = \sum_s A_{b,s} \otimes Y_{b,s}$; a `Rows` term is $G_b = \sum_s e_{\mathrm{ids}_{b,s}} \otimes Y_{b,s}$, with
$e_i$ the unit vectors of one axis. All sums over features and sequences are accumulated in float32 or wider.
"""

import math
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..._norms import exponent, times_power
from ..._tree import weighted, wide
from ._jaxpr import Site
from ._use import EinsumUse

Label = int | str

# Real and imaginary parts are two positions of one more sequence axis.
_PARTS = -5000

# Products of longer sequences are added up in pieces of `_PIECE` positions, so that their rounding stays small beside the norm.
_LONG, _PIECE = 1024, 256


class Outer(eqx.Module):
    """A sum of products of two dense factors: see the module.

    **Arguments:**

    - `a`, `y`: the factors.
    - `a_axes`, `y_axes`: the label of each of their axes.
    - `shape`: of the parameter's base.
    """

    a: Array
    y: Array
    a_axes: tuple[Label, ...] = eqx.field(static=True)
    y_axes: tuple[Label, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)


class Rows(eqx.Module):
    """A sum of rows: see the module.

    **Arguments:**

    - `ids`: which row; outside the axis, none.
    - `y`: the rows.
    - `ids_axes`, `y_axes`: the label of each of their axes.
    - `axis`: the axis of the parameter's base that `ids` index.
    - `shape`: of the parameter's base.
    """

    ids: Int[Array, "..."]
    y: Array
    ids_axes: tuple[Label, ...] = eqx.field(static=True)
    y_axes: tuple[Label, ...] = eqx.field(static=True)
    axis: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)


Term = Outer | Rows


def make_term(site: Site, captured: Array, cotangent: Array) -> Term:
    """The term of a site. Both arrays have the axes of the enclosing scans first, then the batch, then those of one example."""
    use, view = site.use, site.view
    depth = len(site.scans)
    # sequence axes of the use are -1, -2, ...; those of scans are numbered on from far below
    lead = tuple(-1000 - k if axis is None else axis for k, (_, axis) in enumerate(site.scans))
    name = lambda j: view.axes[j] if j >= 0 else j
    y_axes = (*lead, "b", *map(name, use.output_axes))
    if use.output_shape is not None:
        cotangent = cotangent.reshape(*cotangent.shape[: depth + 1], *use.output_shape)
    if isinstance(use, EinsumUse):
        if not jnp.issubdtype(captured.dtype, jnp.inexact):
            captured = captured.astype(jnp.float32)  # operands of an integer product
        if use.expand is not None:
            expand = use.expand
            for _ in range(depth + 1):
                expand = jax.vmap(expand)
            captured = expand(captured)
        a_axes = (*lead, "b", *map(name, use.captured_axes))
        a, y, a_axes, y_axes = _real_parts(captured, cotangent, a_axes, y_axes)
        return Outer(a, y, a_axes, y_axes, view.shape)
    ids_axes = (*lead, "b", *range(-1, -1 - len(site.captured.shape), -1))
    # the gradient of a real table is the real part of what its complex rows get
    return Rows(captured, jnp.real(cotangent), ids_axes, y_axes, view.axes[use.axis], view.shape)


def _real_parts(a: Array, y: Array, a_axes: tuple[Label, ...], y_axes: tuple[Label, ...]) -> Any:
    r"""Factors of the real part of $\sum A \otimes Y$: the parameter is real, though what is computed with it may be complex.

    $\mathrm{Re}(A Y) = \mathrm{Re} A\, \mathrm{Re} Y - \mathrm{Im} A\, \mathrm{Im} Y$ is a sum over a sequence of length two.
    """
    is_complex = [jnp.iscomplexobj(x) for x in (a, y)]
    if all(is_complex):
        a, y = jnp.stack([a.real, -a.imag], axis=-1), jnp.stack([y.real, y.imag], axis=-1)
        a_axes, y_axes = (*a_axes, _PARTS), (*y_axes, _PARTS)
    elif any(is_complex):
        a, y = a.real, y.real
    return a, y, a_axes, y_axes


def _own(axes: tuple[Label, ...]) -> set[int]:
    return {j for j in axes if isinstance(j, int) and j >= 0}


def features(term: Term) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the parameter that the term has in common (batch axes of the product), in the left, and in the right factor alone."""
    right = _own(term.y_axes)
    left = _own(term.a_axes) if isinstance(term, Outer) else {term.axis} | _own(term.ids_axes)
    return tuple(sorted(left & right)), tuple(sorted(left - right)), tuple(sorted(right - left))


def einsum(axes_a: Iterable[Label], a: Array, axes_b: Iterable[Label], b: Array, out: Iterable[Label]) -> Array:
    """An Einstein sum over labels, accumulated in float32 or wider and at full precision (the default on a GPU is TF32).

    A label in one operand alone must be in `out`.
    """
    axes_a, axes_b, out = tuple(axes_a), tuple(axes_b), tuple(out)
    own = [label for label in out if (label in axes_a) != (label in axes_b)]
    if own and own[0] in axes_b:
        # the product has the axes of its first operand first
        axes_a, a, axes_b, b = axes_b, b, axes_a, a
    dtype = np.result_type(a.dtype, b.dtype, np.float32)
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    batch = [label for label in out if label in axes_a and label in axes_b]
    summed = [label for label in axes_a if label in axes_b and label not in out]
    at = lambda axes, labels: tuple(axes.index(label) for label in labels)
    numbers = ((at(axes_a, summed), at(axes_b, summed)), (at(axes_a, batch), at(axes_b, batch)))
    product = [*batch, *(x for x in axes_a if x not in batch + summed), *(x for x in axes_b if x not in batch + summed)]
    x = lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)
    return jnp.transpose(x, at(product, out))


def sequence(term: Term) -> tuple[int, ...]:
    """The sequence axes."""
    axes = term.a_axes if isinstance(term, Outer) else term.ids_axes
    return tuple(j for j in axes if isinstance(j, int) and j < 0)


def sizes(term: Term) -> dict[Label, int]:
    """The length of every axis."""
    left = (term.a_axes, term.a.shape) if isinstance(term, Outer) else (term.ids_axes, term.ids.shape)
    out = dict(zip(*left, strict=True)) | dict(zip(term.y_axes, term.y.shape, strict=True))
    return out | ({term.axis: term.shape[term.axis]} if isinstance(term, Rows) else {})


def canonical(term: Term, left: tuple[int, ...]) -> tuple[Array, Array]:
    """Both factors with axes (batch, common, sequence, features), each of the four flattened; `left` comes first."""
    common, ours, theirs = features(term)
    length = sizes(term)
    count = lambda labels: math.prod(length[j] for j in labels)
    seq = sequence(term)

    def arrange(x, axes, own):
        order = ("b", *common, *seq, *own)
        x = jnp.transpose(x, [axes.index(j) for j in order])
        return x.reshape(length["b"], count(common), count(seq), *([count(own)] if own else []))

    if isinstance(term, Rows):
        return arrange(term.ids, term.ids_axes, ()), arrange(term.y, term.y_axes, theirs)
    a, y = arrange(term.a, term.a_axes, ours), arrange(term.y, term.y_axes, theirs)
    a = a.reshape(*a.shape[:3], -1)
    y = y.reshape(*y.shape[:3], -1)
    return (a, y) if ours == left else (y, a)


def row_exponents(term: Term, side: str, kept: tuple[Label, ...]) -> Int[Array, "batch *positions"]:
    """The exponent of the largest number in each row of a factor, `"a"` or `"y"`; axes are `kept`, in that order."""
    x, axes = getattr(term, side), getattr(term, f"{side}_axes")
    powers = exponent(x, tuple(k for k, label in enumerate(axes) if label not in kept))
    left = [label for label in axes if label in kept]
    return jnp.transpose(powers, [left.index(label) for label in kept])


def balanced(term: Term) -> Term:
    r"""The same term, with rows of the left factor whose largest number is about one; what they were is in the right factor.

    Then neither the square of a factor nor its product with a weight underflows unless the gradient itself is as small; and where the
    right factor overflows, so does the gradient. Powers of two are exact.
    """
    if isinstance(term, Rows):
        return term
    common, _, _ = features(term)
    kept = ("b", *common, *sequence(term))
    powers = row_exponents(term, "a", kept)
    # bfloat16 has the exponents of float32, float16 has not
    a = term.a if term.a.dtype == jnp.bfloat16 else wide(term.a)

    def along(axes):
        return jnp.expand_dims(
            jnp.transpose(powers, [kept.index(label) for label in axes if label in kept]),
            tuple(k for k, label in enumerate(axes) if label not in kept),
        )

    a, y = times_power(a, -along(term.a_axes)), times_power(wide(term.y), along(term.y_axes))
    return Outer(a, y, term.a_axes, term.y_axes, term.shape)


def pieces(term: Term) -> tuple[int, int] | None:
    """The sequence axis along which products are added up in pieces, and the length of a piece; None for short sequences."""
    if isinstance(term, Rows):
        return None
    length = sizes(term)
    seq = sequence(term)
    positions = math.prod(length[j] for j in seq)
    if positions <= _LONG:
        return None
    axis = max(seq, key=lambda j: length[j])
    return axis, max(1, _PIECE // (positions // length[axis]))


def roundings(term: Term) -> int:
    r"""By how many roundings the sum over a sequence may be off: at most so many times $u \sum_s \|A_s\| \|Y_s\|$, in any order."""
    length = sizes(term)
    positions = math.prod(length[j] for j in sequence(term))
    if (cut := pieces(term)) is not None:
        axis, size = cut
        positions = size * (positions // length[axis]) + -(-length[axis] // size)
    return positions + 4


def _product(term: Outer, out: tuple[Label, ...]) -> Array:
    """The sum of products, over long sequences piece by piece."""
    full = lambda a, y: einsum(term.a_axes, a, term.y_axes, y, out)
    if (cut := pieces(term)) is None:
        return full(term.a, term.y)
    axis, size = cut
    length = sizes(term)[axis]
    at_a, at_y = term.a_axes.index(axis), term.y_axes.index(axis)

    def piece(k, total):
        take = lambda x, at: lax.dynamic_slice_in_dim(x, k * size, size, at)
        return total + full(take(term.a, at_a), take(term.y, at_y))

    number = length // size
    rest = lambda x, at: lax.slice_in_dim(x, number * size, length, axis=at)
    start = full(rest(term.a, at_a), rest(term.y, at_y))
    return lax.fori_loop(0, number, piece, start)


def instantiate(term: Term) -> Float[Array, "batch ..."]:
    """One gradient per example, with the axes of the base."""
    if isinstance(term, Outer):
        return _product(term, ("b", *range(len(term.shape))))
    common, _, theirs = features(term)
    ids, y = canonical(term, (term.axis,))
    y = wide(y).reshape(*y.shape[:3], *([-1] if theirs else []))
    rows = jnp.zeros((*ids.shape[:2], term.shape[term.axis], *y.shape[3:]), y.dtype)
    add = lambda rows, ids, y: rows.at[_drop(ids, rows.shape[0])].add(y, mode="drop")
    grads = jax.vmap(jax.vmap(add))(rows, ids, y)
    order = (*common, term.axis, *theirs)
    grads = grads.reshape(ids.shape[0], *(term.shape[j] for j in order))
    return jnp.transpose(grads, (0, *(1 + order.index(j) for j in range(len(order)))))


def axis_to_cut(terms: list[Term]) -> int | None:
    """The longest axis of the base along which all terms can be cut to pieces; None if there is none."""
    shape = terms[0].shape
    axes = set(range(len(shape))) - {term.axis for term in terms if isinstance(term, Rows)}
    return max(axes, key=lambda j: shape[j]) if axes else None


def restrict(term: Term, axis: int, start: Int[Array, ""], size: int) -> Term:
    """What the term contributes to `size` entries along one axis of the base, from `start` on."""
    cut = lambda x, axes: lax.dynamic_slice_in_dim(x, start, size, axes.index(axis)) if axis in axes else x
    shape = tuple(size if j == axis else n for j, n in enumerate(term.shape))
    y = cut(term.y, term.y_axes)
    if isinstance(term, Outer):
        return Outer(cut(term.a, term.a_axes), y, term.a_axes, term.y_axes, shape)
    return Rows(cut(term.ids, term.ids_axes), y, term.ids_axes, term.y_axes, term.axis, shape)


def _drop(ids, size):
    # a negative index would count from the end
    return jnp.where(ids < 0, size, ids)


def total(term: Term, weights: Float[Array, "2 batch"], keep: Bool[Array, " batch"], may_cancel: bool = True) -> Array:
    """The sum over examples of weight times gradient, with the axes of the base. Where `keep` is false nothing is added, whatever it is.

    Where an example's gradient is more than one product, they may cancel, and none may underflow alone. A single product that underflows is
    only smaller, and the scaled cotangents are shared with the bias.
    """
    if may_cancel:
        term = balanced(term)

    def drop(x, axes):
        column = jnp.expand_dims(keep, tuple(k for k, label in enumerate(axes) if label != "b"))
        return jnp.where(column, x, jnp.zeros((), x.dtype))

    scale = lambda x, axes: weighted(x, weights, keep, axes.index("b"))
    if isinstance(term, Outer):
        a, y = drop(term.a, term.a_axes), scale(term.y, term.y_axes)
        return _product(Outer(a, y, term.a_axes, term.y_axes, term.shape), tuple(range(len(term.shape))))
    common, _, theirs = features(term)
    scaled = Rows(term.ids, scale(term.y, term.y_axes), term.ids_axes, term.y_axes, term.axis, term.shape)
    ids, y = canonical(scaled, (term.axis,))
    ids = jnp.swapaxes(ids, 0, 1).reshape(ids.shape[1], -1)
    y = jnp.swapaxes(y, 0, 1).reshape(*ids.shape, *y.shape[3:])
    table = jnp.zeros((term.shape[term.axis], *y.shape[2:]), y.dtype)
    add = lambda ids, y: table.at[_drop(ids, len(table))].add(y, mode="drop")
    out = jax.vmap(add)(ids, y) if common else add(ids[0], y[0])
    order = (*common, term.axis, *theirs)
    out = out.reshape(tuple(term.shape[j] for j in order))
    return jnp.transpose(out, tuple(order.index(j) for j in range(len(order))))
