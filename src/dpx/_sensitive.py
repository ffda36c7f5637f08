"""Values that are not private yet."""

import functools
from typing import Any, Generic, NoReturn, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import wadler_lindig as wl
from jaxtyping import Array

_T = TypeVar("_T")

_MSG = (
    "{operation} of a `dpx.Sensitive` value: it was computed from single examples and no noise has been added, so nothing that "
    "depends on it may be published. Privatise it (`dpx.PrivateGradient`, `dpx.metrics`), or call `.reveal()` if it stays within "
    "the walls that the data is allowed in."
)
_MSG_GRADIENT = (
    "A `dpx.Sensitive` value cannot be differentiated through. Differentiate your own function of the loss; or compute what you need of the value "
    "inside `jax.lax.stop_gradient`."
)


def _refuse(operation: str):
    def method(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_MSG.format(operation=operation))

    return method


class Sensitive(eqx.Module, Generic[_T]):
    """A value derived from single examples that is not private yet.

    It is a PyTree, so it passes through `jit`, `scan` and `vmap`; it has no arithmetic, comparison, indexing or conversion, and its `repr`
    shows shapes and dtypes only, also when nested in something else.

    What passes through `jit` must be leaves, and whoever asks for the leaves of a tree gets them. So the arrays in here are sealed: their bits
    are scrambled, number by number, into integers that are nonsense to look at, to average or to plot. `.reveal()` unscrambles them.

    !!! success "Guarantee"

        No number inside is shown or computed with unless `.reveal()` is called: not by `jax.tree.leaves` either, nor by a tree map.

    This stops accidents, not intent: there is no secret in the scrambling, equal numbers have equal seals, and shapes are as they are.

    **Arguments:**

    - `value`: any PyTree.
    """

    _value: Any

    def __init__(self, value: _T):
        self._value = jax.tree.map(_seal, value, is_leaf=lambda x: isinstance(x, Sensitive))

    def reveal(self) -> _T:
        """The value itself. Everything computed from it is as sensitive as the data."""
        return jax.tree.map(lambda x: x if isinstance(x, Sensitive) else x.open(), self._value, is_leaf=_is_cell)

    def __pdoc__(self, **kwargs: Any) -> wl.AbstractDoc:
        shown = jax.tree.map(lambda x: x if isinstance(x, Sensitive) else x.shown(), self._value, is_leaf=_is_cell)
        return wl.TextDoc("Sensitive(") + wl.pdoc(shown, **kwargs) + wl.TextDoc(")")

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    __str__ = __repr__

    __eq__ = _refuse("Comparison")
    __ne__ = _refuse("Comparison")
    __lt__ = __le__ = __gt__ = __ge__ = _refuse("Comparison")
    __hash__ = _refuse("Hashing")
    __bool__ = _refuse("Truth value")
    __float__ = __int__ = __complex__ = __index__ = _refuse("Conversion to a number")
    __array__ = __jax_array__ = _refuse("Conversion to an array")
    __iter__ = __getitem__ = __len__ = __contains__ = _refuse("Indexing")
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse("Arithmetic")
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse("Arithmetic")
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = _refuse("Arithmetic")


class _Shape:
    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _Box:
    """A leaf that is neither array nor number, such as a string."""

    def __init__(self, value: Any):
        self._value = value

    def __repr__(self) -> str:
        return type(self._value).__name__

    def open(self) -> Any:
        return self._value

    def shown(self) -> Any:
        return _Shape(repr(self))


class _Sealed(eqx.Module):
    """The scrambled bits of an array.

    **Arguments:**

    - `words`: unsigned integers of at most 32 bits, in arrays of its shape: two for 64 bits, twice as many for complex numbers.
    - `dtype`: what the numbers are; for keys, their type.
    - `is_python`: whether it was a Python number.
    """

    words: tuple[Any, ...]
    dtype: Any = eqx.field(static=True)
    is_python: bool = eqx.field(static=True)

    def open(self) -> Any:
        if not all(hasattr(w, "dtype") for w in self.words):  # what a tree map made of it, such as None
            return self.words[0]
        if not isinstance(self.dtype, np.dtype):
            return jr.wrap_key_data(_unscrambled(self.words, np.dtype(np.uint32)), impl=self.dtype)
        if self.dtype.kind == "c":
            half = len(self.words) // 2
            part = np.dtype(f"f{self.dtype.itemsize // 2}")
            real, imag = (_unscrambled(w, part) for w in (self.words[:half], self.words[half:]))
            return jax.lax.complex(real, imag) if isinstance(real, jax.Array) else real + 1j * imag
        value = _unscrambled(self.words, self.dtype)
        return value.item() if self.is_python and isinstance(value, np.ndarray) and value.ndim == 0 else value

    def shown(self) -> Any:
        if self.is_python or not hasattr(self.words[0], "shape"):
            return _Shape(self.dtype.name if self.is_python else type(self.words[0]).__name__)
        if not isinstance(self.dtype, np.dtype):
            return _Shape("key")
        struct = jax.ShapeDtypeStruct(self.words[0].shape, self.dtype)
        return _Shape(eqx.tree_pformat(struct, struct_as_array=True))


def _is_cell(x: Any) -> bool:
    return isinstance(x, _Sealed | _Box | Sensitive)


def _seal(leaf: Any) -> Any:
    if isinstance(leaf, Sensitive):
        return leaf
    is_python = isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic)
    array: Any = np.asarray(leaf) if is_python or isinstance(leaf, np.generic) else leaf
    if not isinstance(array, jax.Array | np.ndarray):
        return _Box(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return _Sealed(_scrambled(jr.key_data(array)), jr.key_impl(array), False)
    if not (array.dtype == np.bool_ or jnp.issubdtype(array.dtype, jnp.number)):
        return _Box(leaf)
    parts = (array.real, array.imag) if array.dtype.kind == "c" else (array,)
    return _Sealed(tuple(word for part in parts for word in _scrambled(part)), np.dtype(array.dtype), is_python)


# Number by number, since what is in here may be sliced, stacked and sharded while it is sealed. With odd m, x -> (x ^ a) m is a bijection
# of n-bit words; x -> x ^ (x >> n / 2) is its own inverse.
_XOR, _FACTOR = 0x9E3779B9, 0xD1342543


def _mixed(words: Any) -> Any:
    dtype, bits = words.dtype.type, 8 * words.dtype.itemsize
    with np.errstate(over="ignore"):
        words = (words ^ dtype(_XOR % 2**bits)) * dtype(_FACTOR % 2**bits)
        return words ^ (words >> dtype(bits // 2))


def _unmixed(words: Any) -> Any:
    dtype, bits = words.dtype.type, 8 * words.dtype.itemsize
    with np.errstate(over="ignore"):
        words = words ^ (words >> dtype(bits // 2))
        return words * dtype(pow(_FACTOR, -1, 2**bits)) ^ dtype(_XOR % 2**bits)


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype, of whole bytes, in which numbers of `dtype` are scrambled."""
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if jnp.issubdtype(dtype, jnp.integer):
        return np.dtype(np.int8) if jnp.iinfo(dtype).bits < 8 else dtype
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 8 else dtype


def _word(stored: np.dtype) -> np.dtype:
    # JAX has no words of 64 bits unless x64 is on, and cuts those that come in
    return np.dtype(f"u{min(stored.itemsize, 4)}")


def _scrambled(x: Any) -> tuple[Any, ...]:
    stored = _stored(np.dtype(x.dtype))
    if isinstance(x, jax.Array):
        return _scrambled_array(x, stored)
    words = np.ascontiguousarray(x.astype(stored)).reshape(*x.shape, 1).view(_word(stored))
    return tuple(np.asarray(_mixed(words[..., i])) for i in range(words.shape[-1]))


def _unscrambled(words: tuple[Any, ...], dtype: np.dtype) -> Any:
    stored = _stored(dtype)
    if isinstance(words[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(words[0].shape, dtype, sharding=words[0].sharding)
    if isinstance(words[0], jax.Array):
        value = _unscrambled_array(words, stored)
        return value.astype(jax.dtypes.canonicalize_dtype(dtype))
    return np.stack([_unmixed(w) for w in words], axis=-1).view(stored)[..., 0].astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scrambled_array(x: Array, stored: np.dtype) -> tuple[Array, ...]:
    words = jax.lax.bitcast_convert_type(x.astype(stored), _word(stored))
    parts = [words] if words.ndim == x.ndim else [words[..., i] for i in range(words.shape[-1])]
    return tuple(map(_mixed, parts))


@_scrambled_array.defjvp
def _(stored, primals, tangents):
    # JAX would say that the derivative of the bits is zero
    raise TypeError(_MSG_GRADIENT)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unscrambled_array(words: tuple[Array, ...], stored: np.dtype) -> Array:
    parts = [_unmixed(w) for w in words]
    if len(parts) == 1:
        return jax.lax.bitcast_convert_type(parts[0], stored)
    with jax.enable_x64(True):
        return jax.lax.bitcast_convert_type(jnp.stack(parts, axis=-1), stored)
