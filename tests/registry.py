"""All parts of dpx, as records: whoever adds a clipping, a noise, a strategy, a sampler, a metric or a gradient method adds one record here.

A record holds the part as a function, since some are costly to make, and whatever a test must know of it. `laws_of` says which checks of
`dpx.testing` it must pass; `tests/test_registry.py` runs them, and asserts that nothing that dpx exports is missing here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

import dpx
from dpx import metrics, testing


class Linear(eqx.Module):
    """A small model with leaves of two shapes and something that is not trained."""

    weight: Any
    bias: Any
    count: Any
    name: str | None = "linear"

    def __call__(self, x):
        return self.weight @ x + self.bias


def linear(dtype=jnp.float32):
    """The model that clippings by groups are made for."""
    weight = jnp.linspace(-1.5, 1.5, 12).reshape(3, 4).astype(dtype)
    return Linear(weight, jnp.ones(3, dtype), jnp.array(7))


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A part under a name; the name is for reading only. `is_variant`: another of its class stands for it where an entry costs seconds; it is checked
    among the slow tests."""

    name: str
    make: Callable[[], Any]
    is_variant: bool = dataclasses.field(default=False, kw_only=True)

    @functools.cached_property
    def value(self):
        return self.make()


class Law(NamedTuple):
    """A check of one record: where `is_slow`, with the power to refute what is 2 % off."""

    name: str
    check: Callable[[], None]
    is_slow: bool = False


# --- clippings ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ClippingRecord(Record):
    """`factors(norms)`: clip factors in float64 by the definition in the clipping's paper, of norms of groups."""

    factors: Callable[[np.ndarray], np.ndarray]
    attains: float = 0.999
    """How much of its sensitivity is reached."""
    is_private: bool = True
    group_norms: Any = None
    """A clip norm for each leaf of `linear`, where it is for one model."""


def _shorten(bounds: Any, by: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda norms: np.minimum(1.0, np.asarray(bounds) / np.maximum(norms, 1e-300)) / by


GROUPS = Linear(0.3, 0.4, None, None)
CLIPPINGS = [
    ClippingRecord("flat", lambda: dpx.FlatClipping(0.5), _shorten(0.5)),
    ClippingRecord("flat-unit", lambda: dpx.FlatClipping(0.5, unit_norm=True), _shorten(0.5, 0.5), is_variant=True),
    ClippingRecord("flat-l1", lambda: dpx.FlatClipping(0.5, order=1), _shorten(0.5)),
    ClippingRecord("group", lambda: dpx.GroupClipping(GROUPS), _shorten([0.3, 0.4])),
    ClippingRecord(
        "group-equal", lambda: dpx.GroupClipping(GROUPS, allocation="equal"), _shorten([0.3, 0.4]), is_variant=True
    ),
    ClippingRecord(
        "group-optimal",
        lambda: dpx.GroupClipping(GROUPS, unit_norm=True, allocation="optimal"),
        _shorten([0.3, 0.4], 0.5),
        is_variant=True,
    ),
    ClippingRecord(
        "group-far-apart",
        lambda: dpx.GroupClipping(Linear(1e-6, 10.0, None, None), allocation="equal"),
        _shorten([1e-6, 10.0]),
        is_variant=True,
    ),
    ClippingRecord("normalized", lambda: dpx.NormalizedClipping(0.5), lambda n: 0.5 / (n + 0.01), attains=0.9),
    ClippingRecord("auto-v", lambda: dpx.NormalizedClipping(0.5, gamma=0), lambda n: 0.5 / n, is_variant=True),
    ClippingRecord("psac", lambda: dpx.PSACClipping(0.5, r=0.1), lambda n: 0.5 / (n + 0.1 / (n + 0.1)), attains=0.9),
    ClippingRecord(
        "hard",
        lambda: dpx.HardThresholdClipping(0.5, threshold=7.2),
        lambda n: np.where(n <= 7.2, 0.5 / 7.2, 0.0),
        attains=0.9,
    ),
    ClippingRecord("adaptive", lambda: dpx.AdaptiveClipping(0.5), _shorten(0.5)),
    ClippingRecord("adaptive-groups", lambda: dpx.AdaptiveClipping(GROUPS), _shorten([0.3, 0.4]), is_variant=True),
    ClippingRecord("slack", lambda: dpx.SlackClipping(0.5), _shorten(0.5)),
    ClippingRecord("none", lambda: dpx.NoClipping(), lambda n: np.ones_like(n), is_private=False),
]

# --- gradient methods ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class MethodRecord(Record):
    """All of a gradient method is in its interface."""


METHODS = [
    MethodRecord("vectorized", lambda: dpx.Vectorized()),
    MethodRecord("microbatch-1", lambda: dpx.Vectorized(1), is_variant=True),
    MethodRecord("microbatch-3", lambda: dpx.Vectorized(3), is_variant=True),  # does not divide the batch
    MethodRecord("ghost", lambda: dpx.Ghost(), is_variant=True),
    MethodRecord("ghost-3", lambda: dpx.Ghost(3)),
    MethodRecord("auto", lambda: dpx.Auto()),
]

# --- noises -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseRecord(Record):
    """`law`: the distribution function of the noise over its scale, where steps are independent and numbers are not integers."""

    law: Callable[[Any], Any] | None = None
    samples: int = 2**15
    power_samples: int = 2**18
    """With which 2 % are seen."""


def _normal(z):
    from scipy import stats

    return stats.norm.cdf(z)


def _laplace(z):
    from scipy import stats

    return stats.laplace.cdf(z)


NOISES = [
    NoiseRecord("gaussian", lambda: dpx.IndependentGaussian(1.5), _normal),
    NoiseRecord("laplace", lambda: dpx.Laplace(1.5), _laplace),
    # every number is a few hundred coins
    NoiseRecord("discrete", lambda: dpx.DiscreteGaussian(1.5), samples=2**8, power_samples=2**14),
    NoiseRecord(
        "discrete-coarse",
        lambda: dpx.DiscreteGaussian(1.5, 2.0**-2),
        samples=2**8,
        power_samples=2**14,
        is_variant=True,
    ),
    NoiseRecord("correlated", lambda: dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.6, 0.3]), 2.0)),
    NoiseRecord("correlated-tree", lambda: dpx.CorrelatedGaussian(dpx.TreeAggregation(6), 2.0), is_variant=True),
    NoiseRecord(
        "replayed", lambda: dpx.CorrelatedGaussian(dpx.GeometricStrategy(0.7), 2.0, replay=True), is_variant=True
    ),
]

# --- strategies ---------------------------------------------------------------------------------------------------------

HORIZON = 9  # of the bounded strategies


@dataclasses.dataclass(frozen=True, eq=False)
class StrategyRecord(Record):
    """`is_exact`: a theorem says that the sensitivity is what is reached, in any participation. `is_loose`: it may be more even in one.
    `has_signs`: the matrix has negative entries."""

    is_exact: bool = False
    is_loose: bool = False
    has_signs: bool = False


def random_lower(size, seed=0, bands=None):
    """A lower-triangular matrix with a unit diagonal."""
    matrix = np.tril(np.random.default_rng(seed).normal(size=(size, size)) / 3)
    np.fill_diagonal(matrix, 1.0)
    return matrix if bands is None else matrix - np.tril(matrix, -bands)


def _strategy(name: str, make: Callable[[], Any], flags: str = "") -> StrategyRecord:
    words = flags.split()
    return StrategyRecord(
        name, make, "exact" in words, "loose" in words, "signs" in words, is_variant="variant" in words
    )


N = HORIZON
STRATEGIES = [
    _strategy("identity", lambda: dpx.Identity(), "exact"),
    _strategy("banded-1", lambda: dpx.BandedToeplitz([2.0]), "exact variant"),
    _strategy("banded-3", lambda: dpx.BandedToeplitz([1.0, 0.5, 0.25]), "exact"),
    _strategy("banded-3-scaled", lambda: dpx.BandedToeplitz([2.0, 1.0, 0.3]), "exact variant"),
    _strategy("banded-3-signs", lambda: dpx.BandedToeplitz([1.0, -0.4, 0.6]), "signs"),
    _strategy("banded-optimised", lambda: dpx.BandedToeplitz.optimize(N, 4), "exact variant"),
    _strategy("normalized-1", lambda: dpx.ColumnNormalizedBanded([3.0], N), "variant"),
    _strategy("normalized-3", lambda: dpx.ColumnNormalizedBanded([1.0, 0.5, 0.25], N)),
    _strategy("normalized-rising", lambda: dpx.ColumnNormalizedBanded([1.0, 0.5, 0.9, 0.1], N), "variant"),
    _strategy("inverse-1", lambda: dpx.BandedInverse([0.5]), "variant"),
    _strategy("inverse-2", lambda: dpx.BandedInverse.square_root(2), "exact variant"),
    _strategy("inverse-5", lambda: dpx.BandedInverse.square_root(5), "exact"),
    _strategy(
        "inverse-optimised",
        lambda: dpx.BandedInverse.optimize(N, 3, min_separation=3, max_participations=3),
        "variant",
    ),
    _strategy("inverse-signs", lambda: dpx.BandedInverse([1.0, 0.5, -0.2]), "signs"),
    _strategy("geometric", lambda: dpx.GeometricStrategy(0.8), "exact"),
    _strategy("geometric-0", lambda: dpx.GeometricStrategy(0.0), "exact variant"),
    _strategy("geometric-1", lambda: dpx.GeometricStrategy(1.0), "exact variant"),
    _strategy("geometric-bounded", lambda: dpx.GeometricStrategy(0.7, steps=N), "variant"),
    _strategy("geometric-normalized", lambda: dpx.GeometricStrategy(0.8, normalize_columns=True, steps=N)),
    _strategy("geometric-normalized-1", lambda: dpx.GeometricStrategy(1.0, normalize_columns=True, steps=N), "variant"),
    _strategy("geometric-normalized-0", lambda: dpx.GeometricStrategy(0.0, normalize_columns=True, steps=N), "variant"),
    _strategy("square-root", lambda: dpx.SquareRootToeplitz(N), "exact"),
    _strategy(
        "square-root-momentum", lambda: dpx.SquareRootToeplitz(N, momentum=0.9, weight_decay=0.1), "exact variant"
    ),
    _strategy("buffered-1", lambda: dpx.BufferedToeplitz([0.9], [0.4]), "exact variant"),
    _strategy("buffered-3", lambda: dpx.BufferedToeplitz([0.95, 0.6, 0.0], [0.1, 0.3, 0.2]), "exact"),
    _strategy("buffered-signs", lambda: dpx.BufferedToeplitz([0.9, 0.3], [0.9, -0.7]), "signs"),
    _strategy("buffered-optimised", lambda: dpx.BufferedToeplitz.optimize(N, 2), "exact variant"),
    _strategy("dense", lambda: dpx.DenseStrategy(random_lower(N))),
    _strategy("dense-banded", lambda: dpx.DenseStrategy(random_lower(N, bands=3)), "variant"),
    _strategy("dense-optimised", lambda: dpx.DenseStrategy.optimize(N), "variant"),
    _strategy("tree-naive", lambda: dpx.TreeAggregation(N, honaker=False), "variant"),
    _strategy("tree-honaker", lambda: dpx.TreeAggregation(N), "loose"),
    _strategy("tree-restarts", lambda: dpx.TreeAggregation(N, restart_every=4), "loose"),
    _strategy("tree-tight", lambda: dpx.TreeAggregation(N, restart_every=3, tight=True), "variant"),
]

# --- samplers -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerRecord(Record):
    """`large`: the same scheme on more examples, where 2 % of the rate are seen."""

    large: Callable[[], Any] | None = None
    is_distinct: bool = True
    has_mean_size: bool = True
    """Whether the mean batch is `batch_size`, by which sums are divided: not where batches are cut."""
    window: int = 8
    """Steps that an attacker looks at: a whole cycle."""


S = dpx.sampling
SAMPLERS = [
    SamplerRecord(
        "poisson", lambda: dpx.PoissonSampler(50, 10, 400), lambda: dpx.PoissonSampler(4000, 800, 400), window=4
    ),
    SamplerRecord(
        "poisson-truncated", lambda: dpx.PoissonSampler(50, 10, 400, max_batch_size=14), has_mean_size=False, window=4
    ),
    SamplerRecord(
        "cyclic",
        lambda: dpx.CyclicPoissonSampler(50, 8, 400, 5),
        lambda: dpx.CyclicPoissonSampler(4000, 640, 400, 5),
        window=5,
    ),
    SamplerRecord(
        "cyclic-equal", lambda: dpx.CyclicPoissonSampler(50, 8, 400, 5, partition="equal"), window=5, is_variant=True
    ),
    SamplerRecord("shuffle", lambda: dpx.ShuffleSampler(50, 8, 400)),
    SamplerRecord("reshuffle", lambda: dpx.ShuffleSampler(50, 8, 400, reshuffle=True), window=6, is_variant=True),
    SamplerRecord("poisson-all", lambda: dpx.PoissonSampler(20, 20, 400), window=4),
    SamplerRecord("balls-in-bins", lambda: S.BallsInBinsSampler(50, 10, 400), window=5),
    SamplerRecord("random-allocation", lambda: S.RandomAllocationSampler(50, 10, 400, 80), window=5),
    SamplerRecord("min-sep", lambda: S.MinSepSampler(50, 5, 400, 4), window=5),
    SamplerRecord(
        "min-sep-cold",
        lambda: S.MinSepSampler(50, 5, 400, 4, start="cold"),
        has_mean_size=False,
        window=5,
        is_variant=True,
    ),
    SamplerRecord(
        "min-sep-cold-truncated",
        lambda: S.MinSepSampler(50, 5, 400, 4, start="cold", max_batch_size=9),
        has_mean_size=False,
        window=2,
        is_variant=True,
    ),
    SamplerRecord("fixed-size", lambda: S.FixedSizeSampler(50, 10, 400), window=4),
    SamplerRecord(
        "fixed-size-replace", lambda: S.FixedSizeSampler(50, 10, 400, replace=True), is_distinct=False, window=4
    ),
    SamplerRecord(
        "users",
        lambda: S.UserSampler(dpx.PoissonSampler(20, 5, 400), np.arange(90) * 7 % 30 % 20, 4),
        window=4,
    ),
    SamplerRecord(
        "users-min-sep",
        lambda: S.UserSampler(S.MinSepSampler(20, 4, 400, 3), np.arange(60) % 20, 2),
        window=4,
        is_variant=True,
    ),
]

# --- metrics ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class MetricRecord(Record):
    """A metric."""


METRICS = [
    MetricRecord("mean", lambda: metrics.Mean("losses", -1.0, 3.0, 2.0)),
    MetricRecord("sum", lambda: metrics.Sum("losses", -1.0, 3.0, 2.0)),
    MetricRecord("count", lambda: metrics.Count("losses", 2.0)),
    MetricRecord("histogram", lambda: metrics.Histogram("losses", [-1.0, 0.0, 0.5, 4.0], 2.0)),
    MetricRecord("dropped", lambda: metrics.Dropped(2.0)),
    MetricRecord("quantile", lambda: metrics.Quantile("losses", 0.5, -2.0, 2.0, 2.0)),
]

# --- all of them --------------------------------------------------------------------------------------------------------

REGISTRY: list[Record] = [*CLIPPINGS, *METHODS, *NOISES, *STRATEGIES, *SAMPLERS, *METRICS]
ABSTRACT = {
    dpx.AbstractClipping: CLIPPINGS,
    dpx.AbstractGradientMethod: METHODS,
    dpx.AbstractNoise: NOISES,
    dpx.AbstractStrategy: STRATEGIES,
    dpx.AbstractSampler: SAMPLERS,
    metrics.AbstractMetric: METRICS,
}


def laws_of(record: Record) -> list[Law]:
    """What a record must pass; all of a variant's are slow."""
    return [law._replace(is_slow=law.is_slow or record.is_variant) for law in _laws_of(record)]


def _laws_of(record: Record) -> list[Law]:
    match record:
        case ClippingRecord() if record.is_private:
            return [Law("bound", lambda: testing.check_clipping(record.value, linear(), attains=record.attains))]
        case MethodRecord():
            check = lambda kinds: testing.check_gradient_method(record.value, kinds=kinds)
            return [
                Law("definition", lambda: check(("list",))),
                Law(
                    "definition-on-other-models",
                    lambda: check(("perceptron", "embedding", "convolution")),
                    is_slow=True,
                ),
            ]
        case NoiseRecord():
            return [
                Law("law", lambda: testing.check_noise(record.value, steps=4, samples=record.samples)),
                Law("power", lambda: testing.check_noise(record.value, samples=record.power_samples), is_slow=True),
            ]
        case StrategyRecord():
            return [
                Law(
                    "stream-and-sensitivity",
                    lambda: testing.check_strategy(record.value, HORIZON, exact=record.is_exact, loose=record.is_loose),
                )
            ]
        case SamplerRecord():
            options: dict[str, Any] = dict(
                distinct=record.is_distinct, has_mean_size=record.has_mean_size, window=record.window
            )
            large = record.large or record.make
            return [
                Law("participation-and-event", lambda: testing.check_sampler(record.value, seeds=120, **options)),
                Law("power", lambda: testing.check_sampler(large(), seeds=1500, **options), is_slow=True),
            ]
        case MetricRecord():
            return [Law("cost", lambda: testing.check_metric(record.value))]
    return []


def by_name(records: list[Any]) -> dict[str, Any]:
    """Parts by the names of their records, made when they are asked for."""
    return _Lazy(records)


class _Lazy(dict):
    def __init__(self, records: list[Any]):
        self._records = {record.name: record for record in records}
        super().__init__(dict.fromkeys(self._records))

    def __getitem__(self, name: str) -> Any:
        return self._records[name].value

    def values(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return [record.value for record in self._records.values()]

    def items(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return [(name, record.value) for name, record in self._records.items()]
