"""A zoo of small models: every way that a weight is commonly used. Each case is a model, a per-example loss and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

BATCH = 4


class Case(NamedTuple):
    """`make()` builds `(model, loss, batch)`; `loss(model, *example)`, plus `key` where the loss names it.

    `frozen` is a filter specification for what is trained, as a function of the model, or None for all of it.
    """

    name: str
    make: Callable[[], tuple[Any, Callable[..., jax.Array], tuple[Any, ...]]]
    frozen: Callable[[Any], Any] | None = None
    tolerance: float = 1e-5


ZOO: list[Case] = []


def case(frozen=None, tolerance=1e-5):
    """Adds a function that builds a model, a loss and a batch to the zoo."""

    def add(make):
        @functools.wraps(make)
        def quickly():
            # every shape of random numbers is a program of its own, and threefry's takes a second to compile
            with jax.default_prng_impl("unsafe_rbg"):
                return make()

        ZOO.append(Case(make.__name__, quickly, frozen, tolerance))
        return quickly

    return add


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def scale(label):
    return 1 + label.astype(jnp.float32)


def _normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


def _vectors(size=6, classes=3):
    return _normal(1, BATCH, size), jnp.arange(BATCH) % classes


def _images(channels=2, size=8, classes=3):
    return _normal(1, BATCH, channels, size, size), jnp.arange(BATCH) % classes


def _tokens(length=7, vocab=11):
    # few distinct tokens, so that some are repeated within an example
    return (jnp.asarray(np.random.default_rng(1).integers(0, vocab // 2, (BATCH, length)), jnp.int32),)


def _sequences(length=5, size=3):
    return (_normal(1, BATCH, length, size),)


def _weight(key, *shape):
    return _normal(key, *shape, scale=shape[-1] ** -0.5)


class Model(eqx.Module):
    """A model whose parameters have names and whose function is given."""

    parameters: dict[str, Any]
    function: Callable | None = eqx.field(static=True)

    def __call__(self, *args):
        assert self.function is not None
        return self.function(*args, **self.parameters)


@case()
def mlp():
    return eqx.nn.MLP(6, 3, 5, 2, key=jr.key(0)), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def linear_without_bias():
    return eqx.nn.Linear(6, 3, use_bias=False, key=jr.key(0)), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def logistic_regression_scalar_weight():
    f = lambda x, w, b: w * jnp.sum(x) + b
    return (
        Model({"w": jnp.array(0.5), "b": jnp.array(0.1)}, f),
        lambda m, x, y: jnp.logaddexp(0, m(x)) * scale(y),
        _vectors(),
    )


class CNN(eqx.Module):
    convolutions: list
    head: eqx.nn.Linear
    pool: Callable = eqx.field(static=True)

    def __call__(self, x):
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.head(self.pool(x))


def _cnn(convolutions, features, pool=lambda x: x.mean((1, 2))):
    return CNN(convolutions, eqx.nn.Linear(features, 3, key=jr.key(9)), pool)


@case()
def cnn():
    layers = [eqx.nn.Conv2d(2, 4, 3, key=jr.key(0)), eqx.nn.Conv2d(4, 5, 3, stride=2, padding=1, key=jr.key(1))]
    return _cnn(layers, 5), lambda m, x, y: cross_entropy(m(x), y), _images()


@case()
def cnn_max_pool():
    pool = lambda x: eqx.nn.MaxPool2d(2, 2)(x).reshape(-1)
    layers = [eqx.nn.Conv2d(2, 4, 5, padding="SAME", stride=2, key=jr.key(0))]
    return _cnn(layers, 16, pool), lambda m, x, y: cross_entropy(m(x), y), _images()


@case()
def cnn_depthwise_dilated():
    layers = [
        eqx.nn.Conv2d(2, 6, 3, groups=2, dilation=2, padding=2, key=jr.key(0)),
        eqx.nn.Conv2d(6, 6, 3, groups=6, key=jr.key(1)),
    ]
    return _cnn(layers, 6), lambda m, x, y: cross_entropy(m(x), y), _images()


@case()
def cnn_transposed():
    layers = [
        eqx.nn.Conv2d(2, 4, 3, stride=2, key=jr.key(0)),
        eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2, key=jr.key(1)),
    ]
    return _cnn(layers, 6), lambda m, x, y: cross_entropy(m(x), y), _images()


@case()
def convolution_1d():
    model = eqx.nn.Sequential([eqx.nn.Conv1d(3, 4, 3, padding=((2, 0),), key=jr.key(0)), eqx.nn.Lambda(jnp.tanh)])
    return model, lambda m, x: jnp.sum(m(x.T) ** 2), _sequences()


@case()
def convolution_3d():
    model = eqx.nn.Conv3d(1, 2, 2, stride=(1, 2, 1), key=jr.key(0))
    return model, lambda m, x: jnp.sum(jnp.sin(m(x))), (jr.normal(jr.key(1), (BATCH, 1, 3, 4, 3)),)


@case()
def convolution_channels_last():
    f = lambda x, w: lax.conv_general_dilated(x[None], w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    batch = (jr.normal(jr.key(1), (BATCH, 5, 6, 3)),)
    return Model({"w": _weight(0, 3, 2, 3, 4)}, f), lambda m, x: jnp.sum(jnp.tanh(m(x)) ** 2), batch


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    blocks: list
    norms: list
    head: eqx.nn.Linear

    def __init__(self):
        self.stem = eqx.nn.Conv2d(2, 4, 3, padding=1, key=jr.key(0))
        self.blocks = [eqx.nn.Conv2d(4, 4, 3, padding=1, use_bias=False, key=jr.key(k)) for k in (1, 2)]
        self.norms = [eqx.nn.GroupNorm(2, 4) for _ in self.blocks]
        self.head = eqx.nn.Linear(4, 3, key=jr.key(3))

    def __call__(self, x):
        x = self.stem(x)
        for convolution, norm in zip(self.blocks, self.norms, strict=True):
            weight = convolution.weight
            mean = jnp.mean(weight, axis=(1, 2, 3), keepdims=True)
            weight = (weight - mean) / jnp.sqrt(jnp.var(weight, axis=(1, 2, 3), keepdims=True) + 1e-3)
            x = x + eqx.tree_at(lambda c: c.weight, convolution, weight)(jax.nn.relu(norm(x)))
        return self.head(x.mean((1, 2)))


@case()
def resnet_group_norm_weight_standardisation():
    return ResNet(), lambda m, x, y: cross_entropy(m(x), y), _images(size=6)


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list

    def __init__(self, size, *, key):
        keys = jr.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, size, key=keys[0])
        self.up = eqx.nn.Linear(size, 2 * size, key=keys[1])
        self.down = eqx.nn.Linear(2 * size, size, key=keys[2])
        self.norms = [eqx.nn.LayerNorm(size), eqx.nn.LayerNorm(size, use_bias=False)]

    def __call__(self, x, mask=None):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=mask)
        h = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(h)))


class ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    positions: jax.Array
    token: jax.Array
    blocks: list
    head: eqx.nn.Linear

    def __init__(self):
        self.patches = eqx.nn.Conv2d(2, 4, 4, stride=4, key=jr.key(0))
        self.positions, self.token = _weight(1, 5, 4), _weight(2, 1, 4)
        self.blocks = [Block(4, key=jr.key(k)) for k in (3, 4)]
        self.head = eqx.nn.Linear(4, 3, key=jr.key(5))

    def __call__(self, x):
        x = self.patches(x).reshape(4, -1).T
        x = jnp.concatenate([self.token, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[0])


@case()
def vision_transformer():
    return ViT(), lambda m, x, y: cross_entropy(m(x), y), _images()


class Decoder(eqx.Module):
    """A decoder; `head` is None where the embedding is tied."""

    embedding: eqx.nn.Embedding
    positions: jax.Array
    blocks: Any
    head: eqx.nn.Linear | None
    stacked: bool = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(self, tied=True, stacked=False, remat=False, vocab=11, size=4, length=7, layers=2):
        self.embedding = eqx.nn.Embedding(vocab, size, key=jr.key(0))
        self.positions = _weight(1, length, size)
        make = lambda key: Block(size, key=key)
        keys = jr.split(jr.key(2), layers)
        self.blocks = eqx.filter_vmap(make)(keys) if stacked else [make(key) for key in keys]
        self.head = None if tied else eqx.nn.Linear(size, vocab, key=jr.key(3))
        self.stacked, self.remat = stacked, remat

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids) + self.positions[: len(ids)]
        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        if self.stacked:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            body = lambda x, layer: (eqx.combine(layer, static)(x, mask), None)
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.nothing_saveable) if self.remat else body
            x, _ = lax.scan(body, x, arrays)
        else:
            for block in self.blocks:
                x = (eqx.filter_checkpoint(block) if self.remat else block)(x, mask)
        return x @ self.embedding.weight.T if self.head is None else jax.vmap(self.head)(x)


def next_token(model, ids):
    return jnp.mean(jax.vmap(cross_entropy)(model(ids)[:-1], ids[1:]))


@case()
def decoder():
    return Decoder(tied=False), next_token, _tokens()


@case()
def decoder_tied_embedding():
    return Decoder(), next_token, _tokens()


@case()
def decoder_remat():
    return Decoder(remat=True), next_token, _tokens()


@case()
def decoder_scan_over_layers():
    return Decoder(tied=False, stacked=True), next_token, _tokens()


@case()
def decoder_scan_over_layers_remat():
    return Decoder(stacked=True, remat=True), next_token, _tokens()


@case()
def embedding_bag_repeated_and_out_of_range():
    f = lambda ids, e, w: jnp.tanh(jnp.take(e, ids, axis=0, mode="clip").mean(0) + e[ids[0]]) @ w
    ids = jnp.array([[0, 0, 0], [1, 2, 1], [-1, 5, 9], [4, 12, 100]])
    model = Model({"e": _weight(0, 6, 4), "w": _weight(1, 4, 3)}, f)
    return model, lambda m, ids, y: cross_entropy(m(ids), y), (ids, jnp.arange(BATCH) % 3)


@case()
def embedding_fill_or_drop():
    f = lambda ids, e: jnp.tanh(e.at[:, ids].get(mode="fill", fill_value=0.5)).sum(1)
    return (
        Model({"e": _weight(0, 4, 6)}, f),
        lambda m, ids: jnp.sum(m(ids) ** 2),
        (jnp.arange(-8, 12).reshape(BATCH, 5),),
    )


@case()
def gru():
    step = lambda m, h, x: (m(x, h), None)
    loss = lambda m, x: jnp.sum(lax.scan(lambda h, x: step(m, h, x), jnp.zeros(4), x)[0] ** 2)
    return eqx.nn.GRUCell(3, 4, key=jr.key(0)), loss, _sequences()


@case()
def lstm():
    def loss(m, x):
        carry, hidden = lax.scan(lambda c, x: ((c := m(x, c)), c[0]), (jnp.zeros(4), jnp.zeros(4)), x, reverse=True)
        return jnp.sum(hidden**2) + jnp.sum(carry[1])

    return eqx.nn.LSTMCell(3, 4, key=jr.key(0)), loss, _sequences()


@case()
def recurrent_stack():
    """A scan over time inside a scan over layers: weights constant in one and iterated over in the other."""

    def f(x, w, u):
        def layer(x, wu):
            w, u = wu
            return lax.scan(lambda h, x: ((h := jnp.tanh(w @ h + u @ x)), h), jnp.zeros(3), x)[1], None

        return lax.scan(layer, x, (w, u))[0]

    model = Model({"w": _weight(0, 2, 3, 3), "u": _weight(1, 2, 3, 3)}, f)
    return model, lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def mixture_of_experts_top_k():
    def f(x, router, up, down):
        gates, experts = lax.top_k(jax.nn.softmax(x @ router), 2)
        everyone = jnp.einsum("ehd,d->eh", up, x)
        out = jnp.einsum("edh,eh->ed", down, jax.nn.relu(everyone))
        return jnp.sum(gates[:, None] * out[experts], 0)

    model = Model({"router": _weight(0, 6, 4), "up": _weight(1, 4, 5, 6), "down": _weight(2, 4, 3, 5)}, f)
    return model, lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def mixture_of_experts_gathered():
    def f(x, router, w):
        gates, experts = lax.top_k(jax.nn.softmax(x @ router), 2)
        return jnp.einsum("k,kdh,h->d", gates, w[experts], x)

    model = Model({"router": _weight(0, 6, 4), "w": _weight(1, 4, 3, 6)}, f)
    return model, lambda m, x, y: cross_entropy(m(x), y), _vectors()


class LoRA(eqx.Module):
    base: eqx.nn.Linear
    a: jax.Array
    b: jax.Array
    merged: bool = eqx.field(static=True)

    def __call__(self, x):
        if self.merged:
            return (self.base.weight + self.b @ self.a) @ x
        return self.base(x) + self.b @ (self.a @ x)


def _adapters(model):
    spec = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda m: (m.a, m.b), spec, (True, True))


def _lora(merged):
    return LoRA(eqx.nn.Linear(6, 3, key=jr.key(0)), _weight(1, 2, 6), _weight(2, 3, 2), merged)


@case(frozen=_adapters)
def lora():
    return _lora(False), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case(frozen=_adapters)
def lora_merged():
    return _lora(True), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def low_rank_all_trained():
    return _lora(True), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def deep_sets():
    model = Model({"inner": eqx.nn.MLP(3, 4, 5, 1, key=jr.key(0)), "outer": eqx.nn.Linear(4, 2, key=jr.key(1))}, None)
    loss = lambda m, x: jnp.sum(m.parameters["outer"](jax.vmap(m.parameters["inner"])(x).sum(0)) ** 2)
    return model, loss, _sequences()


@case(tolerance=3e-2)
def bfloat16_mlp():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, mlp()[0])
    x, y = _vectors()
    return model, lambda m, x, y: cross_entropy(m(x).astype(jnp.float32), y), (x.astype(jnp.bfloat16), y)


@case(tolerance=3e-2)
def mixed_precision_attention():
    def loss(m, x):
        m = jax.tree.map(lambda w: w.astype(jnp.bfloat16) if eqx.is_array(w) else w, m)
        with jax.numpy_dtype_promotion("standard"):
            return jnp.sum(m(x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)

    return Block(4, key=jr.key(0)), loss, _sequences(size=4)


@case()
def einsum_attention():
    def f(x, q, k, v, o):
        project = lambda w: jnp.einsum("td,hdk->htk", x, w)
        scores = jax.nn.softmax(jnp.einsum("htk,hsk->hts", project(q), project(k)))
        return jnp.einsum("hts,hsk,hkd->td", scores, project(v), o)

    w = lambda key: _weight(key, 2, 3, 4)
    model = Model({"q": w(0), "k": w(1), "v": w(2), "o": _weight(3, 2, 4, 3)}, f)
    return model, lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def fused_projection():
    """One weight, split in three; one bias; a slice of a stack of weights at a time."""

    def f(x, w, stack):
        q, k, v = jnp.split(x @ w, 3, axis=1)
        a, b = jnp.split(stack, 2)
        return jnp.tanh(q * k + v) @ a[0] @ b[0] @ stack[1]

    model = Model({"w": _weight(0, 3, 9), "stack": _weight(1, 4, 3, 3)}, f)
    return model, lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def overlapping_slices():
    f = lambda x, w: jnp.sin(w[:2] @ x[:3]) @ (w[1:] @ x[3:]) + jnp.sum(w[0])
    return Model({"w": _weight(0, 3, 3)}, f), lambda m, x, y: m(x) * scale(y), _vectors()


@case()
def cond_model():
    def loss(m, x, y):
        return lax.cond(x[0] > 0, lambda: cross_entropy(m(x), y), lambda: cross_entropy(2 * m(x - 1), y))

    return eqx.nn.MLP(6, 3, 5, 1, key=jr.key(0)), loss, _vectors()


@case()
def cond_in_scan():
    def f(x, w, v):
        step = lambda h, x: (lax.cond(x[0] > 0, lambda h: jnp.tanh(w @ h), lambda h: h + v @ x, h), None)
        return lax.scan(step, jnp.ones(3), x)[0]

    return Model({"w": _weight(0, 3, 3), "v": _weight(1, 3, 3)}, f), lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def scan_in_cond():
    def f(x, w):
        rolled = lambda: lax.scan(lambda h, x: (jnp.tanh(w @ h + x), None), jnp.ones(3), x)[0]
        return lax.switch(jnp.int32(x[0, 0] * 10) % 3, [rolled, lambda: w @ x[0], lambda: x[1]])

    return Model({"w": _weight(0, 3, 3)}, f), lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def while_model():
    """A data-dependent number of steps, on values that carry no gradient; and a fixed number, on values that do."""

    def f(x, w):
        steps = lax.while_loop(lambda n: n < jnp.abs(x[0]) * 5, lambda n: n + 1, jnp.float32(0))
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(w @ h), x) * scale(steps)

    return Model({"w": _weight(0, 6, 6)}, f), lambda m, x, y: jnp.sum(m(x) ** 2) * scale(y), _vectors()


@case()
def neural_ode():
    field = eqx.nn.MLP(3, 3, 5, 1, activation=jnp.tanh, key=jr.key(0))

    def loss(m, x):
        def step(y, _):
            k1 = m(y)
            k2 = m(y + 0.1 * k1)
            return y + 0.05 * (k1 + k2), None

        return jnp.sum(lax.scan(step, x[0], length=4)[0] ** 2)

    return field, loss, _sequences()


@case()
def one_weight_in_three_places():
    def f(x, w):
        return jnp.sum(w.T @ jnp.tanh(w @ x) * x) + jnp.sum(w**2 * 0.1) + jnp.tanh(w)[0] @ x

    return Model({"w": _weight(0, 6, 6)}, f), lambda m, x, y: m(x) * scale(y), _vectors()


@case()
def one_layer_called_twice():
    model = eqx.nn.Linear(6, 6, key=jr.key(0))
    return model, lambda m, x, y: cross_entropy(m(jnp.tanh(m(x))), y), _vectors()


@case()
def same_weight_transposed():
    f = lambda x, w: w.T @ jnp.tanh(w @ x)
    return Model({"w": _weight(0, 4, 6)}, f), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def layer_and_its_weight():
    """The mistake that layer hooks cannot see."""
    model = eqx.nn.Linear(6, 6, key=jr.key(0))
    return model, lambda m, x, y: cross_entropy(m(x) + 3 * jnp.sin(m.weight).sum(1) + x @ m.weight, y), _vectors()


@case()
def custom_rules():
    @jax.custom_vjp
    def matmul(w, x):
        return w @ x

    def backward(residuals, ct):
        # not the derivative: twice of it
        w, x = residuals
        return 2 * jnp.outer(ct, x), w.T @ ct

    matmul.defvjp(lambda w, x: (w @ x, (w, x)), backward)

    @jax.custom_jvp
    def act(w, x):
        return jnp.sin(w @ x)

    @act.defjvp
    def _(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        return act(w, x), 3 * (dw @ x + w @ dx)

    model = Model({"w": _weight(0, 4, 6), "v": _weight(1, 3, 4)}, None)
    loss = lambda m, x, y: cross_entropy(act(m.parameters["v"], jax.jit(matmul)(m.parameters["w"], x)), y)
    return model, loss, _vectors()


@case()
def stopped_gradient():
    f = lambda x, w, v: v @ jnp.tanh(w @ x) + lax.stop_gradient(w) @ x
    return Model({"w": _weight(0, 6, 6), "v": _weight(1, 6, 6)}, f), lambda m, x, y: cross_entropy(m(x), y), _vectors()


@case()
def unused_parameter():
    return (
        Model({"w": _weight(0, 3, 6), "unused": _weight(1, 2)}, lambda x, w, unused: w @ x),
        (lambda m, x, y: cross_entropy(m(x), y)),
        _vectors(),
    )


@case()
def dropout():
    model = eqx.nn.Sequential(
        [eqx.nn.Linear(6, 8, key=jr.key(0)), eqx.nn.Dropout(0.5), eqx.nn.Linear(8, 3, key=jr.key(1))]
    )
    return (
        model,
        lambda m, x, y, key: cross_entropy(m(x, key=key), y),
        (*_vectors(), jr.split(jr.key(7, impl="threefry2x32"), BATCH)),
    )


@case()
def matrix_factorization():
    """One row of each of two tables, by a traced scalar index."""
    model = Model({"u": _weight(0, 5, 3), "v": _weight(1, 6, 3)}, lambda i, j, u, v: u[i] @ v[j])
    ids = jnp.array([0, 1, 1, 7]), jnp.array([3, -1, 2, 5])
    return model, lambda m, i, j: (m(i, j) - 1) ** 2, ids


@case()
def position_embedding_and_scale():
    f = lambda x, p, s: jnp.tanh((x + p[None][0]) * s) @ p.T
    return Model({"p": _weight(0, 5, 3), "s": jnp.ones((1, 3))}, f), lambda m, x: jnp.sum(m(x) ** 2), _sequences()


@case()
def bilinear_and_quadratic():
    model = eqx.nn.Linear(6, 6, use_bias=False, key=jr.key(0))
    return model, lambda m, x, y: x @ m.weight @ m.weight @ x * scale(y), _vectors()


@case()
def vmapped_ensemble():
    make = lambda key: eqx.nn.MLP(6, 3, 4, 1, key=key)
    model = eqx.filter_vmap(make)(jr.split(jr.key(0), 3))
    run = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))
    return model, lambda m, x, y: cross_entropy(run(m, x).mean(0), y), _vectors()
