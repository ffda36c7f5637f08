r"""Squared per-example norms of the sum of a parameter's terms.

With $G_b = \sum_s A_{b,s} \otimes Y_{b,s}$, cheapest way first:

- no sequence: $\|G_b\|^2 = \|A_b\|^2 \|Y_b\|^2$;
- Gram: $\|G_b\|^2 = \sum_{s,t} \langle A_s, A_t\rangle \langle Y_s, Y_t\rangle$, where for
   table look-ups $\langle A_s, A_t\rangle = [\mathrm{ids}_s = \mathrm{ids}_t]$;
- instantiate $G_b$, whole or piece by piece, and sum the squares.

Several uses of one parameter are one longer sequence, so that the norm is that of the SUM.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._tree import per_example_power, wide
from ._term import Outer, Rows, Term, canonical, einsum, features, instantiate, restrict, row_sums, sequence


def outer_norm(term: Term) -> Float[Array, " batch"]:
    """Without a sequence. Batch axes of the product are summed over."""
    assert isinstance(term, Outer)
    common, _, _ = features(term)
    kept = ("b", *common)
    a = row_sums(wide(term.a) ** 2, term.a_axes, kept)
    y = row_sums(wide(term.y) ** 2, term.y_axes, kept)
    return jnp.sum(a * y, axis=tuple(range(1, len(kept))))


def gram_norm(terms: list[Term]) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    r"""The squared norm, and how far rounding may have lowered it: a few `2**-24` times $(\sum_s \|A_s\| \|Y_s\|)^2$."""
    if len(terms) == 1 and isinstance(terms[0], Outer):
        norm = _single(terms[0])
    else:
        norm = _concatenated(terms)
    # a batch axis of the product has lengths of its own
    lengths = functools.reduce(jnp.add, [_lengths(term) for term in terms])
    bound = jnp.sum(lengths**2, axis=tuple(range(1, lengths.ndim)))
    # products that cancel are the one place where rounding errors are not small beside the norm
    return jnp.maximum(norm, 0), 2.0**-24 * bound


def recomputed_norm(terms: list[Term], axis: int, pieces: int) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    r"""The squared norm of instantiated gradients of which one piece along `axis` is held at a time, and how far from those that the
    clipped sum adds up it may be. With $n$ the norm and $L = \sum_s \|A_s\| \|Y_s\|$ that is $(n + \epsilon L)^2 - n^2$.
    """
    size = terms[0].shape[axis] // pieces

    def piece(k, power):
        parts = [instantiate(restrict(term, axis, k * size, size)) for term in terms]
        return power + per_example_power(functools.reduce(jnp.add, parts), 2)

    power = lax.fori_loop(0, pieces, piece, jnp.zeros_like(_total_length(terms[0]), jnp.float32))
    slack = 2.0**-22 * functools.reduce(jnp.add, [_total_length(term) for term in terms]).astype(jnp.float32)
    return power, slack * (2 * jnp.sqrt(power) + slack)


def _concatenated(terms: list[Term]) -> Float[Array, " batch"]:
    left = next((features(t)[1] for t in terms if isinstance(t, Rows)), features(terms[0])[1])
    pairs = [canonical(term, left) for term in terms]
    dense = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Outer)]
    rows = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Rows)]
    join = lambda xs: jnp.concatenate([wide(x) for x in xs], axis=2) if len(xs) > 1 else xs[0]
    # the size of the axis that ids index
    limit = next((t.shape[t.axis] for t in terms if isinstance(t, Rows)), 0)
    norm: Any = 0.0
    gram = lambda x, y: einsum("bgsd", x, "bgtd", y, "bgst")
    if dense:
        a, y = join([a for a, _ in dense]), join([y for _, y in dense])
        norm = norm + jnp.sum(gram(a, a) * gram(y, y), axis=(1, 2, 3))
    if rows:
        ids = jnp.concatenate([i for i, _ in rows], axis=2)
        z = join([z for _, z in rows])
        z = z.reshape(*ids.shape, -1)
        # masks are applied to the products: a masked copy of z would double its memory
        is_row = (ids >= 0) & (ids < limit)
        same = (ids[..., :, None] == ids[..., None, :]) & is_row[..., None]
        if adds_rows(*z.shape[2:]):
            # each position meets the sum of the rows of its id; XLA writes no product if there is one batch axis
            flat = z.reshape(-1, *z.shape[2:])
            sums = einsum("bst", same.astype(z.dtype).reshape(-1, *same.shape[2:]), "btd", flat, "bsd")
            norm = norm + jnp.sum(jnp.sum(sums * wide(flat), axis=(1, 2)).reshape(z.shape[:2]), axis=1)
        else:
            norm = norm + jnp.sum(jnp.where(same, gram(z, z), 0), axis=(1, 2, 3))
        if dense:
            # columns of the dense factor at the ids: <e_id, a_s>
            picked = jnp.take_along_axis(wide(a), jnp.clip(ids, 0, limit - 1)[..., None, :], axis=3)
            products = picked * gram(y, z)
            norm = norm + 2 * jnp.sum(jnp.where(is_row[..., None, :], products, 0), axis=(1, 2, 3))
    return norm


def adds_rows(positions: int, features: int) -> bool:
    """Whether the rows of equal ids are added up, rather than multiplied in pairs."""
    return features <= 4 * positions


def _single(term: Outer) -> Float[Array, " batch"]:
    common, _, _ = features(term)
    seq = sequence(term)
    other = {j: j - 10_000 for j in seq}
    primed = lambda axes: tuple(other[j] if j in other else j for j in axes)
    out = ("b", *common, *seq, *(other[j] for j in seq))
    a = einsum(term.a_axes, term.a, primed(term.a_axes), term.a, out)
    y = einsum(term.y_axes, term.y, primed(term.y_axes), term.y, out)
    return jnp.sum(a * y, axis=tuple(range(1, len(out))))


def _lengths(term: Term) -> Float[Array, "batch *common"]:
    r"""$\sum_s \|A_s\| \|Y_s\|$."""
    common, _, _ = features(term)
    kept = ("b", *common, *sequence(term))
    squares = row_sums(wide(term.y) ** 2, term.y_axes, kept)
    if isinstance(term, Outer):
        lengths = jnp.sqrt(row_sums(wide(term.a) ** 2, term.a_axes, kept) * squares)
    else:
        ids = jnp.transpose(term.ids, [term.ids_axes.index(label) for label in kept])
        lengths = jnp.where((ids >= 0) & (ids < term.shape[term.axis]), jnp.sqrt(squares), 0)
    return jnp.sum(lengths, axis=tuple(range(1 + len(common), len(kept))))


def _total_length(term: Term) -> Float[Array, " batch"]:
    lengths = _lengths(term)
    return jnp.sum(lengths, axis=tuple(range(1, lengths.ndim)))
