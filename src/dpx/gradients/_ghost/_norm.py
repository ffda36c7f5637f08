r"""Per-example norms of the sum of a parameter's terms, and by how much what is added up may exceed them.

With $G_b = \sum_s A_{b,s} \otimes Y_{b,s}$, cheapest way first:

- no sequence: $\|G_b\| = \|A_b\| \|Y_b\|$;
- Gram: $\|G_b\|^2 = \sum_{s,t} \langle A_s, A_t\rangle \langle Y_s, Y_t\rangle$, where for
   table look-ups $\langle A_s, A_t\rangle = [\mathrm{ids}_s = \mathrm{ids}_t]$;
- instantiate $G_b$, whole or piece by piece, and sum the squares.

Several uses of one parameter are one longer sequence, so that the norm is that of the SUM.

Every function returns the norm and an upper bound of the norm of what the clipped sum adds up for a weight of one, whatever the data:
with $u = 2^{-24}$ and $L = \sum_s \|A_s\| \|Y_s\|$, rounding moves a product over $K$ numbers by at most $K u$ times the product of
lengths. What is relative to the norm itself is left to `clip_weights`. docs/ghost.md has the proofs.
"""

import functools
import math

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..._norms import UNIT, additions, at_most, combined, norms_of, ordered_sum, rounded, times_power
from ..._tree import expand_like, wide
from ._term import (
    Outer,
    Rows,
    Term,
    balanced,
    canonical,
    einsum,
    features,
    instantiate,
    restrict,
    roundings,
    row_exponents,
    sequence,
    sizes,
)

# (features multiplied at once, numbers added at once): the first whose rounding stays small beside a norm that does not cancel
_SPLITS = ((None, 1024), (256, 64), (64, 32))
_SMALL = 2.0**-7

Bounded = tuple[Float[Array, " batch"], Float[Array, " batch"]]


def outer_norm(term: Term) -> Bounded:
    """Without a sequence. Batch axes of the product are summed over."""
    assert isinstance(term, Outer)
    longest, shift = _longest([term])
    norm = _restored(longest, shift)
    return norm, norm * _length_rounding([term]) + _flushed(term)


def gram_norm(terms: list[Term]) -> Bounded:
    r"""By inner products. Their rounding is at most $c u L^2$ in the square, and that of the sum that is added up $k u L$; neither the
    gradient nor what is added up is longer than $L$."""
    scaled, shift = _normalised(terms)
    lengths = functools.reduce(jnp.add, [_lengths(term) for term in scaled])
    longest = _over_common(lengths)
    added = (sum(map(roundings, terms)) + len(terms)) * UNIT
    if all(isinstance(term, Rows) for term in terms):
        square, reach, count = _rows_gram(scaled)
    else:
        square, count = _dense_gram(scaled)
        reach = longest
    longest, reach = longest * _length_rounding(terms), reach * _length_rounding(terms)
    norm = jnp.sqrt(jnp.maximum(square, 0))
    safe = jnp.sqrt(jnp.maximum(square, 0) + count * UNIT * reach**2) * (1 + 4 * UNIT) + added * reach
    safe = jnp.minimum(safe, longest * (1 + added))
    safe = _restored(safe, shift) + _flushed(terms[0])
    return _restored(norm, shift), safe


def instantiated_norm(terms: list[Term], grads: Float[Array, "batch ..."], is_added: bool) -> Bounded:
    """Of gradients that are there. Where it is not they that are added up, but the sum of products once more, both may round."""
    (norm,) = norms_of([grads], 2)
    safe = at_most(norm, grads.shape[1:], 2)
    return norm, safe if is_added else safe + _twice_rounded(terms)


def recomputed_norm(terms: list[Term], axis: int, pieces: int) -> Bounded:
    r"""Of instantiated gradients of which one piece along `axis` is held at a time."""
    size = terms[0].shape[axis] // pieces

    def piece(k, norm):
        parts = [instantiate(restrict(term, axis, k * size, size)) for term in terms]
        (more,) = norms_of([functools.reduce(jnp.add, parts)], 2)
        return combined([norm, more], 2)

    batch = sizes(terms[0])["b"]
    norm = lax.fori_loop(0, pieces, piece, jnp.zeros(batch, jnp.float32))
    # four roundings more for each piece
    safe = at_most(norm, restrict(terms[0], axis, jnp.array(0), size).shape, 2) * (1 + 4 * pieces * UNIT)
    return norm, safe + _flushed(terms[0]) + _twice_rounded(terms)


def _twice_rounded(terms: list[Term]) -> Float[Array, " batch"]:
    longest, shift = _longest(terms)
    added = 2 * (sum(map(roundings, terms)) + len(terms)) * UNIT * _length_rounding(terms)
    return _restored(added * longest, shift)


def _length_rounding(terms: list[Term]) -> float:
    """By how much a total length may be too small, as a factor: two norms, their product, and its sum."""

    def one(term: Term) -> float:
        common, _, _ = features(term)
        length = sizes(term)
        own = lambda axes: tuple(length[j] for j in axes if j != "b" and j not in (*common, *sequence(term)))
        left = rounded(own(term.a_axes)) if isinstance(term, Outer) else 1
        seq = additions(tuple(length[j] for j in sequence(term)))
        over_common = rounded(tuple(length[j] for j in common))
        return left * rounded(own(term.y_axes)) * (1 + (seq + 2) * UNIT) * over_common

    return max(map(one, terms)) * (1 + len(terms) * UNIT)


def _flushed(term: Term) -> float:
    """What may be missing of a norm because products below 2**-126 count as zero."""
    return math.sqrt(math.prod(term.shape)) * 2.0**-62


def _shift(terms: list[Term]) -> Int[Array, " batch"]:
    """The exponent of each example's largest product of two numbers, at most two too large."""
    powers = []
    for term in terms:
        kept = ("b", *features(term)[0], *sequence(term))
        power = row_exponents(term, "y", kept)
        if isinstance(term, Outer):
            power = power + row_exponents(term, "a", kept)
        powers.append(jnp.max(power, axis=tuple(range(1, power.ndim)), initial=-1000))
    return functools.reduce(jnp.maximum, powers)


def _normalised(terms: list[Term]) -> tuple[list[Term], Array]:
    """Balanced terms whose largest product of two numbers is about one, and the power of two that they were divided by, for each example."""
    shift = _shift(terms)
    # a product beyond 2**127 is infinite already
    shift = jnp.where(jnp.abs(shift) > 500, 0, jnp.clip(shift, -126, 126))

    def divide(term: Term) -> Term:
        column = jnp.expand_dims(shift, tuple(k for k, label in enumerate(term.y_axes) if label != "b"))
        return eqx.tree_at(lambda t: t.y, term, times_power(wide(term.y), -column))

    return [divide(balanced(term)) for term in terms], shift


def _longest(terms: list[Term]) -> tuple[Float[Array, " batch"], Array]:
    """$L$, divided by a power of two, and that power; nothing as large as the factors is written."""
    shift = _shift(terms)

    def one(term: Term) -> Array:
        kept = ("b", *features(term)[0], *sequence(term))
        power = row_exponents(term, "y", kept)
        size = _sizes(term, "y", kept, power)
        if isinstance(term, Outer):
            left = row_exponents(term, "a", kept)
            size, power = size * _sizes(term, "a", kept, left), power + left
        # the power of a product is never above that of the largest
        size = times_power(size, power - expand_like(shift, power))
        return _over_common(_summed(term, size))

    # terms may have different batch axes
    return functools.reduce(jnp.add, map(one, terms)), shift


def _restored(x: Float[Array, " batch"], shift: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """A norm in its own units, infinite where it is beyond float32. Products of two numbers have powers of up to 252: half of it, twice."""
    half = jnp.where(jnp.abs(shift) > 500, 0, shift) // 2
    return times_power(times_power(x, half), jnp.where(jnp.abs(shift) > 500, 0, shift) - half).astype(jnp.float32)


def _over_common(lengths: Float[Array, "batch *common"]) -> Float[Array, " batch"]:
    """A batch axis of the product has lengths of its own."""
    return jnp.sqrt(ordered_sum(lengths, tuple(range(1, lengths.ndim)), jnp.square)) if lengths.ndim > 1 else lengths


def _dense_gram(terms: list[Term]) -> tuple[Float[Array, " batch"], float]:
    """The squared norm, and its rounding in units of `UNIT` times the squared total length."""
    left = next((features(t)[1] for t in terms if isinstance(t, Rows)), features(terms[0])[1])
    pairs = [canonical(term, left) for term in terms]
    dense = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Outer)]
    rows = [pair for pair, term in zip(pairs, terms, strict=True) if isinstance(term, Rows)]
    join = lambda xs: jnp.concatenate([wide(x) for x in xs], axis=2) if len(xs) > 1 else xs[0]
    # the size of the axis that ids index
    limit = next((t.shape[t.axis] for t in terms if isinstance(t, Rows)), 0)
    a, y = join([a for a, _ in dense]), join([y for _, y in dense])
    positions = a.shape[2] + sum(i.shape[2] for i, _ in rows)
    common = a.shape[1]

    def rounding(split: tuple[int | None, int]) -> int:
        chunk, group = split
        dot = lambda width: width if chunk is None or width <= chunk else chunk + 4
        return dot(a.shape[-1]) + dot(y.shape[-1]) + additions((common, positions, positions), group) + 8

    split = next((s for s in _SPLITS if rounding(s) * positions * UNIT <= _SMALL), _SPLITS[-1])
    chunk, group = split
    gram = functools.partial(_gram, chunk=chunk)
    total = lambda x: ordered_sum(x, (1, 2, 3), group=group)
    norm = total(gram(a, a) * gram(y, y))
    if rows:
        ids = jnp.concatenate([i for i, _ in rows], axis=2)
        z = join([z for _, z in rows])
        z = z.reshape(*ids.shape, -1)
        is_row = (ids >= 0) & (ids < limit)
        same = (ids[..., :, None] == ids[..., None, :]) & is_row[..., None]
        norm = norm + total(jnp.where(same, gram(z, z), 0))
        # columns of the dense factor at the ids: <e_id, a_s>
        picked = jnp.take_along_axis(wide(a), jnp.clip(ids, 0, limit - 1)[..., None, :], axis=3)
        products = picked * gram(y, z)
        norm = norm + 2 * total(jnp.where(is_row[..., None, :], products, 0))
    return norm, rounding(split)


def _rows_gram(terms: list[Term]) -> tuple[Float[Array, " batch"], Float[Array, " batch"], float]:
    r"""Of look-ups: rows of equal ids are added up. The squared norm, the reach $R$ of its rounding, and that in units of `UNIT` times $R^2$.

    Rows of different ids never meet, so that $R^2 = \sum_i (\sum_{s : \mathrm{id}_s = i} \|Y_s\|)^2$, which is not longer than $L$.
    """
    pairs = [canonical(term, features(term)[1]) for term in terms]
    join = lambda xs: jnp.concatenate(xs, axis=2) if len(xs) > 1 else xs[0]
    ids, z = join([i for i, _ in pairs]), join([wide(z) for _, z in pairs])
    z = z.reshape(*ids.shape, -1)
    limit = terms[0].shape[next(t.axis for t in terms if isinstance(t, Rows))]
    # masks are applied to the products: a masked copy of z would double its memory
    is_row = (ids >= 0) & (ids < limit)
    same = (ids[..., :, None] == ids[..., None, :]) & is_row[..., None]
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    mask = flat(same).astype(z.dtype)
    lengths = jnp.where(is_row, jnp.sqrt(ordered_sum(z, (3,), jnp.square)), 0)
    of_id = einsum("bst", mask, "bt", flat(lengths), "bs").reshape(lengths.shape)
    reach = jnp.sqrt(ordered_sum(lengths * of_id, (1, 2)))
    positions, width = z.shape[2:]
    if adds_rows(positions, width):
        # each position meets the sum of the rows of its id; XLA writes no product if there is one batch axis
        sums = einsum("bst", mask, "btd", flat(z), "bsd").reshape(z.shape)
        square = ordered_sum(ordered_sum(sums * z, (3,)), (1, 2))
        count = positions + additions((width,)) + additions(ids.shape[1:])
    else:
        gram = einsum("bgsd", z, "bgtd", z, "bgst")
        square = ordered_sum(jnp.where(same, gram, 0), (1, 2, 3))
        count = width + additions((ids.shape[1], positions, positions))
    return square, reach, count + 8


def adds_rows(positions: int, features: int) -> bool:
    """Whether the rows of equal ids are added up, rather than multiplied in pairs."""
    return features <= 4 * positions


def _gram(x: Array, y: Array, chunk: int | None) -> Float[Array, "batch common s t"]:
    """Inner products, of at most `chunk` features at once; the parts are added up with a running correction (Knuth's two-sum)."""
    product = lambda x, y: einsum("bgsd", x, "bgtd", y, "bgst")
    width = x.shape[-1]
    if chunk is None or width <= chunk:
        return product(x, y)
    number = width // chunk
    rest = lambda x: lax.slice_in_dim(x, number * chunk, width, axis=3)
    take = lambda x, k: lax.dynamic_slice_in_dim(x, k * chunk, chunk, 3)

    def add(k, carry):
        total, lost = carry
        part = product(take(x, k), take(y, k))
        new = total + part
        back = new - total
        return new, lost + ((total - (new - back)) + (part - back))

    start = product(rest(x), rest(y))
    total, lost = lax.fori_loop(0, number, add, (start, jnp.zeros_like(start)))
    return total + lost


def _lengths(term: Term) -> Float[Array, "batch *common"]:
    r"""$\sum_s \|A_s\| \|Y_s\|$."""
    kept = ("b", *features(term)[0], *sequence(term))
    lengths = _sizes(term, "y", kept)
    if isinstance(term, Outer):
        lengths = lengths * _sizes(term, "a", kept)
    return _summed(term, lengths)


def _sizes(term: Term, side: str, kept: tuple, power: Array | None = None) -> Float[Array, "batch *positions"]:
    """The length of each row of a factor; divided by two to the `power`, if given."""
    x, axes = getattr(term, side), getattr(term, f"{side}_axes")
    over = tuple(k for k, label in enumerate(axes) if label not in kept)
    of = jnp.square
    if power is not None:
        left = [label for label in axes if label in kept]
        down = jnp.expand_dims(jnp.transpose(-power, [kept.index(label) for label in left]), over)
        of = lambda part: jnp.square(times_power(part, down))
    lengths = jnp.sqrt(ordered_sum(x, over, of))
    left = [label for label in axes if label in kept]
    return jnp.transpose(lengths, [left.index(label) for label in kept])


def _summed(term: Term, lengths: Array) -> Float[Array, "batch *common"]:
    """The sum over the sequence; ids out of range are no rows."""
    common, _, _ = features(term)
    kept = ("b", *common, *sequence(term))
    if isinstance(term, Rows):
        ids = jnp.transpose(term.ids, [term.ids_axes.index(label) for label in kept])
        lengths = jnp.where((ids >= 0) & (ids < term.shape[term.axis]), lengths, 0)
    return ordered_sum(lengths, tuple(range(1 + len(common), len(kept))))
