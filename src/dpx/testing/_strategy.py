"""The laws of strategies."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._checks import instance
from ..strategies import AbstractStrategy
from ._noise import signed_patterns
from ._report import check_false_alarm, require

_SMALL = 8
_INVERSE = "the stream of `init` and `step` is the inverse of `materialize` times the independent noise"
_SENSITIVE = "`sensitivity` is at least what some gradients of norm at most 1 reach, in every pattern of participations"


def check_strategy(
    strategy: AbstractStrategy,
    steps: int = 9,
    *,
    exact: bool = False,
    loose: bool = False,
    seed: int = 0,
    false_alarm: float = 1e-6,
) -> None:
    r"""Checks that a strategy's stream, matrix, sensitivity, bands and error belong together.

    !!! success "Laws"

        - The matrix is lower-triangular with a positive diagonal, its beginning that of shorter runs, and zero below `bands`.
        - `step` gives $C^{-1} z$, in float32 and bfloat16, compiled or not, batched or not; so does `replay`, from no more than `replay_depth` draws;
          past the horizon it is NaN.
        - `sensitivity` is no less than what any pattern of participations reaches, with gradients that are equal or opposite, or vectors in any
          directions, found by search; and no more where a theorem says so.
        - `inverse_row_power` and `error` are those of the matrix.

    **Arguments:**

    - `strategy`: the strategy.
    - `steps`: of the runs that are looked at, at most its horizon.
    - `exact`: whether its sensitivity must be no more than what gradients in one dimension reach, in any participation.
    - `loose`: whether it may be more even in one participation, and where participations lie further apart than there are bands.
    - `seed`: of the noise and the directions.
    - `false_alarm`: as elsewhere; nothing here is a matter of chance.

    **Raises:** `AssertionError` that names the law, with the participation or the step that breaks it.
    """
    instance("check_strategy(strategy=...)", strategy, AbstractStrategy, "dpx.BandedToeplitz([1.0, 0.5])")
    check_false_alarm("check_strategy", false_alarm)
    steps = min(steps, strategy.steps or steps)
    _check_matrix(strategy, steps)
    _check_stream(strategy, steps, jr.key(seed))
    for length in sorted({min(steps, _SMALL), min(steps, 5)}):
        _check_sensitivity(strategy, length, exact, loose, np.random.default_rng(seed))
    _check_error(strategy, steps)


def _check_matrix(strategy: AbstractStrategy, steps: int) -> None:
    matrix = strategy.materialize(steps)
    law = "`materialize` gives a lower-triangular float64 matrix with a positive diagonal"
    require(
        matrix.dtype == np.float64 and matrix.shape == (steps, steps),
        strategy,
        law,
        f"{matrix.dtype}{list(matrix.shape)}",
    )
    require(not np.triu(matrix, 1).any(), strategy, law, f"{np.abs(np.triu(matrix, 1)).max():.3g} above the diagonal")
    require((np.diag(matrix) > 0).all(), strategy, law, f"{np.diag(matrix).min():.3g} on the diagonal")
    short = max(1, steps // 2)
    apart = np.abs(strategy.materialize(short) - matrix[:short, :short]).max()
    require(
        apart <= 1e-12,
        strategy,
        "the matrix of a shorter run is the beginning of that of a longer one",
        f"a difference of {apart:.3g}",
    )
    if strategy.bands is not None:
        below = np.abs(np.tril(matrix, -strategy.bands)).max()
        require(
            below == 0,
            strategy,
            "`bands` is the number of bands of the matrix",
            f"{strategy.bands} declared, and {below:.3g} below them",
        )
    if strategy.replay_depth is not None:
        below = np.abs(np.tril(np.linalg.inv(matrix), -strategy.replay_depth - 1)).max()
        require(
            below < 1e-12,
            strategy,
            "`replay_depth` is the number of earlier draws that a step needs",
            f"{strategy.replay_depth} declared, and {below:.3g} further from the diagonal of the inverse",
        )


def _check_stream(strategy: AbstractStrategy, steps: int, key: Any) -> None:
    keys = jr.split(key, 2)
    long = steps if strategy.steps is not None else 4 * steps
    z = {"a": jr.normal(keys[0], (long, 2, 3)), "b": (jr.normal(keys[1], (long, 2), jnp.bfloat16), None)}
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), z)

    def run(z: Any) -> Any:
        return jax.lax.scan(lambda buffers, z: strategy.step(z, buffers)[::-1], strategy.init(struct), z)[1]

    out = jax.jit(run)(z)
    _compare(strategy, z, out, _INVERSE)
    buffers = strategy.init(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    step = jax.jit(strategy.step) if _hashes(strategy) else jax.jit(lambda z, b: strategy.step(z, b))
    for t in range(min(2, steps)):
        jitted, _ = step(z["a"][t], buffers)
        eager, buffers = strategy.step(z["a"][t], buffers)
        apart = float(jnp.max(jnp.abs(eager - jitted)))
        require(
            apart <= 1e-5,
            strategy,
            "a compiled step is that of the interpreter",
            f"a difference of {apart:.3g} at step {t}",
        )
    if strategy.steps is not None:
        struct = jax.ShapeDtypeStruct((2,), jnp.float32)
        more = jax.jit(run)(jr.normal(keys[0], (strategy.steps + 2, 2)))
        require(
            np.isfinite(more[: strategy.steps]).all() and np.isnan(more[strategy.steps :]).all(),
            strategy,
            "past the horizon the noise is NaN",
            f"{np.asarray(more)[:, 0].tolist()} for a horizon of {strategy.steps}",
        )
    if strategy.replay_depth is not None:
        _check_replay(strategy, jax.tree.map(lambda x: x[:steps], z), steps)


def _hashes(strategy: AbstractStrategy) -> bool:
    return not jax.tree.leaves(strategy)


def _check_replay(strategy: AbstractStrategy, z: Any, steps: int) -> None:
    def again(step: Any) -> Any:
        # what lies before the first step must not matter, as long as it is finite
        draw = lambda x, age: jnp.where(age <= step, x[jnp.maximum(step - age, 0)], jnp.full_like(x[0], 1e3))
        return strategy.replay(lambda age: jax.tree.map(lambda x: draw(x, age), z), step)

    out = jax.jit(lambda: jax.lax.map(again, jnp.arange(steps, dtype=jnp.int32)))()
    _compare(strategy, z, out, "`replay` gives the noise of the stream")


def _compare(strategy: AbstractStrategy, z: Any, out: Any, law: str) -> None:
    matrix = strategy.materialize(len(jax.tree.leaves(z)[0]))
    for x, y in zip(jax.tree.leaves(z), jax.tree.leaves(out), strict=True):
        require(
            x.dtype == y.dtype and x.shape == y.shape,
            strategy,
            law,
            f"{y.dtype}{list(y.shape)} for {x.dtype}{list(x.shape)}",
        )
        flat = np.asarray(x.astype(jnp.float32), np.float64).reshape(len(x), -1)
        got = np.asarray(y.astype(jnp.float32), np.float64).reshape(flat.shape)
        expected = np.linalg.solve(matrix, flat)
        allowed = (3e-6 if x.dtype == jnp.float32 else 1e-2) * max(1.0, np.abs(expected).max())
        apart = np.abs(got - expected).max(1)
        worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
        require(
            apart[worst] <= allowed,
            strategy,
            law,
            f"{got[worst, 0]:.7g} at step {worst} in {x.dtype}, where the inverse of the matrix gives {expected[worst, 0]:.7g}",
        )


def _check_sensitivity(
    strategy: AbstractStrategy, steps: int, exact: bool, loose: bool, rng: np.random.Generator
) -> None:
    matrix = strategy.materialize(steps)
    gram = matrix.T @ matrix
    has_signs = bool((gram < -1e-12).any())
    once = strategy.sensitivity(steps)
    for separation, most in itertools.product(sorted({1, 2, 3, 4, steps}), (1, 2, 3, None)):
        claimed = strategy.sensitivity(steps, separation, most)
        patterns = signed_patterns(steps, separation, most)
        reached = np.linalg.norm(patterns @ matrix.T, axis=1)
        best = int(np.argmax(reached))
        asked = f"{steps} steps, min_separation={separation}, max_participations={most}"
        require(
            claimed >= reached[best] * (1 - 1e-12),
            strategy,
            _SENSITIVE,
            f"{claimed:.9g} claimed for {asked}; gradients {patterns[best].astype(int).tolist()} reach {reached[best]:.9g}",
        )
        bands = strategy.bands
        disjoint = most == 1 or (bands is not None and bands <= separation)
        if exact or (disjoint and not loose):
            require(
                claimed <= reached[best] * (1 + 1e-9),
                strategy,
                "`sensitivity` is no more than gradients reach, where that is known",
                f"{claimed:.9g} claimed for {asked}; at most {reached[best]:.9g} is reached",
            )
        if has_signs:
            reach = _search(gram, patterns != 0, rng)
            require(
                claimed >= reach * (1 - 1e-9),
                strategy,
                _SENSITIVE,
                f"{claimed:.9g} claimed for {asked}; gradients of different directions reach {reach:.9g}, "
                f"where equal and opposite ones reach {reached[best]:.9g}",
            )
        times = steps if most is None else most
        require(
            claimed <= times * once * (1 + 1e-9),
            strategy,
            "several participations move no more than as many single ones",
            f"{claimed:.9g} claimed for {asked}, and {once:.9g} for one participation",
        )


def _search(gram: np.ndarray, patterns: np.ndarray, rng: np.random.Generator) -> float:
    """What vectors of norm 1 reach: each in turn is pointed to where the others want it."""
    patterns = np.unique(patterns, axis=0).astype(np.float64)
    vectors = rng.normal(size=(len(patterns), len(gram), len(gram))) * patterns[:, :, None]
    for _ in range(40):
        for t in range(len(gram)):
            pull = np.einsum("s,psd->pd", gram[t], vectors)
            size = np.linalg.norm(pull, axis=1, keepdims=True)
            vectors[:, t] = np.where(size > 0, pull / np.maximum(size, 1e-300), vectors[:, t]) * patterns[:, t, None]
    return math.sqrt(float(np.einsum("st,psd,ptd->p", gram, vectors, vectors).max()))


def _check_error(strategy: AbstractStrategy, steps: int) -> None:
    inverse = np.linalg.inv(strategy.materialize(steps))
    power = strategy.inverse_row_power(steps)
    expected = np.square(inverse).sum(1)
    require(
        power.shape == (steps,) and np.allclose(power, expected, rtol=1e-8),
        strategy,
        "`inverse_row_power` is that of the matrix",
        f"{power.tolist()}, and {expected.tolist()} by the matrix",
    )
    queries = np.tri(steps)
    momentum = np.convolve(np.ones(steps), 0.9 ** np.arange(steps))[:steps]
    lag = np.arange(steps)[:, None] - np.arange(steps)
    for name, workload, matrix in (
        ("prefix", "prefix", queries),
        ("momentum", momentum, np.where(lag >= 0, momentum[np.abs(lag)], 0.0)),
        ("scaled prefix", np.linspace(1, 0.1, steps)[:, None] * queries, np.linspace(1, 0.1, steps)[:, None] * queries),
    ):
        rows = np.square(matrix @ inverse).sum(1)
        for separation, most in ((1, 1), (3, 2)):
            sensitivity = strategy.sensitivity(steps, separation, most)
            for kind, direct in (("mean", math.sqrt(rows.mean())), ("max", math.sqrt(rows.max()))):
                got = strategy.error(steps, workload, kind, min_separation=separation, max_participations=most)
                require(
                    abs(got - sensitivity * direct) <= 1e-8 * got,
                    strategy,
                    "`error` is that of the matrix, sensitivity included",
                    f"{got:.9g} for the {kind} error of the {name} workload with min_separation={separation}, max_participations={most}, and "
                    f"{sensitivity * direct:.9g} by the matrix",
                )
