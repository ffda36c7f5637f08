"""A plan's gradient stays what the plan states: whatever is changed in it afterwards is refused, or marked where nobody can look."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from conftest import assert_trees_close, assert_trees_equal, loss, make_batch, make_model

# a handful of examples is enough here, wherever they come from
pytestmark = pytest.mark.filterwarnings("ignore:A batch of .* without a mask")

MODEL, BATCH = make_model(), make_batch()
PLAN = dpx.PrivacyPlan(
    dpx.PoissonSampler(100, 10, 5), dpx.AdaptiveClipping(0.5), dpx.IndependentGaussian(1.1)
).with_metrics(size=dpx.metrics.Count(None, 9.0))
OTHER = 0.25

# every number that a statement rests on
NUMBERS: dict[str, Any] = {
    "noise multiplier": lambda p: p.noise.noise_multiplier,
    "clip norm": lambda p: p.clipping.initial_norms,
    "counts of the clipping": lambda p: p.clipping.count_noise_multiplier,
    "normalizer": lambda p: p.normalizer,
    "metric": lambda p: p.metrics["size"].noise_multiplier,
}


def changed(module, where):
    return eqx.tree_at(where, module, np.full(where(module).shape, OTHER, np.float32))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_changed_after_the_plan_is_refused(name):
    private_grad = PLAN.private_gradient(loss)
    state = private_grad.init(MODEL)
    private_grad(MODEL, BATCH, state)[1].raise_if_failed()
    # also after a good step: the copy has not been checked
    with pytest.raises(ValueError, match=r"made by a plan.*now has 0\.25.*one plan for each choice"):
        changed(private_grad, NUMBERS[name])(MODEL, BATCH, state)
    with pytest.raises(ValueError, match="made by a plan"):  # nothing of it is traced there
        jax.jit(lambda: changed(private_grad, NUMBERS[name])(MODEL, BATCH, state)[0].weight)()


def test_a_traced_number_is_marked():
    private_grad = PLAN.private_gradient(loss)
    state = private_grad.init(MODEL, key=jr.key(0))
    run = eqx.filter_jit(lambda p: p(MODEL, BATCH, state)[:2])
    grads, same = run(private_grad)
    assert_trees_close(grads, private_grad(MODEL, BATCH, state)[0])
    same.raise_if_failed()
    for where in NUMBERS.values():
        grads, after = run(changed(private_grad, where))
        assert all(np.isnan(g).all() for g in jax.tree.leaves(grads))
        assert after.result == dpx.Result.not_the_plan
        # nothing that clipping and metrics saw is learnt
        assert_trees_equal((after.clipping, after.metrics), (state.clipping, state.metrics))
        with pytest.raises(RuntimeError, match="Make one plan for each choice"):
            after.raise_if_failed()


def test_a_sweep_over_the_noise_of_a_plan_is_marked_and_one_without_a_plan_runs():
    sigmas = jnp.array([1.1, 2.0])
    keys = jr.split(jr.key(0), 2)

    def one(private_grad, sigma, key):
        swept = eqx.tree_at(lambda p: p.noise.noise_multiplier, private_grad, sigma)
        return swept(MODEL, BATCH, private_grad.init(MODEL, key=key))[0].weight

    planned = eqx.filter_vmap(one, in_axes=(None, 0, 0))(PLAN.private_gradient(loss), sigmas, keys)
    assert np.isfinite(planned[0]).all() and np.isnan(planned[1]).all()
    free = dpx.PrivateGradient(loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.0))
    assert np.isfinite(eqx.filter_vmap(one, in_axes=(None, 0, 0))(free, sigmas, keys)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"noise": dpx.IndependentGaussian(1.0)},
        {"noise": dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), 1.1)},
        {"clipping": dpx.AdaptiveClipping(0.6)},
        {"clipping": dpx.FlatClipping(0.5)},
        {"normalizer": 9.0},
        {"steps": 6},
        {"steps": None},
        {"unit": "user"},
        {"participation": dpx.Participation(2, 2)},
        {"metrics": {}},
    ],
)
def test_a_part_replaced_after_the_plan_is_refused(changes):
    private_grad = PLAN.private_gradient(loss)
    with pytest.raises(ValueError, match="made by a plan"):
        dataclasses.replace(private_grad, **changes)
    for name in ("noise", "clipping", "metrics"):
        if name in changes:
            swapped = eqx.tree_at(lambda p, name=name: getattr(p, name), private_grad, changes[name])
            with pytest.raises(ValueError, match="made by a plan"):
                swapped(MODEL, BATCH, private_grad.init(MODEL))


def test_what_changes_speed_alone_may_be_changed():
    private_grad = PLAN.private_gradient(loss)
    other = dataclasses.replace(private_grad, method=dpx.Vectorized(2), loss=lambda m, x, y: loss(m, x, y))
    other(MODEL, BATCH, other.init(MODEL))[1].raise_if_failed()
    with pytest.raises(ValueError, match="fixed by the plan"):
        PLAN.private_gradient(loss, stated=None)  # pyright: ignore[reportCallIssue]


def test_private_sums_keep_to_their_plan():
    plan = dpx.dp_sgd(num_examples=100, batch_size=10, steps=5, noise_multiplier=1.1)
    private_sum = plan.private_sum(lambda model, x, y: x)
    state = private_sum.init(None, BATCH)
    private_sum(None, BATCH, state)[1].raise_if_failed()
    noisier = eqx.tree_at(lambda p: p.noise.noise_multiplier, private_sum, np.float32(OTHER))
    with pytest.raises(ValueError, match="made by a plan"):
        noisier(None, BATCH, state)
    with pytest.raises(ValueError, match="made by a plan"):
        dataclasses.replace(private_sum, normalizer=3.0)
    out, after, _ = eqx.filter_jit(lambda p: p(None, BATCH, state))(noisier)
    assert np.isnan(out).all() and after.result == dpx.Result.not_the_plan
    eqx.filter_jit(lambda p: p(None, BATCH, state)[1])(private_sum).raise_if_failed()


def test_a_plans_gradient_made_inside_jit_is_recorded_too():
    def run():
        private_grad = changed(PLAN.private_gradient(loss), NUMBERS["noise multiplier"])
        return private_grad(MODEL, BATCH, private_grad.init(MODEL, key=jr.key(0)))[0].weight

    try:
        out = jax.jit(run)()
    except ValueError as error:
        assert "made by a plan" in str(error)
    else:
        assert np.isnan(out).all()


@pytest.mark.parametrize(
    "changed", [jnp.int32(1), jnp.bfloat16(1.9), np.full(2, np.nextafter(np.float32(1.9), np.float32(2)))]
)
def test_guarantee_a_traced_number_of_another_dtype_or_shape_is_not_the_plans(changed):
    """Cast to an integer 1.9 is 1, which passed for the noise multiplier that the plan states."""
    from dpx.private_gradient._stated import check_stated, stated_of

    clipping, noise = dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.9)
    stated = stated_of(clipping, noise, np.float32(10.0), {}, 3)

    @jax.jit
    def is_the_plans(multiplier):
        other = eqx.tree_at(lambda n: n.noise_multiplier, noise, multiplier)
        return check_stated(stated, clipping, other, np.float32(10.0), {}, 3)

    assert is_the_plans(noise.noise_multiplier)
    assert not is_the_plans(changed)
