"""The ghost engine against the naive loop over examples, on every model of the zoo."""

import functools
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from dpx import Ghost
from dpx.gradients._ghost import EinsumUse, ghost_check, ghost_clipped_sum, ghost_plan, ghost_rule
from zoo import BATCH, ZOO, Case

NORM = 0.5
CORE = ["mlp", "cnn", "decoder_tied_embedding", "decoder_scan_over_layers_remat", "gru", "cond_in_scan", "lora_merged"]


def by_name(name: str) -> Case:
    return next(case for case in ZOO if case.name == name)


def problem(case: Case):
    """`(loss, params, examples)` in the form that gradient methods take."""
    model, loss, batch = case.make()
    spec = eqx.is_inexact_array if case.frozen is None else case.frozen(model)
    params, static = eqx.partition(model, spec)
    return lambda p, e: (loss(eqx.combine(p, static), *e), e[0]), params, batch


def group_labels(params, kind):
    number = len(jax.tree.leaves(params))
    return (
        (0,) * number
        if kind == "flat"
        else tuple(k % 3 for k in range(number))
        if number >= 3
        else tuple(range(number))
    )


def clip(norms):
    """A clip norm for each group; about half of the examples of the zoo exceed it."""
    limit = NORM / norms.shape[1] ** 0.5
    return jnp.where(norms <= limit, 1.0, limit / jnp.maximum(norms, limit))


@functools.cache
def naive_gradients(case: Case):
    """Per-example gradients of each leaf, in float64 on the host."""
    loss, params, examples = problem(case)
    grads = jax.jit(jax.vmap(jax.grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0)))(params, examples)
    return [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]


def naive(grads, labels, keep: Any = slice(None), weigh=clip):
    """What a loop over (the kept) examples computes."""
    axes = lambda g: tuple(range(1, g.ndim))
    squares = [
        sum(np.sum(g**2, axes(g)) for g, k in zip(grads, labels, strict=True) if k == group)
        for group in range(max(labels) + 1)
    ]
    norms = np.sqrt(np.stack(squares, 1))
    weights = np.zeros_like(norms)
    weights[keep] = np.asarray(weigh(jnp.asarray(norms[keep], jnp.float32)), np.float64)
    return [np.tensordot(weights[keep, k], g[keep], 1) for g, k in zip(grads, labels, strict=True)], norms


def close(got, wanted, tolerance):
    """Relative to the largest entry of the whole tree: a leaf whose gradient cancels has no digits of its own."""
    scale = max(np.max(np.abs(w), initial=0) for w in wanted) + 1e-30
    for g, w in zip(jax.tree.leaves(got), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=tolerance, atol=tolerance * scale)


def ids(case):
    return case.name


LIMIT = 1e-3


# variants of models that the quick run has in another form, and that take long to compile
SLOW = {
    "vision_transformer",
    "decoder",
    "decoder_remat",
    "decoder_scan_over_layers",
    "mixed_precision_attention",
    "mixture_of_experts_gathered",
    "cnn_max_pool",
    "einsum_attention",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c.name in SLOW)) for c in ZOO], ids=ids)
def test_equals_naive_loop_and_never_exceeds_the_clip_norm(case):
    """Both in one compiled program, flat and by groups.

    The guarantee: one example's contribution, measured in float64, is within 1e-6 of the clip norm.
    """
    loss, params, examples = problem(case)
    flat, group = (group_labels(params, kind) for kind in ("flat", "group"))
    guard = lambda norms: dpx.FlatClipping(LIMIT).factors(norms, ())

    @eqx.filter_jit
    def run(params, examples, mask):
        guarded = ghost_clipped_sum(loss, params, examples, mask, flat, guard)[:2]
        return [ghost_clipped_sum(loss, params, examples, None, labels, clip) for labels in (flat, group)], guarded

    grads = naive_gradients(case)
    mask = jnp.arange(BATCH)
    outs, _ = run(params, examples, mask == 0)
    for labels, (total, norms, losses, aux) in zip((flat, group), outs, strict=True):
        wanted, wanted_norms = naive(grads, labels)
        np.testing.assert_allclose(norms, wanted_norms, rtol=case.tolerance, atol=1e-6)
        close(total, wanted, case.tolerance)
        assert jax.tree.structure(total) == jax.tree.structure(params)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(total))
        assert losses.shape == (BATCH,) and np.array_equal(aux, examples[0])
    for i in range(BATCH):
        _, (total, norms) = run(params, examples, mask == i)
        size = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(total)))
        assert size <= LIMIT * (1 + 1e-6)
        assert size >= min(LIMIT, float(norms[i, 0])) * (1 - 1e-4)


@pytest.mark.parametrize("name", ["mlp", "cond_in_scan", "lora_merged"])
def test_eager_equals_jit(name):
    case = by_name(name)
    loss, params, examples = problem(case)
    labels = group_labels(params, "flat")
    total, norms, _, _ = ghost_clipped_sum(loss, params, examples, None, labels, clip)
    wanted, wanted_norms = naive(naive_gradients(case), labels)
    np.testing.assert_allclose(norms, wanted_norms, rtol=case.tolerance, atol=1e-6)
    close(total, wanted, case.tolerance)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("decoder")) for n in CORE])
def test_masked_and_non_finite_examples_contribute_exactly_zero(name):
    """The sum is that of the others, to the last bit, whatever the removed examples contain."""
    case = by_name(name)
    loss, params, examples = problem(case)
    labels = group_labels(params, "group")
    mask = jnp.array([True, False, True, True])

    def poison(x):
        return x.at[1].set(jnp.inf).at[2].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    compiled = eqx.filter_jit(lambda e, m: ghost_clipped_sum(loss, params, e, m, labels, clip)[:2])
    total, norms = compiled(jax.tree.map(poison, examples), mask)
    poisoned = any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(examples))
    assert not poisoned or not np.all(np.isfinite(norms[2]))
    wanted, _ = naive(naive_gradients(case), labels, keep=[0, 3] if poisoned else [0, 2, 3])
    close(total, wanted, case.tolerance)
    nothing, _ = compiled(jax.tree.map(poison, examples), jnp.zeros(BATCH, bool))
    assert all(np.all(x == 0) for x in jax.tree.leaves(nothing))


def test_traces_the_loss_once():
    loss, params, examples = problem(by_name("gru"))
    count = 0

    def counted(p, e):
        nonlocal count
        count += 1
        return loss(p, e)

    eqx.filter_jit(lambda: ghost_clipped_sum(counted, params, examples, None, (0,) * 4, clip))()
    assert count == 1


def test_under_vmap_over_models():
    loss, params, examples = problem(by_name("decoder"))
    labels = (0,) * len(jax.tree.leaves(params))
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    sum_of = lambda p: ghost_clipped_sum(loss, p, examples, None, labels, clip)[:2]
    stacked = jax.jit(jax.vmap(sum_of))(several)
    for k in range(2):
        one = jax.jit(sum_of)(jax.tree.map(operator.itemgetter(k), several))
        for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-6)


def test_rules_chosen():
    """That the cheap rules are in fact used: the engine would be right, and slow, without any."""
    expected = {
        "mlp": {"outer product"},
        "decoder": {"Gram", "instantiate"},
        "decoder_scan_over_layers_remat": {"Gram", "instantiate"},
        "decoder_tied_embedding": {"Gram", "instantiate"},
        "cnn": {"Gram", "instantiate", "outer product"},
        "cnn_depthwise_dilated": {"Gram", "instantiate", "outer product"},
        "lora": {"outer product"},
        "gru": {"Gram", "instantiate"},
        "cond_model": {"Gram", "outer product"},
        "one_layer_called_twice": {"Gram", "instantiate"},
    }
    for name, rules in expected.items():
        loss, params, examples = problem(by_name(name))
        rows = ghost_plan(loss, params, examples)
        elementwise = ("is used by `add`", "is used by `mul`", "is used by `broadcast_in_dim`")
        matrices = [rule for shape, rule, _, _ in rows if not rule.endswith(elementwise)]
        assert matrices and all(any(rule.startswith(r) for r in rules) for rule in matrices), (name, rows)


# JAX itself refuses to look up a table by indices that are sharded over an explicit axis, so that those losses need an auto axis
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "Explicit") for name in CORE if "decoder" not in name]
    + [(name, "Auto") for name in ("mlp", "decoder_tied_embedding", "decoder_scan_over_layers_remat")],
)
def test_sharded_equals_one_device(name, kind):
    """A batch over four devices, parameters on all of them: same norms, same sum, nothing named by the engine."""
    loss, params, examples = problem(by_name(name))
    labels = group_labels(params, "group")
    run = eqx.filter_jit(lambda p, e, m: ghost_clipped_sum(loss, p, e, m, labels, clip)[:3])
    mask = jnp.array([True, True, False, True])
    wanted = run(params, examples, mask)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType[kind],))):
        got = run(jax.device_put(params, jax.P()), *jax.device_put((examples, mask), jax.P("data")))
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(got[0]))
        if kind == "Explicit":
            assert jax.typeof(got[1]).sharding.spec[0] == "data"
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"microbatch_size": 3}, {"memory_budget": 9000}, {"memory_budget": 0.5}], ids=str)
def test_microbatches_and_budgets_change_nothing(options):
    case = by_name("decoder_scan_over_layers_remat")
    loss, params, examples = problem(case)
    labels = group_labels(params, "group")
    run = eqx.filter_jit(Ghost(**options).clipped_sum)
    out = run(loss, params, examples, jnp.array([True, True, False, True]), labels, 2, clip)
    wanted, _ = naive(naive_gradients(case), labels, keep=[0, 1, 3])
    close(out.total, wanted, case.tolerance)


def test_budget_too_small_says_what_fits():
    loss, params, examples = problem(by_name("decoder"))
    with pytest.raises(ValueError, match=r"must be at least \d+ bytes"):
        Ghost(memory_budget=10).explain(loss, params, examples)
    with pytest.raises(ValueError, match="positive"):
        Ghost(memory_budget=-1)


def test_budget_forbids_instantiating():
    """Sixteen positions, 64 x 64 weights: instantiating is faster, a Gram matrix is smaller."""
    loss = lambda p, e: (jnp.sum(jnp.tanh(e @ p) ** 2), ())
    rule = lambda budget: ghost_plan(loss, jnp.ones((64, 64)), jnp.ones((4, 32, 64)), memory_budget=budget)[0][1]
    assert rule(10**9).startswith("instantiate")
    assert rule(4 * 4 * 32 * 64 * 3).startswith("Gram")


@pytest.mark.parametrize("name", ["cnn", "layer_and_its_weight"])
def test_check_finds_no_difference(name):
    rows = ghost_check(*problem(by_name(name)))
    assert all(error < 1e-5 for row in rows for error in row)


def test_private_gradients_check_and_explain_themselves():
    params, loss, batch = next(c for c in ZOO if c.name == "cnn").make()
    private_grad = dpx.PrivateGradient(loss, dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0), method=Ghost())
    found = private_grad.check(params, batch)
    assert found.is_close and len(found.rows) == len(jax.tree.leaves(eqx.filter(params, eqx.is_inexact_array)))
    assert "error of norms" in str(found)
    assert "MFLOP" in str(private_grad.explain(params, batch))


def test_check_finds_a_wrong_rule(monkeypatch):
    """A rule that a user got wrong is caught by the comparison with one gradient per example."""
    from dpx.gradients._ghost import _use

    right: Any = _use._RULES["dot_general"]
    halved = lambda e, *_: e / 2
    wrong = lambda use: EinsumUse(halved, right(use).captured_axes, right(use).output_axes)
    monkeypatch.setitem(_use._RULES, "dot_general", wrong)
    rows = ghost_check(*problem(by_name("linear_without_bias")))
    assert all(error > 0.1 for error in rows[0])


def test_a_rule_of_ones_own():
    """`ghost_rule` as its documentation shows it, here for a primitive that is differentiated per example without it."""
    from dpx.gradients._ghost import _use

    f = lambda x, w: x * w
    model_loss = lambda p, e: (jnp.sum(jnp.sin(f(e, p))), ())
    examples, w = jnp.arange(12.0).reshape(4, 3), jnp.array([1.0, 2.0, 3.0])

    try:

        @ghost_rule("mul")
        def multiply(use):
            shapes = {struct.shape for struct in use.inputs}
            return EinsumUse(lambda e: e, (0,), (0,)) if len(shapes) == 1 and len(use.output.shape) == 1 else None

        ((_, rule, _, _),) = ghost_plan(model_loss, w, examples)
        assert "mul" in rule
        total, norms, _, _ = ghost_clipped_sum(model_loss, w, examples, None, (0,), jnp.ones_like)
    finally:
        del _use._RULES["mul"]
    grads = jax.vmap(jax.grad(lambda p, e: model_loss(p, e)[0]), in_axes=(None, 0))(w, examples)
    np.testing.assert_allclose(total, grads.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norms[:, 0], jnp.linalg.norm(grads, axis=1), rtol=1e-5)


def test_cancelling_products_do_not_lose_the_bound():
    """A gradient that is a small rest of large terms: the Gram norm is mostly rounding, and may not understate what is added."""
    half = 1e3 * jr.normal(jr.key(0), (1, 8, 64))
    x = jnp.concatenate([half, half + 0.05 * jr.normal(jr.key(1), half.shape)], axis=1)
    w = jr.normal(jr.key(2), (64, 512)) / 8
    sign = jnp.repeat(jnp.array([1.0, -1.0]), 8)[:, None]
    loss = lambda p, e: (jnp.sum(sign * (e @ p)), ())
    assert ghost_plan(loss, w, x)[0][1].startswith("Gram")
    factors = lambda norms: dpx.FlatClipping(1e-2).factors(norms, ())
    total, norms, _, _ = jax.jit(lambda w, x: ghost_clipped_sum(loss, w, x, None, (0,), factors))(w, x)
    assert np.linalg.norm(np.asarray(total, np.float64)) <= 1e-2 * (1 + 1e-6), norms
