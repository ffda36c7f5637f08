"""The feed: the batches of a plan, on devices before they are needed, whatever is in the way."""

import gc
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding

import dpx
from conftest import ENVIRONMENT
from dpx.data import AbstractSource, feed
from dpx.gradients._base import ClippedSum
from dpx.gradients._microbatch import in_microbatches

P = jax.P
X = np.arange(60, dtype=np.float32)[:, None] + np.linspace(0, 0.5, 3, dtype=np.float32)
Y = {"label": np.arange(60) % 7}
SAMPLER = dpx.PoissonSampler(60, 12, 30)
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def mesh(devices, kind=AxisType.Explicit):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])


def over(devices, kind=AxisType.Explicit):
    return NamedSharding(mesh(devices, kind), P("data"))


class Source(AbstractSource):
    """Counts what it is asked for; `change` is applied to what it gives in a call."""

    data: tuple
    calls: list
    change: Callable[[int, Any], Any] | None
    length: Callable[[int], int] | None

    def __init__(self, data, change=None, length=None):
        self.data, self.calls, self.change, self.length = data, [], change, length

    @property
    def num_rows(self):
        return len(self.data[0]) if self.length is None else self.length(len(self.calls))

    def rows(self, indices):
        self.calls.append(indices)
        rows = jax.tree.map(lambda x: x[indices], self.data)
        return rows if self.change is None else self.change(len(self.calls), rows)


def real(batch, mask):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(mask)], batch)


def threads():
    return [t for t in threading.enumerate() if t.name == "dpx-feed"]


def assert_same(fed, plain):
    for (batch, mask), (other, other_mask) in zip(fed, plain, strict=True):
        assert jax.tree.structure(batch) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, real(batch, mask), real(other, other_mask))
        assert not any(np.asarray(x)[~np.asarray(mask)].any() for x in jax.tree.leaves(batch))


# --- The batches of a plan ----------------------------------------------------------------------------------------------


SAMPLERS = st.sampled_from(
    [
        SAMPLER,
        dpx.PoissonSampler(60, 1, 9),  # empty ones
        dpx.PoissonSampler(60, 30, 9, max_batch_size=33),
        dpx.FixedSizeSampler(60, 60, 5),
        dpx.BallsInBinsSampler(60, 6, 20),
        dpx.MinSepSampler(60, 6, 20, 4),
        dpx.UserSampler(dpx.PoissonSampler(20, 5, 20), np.arange(60) % 20, 2),
        dpx.UserSampler(dpx.PoissonSampler(40, 9, 20), np.minimum(np.arange(60), 39), 5),
    ]
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    SAMPLERS, st.integers(0, 2**128 - 1), st.floats(0, 1), st.sampled_from([None, 1, 2, 3, 4]),
    st.sampled_from(list(KINDS)), st.sampled_from([None, 1, 2, 5, 64]), st.integers(0, 3),
)  # fmt: skip
def test_a_feed_is_the_plans_batches(sampler, seed, share, devices, kind, microbatch, prefetch):
    start = round(share * sampler.steps)
    sharding = None if devices is None else over(devices, KINDS[kind])
    options = {"sharding": sharding, "microbatch_size": microbatch, "prefetch": prefetch}
    plain = list(dpx.data.gather_batches(sampler, (X, Y), seed=seed, start=start))
    fed = feed(sampler, (X, Y), seed=seed, start=start, **options)
    assert len(fed) == len(plain) == sampler.steps - start
    fed = list(fed)
    assert_same(fed, plain)
    for batch, mask in fed:
        assert mask.shape[0] % ((devices or 1) * (microbatch or 1)) == 0
        for leaf in jax.tree.leaves((batch, mask)):
            assert leaf.shape[0] == mask.shape[0]
            assert isinstance(leaf, jax.Array) and (
                sharding is None or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            )
        if devices is not None and not (
            kind == "auto" and microbatch
        ):  # where microbatches are rows in a row, they are packed
            counts = np.asarray(mask).any(axis=tuple(range(1, mask.ndim))).reshape(devices, -1).sum(axis=1)
            assert np.ptp(counts) <= 1
    sizes = {mask.shape[0] for _, mask in fed}
    assert len(sizes) <= 1 and all(size >= sampler.physical_batch_size for size in sizes)


def test_a_plans_batches_take_sources_and_have_a_length():
    plan = dpx.dp_sgd(60, 12, 30, noise_multiplier=1.0)
    batches = plan.batches(dpx.data.as_source((X, Y)), seed=3, start=4)
    assert len(batches) == 26
    first = next(batches)
    assert len(batches) == 25 and iter(batches) is batches
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(first))
    assert_same([first, *batches], plan.batches((X, Y), seed=3, start=4))
    assert len(batches) == 0 and list(batches) == []
    assert_same(feed(plan.sampler, Source((X, Y)), seed=3, start=4), plan.batches((X, Y), seed=3, start=4))


def test_one_call_for_all_of_a_batchs_rows_and_none_for_an_empty_one():
    sampler, source = dpx.PoissonSampler(60, 1, 20), Source((X, Y))
    batches = list(feed(sampler, source, seed=0, sharding=over(4), microbatch_size=2))
    drawn = [rows for step in range(20) if len(rows := sampler.indices(0, step))]
    assert len(batches) == 20 > len(drawn)
    assert [c.tolist() for c in source.calls[1:]] == [r.tolist() for r in drawn]  # the first looks what a row is
    assert all(c.dtype == np.int64 for c in source.calls)


class First(dpx.sampling.AbstractSampler):
    """Batches of the first so many rows, however many they are padded to."""

    sizes: tuple[int, ...]
    size: int
    num_examples: int
    batch_size: int
    steps: int
    unit: ClassVar[str] = "example"

    def __init__(self, sizes, size):
        self.sizes, self.size, self.steps, self.num_examples, self.batch_size = sizes, size, len(sizes), 60, 12

    @property
    def num_rows(self):
        return self.num_examples

    @property
    def participation(self):
        return dpx.Participation(1, None)

    @property
    def participation_per_event(self):
        return self.participation

    @property
    def adjacencies(self):
        return ()

    @property
    def physical_batch_size(self):
        return self.size

    @property
    def assumption(self):
        return "none"

    def indices(self, seed, step):
        return np.arange(self.sizes[step])

    def event(self, mechanism, bands, steps, strategy=None):
        raise NotImplementedError


def test_a_batch_that_is_too_large_grows_the_padding_and_loses_nobody():
    sampler = First((5, 41, 16), 16)
    sizes = [mask.shape[0] for _, mask in feed(sampler, (X,), seed=0, sharding=over(3), microbatch_size=2)]
    assert sizes == [18, 48, 18]
    assert_same(feed(sampler, (X,), seed=0, sharding=over(3)), dpx.data.gather_batches(sampler, (X,), seed=0))


@pytest.mark.parametrize("rows", [[-1, 3], [3, 60], [-7]])
def test_rows_that_are_not_there_are_refused(rows, monkeypatch):
    monkeypatch.setattr(First, "indices", lambda self, seed, step: np.array(rows))
    for batches in (dpx.data.gather_batches, feed):
        with pytest.raises(ValueError, match="must give rows of the data, from 0 to 59"):
            next(batches(First((2,), 16), (X,), seed=0))


# --- Microbatches and keys ----------------------------------------------------------------------------------------------


def microbatches_run(batch, mask, size):
    """How many microbatches of the gradient methods have a real row in them."""

    def compute(examples, mask):
        zeros = jnp.zeros_like(examples[0][:, 0])
        return ClippedSum({"ran": jnp.ones(()), "sum": jnp.sum(examples[0], axis=0)}, zeros[:, None], zeros, None)

    total = eqx.filter_jit(lambda b, m: in_microbatches(compute, b, m, size).total)(batch, mask)
    np.testing.assert_allclose(total["sum"], np.asarray(batch[0])[np.asarray(mask)].sum(axis=0), rtol=1e-5)
    return int(total["ran"])


@pytest.mark.parametrize(
    ("devices", "microbatch", "of_method"),
    [(4, 2, 8), (4, 2, 2), (4, 4, 8), (2, 3, 6), (4, 1, 4), (3, 4, 12), (1, 5, 5), (2, 6, 6)],
)
def test_all_devices_skip_the_same_microbatches(devices, microbatch, of_method):
    """As few run as hold the real rows, whether the method's microbatch is meant for one device or for all of them."""
    numbers = (0, 1, 7, 12, 25, 40, 56)
    with jax.set_mesh(mesh(devices)):
        fed = feed(First(numbers, 56), (X,), seed=0, sharding=over(devices), microbatch_size=microbatch)
        for number, (batch, mask) in zip(numbers, fed, strict=True):
            count = dpx.gradients.microbatch_count(mask.shape[0], of_method, devices)
            of_device = mask.shape[0] // devices // count
            least = math.ceil(math.ceil(number / devices) / of_device)
            assert microbatches_run(batch, mask, of_method) == least <= count


@pytest.mark.parametrize("size", [None, 4])
def test_an_examples_key_is_the_same_on_one_device_and_on_many(size):
    """Padding stands elsewhere, and an example sees the same augmentation."""
    plan = dpx.dp_sgd(60, 12, 30, noise_multiplier=1.0)
    noisy = lambda w, x, key: jnp.sum(w * (x + jr.normal(key, x.shape)))
    private_grad = plan.private_gradient(noisy, method=dpx.Vectorized(size))
    w = jnp.ones(3)
    sums = []
    for devices in (None, 1, 4):
        with jax.set_mesh(mesh(devices or 1)):
            sharding = None if devices is None else over(devices)
            batches = dpx.data.gather_batches(SAMPLER, (X,), seed=5) if devices is None else None
            for step, (batch, mask) in enumerate(
                batches or feed(SAMPLER, (X,), seed=5, sharding=sharding, microbatch_size=1)
            ):
                if step == 2:
                    break
                total = eqx.filter_jit(private_grad.clipped_sum)(w, batch, mask=mask, key=jr.key(9)).reveal()
                sums.append((step, np.asarray(jax.tree.leaves(total)[0])))
    for step in range(2):
        first, *others = [total for t, total in sums if t == step]
        for other in others:
            np.testing.assert_allclose(first, other, rtol=1e-5)


def test_padding_between_examples_changes_no_key():
    private_sum = dpx.PrivateGradient(
        lambda w, x, key: jnp.sum(w * jr.normal(key, x.shape)), dpx.FlatClipping(1e6), dpx.IndependentGaussian(1.0)
    )
    of = lambda x, mask: private_sum.clipped_sum(jnp.ones(3), (x,), mask=np.array(mask), key=jr.key(0)).reveal()
    plain = of(X[:3], [True] * 3)
    spread = of(np.insert(X[:3], [0, 1, 1, 3], np.nan, axis=0), [False, True, False, False, True, True, False])
    np.testing.assert_allclose(plain, spread, rtol=1e-6)


# --- The thread ---------------------------------------------------------------------------------------------------------


def test_a_feed_works_ahead_and_no_further():
    source = Source((X,))
    batches = feed(SAMPLER, source, seed=0, prefetch=3)
    next(batches)
    deadline = time.monotonic() + 10
    while len(source.calls) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(source.calls) == 1 + 1 + 3 + 1  # the look at a row, the batch taken, those that wait, the one in hand
    batches.close()
    assert list(batches) == [] and not threads()


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_feed_that_is_dropped_leaves_no_thread(taken):
    source = Source((X,))
    alive = weakref.ref(source)
    batches = feed(SAMPLER, source, seed=0)
    for _ in range(taken):
        next(batches)
    assert len(threads()) == (taken == 1)
    del batches, source
    gc.collect()
    assert not threads() and alive() is None


def test_a_finished_feed_leaves_no_thread():
    batches = feed(SAMPLER, (X,), seed=0)
    assert sum(1 for _ in batches) == 30 and not threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("error", [OSError("disk"), StopIteration(), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_source_comes_at_its_step_and_loses_no_batch(prefetch, error):
    failing = [True]

    def change(call, rows):
        if call == 7 and failing:  # of step 5, the first call being the look at a row
            failing.clear()
            raise error
        return rows

    batches = feed(SAMPLER, Source((X,), change=change), seed=0, prefetch=prefetch)
    got = [next(batches) for _ in range(5)]
    kind = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(kind):
        next(batches)
    assert len(batches) == 25
    got += list(batches)  # whoever tries again is given the same batch
    assert_same(got, dpx.data.gather_batches(SAMPLER, (X,), seed=0))


def test_two_threads_that_share_a_feed_get_every_batch_once():
    batches, got = feed(SAMPLER, (X,), seed=0), []

    def take():
        for batch in batches:
            got.append(batch)

    takers = [threading.Thread(target=take) for _ in range(3)]
    [t.start() for t in takers]
    [t.join() for t in takers]
    key = lambda pair: real(*pair)[0][:, 0].tolist()
    assert sorted(map(key, got)) == sorted(map(key, dpx.data.gather_batches(SAMPLER, (X,), seed=0)))


def test_settings_of_the_callers_thread_hold_in_the_feeds():
    with jax.enable_x64(True):
        ((leaf,), _) = next(feed(SAMPLER, (X.astype(np.float64),), seed=0))
        assert leaf.dtype == np.float64
    with jax.default_device(jax.devices()[2]):
        ((leaf,), _) = next(feed(SAMPLER, (X,), seed=0))
        assert leaf.devices() == {jax.devices()[2]}


# --- What changes, and what is wrong ------------------------------------------------------------------------------------


CHANGES = {
    "dtype": (lambda n, rows: (rows[0].astype(np.float64 if n > 3 else np.float32),), "was float32, and is float64"),
    "width": (lambda n, rows: (rows[0][:, : 3 - (n > 3)],), r"had shape \(3,\), and has \(2,\)"),
    "tree": (lambda n, rows: (rows[0], rows[0]) if n > 3 else rows, "changed between steps"),
    "fewer rows": (lambda n, rows: (rows[0][: len(rows[0]) - (n > 3)],), "one row for each"),
    "more rows": (lambda n, rows: (np.repeat(rows[0], 1 + (n > 3), axis=0),), "one row for each"),
    "a list": (lambda n, rows: [rows[0]] if n > 3 else rows, "must give a tuple"),
    "JAX arrays": (lambda n, rows: (jnp.asarray(rows[0]),) if n > 3 else rows, "NumPy arrays"),
    "None": (lambda n, rows: None if n > 3 else rows, "must give a tuple"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_changes_between_steps_is_refused(name):
    change, match = CHANGES[name]
    for batches in (
        feed(SAMPLER, Source((X,), change=change), seed=0),
        dpx.data.gather_batches(SAMPLER, Source((X,), change=change), seed=0),
    ):
        next(batches)
        next(batches)
        with pytest.raises(ValueError, match=match):
            next(batches)


def test_a_source_that_changes_its_length_is_refused():
    source = Source((X,), length=lambda calls: 60 + (calls > 3))
    batches = feed(SAMPLER, source, seed=0)
    [next(batches) for _ in range(3)]
    with pytest.raises(ValueError, match="had 60 rows, and has 61"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": -1}, r"feed\(seed=...\)"),
        ({"seed": None}, r"feed\(seed=...\)"),
        ({"start": 31}, "30 steps"),
        ({"start": 1.5}, r"feed\(start=...\).*integer"),
        ({"microbatch_size": 0}, r"feed\(microbatch_size=...\)"),
        ({"microbatch_size": True}, r"feed\(microbatch_size=...\)"),
        ({"prefetch": -1}, r"feed\(prefetch=...\)"),
        ({"workers": 1.0}, r"feed\(workers=...\)"),
        ({"sharding": P("data")}, r"NamedSharding\(mesh, spec\)"),
        ({"sharding": "data"}, r"feed\(sharding=...\)"),
        ({"source": (X[:59],)}, r"`data\[0\]` must have `num_examples` = 60 rows"),
        ({"source": X}, r"Write `\(data,\)`"),
        ({"sampler": dpx.PoissonSampler}, r"feed\(sampler=...\)"),
        ({"sampler": dpx.dp_sgd(60, 12, 30, noise_multiplier=1.0)}, r"feed\(sampler=...\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, match):
    arguments = {"sampler": SAMPLER, "source": (X,), "seed": 0} | options
    with pytest.raises(ValueError, match=match):
        feed(arguments.pop("sampler"), arguments.pop("source"), **arguments)


def test_a_mesh_that_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"NamedSharding\(mesh, jax.P\('data'\)\)"):
        feed(SAMPLER, (X,), seed=0, sharding=cast(Any, mesh(2)))
    square = jax.make_mesh((2, 2), ("data", "model"))
    with pytest.raises(ValueError, match="leading axis"):
        feed(SAMPLER, (X,), seed=0, sharding=NamedSharding(square, P("data", "model")))
    for spec, devices in ((P(("data", "model")), 4), (P("model"), 2), (P(), 1), (P(None, None), 1)):
        batch, mask = next(feed(SAMPLER, (X,), seed=0, sharding=NamedSharding(square, spec)))
        assert mask.sharding.shard_shape(mask.shape)[0] == mask.shape[0] // devices


def test_several_processes_must_say_how_batches_lie(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    with pytest.raises(ValueError, match="2 processes would load all of every batch"):
        feed(SAMPLER, (X,), seed=0)


# --- Several processes --------------------------------------------------------------------------------------------------

_PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
sys.path.insert(0, sys.argv[3])
import json
from test_feed import a_run_in_two_processes
print(json.dumps(a_run_in_two_processes(eval(sys.argv[4]))))
"""


def a_run_in_two_processes(order):
    """What a run gives on four devices in `order`: the sums of a loss that draws, and the rows that this process loaded for each of them."""
    of_each = [jax.devices()[4 * p : 4 * p + 4 // jax.process_count()] for p in range(jax.process_count())]
    devices = np.array(sum(of_each, []))[list(order)]
    the_mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))
    private_grad = dpx.PrivateGradient(
        lambda w, x, key: jnp.sum(w * (x + jr.normal(key, x.shape))), dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0),
        method=dpx.Vectorized(4),
    )  # fmt: skip
    sampler, source, sums = dpx.PoissonSampler(60, 2, 6), Source((X,)), []
    with jax.set_mesh(the_mesh):
        for batch, mask in feed(
            sampler, source, seed=7, sharding=NamedSharding(the_mesh, P("data")), microbatch_size=1
        ):
            total = eqx.filter_jit(private_grad.clipped_sum)(jnp.ones(3), batch, mask=mask, key=jr.key(1)).reveal()
            sums.append(np.asarray(jax.tree.leaves(total)[0]).tolist())
    return sums, [c.tolist() for c in source.calls[1:]]


@pytest.mark.slow  # processes import and connect
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["in order", "devices of processes in turn"])
def test_two_processes_load_their_own_rows_and_agree(order):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = [sys.executable, "-c", _PROCESS]
    rest = [port, str(Path(__file__).parent), repr(order)]
    runs = [
        subprocess.Popen([*arguments, str(number), *rest], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
        for number in range(2)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs
    (sums, first), (others, second) = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert sums == others
    alone, loaded = a_run_in_two_processes((0, 1, 2, 3))
    np.testing.assert_allclose(sums, alone, atol=1e-6)
    assert len(sums) == 6
    assert sorted(sum(first + second, [])) == sorted(sum(loaded, []))
    assert first and second and not any(a == b for a in first for b in second)


# --- Worker processes ---------------------------------------------------------------------------------------------------


def decoded(call, rows):
    """What a worker makes of rows; at the top of a module, so that it can be sent there."""
    return (rows[0] * 2, np.full(len(rows[0]), os.getpid()))


def failing(call, rows):
    if os.getpid() != PARENT and len(rows[0]) > 1:
        raise OSError("no such image")
    return rows


def dying(call, rows):
    if os.getpid() != PARENT and len(rows[0]) > 1:
        os._exit(9)
    return rows


PARENT = int(os.environ.setdefault("DPX_TEST_PARENT", str(os.getpid())))  # workers inherit it


@pytest.mark.slow  # workers import
def test_workers_read_the_same_rows_in_their_own_processes():
    batches = feed(SAMPLER, Source((X,), change=decoded), seed=0, workers=2)
    fed = list(batches)
    for (batch, mask), (other, real_rows) in zip(fed, dpx.data.gather_batches(SAMPLER, (X,), seed=0), strict=True):
        rows, pids = real(batch, mask)
        np.testing.assert_array_equal(rows, 2 * other[0][real_rows])
        assert os.getpid() not in pids
    assert 1 <= len({int(x) for (batch, mask) in fed for x in np.unique(real(batch, mask)[1])}) <= 2


@pytest.mark.slow  # workers import
def test_workers_that_fail_or_die_are_reported_at_their_step():
    for change, kind, match in ((failing, OSError, "no such image"), (dying, RuntimeError, "__main__")):
        batches = feed(SAMPLER, Source((X,), change=change), seed=0, workers=1)
        with pytest.raises(kind, match=match):
            next(batches)
        assert len(batches) == 30
        batches.close()


def test_a_source_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match=r"feed\(workers=2\).*Source cannot be pickled"):
        feed(SAMPLER, Source((X,), change=lambda call, rows: rows), seed=0, workers=2)
