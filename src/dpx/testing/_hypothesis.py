"""Hypothesis strategies of inputs that break bounds. `hypothesis` is imported when one is asked for."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..clipping import FlatClipping, NormalizedClipping
from ..noise import CorrelatedGaussian, IndependentGaussian
from ..plan import PrivacyPlan
from ..sampling import BallsInBinsSampler, CyclicPoissonSampler, FixedSizeSampler, PoissonSampler, ShuffleSampler
from ..strategies import BandedToeplitz
from ._hostile import hostile_numbers
from ._zoo import ZooLoss, zoo

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError("`dpx.testing` draws inputs with hypothesis: `pip install 'dpx[testing]'`.") from error
    return strategies


def _leaving_random_alone(make: Callable[[], Any]) -> Any:
    """What `make` gives; compilation names files at random, which hypothesis takes for a draw that it cannot repeat."""
    state = random.getstate()
    try:
        return make()
    finally:
        random.setstate(state)


def hostile_floats(dtype: Any = "float32") -> "SearchStrategy[float]":
    """Numbers of a floating-point type at which arithmetic breaks: zeros of both signs, subnormal, smallest and largest numbers, those whose squares
    under- or overflow, infinities and NaN, and any other.

    **Arguments:**

    - `dtype`: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"`.

    **Returns:** a hypothesis strategy of Python floats that are numbers of that type.
    """
    st = _strategies()
    width = {"float16": 16, "float32": 32, "float64": 64}.get(jnp.dtype(dtype).name, 32)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = lambda x: float(np.asarray(x, np.float64).astype(jnp.dtype(dtype)).astype(np.float64))
        special = [rounded(x) for x in hostile_numbers(dtype)]

    def nearest(x: float) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return rounded(x)

    return st.one_of(st.sampled_from(special), st.floats(width=width).map(nearest))


def gradients(struct: Any) -> "SearchStrategy[Any]":
    """Trees of hostile arrays, one example's gradient.

    **Arguments:**

    - `struct`: a tree of arrays or `jax.ShapeDtypeStruct`s of floating-point types.

    **Returns:** a hypothesis strategy of trees of NumPy arrays of these shapes and types.
    """
    st = _strategies()
    leaves, treedef = jax.tree.flatten(struct)

    def array(leaf: Any) -> Any:
        entries = st.lists(hostile_floats(leaf.dtype), min_size=leaf.size, max_size=leaf.size)
        return entries.map(lambda x: np.asarray(x, np.float64).astype(leaf.dtype).reshape(leaf.shape))

    return st.tuples(*map(array, leaves)).map(lambda arrays: jax.tree.unflatten(treedef, arrays))


def models() -> "SearchStrategy[tuple[Any, ZooLoss]]":
    """Small models of several kinds (linear, a perceptron, an embedding, a convolution), each with a loss of one example.

    **Returns:** a hypothesis strategy of `(model, loss)`; `loss.example` says what its examples look like, and `batches(loss)` draws some.
    """
    st = _strategies()
    return st.tuples(st.integers(0, 7), st.integers(0, 3)).map(
        lambda drawn: _leaving_random_alone(lambda: zoo(drawn[0])[drawn[1]][1:])
    )


def batches(loss_or_struct: Any, max_size: int = 8) -> "SearchStrategy[tuple[np.ndarray, ...]]":
    """Batches with hostile numbers among ordinary ones.

    **Arguments:**

    - `loss_or_struct`: a loss that `models` drew, or a tuple of `jax.ShapeDtypeStruct`s: ONE example, as a loss takes it.
    - `max_size`: of the batch; the least is 1.

    **Returns:** a hypothesis strategy of tuples of NumPy arrays with a leading axis of examples. Integers are from 0 to 4.
    """
    st = _strategies()
    struct = getattr(loss_or_struct, "example", loss_or_struct)

    def array(leaf: Any, size: int) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            entry = st.one_of(st.floats(-3, 3, width=16), st.floats(-3, 3, width=16), hostile_floats(leaf.dtype))
        else:
            entry = st.integers(0, 4)
        count = size * int(np.prod(leaf.shape))
        entries = st.lists(entry, min_size=count, max_size=count)
        return entries.map(lambda x: np.asarray(x).astype(leaf.dtype).reshape(size, *leaf.shape))

    return st.integers(1, max_size).flatmap(lambda size: st.tuples(*(array(leaf, size) for leaf in struct)))


def masks(size: int) -> "SearchStrategy[np.ndarray]":
    """Masks of a batch, True for real examples; among them those that keep all and none.

    **Arguments:**

    - `size`: of the batch.

    **Returns:** a hypothesis strategy of boolean NumPy arrays of shape `(size,)`.
    """
    st = _strategies()
    some = st.lists(st.booleans(), min_size=size, max_size=size)
    return st.one_of(st.just([True] * size), st.just([False] * size), some).map(lambda x: np.asarray(x, bool))


def plans() -> "SearchStrategy[PrivacyPlan]":
    """Plans of several kinds that can be accounted for within milliseconds: sampling, clipping, independent and correlated Gaussian noise, and
    the adjacencies that go with them.

    **Returns:** a hypothesis strategy of calibrated `PrivacyPlan`s.
    """
    st = _strategies()

    kinds = ("poisson", "cyclic", "shuffle", "fixed", "bins")
    numbers = st.tuples(
        st.sampled_from(kinds),
        st.integers(1, 20),
        st.integers(4, 40),
        st.integers(1, 60),
        st.floats(0.6, 8.0),
        st.integers(1, 4),
        st.sampled_from((0.1, 1.0)),
        st.integers(0, 5),
    )
    return numbers.map(lambda drawn: _leaving_random_alone(lambda: _plan(*drawn)))


def _plan(
    kind: str, size: int, times: int, steps: int, multiplier: float, cycle: int, norm: float, choice: int
) -> PrivacyPlan:
    number, noise = size * times, IndependentGaussian(multiplier)
    match kind:
        case "poisson":
            sampler = PoissonSampler(number, size, steps)
        case "cyclic":
            sampler = CyclicPoissonSampler(number, size, steps, cycle)
            if cycle >= 2 and choice % 2:
                noise = CorrelatedGaussian(BandedToeplitz([1.0, 0.5]), multiplier)
        case "shuffle":
            sampler = ShuffleSampler(number, size, steps)
        case "fixed":
            sampler = FixedSizeSampler(number, size, steps)
        case _:
            sampler = BallsInBinsSampler(number, size, steps)
    clipping = NormalizedClipping(norm) if choice < 2 else FlatClipping(norm)
    adjacency = sampler.adjacencies[choice % len(sampler.adjacencies)]
    return PrivacyPlan(sampler, clipping, noise, adjacency=adjacency)
