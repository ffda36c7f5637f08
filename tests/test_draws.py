"""Normal and Laplace draws: the law as far as 2**-64, from chosen words and from keys; the same bits however they are computed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType
from scipy import special, stats

import dpx
from dpx.random import CHACHA20
from dpx.random._draws import _draw, draw, laplace_from_words, normal_from_words, words
from dpx.sharding import laplace_like, normal_like

COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
KEYS = {"threefry": "threefry2x32", "chacha": CHACHA20, "rbg": "rbg"}
LAWS = {"normal": normal_from_words, "laplace": laplace_from_words}
REFERENCE = {"normal": stats.norm, "laplace": stats.laplace}
SURE = 1e-7  # false alarm of each statistical test below; the keys are fixed
TOP = 2**62 - 1


def words_of(number: int, is_negative: bool) -> tuple[int, int]:
    return number >> 31 << 1 | is_negative, (number & 2**31 - 1) << 1


def chosen() -> list[int]:
    """Numbers below 2**62 of every size, the same below 2**62, and what lies around the seams of the formulas."""
    rng = np.random.default_rng(0)
    sizes = [int(x) >> k for k in range(62) for x in rng.integers(2**61, 2**62, 40)]
    seams = [2**31 + i for i in range(-3, 4)] + [2**61 + i for i in range(-3, 4)] + list(range(8))
    return sorted({m for n in sizes + seams for m in (n, TOP - n)})


def expected(name: str, number: int) -> float:
    """Where the probability of being further out is (number + 1/2) / 2**62, from whichever side has the digits."""
    y, s = (
        (2 * number + 1) / 2**63,
        (2 * (TOP - number) + 1) / 2**63,
    )  # Python rounds these quotients of integers correctly
    if name == "normal":
        return -special.ndtri(y / 2) if y < 0.3 else np.sqrt(2) * special.erfinv(s)
    return -np.log(y) if y < 0.3 else -np.log1p(-s)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(np.float32, 1e-6, 0), (np.float64, 1e-13, 2.3e-16)])
def test_chosen_words_give_the_quantiles(name, dtype, rtol, atol):
    numbers = chosen()
    right = np.array([expected(name, m) for m in numbers])
    with jax.enable_x64(dtype == np.float64):
        first, second = (np.array(w, np.uint32) for w in zip(*(words_of(m, False) for m in numbers), strict=True))
        positive = np.asarray(jax.jit(LAWS[name], static_argnums=2)(first, second, dtype))
        negative = np.asarray(jax.jit(LAWS[name], static_argnums=2)(first | np.uint32(1), second, dtype))
        # bits that are not part of the number change nothing
        spare = np.asarray(jax.jit(LAWS[name], static_argnums=2)(first, second | np.uint32(1), dtype))
    assert positive.dtype == dtype
    np.testing.assert_allclose(positive.astype(np.float64), right, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(negative, -positive)
    np.testing.assert_array_equal(spare, positive)
    # descending, up to the rounding of the formula
    steps = np.diff(positive.astype(np.float64))
    assert (steps <= 2 * rtol * positive[1:] + atol).all()


@pytest.mark.parametrize(("name", "end"), [("normal", -special.ndtri(2.0**-64)), ("laplace", 63 * np.log(2))])
def test_tails_end_at_two_to_the_minus_64(name, end):
    zero, most = jnp.uint32(0), jnp.uint32(2**32 - 1)
    assert float(LAWS[name](zero, zero, np.float32)) == pytest.approx(end, rel=1e-6)
    assert float(LAWS[name](zero + 1, zero, np.float32)) == pytest.approx(-end, rel=1e-6)
    smallest = float(LAWS[name](most - 1, most - 1, np.float32))
    assert 0 < smallest < 1e-18  # no draw is zero


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_follow_the_law(kind, name, dtype):
    size, law = 100_000, REFERENCE[name]
    with jax.enable_x64(dtype == np.float64):
        z = np.asarray(draw(LAWS[name], jr.key(5, impl=KEYS[kind]), (size,), dtype))
        assert z.dtype == dtype
    z = z.astype(np.float64)
    assert stats.kstest(z, law.cdf).pvalue > SURE
    # in 64 bins of equal probability; and with the sign, the parity of the bin, and the neighbour independent
    bins = np.minimum((law.cdf(z) * 64).astype(int), 63)
    assert stats.chisquare(np.bincount(bins, minlength=64)).pvalue > SURE
    pairs = np.bincount(bins[:-1:2] // 8 * 8 + bins[1::2] // 8, minlength=64)
    assert stats.chisquare(pairs).pvalue > SURE
    sigmas = stats.norm.isf(SURE / 2)
    assert abs(z.mean()) < sigmas * law.std() / np.sqrt(size)
    kurtosis = 3 if name == "normal" else 6
    assert abs(z.var() - law.var()) < sigmas * law.var() * np.sqrt((kurtosis - 1) / size)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("zeros", [24, 31, 40])
def test_tails_follow_the_law(kind, name, zeros):
    """Given that they are beyond probability 2**-zeros, since the first bits of the words that a key gives are taken to be zero.

    That is beyond 5.4, 6.3 and 7.3 standard deviations. An atom of a tenth of the mass there is found with certainty.
    """
    size = 50_000
    first, second = words(jr.key(6, impl=KEYS[kind]), (size,))
    first, second = np.ravel(first)[:size], np.ravel(second)[:size]
    first = (first & 1) | (first & (2**32 - 1 >> min(zeros, 31)) & np.uint32(2**32 - 2))
    second = second & np.uint32(2**32 - 1 >> max(zeros - 31, 0))
    z = np.asarray(jax.jit(LAWS[name], static_argnums=2)(first, second, np.float32)).astype(np.float64)
    further = 2 * REFERENCE[name].sf(np.abs(z)) * 2.0**zeros
    assert further.max() < 1 + 1e-4
    assert stats.kstest(further, "uniform").pvalue > SURE
    assert stats.binomtest(int((z < 0).sum()), size).pvalue > SURE
    assert stats.kstest(further[z < 0], "uniform").pvalue > SURE


@pytest.mark.parametrize("kind", ["threefry", "chacha"])
def test_a_million_draws_leave_four_sigma_as_often_as_they_should(kind):
    size = 2**20
    z = np.abs(np.asarray(draw(normal_from_words, jr.key(7, impl=KEYS[kind]), (size,))))
    for threshold in (3.0, 4.0):
        assert stats.binomtest(int((z > threshold).sum()), size, float(2 * stats.norm.sf(threshold))).pvalue > SURE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threefry", "chacha"])
def test_draws_leave_the_range_of_23_bits(kind):
    # 24 of 4 * 10^8 are expected beyond 5.42; to see fewer than 5 has probability 4e-6, and none 4e-11
    tail = jax.jit(
        lambda i: jnp.sum(jnp.abs(_draw(normal_from_words, jr.fold_in(key, i), (10**7,), np.float32, True)) > 5.42)
    )
    key = jr.key(8, impl=KEYS[kind])
    count = sum(int(tail(i)) for i in range(40))
    assert stats.poisson.sf(count - 1, 4e8 * 2 * stats.norm.sf(5.42)) > 1e-7
    assert stats.poisson.cdf(count, 4e8 * 2 * stats.norm.sf(5.42)) > 1e-7


SHAPES = [(), (0, 3), (5, 7), (300_001,), (4, 100, 400)]


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_make_the_whole(kind, shape):
    """One CPU fills large arrays in parts; the numbers are those of any other machine."""
    key = jr.key(1, impl=KEYS[kind])
    whole, in_parts = (_draw(normal_from_words, key, shape, np.float32, flag) for flag in (False, True))
    assert whole.shape == in_parts.shape == shape
    np.testing.assert_array_equal(whole, in_parts)


@pytest.mark.parametrize("kind", ["threefry", "chacha"])
def test_positions_beyond_32_bits_have_words_of_their_own(kind):
    """As one part after the other counts them, with the carry into the upper half."""
    from dpx.random._draws import _of_blocks

    key = jr.key(1, impl=KEYS[kind])
    low, high = jnp.array([5, 5, 6], jnp.uint32), jnp.array([0, 1, 0], jnp.uint32)
    first, second = _of_blocks(key, low, high)
    assert (
        len({*np.asarray(first).reshape(3, -1)[:, 0].tolist(), *np.asarray(second).reshape(3, -1)[:, 0].tolist()}) == 6
    )


def test_threefry_words_are_its_64_bits():
    key = jr.key(2)
    first, second = (np.asarray(w).astype(np.uint64) for w in words(key, (50, 3)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jr.bits(key, (50, 3), jnp.uint64), first << np.uint64(32) | second)


@pytest.mark.parametrize("kind", KEYS)
def test_words_are_those_of_no_other_draw(kind):
    key = jr.key(2, impl=KEYS[kind])
    first, second = words(key, (1024,))
    other = [jr.bits(jr.fold_in(key, 1), (1024,)), jr.bits(jr.split(key)[0], (1024,)), jr.key_data(key)]
    if kind == "chacha":
        other.append(jr.bits(key, (4096,)))  # its own nonce
    ours = np.concatenate([np.ravel(first), np.ravel(second)])
    pairs = ours.astype(np.uint64)[::2] << np.uint64(32) | ours[1::2]
    assert len(np.unique(pairs)) == len(pairs)
    theirs = np.concatenate([np.ravel(x) for x in other])
    # 2,048 words meet about 6,000 others by chance with probability 0.3 %, two of them with 4e-6, five with 2e-15
    assert np.isin(ours, theirs).sum() < 5


@pytest.mark.parametrize("kind", ["threefry", "chacha"])
@pytest.mark.parametrize(
    ("axes", "sizes"), [("Explicit", (2,)), ("Explicit", (2, 2)), ("Explicit", (4,)), ("Auto", (4,))], ids=str
)
def test_devices_draw_their_own_part_of_the_same_numbers(kind, axes, sizes):
    key = jr.key(4, impl=KEYS[kind])
    names = ("data", "model")[: len(sizes)]
    both = ("data", names[1]) if len(names) == 2 else (None, "data")
    cases = {
        "even": ((64, 96), both),
        "not whole blocks": ((12, 7), ("data",)),
        "share below a block": ((16,), ("data",)),
    }
    likes = {"even": normal_like, "not whole blocks": laplace_like, "share below a block": normal_like}
    alone = {name: likes[name](key, jnp.zeros(shape)) for name, (shape, _) in cases.items()}
    kinds = (getattr(AxisType, axes),) * len(names)
    mesh = jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        shardings = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, (_, spec) in cases.items()}
        zeros = {name: jax.device_put(jnp.zeros(shape), shardings[name]) for name, (shape, _) in cases.items()}

        def noise(key, zeros):
            return {name: likes[name](key, x) for name, x in zeros.items()}

        compiled = jax.jit(noise, out_shardings=shardings).lower(key, zeros).compile()
        assert not COLLECTIVES.search(str(compiled.as_text()))
        for name, out in compiled(key, zeros).items():
            assert out.sharding.is_equivalent_to(shardings[name], out.ndim)
            np.testing.assert_array_equal(out, alone[name])


def test_rbg_keys_draw_the_same_numbers_on_several_devices():
    key = jr.key(4, impl="rbg")
    alone = normal_like(key, jnp.zeros((64, 96)))
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        sharded = jax.jit(normal_like)(key, jax.device_put(jnp.zeros((64, 96)), jax.P("data")))
    np.testing.assert_array_equal(sharded, alone)


@pytest.mark.parametrize("kind", ["threefry", "chacha"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_vmap_over_keys_is_a_stack(kind, in_parts):
    keys = jr.split(jr.key(9, impl=KEYS[kind]), 3)
    one = lambda key: _draw(normal_from_words, key, (140_001,), np.float32, in_parts)
    np.testing.assert_array_equal(jax.vmap(one)(keys), jnp.stack([one(key) for key in keys]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_noise_of_narrow_sums_is_float32(dtype):
    for like in (normal_like, laplace_like):
        assert like(jr.key(0), jnp.zeros(3, dtype)).dtype == jnp.float32


def test_all_noise_comes_from_one_place():
    """`jax.random.normal` and its like are nowhere in the source; what is drawn for privacy comes from `_draws`, or from random integers."""
    source = Path(dpx.__file__).parent
    forbidden = re.compile(
        r"\b(?:jr|random)\.(normal|laplace|uniform|exponential|truncated_normal|logistic|gumbel)\(|erf_inv\("
    )
    for path in source.rglob("*.py"):
        if path.is_relative_to(source / "testing") or path.is_relative_to(source / "auditing"):
            continue  # inputs of checks and attacks
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        code = re.sub(r'"""[\s\S]*?"""', "", code)
        assert not forbidden.search(code), path


@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_noise_parts_use_these_draws(name):
    """A step adds the draw of its folded key, times the scale."""
    noise = dpx.IndependentGaussian(1.0) if name == "normal" else dpx.Laplace(1.0)
    total, key = jnp.zeros((40, 50)), jr.key(3)
    noisy, _ = noise.step(total, jnp.float32(2.0), key, jnp.int32(5), ())
    leaf = jr.split(jr.fold_in(key, 5), 1)[0]
    np.testing.assert_allclose(noisy, 2 * draw(LAWS[name], leaf, (40, 50)), rtol=1e-6)


@pytest.mark.parametrize("step", [-1, 2**64])
def test_steps_that_would_reach_another_domains_stream_are_refused(step):
    from dpx.random import Domain, generator

    with pytest.raises(ValueError, match="2\\*\\*64"):
        generator(0, step, Domain.POISSON)
