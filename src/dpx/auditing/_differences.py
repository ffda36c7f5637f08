"""What one example can change, seen under one key: the noise cancels, and what is left is exact."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._probe import EVERYTHING, NOTHING, REAL, rows_of, with_rows
from ._sampling_laws import Found

ROWS = 8
_LEAVES = 64  # of which each has a canary of its own
_D1 = "one example moves the sum by the sensitivity at most"
_D2 = "an example that is masked out moves nothing"
_D3 = "what is divided by is public: nothing depends on how many examples there are"


class Subject(NamedTuple):
    """A step that can be asked twice with one key.

    **Arguments:**

    - `sums`: from rows and their mask, the noisy sum, leaf by leaf, in units of the sum.
    - `sensitivity`: how far one example may move it.
    - `order`: in which norm.
    - `paths`: of the leaves.
    """

    sums: Callable[[tuple[Any, ...], np.ndarray], list[np.ndarray]]
    sensitivity: float
    order: int
    paths: Sequence[str]


class Row(NamedTuple):
    """A row that is put in the last place of a batch: its name, the batch with it, and the leaf that it is about."""

    name: str
    batch: tuple[Any, ...]
    where: str = ""


def probes(batch: tuple[Any, ...], subject: Subject, sizes: Sequence[int], is_user: bool) -> list[Row]:
    """Rows with gradients of every size, in all leaves at once and in each in turn; batches take the arguments of a `Probe`."""
    size, dimension = subject.sensitivity, sum(sizes)
    base = rows_of(batch, ROWS)

    def row(name: str, leaf: int, gain: float, where: str = "", position: int = 0) -> Row:
        leaves = np.array([REAL] * (ROWS - 1) + [leaf], np.int32)
        positions = np.array([0] * (ROWS - 1) + [position], np.int32)
        gains = np.array([0.0] * (ROWS - 1) + [gain], np.float32)
        return Row(name, with_rows(base, is_user, leaves, positions, gains), where)

    ordinary = size / max(dimension, 1) ** (1 / subject.order)
    found = [
        row("no gradient", NOTHING, 0.0),
        row("a gradient of 1e4 clip norms in every parameter", EVERYTHING, 1e4 * max(size, 1e-30)),
        row("a gradient of half a clip norm", EVERYTHING, ordinary / 2),
        row("a gradient of 1.5 clip norms", EVERYTHING, 1.5 * ordinary),
        row("a tiny gradient", EVERYTHING, 1e-6 * ordinary),
        row("an infinite gradient", EVERYTHING, math.inf),
        row("a gradient of NaN", EVERYTHING, math.nan),
    ]
    numbers = [i for i, n in enumerate(sizes) if n]
    if len(numbers) > _LEAVES:
        numbers = [numbers[i] for i in np.linspace(0, len(numbers) - 1, _LEAVES).astype(int)]
    for leaf in numbers:
        at = sizes[leaf] - 1
        name = f"a gradient of 1e3 clip norms in one parameter of {subject.paths[leaf]}"
        found.append(row(name, leaf, 1e3 * max(size, 1e-30), subject.paths[leaf], at))
    return found


def hostile_rows(batch: tuple[Any, ...]) -> list[Row]:
    """The user's own rows, and what is made of them: large, infinite and NaN where numbers are floating-point ones."""
    base = rows_of(batch, ROWS)

    def changed(name: str, change: Callable[[np.ndarray], Any]) -> Row:
        def last(x: Any) -> Any:
            x = np.array(x)
            if jnp.issubdtype(x.dtype, jnp.floating):
                x[-1] = np.asarray(change(x[-1].astype(np.float64))).astype(x.dtype)
            return x

        with np.errstate(over="ignore"):
            return Row(name, jax.tree.map(last, base))

    is_key = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    found = [Row("a row of the batch", base)]
    leaves = jax.tree.leaves(base)
    if any(is_key(x) for x in leaves) or not any(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        return found
    return [
        *found,
        changed("a row times 1e4", lambda x: 1e4 * x),
        changed("a row of infinities", lambda x: np.full_like(x, np.inf)),
        changed("a row of NaN", lambda x: np.full_like(x, np.nan)),
    ]


def difference_laws(subject: Subject, rows: Sequence[Row], code: str = "") -> Iterator[Found]:
    """D0, D1 and D2: what the last row of each batch changes when it is there, and when it is masked out.

    **Arguments:**

    - `subject`: the step.
    - `rows`: batches that differ in their last row alone, the first of them being harmless.
    - `code`: added to the names of the tests, for a second program.
    """
    everyone = np.ones(ROWS, bool)
    without = everyone.copy()
    without[-1] = False
    first = subject.sums(rows[0].batch, without)
    again = subject.sums(rows[0].batch, without)
    equal = all(np.array_equal(x, y, equal_nan=True) for x, y in zip(first, again, strict=True))
    law = "a step is a function of its arguments: its noise is that of the key in its state"
    yield Found(
        "D0" + code, law, "the same numbers twice" if equal else "other numbers from the same arguments", holds=equal
    )
    finite = all(np.isfinite(x).all() for x in first)
    if not finite:
        bad = [p for p, x in zip(subject.paths, first, strict=True) if not np.isfinite(x).all()]
        yield Found("D1" + code, _D1, "a gradient that is not finite, of ordinary rows", bad[0], holds=False)
        return
    worst: dict[str, tuple[float, str, str, float]] = {"D1": (-1.0, "", "", 0.0), "D2": (-1.0, "", "", 0.0)}
    for row in rows:
        for name, mask in (("D1", everyone), ("D2", without)):
            moved, where, allowed = _moved(subject, subject.sums(row.batch, mask), first)
            limit = (subject.sensitivity if name == "D1" else 0.0) + allowed
            excess = moved / limit if math.isfinite(moved) else math.inf
            if excess > worst[name][0]:
                worst[name] = (excess, row.name, where, moved)
    for name, law in (("D1", _D1), ("D2", _D2)):
        excess, row_name, where, moved = worst[name]
        found = f"{moved / subject.sensitivity:.7g} times the sensitivity, by {row_name}"
        yield Found(name + code, law, found, where if excess > 1 else "", holds=excess <= 1)


def public_scale(subject: Subject, nothing: Row) -> Found:
    """D3: of rows without a gradient, whether it matters how many of them are real."""
    leaf, position, gain = nothing.batch[-3:]
    empty = (*nothing.batch[:-3], np.full_like(leaf, NOTHING), position, gain)
    few = np.arange(ROWS) < 2
    many, less = subject.sums(empty, np.ones(ROWS, bool)), subject.sums(empty, few)
    moved, where, allowed = _moved(subject, many, less)
    found = f"{moved:.4g} between 2 and {ROWS} rows that contribute nothing, where rounding explains {allowed:.2g}"
    return Found("D3", _D3, found, where if moved > allowed else "", holds=moved <= allowed)


def _moved(subject: Subject, one: list[np.ndarray], other: list[np.ndarray]) -> tuple[float, str, float]:
    """How far apart two sums are, the leaf in which they are most, and what rounding explains."""
    with np.errstate(invalid="ignore"):
        gaps = [float(np.sum(np.abs(x - y) ** subject.order)) for x, y in zip(one, other, strict=True)]
    largest = max((float(np.max(np.abs(y), initial=0.0)) for y in other), default=0.0)
    number = sum(x.size for x in one)
    rounding = 1e-5 * subject.sensitivity + 1e-6 * number ** (1 / subject.order) * largest
    total = sum(gaps)
    if not math.isfinite(total):
        at = next(i for i, gap in enumerate(gaps) if not math.isfinite(gap))
        return math.inf, subject.paths[at], rounding
    return total ** (1 / subject.order), subject.paths[int(np.argmax(gaps))], rounding
