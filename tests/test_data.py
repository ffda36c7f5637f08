"""Sources: rows by number from whatever holds them, and the right remedy for what does not."""

import pickle
import threading
from typing import Any, cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dpx
from dpx.data import ArraySource, ExampleSource, HuggingFaceSource, as_source

X = np.arange(60, dtype=np.float32).reshape(20, 3)
Y = np.arange(20, dtype=np.int8)
ROWS = np.array([7, 3, 19, 0, 3])
PLAN = dpx.dp_sgd(20, 5, 4, noise_multiplier=1.0)


class Pairs:
    """As torch's map-style data sets: one example at a time."""

    def __init__(self, number=20):
        self.number = number
        self.asked = []

    def __len__(self):
        return self.number

    def __getitem__(self, i) -> Any:
        if not isinstance(i, int):
            raise TypeError("list indices must be integers")
        self.asked.append(i)
        return X[i], int(Y[i])


class Listed(Pairs):
    """With torch's way of asking for many."""

    def __getitems__(self, numbers):
        self.asked.append(list(numbers))
        return [(X[i], Y[i]) for i in numbers]


class Columns:
    """As a tensor data set: indexing by a list gives the stack."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return X[i], Y[i]


class OnlyLists(Columns):
    def __getitem__(self, i):
        if not isinstance(i, list):
            raise TypeError("a list")
        return X[i], Y[i]


class Scalars(Columns):
    """Understands a list, and something else by it than its rows: (rows,) instead of (rows, 3)."""

    def __getitem__(self, i):
        return (X[i].sum(), Y[i]) if isinstance(i, int) else (X[i].sum(axis=0), Y[i])


class Tensor:
    """As torch's: refuses to be made an array while it tracks gradients."""

    def __init__(self, x, tracks=True):
        self.x, self.tracks = x, tracks

    def detach(self):
        return Tensor(self.x, False)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        assert not self.tracks
        return np.asarray(self.x, dtype)


class Tensors(Pairs):
    def __getitem__(self, i):
        return {"x": Tensor(X[i]), "y": [Y[i]]}


def h5(tmp_path):
    h5py = pytest.importorskip("h5py")
    file = h5py.File(tmp_path / "data.h5", "w")
    return file.create_dataset("x", data=X, chunks=(4, 3))


def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


# --- What becomes a source ----------------------------------------------------------------------------------------------


def check(source, *expected):
    """The rows that were asked for, in their order, in one tuple."""
    assert source.num_rows == 20
    rows = source.rows(ROWS)
    assert isinstance(rows, tuple) and len(rows) == len(expected)
    for got, all_rows in zip(jax.tree.leaves(rows), jax.tree.leaves(expected), strict=True):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, all_rows[ROWS])
    assert jax.tree.structure(rows) == jax.tree.structure(expected)


def test_arrays_of_all_kinds(tmp_path):
    pd = pytest.importorskip("pandas")
    labels = list("tsrqponmlkjihgfedcba")
    check(as_source((X, {"y": Y})), X, {"y": Y})
    check(as_source((jnp.asarray(X),)), X)
    check(as_source((jnp.asarray(X, jnp.bfloat16),)), X.astype(jnp.bfloat16))
    check(as_source((mapped(tmp_path), Y)), X, Y)
    check(as_source((pd.DataFrame(X, index=labels), pd.Series(Y, index=labels[::-1]))), X, Y)
    check(as_source((h5(tmp_path),)), X)
    assert as_source((X,)).rows(np.zeros(0, np.int64))[0].shape == (0, 3)
    source = as_source((X,))
    assert as_source(source) is source
    source.rows(ROWS)[0][:] = -1  # what is given is a copy
    check(source, X)


@pytest.mark.parametrize("kind", [Pairs, Listed, Columns, OnlyLists], ids=lambda k: k.__name__)
def test_data_sets_by_number(kind):
    check(as_source(kind()), X, Y)
    assert as_source(kind()).rows(ROWS)[0].dtype == np.float32


def test_data_sets_are_asked_in_the_right_way():
    dataset = Listed()
    as_source(dataset).rows(ROWS)
    assert dataset.asked == [ROWS.tolist()]
    check(as_source(Scalars()), X.sum(axis=1), Y)
    check(as_source(Tensors()), {"x": X, "y": [Y]})
    (values,) = as_source(cast(Any, range(10, 30))).rows(ROWS)
    assert (values == 10 + ROWS).all()


def test_rows_that_are_read_one_by_one_are_read_at_the_same_time():
    together = threading.Barrier(4)

    class Slow(Pairs):
        def __getitem__(self, i):
            super().__getitem__(i)
            together.wait(timeout=10)  # breaks unless four are here
            return X[i]

    source = ExampleSource(Slow(), threads=4)
    np.testing.assert_array_equal(source.rows(np.arange(4))[0], X[:4])


def test_grain():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(np.arange(20)).map(lambda i: {"x": X[i], "y": Y[i]})
    check(as_source(dataset), {"x": X, "y": Y})
    check(as_source(grain.MapDataset.source(np.arange(20)).map(lambda i: (X[i], Y[i]))), X, Y)
    for bad, match in [
        (dataset.repeat(), "leave `.repeat"),
        (dataset.to_iter_dataset(), "of Grain a `MapDataset`"),
        (iter(dataset), "of Grain a `MapDataset`"),
    ]:
        with pytest.raises(ValueError, match=match):
            as_source(bad)
    with pytest.raises(ValueError, match="Row 1 of `data` is None.*filter the data before"):
        as_source(dataset.filter(lambda row: row["y"] % 2 == 0)).rows(np.array([0, 1]))
    with pytest.raises(ValueError, match="got bytes.*map.decode"):
        as_source(grain.MapDataset.source([b"record"] * 20)).rows(np.array([0, 1]))


def test_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        x=datasets.List(datasets.Value("float32"), length=3), y=datasets.Value("int8"), name=datasets.Value("string")
    )
    columns = {"x": X.tolist(), "y": Y.tolist(), "name": list("abcdefghijklmnopqrst")}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    check(as_source(dataset.remove_columns("name")), {"x": X, "y": Y})
    check(as_source(dataset.select_columns(["y"])), {"y": Y})
    source = HuggingFaceSource(dataset, ["y", "x"])
    check(source, Y, X)
    assert [leaf.dtype for leaf in source.rows(ROWS)] == [np.int8, np.float32]  # NumPy's format says int64
    check(pickle.loads(pickle.dumps(source)), Y, X)
    with pytest.raises(ValueError, match="Column 'name'.*must hold numbers.*dataset.map.*columns="):
        next(PLAN.batches(dataset, seed=0))
    with pytest.raises(ValueError, match=r"columns=...\).*'x', 'y', 'name'; got \['z'\]"):
        HuggingFaceSource(dataset, ["z"])
    with pytest.raises(ValueError, match=r"`data\['train'\]`"):
        as_source(datasets.DatasetDict({"train": dataset}))
    with pytest.raises(ValueError, match="streaming=True"):
        as_source(dataset.to_iterable_dataset())
    ragged = datasets.Dataset.from_dict({"x": [[0] * (i % 3 + 1) for i in range(20)]})
    with pytest.raises(ValueError, match="Column 'x'.*one shape.*pad"):
        as_source(ragged).rows(np.arange(3))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=30))
def test_all_sources_give_the_same_rows(numbers):
    indices = np.array(numbers)
    for data in ((X, Y), Pairs(), Listed(), Columns(), OnlyLists()):
        x, y = as_source(data).rows(indices)
        np.testing.assert_array_equal(x, X[indices])
        np.testing.assert_array_equal(y, Y[indices])


def test_plans_take_them_all(tmp_path):
    expected = list(PLAN.batches((X, Y), seed=0))
    for data in (Pairs(), Listed(), (mapped(tmp_path), Y)):
        for (batch, mask), ((x, y), real) in zip(PLAN.batches(data, seed=0), expected, strict=True):
            np.testing.assert_array_equal(mask, real)
            np.testing.assert_array_equal(batch[0], x)
            np.testing.assert_array_equal(batch[1], y)


def test_a_memory_map_is_opened_by_whoever_gets_the_source_and_not_sent(tmp_path):
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (20, 10_000))
    large[:] = np.arange(20)[:, None]
    large.flush()
    plain = np.memmap(tmp_path / "large.npy", np.float32, "r", large.offset, (20, 10_000))
    for leaf in (np.load(tmp_path / "large.npy", mmap_mode="r"), plain):
        pickled = pickle.dumps(as_source((leaf, Y)))
        assert len(pickled) < 10_000
        copy = pickle.loads(pickled)
        check(copy, np.asarray(large), Y)
        assert not copy.leaves[0].flags.writeable
    # where a view begins NumPy does not know: it is sent, and right
    check(pickle.loads(pickle.dumps(as_source((large[::-1],)))), np.asarray(large)[::-1])
    half = pickle.loads(pickle.dumps(ArraySource((large[10:],))))
    assert (half.rows(np.array([1]))[0] == 11).all()


# --- What does not ------------------------------------------------------------------------------------------------------


class Stream:
    def __iter__(self):
        return iter(())


class Endless(Pairs):
    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")


class Uneven(Pairs):
    def __getitem__(self, i):
        return X[i][: 1 + i % 3]


class Kinds(Pairs):
    def __getitem__(self, i):
        return X[i] if i % 2 else {"x": X[i]}


class Types(Pairs):
    def __getitem__(self, i):
        return X[i].astype(np.float64 if i % 2 else np.float32)


class Short(Pairs):
    def __getitems__(self, numbers):
        return [X[0]]


class Words(Pairs):
    def __getitem__(self, i):
        return "word"


BAD = {
    "an array": (X, r"Write `\(data,\)`"),
    "a JAX array": (jnp.asarray(X), r"Write `\(data,\)`"),
    "a dictionary": ({"x": X}, r"Write `\(data,\)`"),
    "a list": ([X, Y], r"tuple\(data\)"),
    "a path": ("data.npy", "mmap_mode='r'"),
    "nothing": (None, "must be a tuple"),
    "a number": (3, "must be a tuple"),
    "a stream": (Stream(), "write a `dpx.data.AbstractSource`"),
    "a generator": ((x for x in X), "write a `dpx.data.AbstractSource`"),
    "a class": (Pairs, "Make one"),
    "a set": ({1, 2}, "read by number, not in turn"),
    "without a length": (Endless(), "Its length is unknown"),
    "without rows": (Pairs(0), "no rows|has 0 rows"),
    "no arrays": ((), "contains no array"),
    "an empty array": ((X[:0],), "no rows"),
    "a scalar": ((np.float32(1),), r"`data\[0\]` must be rows of numbers; got"),
    "a list in a tuple": (([1.0, 2.0],), r"`data\[0\]\[0\]`.*got no array but a list.*np.asarray"),
    "texts": ((np.array(["a"] * 20),), r"`data\[0\]` must hold numbers.*np.unique"),
    "objects": ((np.array([[1], [1, 2]] * 10, object),), r"`data\[0\]` must hold numbers.*unequal"),
    "keys": ((jr.split(jr.key(0), 20),), r"`data\[0\]`.*PRNG keys"),
    "a data set in a tuple": ((Pairs(), Y), r"`data\[0\]`.*give it alone"),
    "lengths that differ": (
        (X, {"y": Y[:19]}),
        r"`data\[1\]\['y'\]` must have as many rows as `data\[0\]`, 20.*got 19",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_source_is_refused_with_the_remedy(name):
    data, match = BAD[name]
    for call in (
        as_source,
        lambda data: PLAN.batches(data, seed=0),
        lambda data: dpx.data.feed(PLAN.sampler, data, seed=0),
    ):
        with pytest.raises(ValueError, match=match):
            call(data)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        (Uneven(), r"Rows of `data` must be alike; of row 7, `it` has shape \(2,\), and of row 3 \(1,\).*Pad"),
        (Kinds(), "Rows of `data` must be alike; row 7 is .*, and row 0 is"),
        (Types(), "has dtype float64, and of row 0 float32"),
        (Short(), "Short.__getitems__.*list of as many.*for 5 numbers"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_rows_that_are_not_alike_are_refused(dataset, match):
    with pytest.raises(ValueError, match=match):
        as_source(dataset).rows(ROWS)


def test_words_are_refused_before_the_first_batch():
    with pytest.raises(ValueError, match=r"`data\[0\]` must hold numbers or booleans"):
        PLAN.batches(cast(Any, Words()), seed=0)


def test_sparse_matrices_are_refused_with_the_remedy():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(ValueError, match=r"dense array; got a csr_array.*\.toarray\(\)"):
        as_source((scipy_sparse.csr_array(X),))


@pytest.mark.parametrize("number", [0, -1, 2.0, True, None])
def test_a_source_that_has_no_number_of_rows_is_refused(number):
    class Numbered(dpx.data.AbstractSource):
        num_rows: object = number

        def rows(self, indices):
            return (X[indices],)

    with pytest.raises(ValueError, match="Numbered.num_rows.*integer of at least 1"):
        PLAN.batches(Numbered(), seed=0)
