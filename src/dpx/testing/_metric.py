"""The laws of metrics."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from .._checks import instance
from ..metrics import AbstractMetric
from ._report import check_false_alarm, require
from ._statistics import distinguish

_HOSTILE = (0.0, 1.0, -1.0, 1e-3, -1e-3, 10.0, -10.0, 1e6, 3e38, -3e38, np.inf, -np.inf, np.nan)
_COST = "all that one step or `release` tells costs no more than one Gaussian query of `noise_multiplier`"
_LOUD = 0.5  # the noise multiplier at which it is attacked: there a wrong scale shows best


def check_metric(metric: AbstractMetric, *, samples: int = 2**14, seed: int = 0, false_alarm: float = 1e-6) -> None:
    r"""Checks that a metric tells no more about one example than its noise multiplier pays for.

    !!! success "Laws"

        - One example more or less, whatever its value, is seen at most as from $N(0, \sigma^2)$ against $N(1, \sigma^2)$, in what a step
          releases (its state included) and in one `release`: an attacker takes the best linear statistic of it, and a threshold. Metrics are looked
          at with little noise, where a scale that is 10 % too small shows.
        - A masked example changes nothing, whatever its value; what is released is finite for all values; the same key gives the same.

    **Arguments:**

    - `metric`: the metric, with a noise multiplier.
    - `samples`: releases drawn for each attack.
    - `seed`: of the draws.
    - `false_alarm`: the probability with which a sound metric is refuted.

    **Raises:** `AssertionError` that names the law and the value of the example that shows it.
    """
    instance("check_metric(metric=...)", metric, AbstractMetric, 'dpx.metrics.Mean("losses", 0.0, 1.0, 10.0)')
    failure = check_false_alarm("check_metric", false_alarm)
    loud = eqx.tree_at(lambda m: m.noise_multiplier, metric, jnp.full_like(metric.noise_multiplier, _LOUD))
    size, key = jnp.float32(4.0), jr.key(seed)

    def released_by_step(values: Array, keep: Array, key: Any) -> Array:
        known = jnp.isfinite(values) | loud.takes_all
        state = loud.measure(
            loud.init(), jnp.where(known, values, 0.0) if not loud.takes_all else values, keep & known, size, key
        )
        return jnp.concatenate([_flat(state), _flat(loud.value(state))])

    def released_at_once(values: Array, keep: Array, key: Any) -> Array:
        known = jnp.isfinite(values) | loud.takes_all
        return _flat(
            loud.answer(jnp.where(known, values, 0.0) if not loud.takes_all else values, keep & known, size, key)
        )

    others = jnp.array([0.0, 0.3, -0.7], jnp.float32)
    for name, released in (("a step", released_by_step), ("`release`", released_at_once)):
        _check_inputs(metric, name, released, others, key)
        _check_cost(metric, name, released, others, key, samples, failure)


def _flat(tree: Any) -> Array:
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])


def _rows(others: Array, value: float) -> Array:
    return jnp.append(others, jnp.float32(value))


def _check_inputs(metric: AbstractMetric, name: str, released: Callable[..., Array], others: Array, key: Any) -> None:
    draw = jax.jit(released)
    everyone, without = jnp.ones(4, bool), jnp.arange(4) < 3
    reference = np.asarray(draw(_rows(others, 0.0), without, key))
    for value in _HOSTILE:
        masked = np.asarray(draw(_rows(others, value), without, key))
        require(
            np.array_equal(reference, masked),
            metric,
            "a masked example changes nothing, whatever its value",
            f"{name} gives {masked.tolist()} next to a masked {value:g}, and {reference.tolist()} next to a masked 0",
        )
        out = np.asarray(draw(_rows(others, value), everyone, key))
        require(
            np.isfinite(out).all(),
            metric,
            "what is released is finite for all values",
            f"{name} gives {out.tolist()} for the value {value:g}",
        )
        again = np.asarray(draw(_rows(others, value), everyone, key))
        require(
            np.array_equal(out, again),
            metric,
            "the same key gives the same",
            f"{name} gives {out.tolist()} and {again.tolist()}",
        )
    empty = np.asarray(draw(_rows(others, 0.0), jnp.zeros(4, bool), key))
    require(np.isfinite(empty).all(), metric, "an empty batch is released too", f"{name} gives {empty.tolist()}")


def _check_cost(
    metric: AbstractMetric,
    name: str,
    released: Callable[..., Array],
    others: Array,
    key: Any,
    samples: int,
    failure: float,
) -> None:
    everyone, without = jnp.ones(4, bool), jnp.arange(4) < 3
    values = jnp.asarray(_HOSTILE, jnp.float32)
    keys = jr.split(jr.fold_in(key, 1), 256)

    # the same keys with and without: what an example moves, next to how far the noise does
    def moved(value: Array) -> Array:
        rows = jnp.append(others, value)
        first = jax.vmap(lambda k: released(rows, everyone, k))(keys)
        second = jax.vmap(lambda k: released(rows, without, k))(keys)
        deviation = jnp.std(second, axis=0)
        return jnp.max(
            jnp.where(
                deviation > 0, jnp.abs(jnp.mean(first - second, axis=0)) / jnp.where(deviation > 0, deviation, 1.0), 0.0
            )
        )

    gains = np.asarray(jax.jit(jax.vmap(moved))(values))
    i = int(np.argmax(np.nan_to_num(gains)))
    rows = jnp.append(others, values[i])
    reached = distinguish(
        lambda k: released(rows, everyone, k),
        lambda k: released(rows, without, k),
        jr.fold_in(key, 2),
        samples,
        failure / 2,
    )
    require(
        reached * _LOUD <= 1 + 1e-6,
        metric,
        _COST,
        f"set to a noise multiplier of {_LOUD:g}, {name} shows whether an example of value {_HOSTILE[i]:g} is there as well as a Gaussian "
        f"query of noise multiplier {1 / max(reached, 1e-9):.4g} would",
    )
