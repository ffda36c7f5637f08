"""Whether the noise that is drawn is what the plan states: exact laws of what steps without examples return."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import _statistics as statistics
from ._noise_laws import NoiseLaw, standardised
from ._sampling_laws import Found

_KEPT = 1 << 22  # numbers kept for what is compared with each other
_LEAVES = 48  # of which every pair is compared


class Residuals(NamedTuple):
    """Noisy sums of steps without examples, leaf by leaf, in units of the sum.

    **Arguments:**

    - `leaves`: of each leaf an array `(steps, coordinates)`.
    - `paths`: of each leaf.
    - `is_exact`: whether two equal numbers are a coincidence that never happens (not so for integers).
    """

    leaves: Sequence[np.ndarray]
    paths: Sequence[str]
    is_exact: bool = True


def noise_laws(residuals: Residuals, law: NoiseLaw, *, upwards: bool = True) -> Iterator[Found]:
    """N1 to I2 of docs/auditing.md.

    **Arguments:**

    - `residuals`: what was drawn.
    - `law`: what should have been.
    - `upwards`: whether more noise than is stated breaks the law, too.
    """
    rng = np.random.default_rng(0xA0D17)
    sizes = [x.shape[1] for x in residuals.leaves]
    yield _repeated(residuals)
    normal = [standardised(x, law, rng) for x in residuals.leaves]
    names = [path or "(the model itself)" for path in residuals.paths]
    # the scale, of each leaf and of all
    numbers = [*zip(names, normal, strict=True), ("", np.concatenate([z.ravel() for z in normal]))]
    for where, z in numbers if len(normal) > 1 else [(names[0], normal[0])]:
        yield _scale(where, z, law, residuals, upwards)
    everything = np.concatenate([z.ravel() for z in normal])
    from scipy import special

    few = everything if len(everything) <= 1 << 18 else rng.choice(everything, 1 << 18, replace=False)
    size = (
        1.0 if upwards else max(1.0, float(everything.std()))
    )  # where more is no fault, the law is that at the scale it has
    centre = float(np.sum(everything)) / size / math.sqrt(len(everything))
    yield Found(
        "N2",
        f"the noise has the stated {law.kind} law",
        f"standard deviation {everything.std():.5g} of the stated one, mean {everything.mean():.3g}",
        p_value=statistics.uniform_p_value(special.ndtr(few / size)),
    )
    yield Found(
        "N3",
        "the noise has mean zero",
        f"{everything.mean():.4g} standard deviations",
        p_value=float(2 * special.ndtr(-abs(centre))),
    )
    yield from _steps(normal, sizes, rng)
    yield from _leaves(normal, names)


def _repeated(residuals: Residuals) -> Found:
    law = "no two steps and no two leaves have the same noise"
    rows: dict[bytes, str] = {}
    for path, leaf in zip(residuals.paths, residuals.leaves, strict=True):
        if not np.any(leaf):
            return Found(
                "N0",
                "every step adds noise",
                "no noise at all: what is published is the clipped sum itself",
                path,
                holds=False,
            )
        if leaf.shape[1] < 3 or not residuals.is_exact:
            continue
        for step, row in enumerate(leaf):
            where = f"step {step}" + (f", {path}" if path else "")
            before = rows.setdefault(row.tobytes(), where)
            if before != where and np.any(row):
                return Found("N0", law, f"the same noise in {before} and in {where}", path, holds=False)
    return Found("N0", law, "none", holds=True)


def _scale(where: str, z: np.ndarray, law: NoiseLaw, residuals: Residuals, upwards: bool) -> Found:
    number, total = z.size, float(np.sum(np.square(z, dtype=np.float64)))
    p = statistics.chi_square_p_value(total, number)
    ratio = math.sqrt(total / number) if math.isfinite(total) else math.nan
    found = f"{ratio:.6g} times the stated standard deviation, over {number} numbers"
    if ratio > 1 and not upwards:
        p = 1.0
    if ratio > 1:
        found += (
            " (more noise than is stated harms no privacy, and is not the mechanism that was stated)"
            if p < 1e-5
            else ""
        )
    power = lambda a: f"{statistics.least_ratio_seen(number, a):.4g} times the stated noise"
    # Of a law that is brought to normal numbers by its distribution function, the sum of squares is that of normal ones too.
    return Found("N1", "the noise has the stated scale", found, where, p_value=p, power=power)


def _steps(normal: Sequence[np.ndarray], sizes: Sequence[int], rng: np.random.Generator) -> Iterator[Found]:
    steps = normal[0].shape[0]
    if steps < 2:
        return
    most = max(8, _KEPT // steps)
    z = np.concatenate(normal, axis=1)
    if z.shape[1] > most:
        z = z[:, rng.choice(z.shape[1], most, replace=False)]
    worst, pair, count = 0.0, (0, 0), 0
    norms = np.linalg.norm(z, axis=1)
    good = np.flatnonzero((norms > 0) & np.isfinite(norms))
    if len(good) >= 2 and z.shape[1] >= 2:
        unit = z[good] / norms[good, None]
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, 0.0)
        at = int(np.argmax(np.abs(cosines)))
        i, j = divmod(at, len(good))
        worst, pair = float(cosines[i, j]), (int(good[i]), int(good[j]))
        count = len(good) * (len(good) - 1) // 2
    if not count:
        return  # nothing to compare: that there is no noise, N0 and N1 say
    p = min(1.0, count * statistics.cosine_p_value(worst, z.shape[1]))
    found = f"noise of steps {min(pair)} and {max(pair)} has cosine {worst:.4g}, of {count} pairs in {z.shape[1]} dimensions"
    yield Found("I1", "the noise of different steps is independent", found, p_value=p)


def _leaves(normal: Sequence[np.ndarray], names: Sequence[str]) -> Iterator[Found]:
    if len(normal) <= _LEAVES:
        pairs = list(itertools.combinations(range(len(normal)), 2))
    else:
        pairs = [(i, i + 1) for i in range(len(normal) - 1)] + [(0, i) for i in range(2, len(normal))]
    worst: tuple[float, str, str] = (2.0, "", "")
    count = 0
    for i, j in pairs:
        width = min(normal[i].shape[1], normal[j].shape[1])
        worst = min(worst, _compared(normal[i][:, :width], normal[j][:, :width], f"{names[i]} and {names[j]}"))
        count += 1
    for z, name in zip(normal, names, strict=True):
        half = z.shape[1] // 2
        if half:
            worst = min(worst, _compared(z[:, :half], z[:, half : 2 * half], f"the halves of {name}"))
            worst = min(worst, _compared(z[:, 0 : 2 * half : 2], z[:, 1 : 2 * half : 2], f"neighbours in {name}"))
            count += 2
    if count:
        p, where, found = worst
        yield Found(
            "I2",
            "the noise of different leaves and coordinates is independent",
            found or "no two are alike",
            where,
            p_value=min(1.0, count * min(p, 1.0)),
        )


def _compared(x: np.ndarray, y: np.ndarray, where: str) -> tuple[float, str, str]:
    x, y = x.ravel(), y.ravel()
    size = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    if not (0 < size < math.inf) or len(x) < 3:
        return 2.0, where, ""
    cosine = float(x @ y) / size
    return (
        statistics.cosine_p_value(cosine, len(x)),
        where,
        f"their noise has cosine {cosine:.4g}, in {len(x)} dimensions",
    )
