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

NORM, LIMIT = 0.5, 1e-3
CORE = ["mlp", "cnn", "decoder_tied_embedding", "decoder_scan_over_layers_remat", "gru", "cond_in_scan", "lora_merged"]
# the reference need not be fast, but it must be compiled for every model
UNOPTIMISED = {"xla_backend_optimization_level": 0}


def by_name(name: str) -> Case:
    return next(case for case in ZOO if case.name == name)


def problem(case: Case):
    """`(loss, params, examples)` in the form that gradient methods take."""
    model, loss, batch = case.make()
    spec = eqx.is_inexact_array if case.frozen is None else case.frozen(model)
    params, static = eqx.partition(model, spec)
    return lambda p, e: (loss(eqx.combine(p, static), *e), e[0]), params, batch


def group_labels(params):
    number = len(jax.tree.leaves(params))
    return tuple(k % 3 for k in range(number)) if number >= 3 else tuple(range(number))


def clip(norms):
    """A clip norm for each group; about half of the examples of the zoo exceed it."""
    limit = NORM / norms.shape[1] ** 0.5
    return jnp.where(norms <= limit, 1.0, limit / jnp.maximum(norms, limit))


def clip_flat(norms):
    """One clip norm for all groups together."""
    total = jnp.sqrt(jnp.sum(norms**2, axis=1, keepdims=True))
    return jnp.broadcast_to(clip(total), norms.shape)


def guard(norms):
    """The library's clipping, of the norm of all groups together."""
    total = jnp.sqrt(jnp.sum(norms**2, axis=1, keepdims=True))
    return jnp.broadcast_to(dpx.FlatClipping(LIMIT).factors(total, ()), norms.shape)


FACTORS = [clip, clip_flat, guard]


@functools.cache
def naive_gradients(case: Case):
    """Per-example gradients of each leaf, in float64 on the host."""
    loss, params, examples = problem(case)
    vectorized = jax.vmap(jax.grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0))
    grads = jax.jit(vectorized, compiler_options=UNOPTIMISED)(params, examples)
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
    tolerance = tolerance + 2.0**-13  # clip factors make room for rounding
    scale = max(np.max(np.abs(w), initial=0) for w in wanted) + 1e-30
    for g, w in zip(jax.tree.leaves(got), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=tolerance, atol=tolerance * scale)


def poison(x):
    return x.at[1].set(jnp.inf).at[2].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def ids(case):
    return case.name


# variants of models that the quick run has in another form, and that take long to compile
SLOW = {
    "decoder_scan_over_layers_remat",
    "vision_transformer",
    "decoder",
    "decoder_remat",
    "decoder_scan_over_layers",
    "mixed_precision_attention",
    "mixture_of_experts_gathered",
    "cnn_max_pool",
    "einsum_attention",
    "vmapped_ensemble",
    "deep_sets",
    "neural_ode",
    "convolution_3d",
    "lstm",
}


def assert_sound(case: Case, **options):
    """One compiled program, whose clip factors are an argument, shows all of these:

    - with clipping by groups and of the whole, sum and norms are those of the loop over examples;
    - the guarantee: one example's contribution, measured in float64, is within 1e-6 of the clip norm;
    - a masked example and one that is not finite contribute exactly zero, whatever they contain.
    """
    loss, params, examples = problem(case)
    labels = group_labels(params)

    @eqx.filter_jit
    def run(params, examples, mask, kind):
        factors = lambda norms: jax.lax.switch(kind, FACTORS, norms)
        return ghost_clipped_sum(loss, params, examples, mask, labels, factors, **options)

    grads = naive_gradients(case)
    everyone = jnp.ones(BATCH, bool)
    for kind, weigh in enumerate([clip, clip_flat]):
        total, norms, losses, aux = run(params, examples, everyone, jnp.array(kind))
        wanted, wanted_norms = naive(grads, labels, weigh=weigh)
        np.testing.assert_allclose(norms, wanted_norms, rtol=case.tolerance, atol=1e-6)
        close(total, wanted, case.tolerance)
        assert jax.tree.structure(total) == jax.tree.structure(params)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(total))
        assert losses.shape == (BATCH,) and np.array_equal(aux, examples[0])

    for i in range(BATCH):
        total, norms, _, _ = run(params, examples, jnp.arange(BATCH) == i, jnp.array(2))
        size = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(total)))
        assert size <= LIMIT * (1 + 1e-6)
        assert size >= min(LIMIT, float(np.linalg.norm(norms[i]))) * (1 - 1e-4)

    if case.name == "while_model":  # whose number of steps grows with the example: infinite ones never end
        return
    poisoned = jax.tree.map(poison, examples)
    total, norms, _, _ = run(params, poisoned, jnp.array([True, False, True, True]), jnp.array(0))
    is_poisoned = not np.all(np.isfinite(norms[2]))
    assert is_poisoned or not any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(examples))
    close(total, naive(grads, labels, keep=[0, 3] if is_poisoned else [0, 2, 3])[0], case.tolerance)
    nothing = run(params, poisoned, ~everyone, jnp.array(0))[0]
    assert all(np.all(x == 0) for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c.name in SLOW)) for c in ZOO], ids=ids)
def test_equals_naive_loop_and_never_exceeds_the_clip_norm_and_drops_the_masked_and_non_finite(case):
    assert_sound(case)


QUICK_CHOICES = {"convolution_1d", "embedding_bag_repeated_and_out_of_range", "bfloat16_mlp"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c.name not in QUICK_CHOICES)) for c in ZOO], ids=ids
)
def test_two_passes_are_as_sound_as_one(case):
    """Without room for instantiated gradients besides, so that those are recomputed."""
    assert_sound(case, passes=2, memory_budget=0)


def layers(number=12, size=32, positions=8, batch=32):
    """Dense layers on a sequence."""
    loss = lambda p, e: (jnp.sum(functools.reduce(lambda x, w: jnp.tanh(x @ w), p, e) ** 2), ())
    params = [jr.normal(jr.key(k), (size, size)) / size**0.5 for k in range(number)]
    return loss, params, jr.normal(jr.key(9), (batch, positions, size))


def tied_projections(number=4, size=64, heads=2, positions=3, batch=16):
    """Into heads and, head by head, back again: products over different sets of axes, which no Gram matrix joins."""

    def layer(x, w):
        return jnp.tanh(jnp.sum(jnp.einsum("htk,hdk->htd", jnp.einsum("td,hdk->htk", x, w), w), 0))

    loss = lambda p, e: (jnp.sum(functools.reduce(layer, p, e) ** 2), ())
    params = [jr.normal(jr.key(k), (heads, size, size // heads)) / size**0.5 for k in range(number)]
    return loss, params, jr.normal(jr.key(9), (batch, positions, size))


def memory(loss, params, examples, **options):
    labels = tuple(k % 2 for k in range(len(params)))
    run = jax.jit(lambda p, e: ghost_clipped_sum(loss, p, e, None, labels, clip, **options)[:2])
    compiled: Any = run.lower(params, examples).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled(params, examples)


def assert_equal_to_vectorized(out, loss, params, examples):
    labels = tuple(k % 2 for k in range(len(params)))
    vectorized = jax.vmap(jax.grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0))
    grads = [np.asarray(g, np.float64) for g in jax.jit(vectorized)(params, examples)]
    wanted, norms = naive(grads, labels)
    close(out[0], wanted, 1e-5)
    np.testing.assert_allclose(out[1], norms, rtol=1e-5)


@pytest.mark.slow
def test_recomputing_what_was_instantiated_saves_memory():
    struct = tied_projections()
    rule = lambda budget: ghost_plan(*struct, memory_budget=budget)[0][1]
    assert rule(10**9).startswith("instantiate (")
    assert rule(2 * 10**5).startswith("instantiate and recompute in 2 pieces (")
    kept, _ = memory(*struct, memory_budget=10**9)
    pieces, out = memory(*struct, memory_budget=0)
    assert pieces < 0.5 * kept
    assert_equal_to_vectorized(out, *struct)


def test_cotangents_that_repeat_a_row_are_kept_as_the_row():
    """Those of a mean of look-ups: what is kept from being computed twice is the row, and what is added up is right."""

    def loss(params, example):
        ids, scale = example
        return jnp.sum(jnp.mean(params[0][ids], axis=0) ** 2 * scale), None

    batch, length, width = 4, 16, 8
    params = [jr.normal(jr.key(0), (50, width))]
    examples = jr.randint(jr.key(1), (batch, length), 0, 50), jnp.linspace(1.0, 2.0, batch)
    run = jax.jit(lambda p, e: ghost_clipped_sum(loss, p, e, None, (0,), clip)[:2])
    loops = [
        e
        for e in jax.make_jaxpr(run)(params, examples).jaxpr.eqns[0].params["jaxpr"].jaxpr.eqns
        if e.primitive.name == "while"
    ]
    kept = [v.aval.shape for loop in loops for v in loop.outvars if v.aval.ndim]
    assert kept == [(batch, width)]
    assert_equal_to_vectorized(run(params, examples), loss, params, examples)


@pytest.mark.slow
def test_two_passes_save_memory():
    """Many layers, whose cotangents one pass keeps until the clip factors are known."""
    struct = layers()
    one, _ = memory(*struct)
    two, out = memory(*struct, passes=2)
    assert two < 0.8 * one
    assert_equal_to_vectorized(out, *struct)


def test_planner_takes_a_second_pass_where_one_does_not_fit():
    """And a budget that nothing fits into says what would."""
    with pytest.raises(ValueError, match="positive"):
        Ghost(memory_budget=-1)
    loss, params, examples = layers(number=6, batch=4)
    with pytest.raises(ValueError, match=r"at least \d+ bytes") as error:
        Ghost(memory_budget=10).explain(loss, params, examples)
    least = int(next(word for word in str(error.value).split() if word.isdigit()))
    rules = [row.rule for row in Ghost(memory_budget=least).explain(loss, params, examples)]
    assert all(rule.endswith("; in two passes") for rule in rules), rules
    assert not any("passes" in row.rule for row in Ghost(memory_budget=10**9).explain(loss, params, examples))
    labels = tuple(k % 2 for k in range(len(params)))
    run = jax.jit(lambda p, e, m: Ghost(memory_budget=least).clipped_sum(loss, p, e, m, labels, 2, clip))
    out = run(params, examples, jnp.ones(4, bool))
    assert_equal_to_vectorized((out.total, out.norms), loss, params, examples)


@pytest.mark.parametrize("name", ["cond_in_scan", "lora_merged"])
def test_eager_equals_jit(name):
    case = by_name(name)
    loss, params, examples = problem(case)
    labels = group_labels(params)
    total, norms, _, _ = ghost_clipped_sum(loss, params, examples, None, labels, clip)
    wanted, wanted_norms = naive(naive_gradients(case), labels)
    np.testing.assert_allclose(norms, wanted_norms, rtol=case.tolerance, atol=1e-6)
    close(total, wanted, case.tolerance)


def test_traces_the_loss_once():
    loss, params, examples = problem(by_name("gru"))
    count = 0

    def counted(p, e):
        nonlocal count
        count += 1
        return loss(p, e)

    eqx.filter_jit(lambda: ghost_clipped_sum(counted, params, examples, None, (0,) * 4, clip))()
    assert count == 1


@pytest.mark.parametrize("passes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_under_vmap_over_models(passes):
    loss, params, examples = problem(by_name("embedding_bag_repeated_and_out_of_range"))
    labels = (0,) * len(jax.tree.leaves(params))
    several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    sum_of = lambda p: ghost_clipped_sum(loss, p, examples, None, labels, clip, passes=passes)[:2]
    stacked = jax.jit(jax.vmap(sum_of))(several)
    alone = jax.jit(sum_of)
    for k in range(2):
        one = alone(jax.tree.map(operator.itemgetter(k), several))
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


def assert_same_when_sharded(case, mesh, place, passes=1):
    """Norms and sum on a mesh are those of the loop over examples; `place` lays out a parameter."""
    loss, params, examples = problem(case)
    labels = group_labels(params)
    run = eqx.filter_jit(
        lambda p, e, m: ghost_clipped_sum(loss, p, e, m, labels, clip, passes=passes, memory_budget=0)[:2]
    )
    mask = jnp.array([True, True, False, True])
    wanted, wanted_norms = naive(naive_gradients(case), labels, keep=[0, 1, 3])
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda x: jax.device_put(x, place(x)), params)
        total, norms = run(sharded, *jax.device_put((examples, mask), jax.P("data")))
    np.testing.assert_allclose(norms, wanted_norms, rtol=case.tolerance, atol=1e-5)
    close(total, wanted, case.tolerance)
    return sharded, total, norms


def mesh_of(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType[kind],) * len(names))


# JAX itself refuses to look up a table by indices that are sharded over an explicit axis, so that those losses need an auto axis
@pytest.mark.parametrize(
    ("name", "kind", "passes"),
    [
        ("cond_in_scan", "Explicit", 1),
        ("lora_merged", "Explicit", 2),
        *[pytest.param(n, "Explicit", 1, marks=pytest.mark.slow) for n in ("mlp", "cnn", "gru", "lora_merged")],
        *[pytest.param(n, "Explicit", 2, marks=pytest.mark.slow) for n in ("mlp", "cnn", "gru", "cond_in_scan")],
        ("embedding_bag_repeated_and_out_of_range", "Auto", 1),
        *[pytest.param(n, "Auto", k, marks=pytest.mark.slow) for n in CORE if "decoder" in n for k in (1, 2)],
    ],
)
def test_sharded_equals_one_device(name, kind, passes):
    """A batch over four devices, parameters on all of them: nothing is named by the engine."""
    mesh = mesh_of((4,), ("data",), kind)
    _, total, norms = assert_same_when_sharded(by_name(name), mesh, lambda _: jax.P(), passes)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(total))
    if kind == "Explicit":
        assert jax.typeof(norms).sharding.spec[0] == "data"


def megatron_mlp():
    """Two layers, the first cut by its outputs, the second by its inputs."""
    weight = lambda key, *shape: jr.normal(jr.key(key), shape) / shape[0] ** 0.5
    loss = lambda p, x, y: jnp.sum((gathered("h,hd->d", jnp.tanh(x @ p["up"]), p["down"]) - y) ** 2)
    batch = jr.normal(jr.key(2), (BATCH, 6)), jr.normal(jr.key(3), (BATCH, 3))
    return {"up": weight(0, 6, 8), "down": weight(1, 8, 3)}, loss, batch


def gathered(subscripts, x, w):
    """A product over a sharded axis, of which explicit axes want to hear where it goes."""
    mesh = jax.sharding.get_abstract_mesh()
    is_explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    options: Any = {"out_sharding": jax.P()} if is_explicit else {}
    return jnp.einsum(subscripts, x, w, **options)


def megatron_transformer():
    """One block: projections cut by heads, the MLP as above, and a look-up by one-hot codes, which explicit axes allow."""

    def loss(p, codes, x):
        h = codes @ p["embedding"] + x
        q, k, v = (jnp.einsum("td,hdk->htk", h, p[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("htk,hsk->hts", q, k))
        h = h + gathered("htk,hkd->td", jnp.einsum("hts,hsk->htk", scores, v), p["o"])
        return jnp.sum((h + gathered("th,hd->td", jnp.tanh(h @ p["up"]), p["down"])) ** 2)

    weight = lambda key, *shape: jr.normal(jr.key(key), shape) / shape[-2] ** 0.5
    params = {"embedding": weight(0, 6, 4), "up": weight(5, 4, 8), "down": weight(6, 8, 4), "o": weight(4, 2, 3, 4)}
    params |= {name: weight(k, 2, 4, 3) for k, name in enumerate("qkv")}
    codes = jax.nn.one_hot(jr.randint(jr.key(8), (BATCH, 5), 0, 6), 6)
    return params, loss, (codes, jr.normal(jr.key(9), (BATCH, 5, 4)))


TENSOR_PARALLEL = {(6, 8): (None, "model"), (4, 8): (None, "model"), (8, 3): ("model",), (8, 4): ("model",)}


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (megatron_mlp, 1),
        (megatron_mlp, 2),
        (megatron_transformer, 1),
        pytest.param(megatron_transformer, 2, marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel_equals_one_device(make, passes, kind):
    """Two devices along the batch, two along hidden features and heads."""
    spec = lambda x: jax.P(*TENSOR_PARALLEL.get(x.shape, ("model",) if x.ndim == 3 else ()))
    mesh = mesh_of((2, 2), ("data", "model"), kind)
    params, total, _ = assert_same_when_sharded(Case(make.__name__, make), mesh, spec, passes)
    if kind == "Explicit":
        for x, g in zip(jax.tree.leaves(params), jax.tree.leaves(total), strict=True):
            assert g.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recurrent_stack", {"microbatch_size": 3}),
        ("recurrent_stack", {"memory_budget": 3000}),
        ("lora_merged", {"memory_budget": 0.5}),
        *[
            pytest.param("decoder_scan_over_layers_remat", o, marks=pytest.mark.slow)
            for o in ({}, {"microbatch_size": 3}, {"memory_budget": 9000})
        ],
    ],
    ids=str,
)
def test_microbatches_and_budgets_change_nothing(name, options):
    case = by_name(name)
    loss, params, examples = problem(case)
    labels = group_labels(params)
    run = eqx.filter_jit(Ghost(**options).clipped_sum)
    out = run(loss, params, examples, jnp.array([True, True, False, True]), labels, 2, clip)
    wanted, _ = naive(naive_gradients(case), labels, keep=[0, 1, 3])
    close(out.total, wanted, case.tolerance)


def test_budget_forbids_instantiating():
    """A kernel of 64 x 64 x 3 x 3 takes more memory than few pixels do: Gram matrices are smaller. With more pixels those are slower
    than to compute the product once more.
    """
    convolve = lambda p, e: jax.lax.conv(e[None], p, (1, 1), "SAME")
    loss = lambda p, e: (jnp.sum(jnp.tanh(convolve(p, e)) ** 2), ())
    kernel = jnp.ones((64, 64, 3, 3))
    rule = lambda budget, size: ghost_plan(loss, kernel, jnp.ones((4, 64, size, size)), memory_budget=budget)[0][1]
    for size, instead in [(8, "Gram ("), (14, "instantiate and recompute in 4 pieces (")]:
        assert rule(10**9, size).startswith("instantiate (")
        held_anyway = 2 * 4 * 64 * size**2
        assert rule(4 * (held_anyway + 40_000), size).startswith(instead)


def test_check_finds_no_difference():
    rows = ghost_check(*problem(by_name("layer_and_its_weight")))
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
