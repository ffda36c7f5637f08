"""Values that are not private yet."""

from typing import Any, Generic, NoReturn, TypeVar

import equinox as eqx
import jax
import wadler_lindig as wl

_T = TypeVar("_T")

_MSG = (
    "{operation} of a `dpx.Sensitive` value: it was computed from single examples and no noise has been added, so nothing that "
    "depends on it may be published. Privatise it (`dpx.PrivateGradient`, `dpx.metrics`), or call `.reveal()` if it stays within "
    "the walls that the data is allowed in."
)


def _refuse(operation: str):
    def method(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_MSG.format(operation=operation))

    return method


class Sensitive(eqx.Module, Generic[_T]):
    """A value derived from single examples that is not private yet.

    It is a PyTree, so it passes through `jit` and `vmap`; it has no arithmetic, comparison, indexing or conversion, and its `repr`
    shows shapes and dtypes only, also when nested in something else.

    !!! success "Guarantee"

        No number inside is shown or computed with unless `.reveal()` is called.

    **Arguments:**

    - `value`: any PyTree.
    """

    _value: _T

    def __init__(self, value: _T):
        self._value = value

    def reveal(self) -> _T:
        """The value itself. Everything computed from it is as sensitive as the data."""
        return self._value

    def __pdoc__(self, **kwargs: Any) -> wl.AbstractDoc:
        kwargs["short_arrays"] = True
        return wl.TextDoc("Sensitive(") + wl.pdoc(_redact(self._value), **kwargs) + wl.TextDoc(")")

    def __repr__(self) -> str:
        return eqx.tree_pformat(self)

    __str__ = __repr__

    __eq__ = _refuse("Comparison")  # pyright: ignore[reportAssignmentType]
    __ne__ = _refuse("Comparison")  # pyright: ignore[reportAssignmentType]
    __lt__ = __le__ = __gt__ = __ge__ = _refuse("Comparison")
    __hash__ = _refuse("Hashing")  # pyright: ignore[reportAssignmentType]
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


def _redact(value: Any) -> Any:
    """Leaves other than arrays (Python numbers, strings) are replaced by the name of their type."""

    def one(leaf):
        return leaf if eqx.is_array(leaf) else _Shape(type(leaf).__name__)

    return jax.tree.map(one, value)
