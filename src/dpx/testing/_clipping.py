"""The laws of clipping."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PyTree

from .._checks import instance
from .._types import Params
from ..clipping import AbstractClipping, AbstractSlackClipping
from ..gradients import Vectorized
from ..noise import IndependentGaussian, Laplace
from ..private_gradient import PrivateGradient
from ._hostile import FLOATS, hostile_vectors
from ._report import check_false_alarm, name_of, require
from ._statistics import distinguish

_TOLERANCE = 1e-6
_BOUND = "one example's contribution, in float64, is at most the sensitivity, whatever the example is"
_ZERO = "an example that is not finite contributes exactly zero"
_ALONE = "what an example contributes does not depend on other examples"


def check_clipping(
    clipping: AbstractClipping,
    model: PyTree = None,
    *,
    attains: float = 0.999,
    seed: int = 0,
    false_alarm: float = 1e-6,
) -> None:
    r"""Checks that a clipping bounds what every example can contribute.

    Examples are clipped as they are in training: they are the gradients of a loss that is linear in the parameters. Among them are those at which
    arithmetic breaks, in float32, bfloat16 and float16 (float64 where JAX has it), in leaves of one type and of several.

    !!! success "Laws"

        - One example's contribution, measured in float64, has norm at most `sensitivity` $\cdot (1 + 10^{-6})$, also with a state that
          `update` changed; one that is not finite contributes zero; the bound is reached.
        - It depends on no other example, and is the same compiled, batched and alone.
        - What `update` learns from the norms is a Gaussian mechanism of `side_noise_multipliers`, all together.
        - Slack counts: with it a contribution has norm at most `sensitivity`, and an example without one leaves none.

    **Arguments:**

    - `clipping`: the clipping.
    - `model`: whose trainable leaves are clipped, where the clipping is for one model; by default a list of two arrays.
    - `attains`: how much of the sensitivity some example must reach: less than 1 where the clipping only comes near it.
    - `seed`: of the inputs.
    - `false_alarm`: the probability with which a sound clipping is refuted; only the last law is a matter of chance.

    **Raises:** `AssertionError` that names the law, and the example that breaks it.
    """
    instance("check_clipping(clipping=...)", clipping, AbstractClipping, "dpx.FlatClipping(1.0)")
    check_false_alarm("check_clipping", false_alarm)
    sensitivity = float(clipping.sensitivity)
    require(
        np.isfinite(sensitivity) and sensitivity > 0,
        clipping,
        "the sensitivity is a positive number",
        f"`sensitivity` = {sensitivity}",
    )
    params = [jnp.zeros((2, 2)), jnp.zeros(2)] if model is None else eqx.filter(model, eqx.is_inexact_array)
    rng = np.random.default_rng(seed)
    largest = 0.0
    for dtypes in _dtypes(len(jax.tree.leaves(params))):
        largest = max(largest, _check_examples(clipping, params, dtypes, rng))
    require(
        largest >= attains * sensitivity,
        clipping,
        f"some example contributes at least {attains:g} of the sensitivity, or noise is wasted",
        f"{largest:.6g} at most, of a sensitivity of {sensitivity:.6g}",
    )
    _check_states(clipping, params, rng)
    if clipping.side_noise_multipliers:
        _check_side_queries(clipping, params, seed, false_alarm)


def _dtypes(leaves: int) -> list[tuple[str, ...]]:
    floats = [*FLOATS, "float64"] if jax.config.read("jax_enable_x64") else list(FLOATS)
    # bfloat16 next to float32, since models have leaves of several types
    return [tuple("float32" if i % 2 and dtype == "bfloat16" else dtype for i in range(leaves)) for dtype in floats]


def _linear(params: Params, *gradients: Array) -> Array:
    terms = [
        jnp.sum((p * g).astype(jnp.float64 if p.dtype == jnp.float64 else jnp.float32))
        for p, g in zip(jax.tree.leaves(params), gradients, strict=True)
    ]
    return sum((term.astype(jnp.float32) for term in terms), jnp.zeros((), jnp.float32))


def private_gradient_of(clipping: AbstractClipping) -> PrivateGradient:
    """Clips the examples themselves."""
    noise = IndependentGaussian(1e-6) if clipping.order == 2 else Laplace(1e-6)
    return PrivateGradient(_linear, clipping, noise, method=Vectorized())


def before_rescaling(clipping: AbstractClipping, published: Params, params: Params) -> list[np.ndarray]:
    """What the noise is added to, in float64, from what is published of it."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(published)]
    rescale = clipping.rescale(clipping.init(params))
    if rescale is None:
        return leaves
    return [x / float(rescale[k]) for x, k in zip(leaves, clipping.labels(params), strict=True)]


def norms_of_rows(leaves: list[np.ndarray], order: int) -> np.ndarray:
    """Norm of each example in float64, whose squares cannot overflow."""
    flat = np.concatenate([np.reshape(x, (len(x), -1)) for x in leaves], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.max(np.abs(flat), axis=1, initial=0.0)
        size = np.where(size > 0, size, 1.0)[:, None]
        return size[:, 0] * np.sum(np.abs(flat / size) ** order, axis=1) ** (1 / order)


def _check_examples(
    clipping: AbstractClipping, params: Params, dtypes: tuple[str, ...], rng: np.random.Generator
) -> float:
    """The largest contribution, once all are found to be small enough."""
    leaves, treedef = jax.tree.flatten(params)
    params = jax.tree.unflatten(treedef, [jnp.zeros(x.shape, d) for x, d in zip(leaves, dtypes, strict=True)])
    sensitivity = float(clipping.sensitivity)
    number = jnp.float32 if set(dtypes) == {"float32"} else dtypes[0]
    flat = hostile_vectors(sum(x.size for x in leaves), number, sensitivity, rng)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    with np.errstate(over="ignore", invalid="ignore"):
        examples = [
            jnp.asarray(np.reshape(part, (-1, *x.shape)).astype(d))
            for part, x, d in zip(np.split(flat, ends, axis=1), leaves, dtypes, strict=True)
        ]
    given = [np.asarray(x.astype(jnp.float32) if x.dtype != jnp.float64 else x, np.float64) for x in examples]
    private_grad = private_gradient_of(clipping)

    def one(*example: Array) -> Params:
        return private_grad.clipped_sum(params, tuple(x[None] for x in example)).reveal()

    out = before_rescaling(clipping, jax.jit(jax.vmap(one))(*examples), params)
    norms, sizes = norms_of_rows(out, clipping.order), norms_of_rows(given, clipping.order)
    where = f"gradients of {' and '.join(dict.fromkeys(dtypes))}"

    def shown(i: int) -> str:
        values = np.concatenate([np.ravel(x[i]) for x in given])
        return f"[{', '.join(f'{v:.6g}' for v in values[:8])}{', ...' if len(values) > 8 else ''}] of norm {sizes[i]:.6g} ({where})"

    is_finite = np.isfinite(np.concatenate([np.reshape(x, (len(x), -1)) for x in given], axis=1)).all(1)
    for i in np.flatnonzero(~is_finite & ~(norms == 0)).tolist():
        require(False, clipping, _ZERO, f"{norms[i]:.6g} from {shown(i)}")
    for i in np.flatnonzero(np.isnan(norms)).tolist():
        require(False, clipping, _BOUND, f"a contribution that is NaN, from {shown(i)}")
    worst = int(np.argmax(norms))
    require(
        norms[worst] <= sensitivity * (1 + _TOLERANCE),
        clipping,
        _BOUND,
        f"a contribution of norm {norms[worst]:.9g}, {norms[worst] / sensitivity:.7g} times the sensitivity {sensitivity:.9g}, from {shown(worst)}",
    )

    if set(dtypes) != {"float32"}:
        return float(norms[worst])
    # all at once, with masks: one compilation
    summed = lambda mask: before_rescaling(
        clipping, private_grad.clipped_sum(params, tuple(examples), mask=mask).reveal(), params
    )
    rows = np.arange(len(flat))
    for i in rng.choice(rows, 4, replace=False).tolist():
        apart = max(float(np.max(np.abs(a - b[i]), initial=0.0)) for a, b in zip(summed(rows == i), out, strict=True))
        require(
            apart <= 1e-5 * sensitivity,
            clipping,
            "a contribution is the same in a batch, where others are masked, and in a `vmap` over batches of one",
            f"a difference of {apart:.3g} for {shown(i)}",
        )
    apart = max(float(np.max(np.abs(a - b.sum(0)), initial=0.0)) for a, b in zip(summed(rows >= 0), out, strict=True))
    require(
        apart <= 1e-6 * sensitivity * len(flat),
        clipping,
        _ALONE,
        f"the sum over {len(flat)} examples at once and the sum of what each contributes alone differ by {apart:.3g} ({where})",
    )
    return float(norms[worst])


def _check_states(clipping: AbstractClipping, params: Params, rng: np.random.Generator) -> None:
    """The bound with the states that `update` leads to, from norms of all sizes."""
    groups = max(clipping.labels(params)) + 1
    special = np.array([0.0, 1e-45, 1e-38, 1e-19, 1e-10, 1.0, 1e12, 1e19, 1e30, 3e38])
    norms = np.concatenate([
        np.repeat(special[:, None], groups, axis=1), rng.choice(special, (64, groups)), 10 ** rng.uniform(-38, 38, (256, groups)),
        float(clipping.sensitivity) * (1 + rng.uniform(-1, 1, (64, groups)) * 1e-3),
    ])  # fmt: skip
    norms = jnp.asarray(norms, jnp.float32)
    measured = np.asarray(norms, np.float64)
    state = clipping.init(params)
    update = jax.jit(lambda state, norms, mask, key: clipping.update(state, norms, mask, jnp.float32(4.0), key))
    mask = jnp.ones(len(norms), bool)
    if isinstance(clipping, AbstractSlackClipping):
        _check_slack(clipping, state, norms, rng)
        return
    changes = [
        None,
        norms,
        jnp.full_like(norms, jnp.nan),
        jnp.full_like(norms, jnp.inf),
        jnp.zeros_like(norms),
        norms * 1e-30,
    ]
    for number, seen in enumerate(changes):
        if seen is not None:
            for again in range(3):
                state = update(state, seen, mask, jr.key(10 * number + again))
        factors = np.asarray(jax.jit(lambda n, s: clipping.factors(n, s))(norms, state), np.float64)
        contributed = np.abs(factors) * measured
        total = norms_of_rows([contributed], clipping.order)
        worst = int(np.argmax(np.where(np.isnan(total), np.inf, total)))
        require(
            total[worst] <= float(clipping.sensitivity) * (1 + _TOLERANCE),
            clipping,
            _BOUND,
            f"factors {factors[worst]} for norms {measured[worst]}, {'at first' if seen is None else f'after {3 * number} updates'}: "
            f"{total[worst]:.9g}, of a sensitivity of {float(clipping.sensitivity):.9g}",
        )
        row = int(rng.integers(len(norms)))
        alone = np.asarray(clipping.factors(norms[row : row + 1], state), np.float64)[0]
        require(
            np.allclose(alone, factors[row], rtol=1e-5, atol=0),
            clipping,
            _ALONE,
            f"norms {measured[row]} have factors {alone} alone and {factors[row]} next to others",
        )
        rescale = clipping.rescale(state)
        require(
            rescale is None or bool(jnp.all(jnp.isfinite(rescale) & (rescale > 0))),
            clipping,
            "`rescale` is positive and finite",
            f"{rescale} after {3 * number} updates",
        )


def _check_slack(clipping: AbstractSlackClipping, state: Any, norms: Array, rng: np.random.Generator) -> None:
    """The bound, slack included, with the states that `learn` leads to, whatever was released."""
    sensitivity, width = float(clipping.sensitivity), (len(norms), clipping.slack_size)
    shortest = np.asarray(norms[:, 0])
    # fractions of a clip norm, and right below and at it
    ratios = np.concatenate([rng.uniform(0, 1, 512), 1 - 10.0 ** -np.arange(1, 8), [0, 1, 1.000001]])
    parts = jax.jit(lambda n, s: (clipping.factors(n[:, None], s)[:, 0], clipping.slack(n, s)))
    learn = jax.jit(lambda state, released: clipping.learn(state, released, jnp.float32(4.0)))
    for number, size in enumerate((None, 0.0, 1.0, -1.0, 30.0, -30.0, 1e30, -1e30)):
        if size is not None:
            state = learn(state, jnp.full(width[1], size * sensitivity, jnp.float32))
        norm = sensitivity / float(parts(jnp.zeros(1), state)[0][0])  # the longest that is not shortened
        tried = jnp.asarray(np.concatenate([shortest, ratios * norm]), jnp.float32)
        factors, slack = (np.asarray(x, np.float64) for x in parts(tried, state))
        contributed = factors[:, None] * np.asarray(tried, np.float64)[:, None]
        total = norms_of_rows([contributed, slack], clipping.order)
        worst = int(np.argmax(np.where(np.isnan(total), np.inf, total)))
        require(
            total[worst] <= sensitivity * (1 + _TOLERANCE) and slack.shape[1:] == width[1:],
            clipping,
            "one example's contribution, its slack included, is at most the sensitivity",
            f"{total[worst]:.9g} from norm {float(tried[worst]):.9g} after {number} updates, of a sensitivity of {sensitivity:.9g}",
        )


def _check_side_queries(clipping: AbstractClipping, params: Params, seed: int, false_alarm: float) -> None:
    """What `update` learns from the norms when one example comes: at most what its noise multipliers pay for."""
    groups = max(clipping.labels(params)) + 1
    state = clipping.init(params)
    claimed = float(np.sqrt(sum(float(side) ** -2 for side in clipping.side_noise_multipliers)))
    norms = jnp.ones((4, groups), jnp.float32)

    def released(mask: Array, last: float) -> Any:
        def draw(key: Any) -> Array:
            changed = norms.at[3].set(last)
            new = clipping.update(state, changed, mask, jnp.float32(4.0), key)
            return jnp.concatenate(
                [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(new) if eqx.is_inexact_array(x)]
            )

        return draw

    for last in (0.0, 1e30):
        with_it, without = released(jnp.ones(4, bool), last), released(jnp.arange(4) < 3, last)
        reached = distinguish(with_it, without, jr.key(seed), 2**15, false_alarm / 2)
        require(
            reached <= claimed * (1 + 1e-6),
            clipping,
            "what `update` learns is paid for by `side_noise_multipliers`",
            f"an attacker tells whether an example of norm {last:g} is there as from one Gaussian of noise multiplier {1 / max(reached, 1e-9):.4g}; "
            f"{name_of(clipping)} claims {1 / claimed:.4g}",
        )
