"""ChaCha20 keys: RFC 8439's vectors, streams that never meet, the same numbers however they are computed."""

import re
import struct

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dpx
from conftest import loss, make_batch, make_model
from dpx.random import CHACHA20
from dpx.random._chacha import chacha20_blocks, flat_index, word_pairs, word_pairs_of_blocks

COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")


def key_of(data: bytes):
    return jr.wrap_key_data(jnp.asarray(np.frombuffer(data, "<u4")), impl=CHACHA20)


def block(key: bytes, count: int, nonce: bytes) -> bytes:
    """As in RFC 8439: a 32-bit count and a nonce of 96 bits."""
    high, *rest = struct.unpack("<3I", nonce)
    words = chacha20_blocks(
        jnp.asarray(np.frombuffer(key, "<u4")), jnp.array([count], jnp.uint32), jnp.array([high], jnp.uint32), rest
    )
    return np.asarray(words)[:, 0].astype("<u4").tobytes()


def reference_block(key: np.ndarray, low: int, high: int, nonce: tuple[int, int]) -> list[int]:
    """The specification once more, with Python integers."""
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *map(int, key), low, high, *nonce]
    s = list(start)

    def rotate(v, by):
        return (v << by | v >> (32 - by)) & 0xFFFFFFFF

    def quarter(a, b, c, d):
        for x, y, z, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] = rotate(s[z] ^ s[x], by)

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)]


ZERO_KEY, LAST_BIT, SECOND_BYTE = bytes(32), bytes(31) + b"\1", b"\0\xff" + bytes(30)
COUNTING = bytes(range(32))


@pytest.mark.parametrize(
    ("key", "count", "nonce", "expected"),
    [
        (  # section 2.3.2
            COUNTING,
            1,
            "000000090000004a00000000",
            "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
            "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
        ),
        (  # appendix A.1, vectors 1 to 5
            ZERO_KEY,
            0,
            "00" * 12,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            ZERO_KEY,
            1,
            "00" * 12,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (
            LAST_BIT,
            1,
            "00" * 12,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
            "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
        ),
        (
            SECOND_BYTE,
            2,
            "00" * 12,
            "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
            "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
        ),
        (
            ZERO_KEY,
            0,
            "00" * 11 + "02",
            "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
            "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
        ),
    ],
)
def test_block_function_of_rfc_8439(key, count, nonce, expected):
    assert block(key, count, bytes.fromhex(nonce)).hex() == expected


def test_encryption_of_rfc_8439():
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    nonce = bytes.fromhex("000000000000004a00000000")
    stream = block(COUNTING, 1, nonce) + block(COUNTING, 2, nonce)
    assert bytes(a ^ b for a, b in zip(text, stream, strict=False)).hex() == (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
        "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


def test_random_bits_are_the_keystream():
    bits = jr.bits(key_of(COUNTING), (3, 16))
    for i in range(3):
        assert np.asarray(bits[i]).tolist() == reference_block(np.frombuffer(COUNTING, "<u4"), i, 0, (0, 0))


SHAPES = [(), (15,), (48,), (5, 7), (3, 32), (8, 6), (2, 3, 4, 4), (64, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_do_not_depend_on_the_shape(shape):
    key = jr.key(3, impl=CHACHA20)
    flat = np.asarray(jr.bits(key, (96,)))
    np.testing.assert_array_equal(np.ravel(jr.bits(key, shape)), flat[: int(np.prod(shape))])


def test_widths():
    key = jr.key(3, impl=CHACHA20)
    flat = np.asarray(jr.bits(key, (96,)))
    np.testing.assert_array_equal(jr.bits(key, (96,), jnp.uint8), flat.astype(np.uint8))
    np.testing.assert_array_equal(jr.bits(key, (96,), jnp.uint16), flat.astype(np.uint16))
    with jax.enable_x64(True):
        pairs = flat.astype(np.uint64).reshape(-1, 2)
        np.testing.assert_array_equal(jr.bits(key, (48,), jnp.uint64), pairs[:, 0] | pairs[:, 1] << 32)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 16)])
def test_empty_arrays(shape):
    assert jr.bits(jr.key(0, impl=CHACHA20), shape).shape == shape


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_counters_have_64_bits(data):
    """Blocks past the 2**32nd do not repeat: the count is that of Python integers, and all of it enters the block."""
    shape = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=4))
    index = [data.draw(st.integers(0, size - 1)) for size in shape]
    low, high = flat_index([jnp.array(i, jnp.uint32) for i in index], shape)
    exact = 0
    for i, size in zip(index, shape, strict=True):
        exact = exact * size + i
    assert (int(high) << 32 | int(low)) == exact % 2**64


def test_the_upper_half_of_the_counter_matters():
    key = np.frombuffer(COUNTING, "<u4")
    high = np.array([0, 1, 2**32 - 1], np.uint32)
    words = np.asarray(chacha20_blocks(jnp.asarray(key), jnp.full(3, 7, jnp.uint32), jnp.asarray(high), (0, 0)))
    for i in range(3):
        assert words[:, i].tolist() == reference_block(key, 7, int(high[i]), (0, 0))


def test_an_axis_too_long_for_its_index_is_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*36"):
        jax.jit(lambda k: jr.bits(k, (2**36,))).lower(jr.key(0, impl=CHACHA20))


def test_derived_keys_are_blocks_under_another_nonce():
    key = np.frombuffer(COUNTING, "<u4")
    children = jr.key_data(jr.split(key_of(COUNTING), 5))
    folded = jr.key_data(jr.fold_in(key_of(COUNTING), 2**32 - 1))
    for j in range(5):
        assert np.asarray(children[j]).tolist() == reference_block(key, j, 0, (1, 0))[:8]
    assert np.asarray(folded).tolist() == reference_block(key, 2**32 - 1, 0, (2, 0))[:8]
    assert jr.split(key_of(COUNTING), (2, 3)).shape == (2, 3)


def test_pairs_for_noise_are_blocks_under_another_nonce():
    """The first words of 8 pairs, then the second ones; in order, whatever the shape, and where whole blocks do not fill it."""
    key = np.frombuffer(COUNTING, "<u4")
    blocks = [reference_block(key, i, 0, (4, 0)) for i in range(3)]
    right = [sum((b[:8] for b in blocks), []), sum((b[8:] for b in blocks), [])]
    for shape in ((24,), (3, 8), (5, 4), (23,), (2, 3, 4), (1, 24, 1), ()):
        size = int(np.prod(shape))
        for words, expected in zip(word_pairs(jnp.asarray(key), shape), right, strict=True):
            assert np.ravel(words).tolist() == expected[:size]
    low, high = jnp.array([7, 7], jnp.uint32), jnp.array([0, 3], jnp.uint32)
    pairs = word_pairs_of_blocks(jnp.asarray(key), low, high)
    for i, number in enumerate((0, 3)):
        assert [x for words in pairs for x in np.asarray(words[i]).tolist()] == reference_block(key, 7, number, (4, 0))


def test_keys_and_streams_are_distinct():
    root = jr.key(0, impl=CHACHA20)
    keys = [root, *(jr.fold_in(root, i) for i in range(20)), *jr.split(root, 20)]
    keys += [jr.fold_in(keys[1], i) for i in range(20)] + list(jr.split(keys[1], 20))
    keys += [jr.key(seed, impl=CHACHA20) for seed in (1, 2, 2**31 - 1, -1)]
    words = np.concatenate([np.ravel(jr.key_data(k)) for k in keys] + [np.asarray(jr.bits(k, (16,))) for k in keys])
    pairs = words.astype(np.uint64)[::2] << 32 | words[1::2]
    # 1,020 pairs of 64 bits agree by chance once in 10^13 runs
    assert len(np.unique(pairs)) == len(pairs)


def test_seeds_use_all_their_bits():
    with jax.enable_x64(True):
        a, b = jr.key(7, impl=CHACHA20), jr.key(7 + 2**40, impl=CHACHA20)
        assert jr.key_data(a).tolist() != jr.key_data(b).tolist()
    assert jr.key_data(a).tolist() == jr.key_data(jr.key(7, impl=CHACHA20)).tolist()


@pytest.mark.slow
def test_jit_is_eager_and_vmap_is_a_stack():
    key = jr.key(5, impl=CHACHA20)

    def draw(key):
        first, second = jr.split(key)
        return jr.normal(first, (3, 7)), jr.bits(jr.fold_in(second, 9), (32,)), jr.key_data(second)

    compiled = jax.jit(draw)(key)
    with jax.disable_jit():
        eager = draw(key)
    for x, y in zip(compiled[1:], eager[1:], strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(compiled[0], eager[0], rtol=1e-6)
    keys = jr.split(key, 4)
    swept = jax.vmap(draw)(keys)
    for i in range(4):
        np.testing.assert_array_equal(swept[1][i], draw(keys[i])[1])
        np.testing.assert_array_equal(swept[0][i], draw(keys[i])[0])


@pytest.mark.parametrize("sizes", [(4,), (2, 2)], ids=str)
def test_sharded_noise_is_that_of_one_device_without_a_collective(sizes):
    key = jr.key(2, impl=CHACHA20)
    names = ("data", "model")[: len(sizes)]
    cases = [
        ((4096,), ("data",)),
        ((64, 256), ("data",)),
        ((64, 32), (None, "data")),  # a device's share is half a block
        ((64, 256), ("data", names[-1]) if len(sizes) == 2 else (None, "data")),
        ((16, 6), ("data",)),
        ((12, 7), ("data",)),  # not whole blocks
        ((8,), ("data",)),
        ((16, 12, 3, 3), (None, "data")),
    ]
    alone = jax.jit(lambda k: [jr.normal(k, shape) for shape, _ in cases])(key)
    mesh = jax.make_mesh(sizes, names)
    with jax.set_mesh(mesh):
        shardings = [jax.NamedSharding(mesh, jax.P(*spec)) for _, spec in cases]

        def draw(k):
            return [jr.normal(k, shape, out_sharding=s) for (shape, _), s in zip(cases, shardings, strict=True)]

        compiled = jax.jit(draw).lower(key).compile()
        assert not COLLECTIVES.search(str(compiled.as_text()))
        for out, expected, sharding in zip(compiled(key), alone, shardings, strict=True):
            assert out.sharding.is_equivalent_to(sharding, out.ndim)
            np.testing.assert_array_equal(out, expected)


def test_each_device_computes_its_own_blocks():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        draw = jax.jit(lambda k: jr.bits(k, (64, 256), out_sharding=sharding))
        text = str(draw.lower(jr.key(0, impl=CHACHA20)).compile().as_text())
        assert "u32[4,16,16]" in text and "u32[4,64,16]" not in text


def test_draws_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        keys = jax.device_put(jr.split(jr.key(0, impl=CHACHA20), 4), jax.P("data"))
        one = jax.shard_map(lambda k: jr.bits(k[0], (1, 16)), in_specs=jax.P("data"), out_specs=jax.P("data"))
        out = np.asarray(jax.jit(one)(keys))
    for i in range(4):
        np.testing.assert_array_equal(out[i], jr.bits(jr.split(jr.key(0, impl=CHACHA20), 4)[i], (16,)))


def test_bits_are_uniform_and_normals_normal():
    from scipy import stats

    key = jr.key(11, impl=CHACHA20)
    bits = np.asarray(jr.bits(key, (1000, 160)))
    # each of the tests below raises a false alarm once in 10^8 keys; the key is fixed
    counts = np.bincount(bits.view(np.uint8).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-8
    ones = np.unpackbits(bits.reshape(-1, 16).view(np.uint8), axis=1).sum(axis=0, dtype=int)
    assert np.abs(ones - 5000).max() < 7.3 * 50  # 512 positions in a block
    neighbours = np.unpackbits((bits.ravel()[:-1] ^ bits.ravel()[1:]).view(np.uint8)).mean()
    assert abs(neighbours - 0.5) < 6 * 0.5 / np.sqrt(32 * 159_999)
    assert stats.kstest(np.asarray(jr.normal(key, (200_000,)), np.float64), "norm").pvalue > 1e-8
    assert stats.kstest(np.asarray(jr.uniform(key, (200_000,)), np.float64), "uniform").pvalue > 1e-8


def test_private_gradients_run_on_it():
    model, batch = make_model(), make_batch()
    private_grad = dpx.PrivateGradient(
        loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.5), normalizer=8.0, steps=4
    )
    draws = []
    for key in (jr.key(1, impl=CHACHA20), jr.key(1, impl=CHACHA20), dpx.random.chacha_key()):
        state = private_grad.init(model, key=key)
        for _ in range(2):
            grads, state, _ = private_grad(model, batch, state, mask=np.zeros(8, bool))
            draws.append(np.asarray(grads.weight))
        state.raise_if_failed()
        assert jr.key_impl(state.key) == CHACHA20
    np.testing.assert_array_equal(draws[0], draws[2])
    np.testing.assert_array_equal(draws[1], draws[3])
    assert not np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[4])


def test_fresh_keys_come_from_the_operating_system():
    keys = [dpx.random.chacha_key(), dpx.random.chacha_key(), dpx.random.fresh_key(CHACHA20)]
    data = [jr.key_data(k).tolist() for k in keys]
    assert all(len(words) == 8 for words in data) and data[0] != data[1] != data[2]
    assert all(k.shape == () and jnp.issubdtype(k.dtype, jax.dtypes.prng_key) for k in keys)
    with pytest.raises(RuntimeError, match=r"dpx\.random\.chacha_key\(\).*same randomness every time"):
        jax.jit(dpx.random.chacha_key)()
