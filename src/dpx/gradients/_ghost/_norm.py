r"""Squared per-example norms of the sum of a parameter's terms.

With $G_b = \sum_s A_{b,s} \otimes Y_{b,s}$, cheapest way first:

- no sequence: $\|G_b\|^2 = \|A_b\|^2 \|Y_b\|^2$;
- Gram: $\|G_b\|^2 = \sum_{s,t} \langle A_s, A_t\rangle \langle Y_s, Y_t\rangle$, where for
   table look-ups $\langle A_s, A_t\rangle = [\mathrm{ids}_s = \mathrm{ids}_t]$;
- instantiate $G_b$ and sum the squares.

Several uses of one parameter are one longer sequence, so that the norm is that of the SUM.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._tree import wide
from ._term import Outer, Rows, Term, canonical, einsum, features, row_sums, sequence


def outer_norm(term: Term) -> Float[Array, " batch"]:
    """Without a sequence. Batch axes of the product are summed over."""
    assert isinstance(term, Outer)
    common, _, _ = features(term)
    kept = ("b", *common)
    a = row_sums(wide(term.a) ** 2, term.a_axes, kept)
    y = row_sums(wide(term.y) ** 2, term.y_axes, kept)
    return jnp.sum(a * y, axis=tuple(range(1, len(kept))))


def gram_norm(terms: list[Term]) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    r"""The squared norm, and $(\sum_s \|A_s\| \|Y_s\|)^2$: the rounding error is a few `2**-24` times the latter."""
    if len(terms) == 1 and isinstance(terms[0], Outer):
        return _single(terms[0])
    left = next((features(t)[1] for t in terms if isinstance(t, Rows)), features(terms[0])[1])
    pairs = [canonical(term, left) for term in terms]
    dense = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Outer)]
    rows = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Rows)]
    join = lambda xs: jnp.concatenate([wide(x) for x in xs], axis=2) if len(xs) > 1 else xs[0]
    # the size of the axis that ids index
    limit = next((t.shape[t.axis] for t in terms if isinstance(t, Rows)), 0)
    norm, bound = 0.0, 0.0
    gram = lambda x, y: einsum("bgsd", x, "bgtd", y, "bgst")
    if dense:
        a, y = join([a for a, _ in dense]), join([y for _, y in dense])
        norm = norm + jnp.sum(gram(a, a) * gram(y, y), axis=(1, 2, 3))
        bound = bound + _lengths(a, y)
    if rows:
        ids = jnp.concatenate([i for i, _ in rows], axis=2)
        z = join([z for _, z in rows])
        z = z.reshape(*ids.shape, -1)
        # masks are applied to the products: a masked copy of z would double its memory
        is_row = (ids >= 0) & (ids < limit)
        same = (ids[..., :, None] == ids[..., None, :]) & is_row[..., None]
        norm = norm + jnp.sum(jnp.where(same, gram(z, z), 0), axis=(1, 2, 3))
        bound = bound + jnp.sum(jnp.where(is_row, jnp.sqrt(jnp.sum(wide(z) ** 2, axis=-1)), 0), axis=2)
        if dense:
            # columns of the dense factor at the ids: <e_id, a_s>
            picked = jnp.take_along_axis(wide(a), jnp.clip(ids, 0, limit - 1)[..., None, :], axis=3)
            products = picked * gram(y, z)
            norm = norm + 2 * jnp.sum(jnp.where(is_row[..., None, :], products, 0), axis=(1, 2, 3))
    return jnp.maximum(norm, 0), jnp.sum(bound**2, axis=1)


def _single(term: Outer):
    common, _, _ = features(term)
    seq = sequence(term)
    other = {j: j - 10_000 for j in seq}
    primed = lambda axes: tuple(other[j] if j in other else j for j in axes)
    out = ("b", *common, *seq, *(other[j] for j in seq))
    a = einsum(term.a_axes, term.a, primed(term.a_axes), term.a, out)
    y = einsum(term.y_axes, term.y, primed(term.y_axes), term.y, out)
    norm = jnp.sum(a * y, axis=tuple(range(1, len(out))))
    kept = ("b", *common, *seq)
    lengths = row_sums(wide(term.a) ** 2, term.a_axes, kept) * row_sums(wide(term.y) ** 2, term.y_axes, kept)
    lengths = jnp.sum(jnp.sqrt(lengths), axis=tuple(range(1 + len(common), len(kept))))
    return jnp.maximum(norm, 0), jnp.sum(lengths**2, axis=tuple(range(1, 1 + len(common))))


def _lengths(a, y):
    squares = jnp.sum(wide(a) ** 2, axis=-1) * jnp.sum(wide(y) ** 2, axis=-1)
    return jnp.sum(jnp.sqrt(squares), axis=2)
