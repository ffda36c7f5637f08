"""Every public call with every wrong value for every parameter: run by `test_bad_input.py` in a Python without runtime type checks.

Prints, as JSON, what neither worked nor raised a `ValueError` that names the parameter, and which public names have no row.
"""

import inspect
import json
import os
import sys
import tempfile
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import GaussianDpEvent

import dpx

warnings.simplefilter("error")


def a_function(*args):
    return args


class AClass:
    """An object that is no part of dpx."""


VALUES = {
    "None": None,
    "text": "x",
    "empty text": "",
    "digits": "1",
    "bytes": b"x",
    "list": [1],
    "nested": [[1], [2, 3]],
    "texts": ["a", "b"],
    "dict": {},
    "full dict": {"a": 1},
    "tuple": (),
    "set": {1},
    "object": AClass(),
    "class": AClass,
    "part's class": dpx.FlatClipping,
    "module": dpx,
    "function": a_function,
    "True": True,
    "np.True": np.bool_(True),
    "complex": 1 + 0j,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "-1": -1,
    "0": 0,
    "1": 1,
    "np.1": np.int64(1),
    "1.5": 1.5,
    "huge": 10**400,
    "array": np.array([1.0, 2.0]),
    "objects": np.array([None, "a"]),
    "jax": jnp.ones((2, 2)),
    "key": jax.random.key(0),
    "sensitive": dpx.Sensitive(1.0),
    "event": GaussianDpEvent(1.0),
    "sampler": dpx.PoissonSampler(100, 10, 5),
}

# which of the values a parameter may accept; all others must be refused
INT, OPT_INT = {"1"}, {"1", "None"}
POSITIVE, OPT_POSITIVE = {"1", "1.5"}, {"1", "1.5", "None"}
PROBABILITY, UNIT, BELOW_ONE = set(), {"0", "1"}, {"0"}
AT_LEAST_ZERO = {"0", "1", "1.5", "inf"}
FINITE = AT_LEAST_ZERO - {"inf"}
NUMBER = {"0", "1", "1.5", "-1"}
FLAG, OPT_FLAG = {"True", "np.True"}, {"True", "np.True", "None"}
WORD, OPT_WORD = set(), {"None"}
TEXT, OPT_TEXT = {"text", "digits"}, {"text", "digits", "None"}
PART, OPT_PART = set(), {"None"}
CLIPPING, OPT_CLIPPING = {"1", "1.5"}, {"1", "1.5", "None"}
FUNCTION, OPT_FUNCTION = {"function"}, {"function", "None"}
SEED, OPT_SEED = {"0", "1"}, {"0", "1", "None"}
NUMBERS = {"list", "array"}
NORMS = {"1", "1.5", "list", "full dict", "nested", "sensitive"}  # trees of numbers
EVENT = {"event"}
KEY, OPT_KEY = {"key"}, {"key", "None"}


class Model(eqx.Module):
    """A model."""

    w: jax.Array


MODEL, DATA = Model(jnp.ones(3)), (np.ones((100, 3), np.float32),)


def loss(model, x):
    return jnp.sum(model.w * x)


S, M, A, O = dpx.strategies, dpx.metrics, dpx.accounting, dpx.optimizers
FLAT, GAUSS = dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0)
POISSON = dpx.PoissonSampler(100, 10, 5)
PLAN = dpx.PrivacyPlan(POISSON, FLAT, GAUSS)
GRADIENT = PLAN.private_gradient(loss, method=dpx.Vectorized())
SUM = PLAN.private_sum(lambda model, x: x)
STATE = GRADIENT.init(MODEL, key=jax.random.key(0))
SGD = optax.sgd(0.1)
TRAINER = dpx.Trainer(PLAN, loss, SGD, method=dpx.Vectorized())
TRAIN_STATE = TRAINER.init(MODEL, key=jax.random.key(0))
RESULT = TRAINER.fit(MODEL, DATA, seed=0, progress=False)
RELEASE = RESULT.publish(os.path.join(tempfile.mkdtemp(), "release"))
LEDGER = A.PrivacyLedger("add_or_remove_one").spend(GaussianDpEvent(1.0))
FILTER = A.PrivacyFilter(1.0, 1e-5)
CURVE = A.TradeOffCurve((0.0, 1.0), (0.5, 0.1))
METRIC = M.Mean("losses", 0.0, 1.0, 1.0)
SIZES = {"num_examples": (100, INT), "batch_size": (10, INT), "steps": (20, INT)}
ERROR = {
    "workload": ("prefix", set()),
    "kind": ("mean", WORD),
    "min_separation": (1, INT),
    "max_participations": (1, OPT_INT),
}
BUDGET = {
    "clipping": (1.0, OPT_CLIPPING),
    "adjacency": ("add_or_remove_one", WORD),
    "unit": ("example", OPT_TEXT),
    "accountant": ("pld", WORD),
}
BATCH = (np.ones((40, 3), np.float32),)  # as many as the plan pads to
MASK = np.ones(40, bool)

# name: (what is called, {parameter: (a right value, what else may be accepted)}); None marks a parameter that has no wrong values
TABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "FlatClipping": (
        dpx.FlatClipping,
        {"norm": (1.0, POSITIVE), "unit_norm": (False, FLAG), "order": (2, {"1"})},
    ),
    "GroupClipping": (
        dpx.GroupClipping,
        {
            "norms": ([1.0], NORMS),
            "unit_norm": (False, FLAG),
            "allocation": ("global", WORD),
        },
    ),
    "GroupClipping.per_layer": (
        dpx.GroupClipping.per_layer,
        {"model": (MODEL, None), "norm": (1.0, POSITIVE)},
    ),
    "NormalizedClipping": (dpx.NormalizedClipping, {"norm": (1.0, POSITIVE), "gamma": (0.1, {"0", *POSITIVE})}),
    "PSACClipping": (dpx.PSACClipping, {"norm": (1.0, POSITIVE), "r": (0.1, POSITIVE)}),
    "HardThresholdClipping": (dpx.HardThresholdClipping, {"norm": (1.0, POSITIVE), "threshold": (2.0, POSITIVE)}),
    "AdaptiveClipping": (
        dpx.AdaptiveClipping,
        {
            "initial_norm": (1.0, NORMS),
            "quantile": (0.5, PROBABILITY),
            "learning_rate": (0.2, POSITIVE),
            "count_noise_multiplier": (10.0, POSITIVE),
        },
    ),
    "SlackClipping": (
        dpx.SlackClipping,
        {
            "norm": (1.0, POSITIVE),
            "quantile": (0.5, PROBABILITY),
            "learning_rate": (0.2, POSITIVE),
            "bins": (4, INT),
        },
    ),
    "NoClipping": (dpx.NoClipping, {}),
    "IndependentGaussian": (dpx.IndependentGaussian, {"noise_multiplier": (1.0, OPT_POSITIVE)}),
    "Laplace": (dpx.Laplace, {"noise_multiplier": (1.0, OPT_POSITIVE)}),
    "DiscreteGaussian": (
        dpx.DiscreteGaussian,
        {"noise_multiplier": (1.0, OPT_POSITIVE), "granularity": (2.0**-10, {"1"})},
    ),
    "CorrelatedGaussian": (
        dpx.CorrelatedGaussian,
        {"strategy": (S.Identity(), PART), "noise_multiplier": (1.0, OPT_POSITIVE), "replay": (False, FLAG)},
    ),
    "Vectorized": (dpx.Vectorized, {"microbatch_size": (None, OPT_INT)}),
    "Ghost": (dpx.Ghost, {"microbatch_size": (None, OPT_INT), "memory_budget": (None, OPT_POSITIVE)}),
    "Auto": (dpx.Auto, {}),
    # samplers
    "PoissonSampler": (dpx.PoissonSampler, {**SIZES, "max_batch_size": (20, {"None"})}),
    "CyclicPoissonSampler": (
        dpx.CyclicPoissonSampler,
        {**SIZES, "cycle_length": (2, INT), "partition": ("equal", WORD)},
    ),
    "BallsInBinsSampler": (dpx.BallsInBinsSampler, {**SIZES, "bins": (10, {"None"})}),
    "MinSepSampler": (
        dpx.MinSepSampler,
        {**SIZES, "min_separation": (2, INT), "start": ("warm", WORD), "max_batch_size": (50, {"None"})},
    ),
    "RandomAllocationSampler": (dpx.RandomAllocationSampler, {**SIZES, "participations": (2, set())}),
    "FixedSizeSampler": (dpx.FixedSizeSampler, {**SIZES, "replace": (False, FLAG)}),
    "ShuffleSampler": (dpx.ShuffleSampler, {**SIZES, "reshuffle": (False, FLAG)}),
    "UserSampler": (
        dpx.UserSampler,
        {
            "base": (dpx.PoissonSampler(2, 1, 5), {"sampler"}),
            "user_ids": ([0, 1], {"texts"}),
            "examples_per_user": (2, INT),
        },
    ),
    "AbstractSampler.indices": (POISSON.indices, {"seed": (0, SEED), "step": (0, {"0", "1"})}),
    "bound_contributions": (
        dpx.bound_contributions,
        {"owners": ([["a"], ["b"]], {"array", "jax", "nested", "tuple"}), "per_owner": (1, INT), "seed": (0, SEED)},
    ),
    # strategies
    "Identity": (S.Identity, {}),
    "BandedToeplitz": (S.BandedToeplitz, {"coefficients": ([1.0], NUMBERS)}),
    "BandedToeplitz.square_root": (
        S.BandedToeplitz.square_root,
        {"bands": (2, INT), "momentum": (0.5, BELOW_ONE), "weight_decay": (0.0, BELOW_ONE)},
    ),
    "BandedToeplitz.optimize": (
        S.BandedToeplitz.optimize,
        {"steps": (4, INT), "bands": (1, {"1"}), **ERROR, "noise_multiplier_for_bands": (None, {"None"})},
    ),
    "ColumnNormalizedBanded": (S.ColumnNormalizedBanded, {"coefficients": ([1.0], NUMBERS), "steps": (4, INT)}),
    "ColumnNormalizedBanded.optimize": (
        S.ColumnNormalizedBanded.optimize,
        {"steps": (4, INT), "bands": (1, {"1"}), **ERROR},
    ),
    "BandedInverse": (S.BandedInverse, {"inverse_coefficients": ([1.0], NUMBERS)}),
    "BandedInverse.square_root": (
        S.BandedInverse.square_root,
        {"bands": (2, INT), "momentum": (0.5, BELOW_ONE), "weight_decay": (0.0, BELOW_ONE)},
    ),
    "BandedInverse.optimize": (S.BandedInverse.optimize, {"steps": (4, INT), "bands": (1, INT), **ERROR}),
    "GeometricStrategy": (
        S.GeometricStrategy,
        {"decay": (0.5, UNIT), "normalize_columns": (False, FLAG), "steps": (4, OPT_INT)},
    ),
    "GeometricStrategy.optimize": (
        S.GeometricStrategy.optimize,
        {"steps": (4, INT), **ERROR, "normalize_columns": (False, FLAG)},
    ),
    "SquareRootToeplitz": (
        S.SquareRootToeplitz,
        {"steps": (4, OPT_INT), "momentum": (0.5, BELOW_ONE), "weight_decay": (0.0, BELOW_ONE)},
    ),
    "BufferedToeplitz": (S.BufferedToeplitz, {"decays": ([0.5], set()), "scales": ([0.1], {"list"})}),
    "BufferedToeplitz.optimize": (S.BufferedToeplitz.optimize, {"steps": (4, INT), "buffers": (1, INT), **ERROR}),
    "DenseStrategy": (S.DenseStrategy, {"matrix": (np.eye(2), set())}),
    "DenseStrategy.optimize": (
        S.DenseStrategy.optimize,
        {"steps": (4, INT), "bands": (2, OPT_INT), **ERROR, "min_separation": (2, INT)},
    ),
    "TreeAggregation": (
        S.TreeAggregation,
        {"steps": (4, INT), "honaker": (True, FLAG), "restart_every": (2, OPT_INT), "tight": (False, FLAG)},
    ),
    "momentum_workload": (
        S.momentum_workload,
        {
            "steps": (2, INT),
            "momentum": (0.5, BELOW_ONE),
            "weight_decay": (0.0, BELOW_ONE),
            "learning_rates": (None, {"None", "array"}),
        },
    ),
    "AbstractStrategy.sensitivity": (
        S.BandedToeplitz([1.0, 0.5]).sensitivity,
        {"steps": (4, INT), "min_separation": (1, INT), "max_participations": (1, OPT_INT)},
    ),
    "AbstractStrategy.materialize": (S.Identity().materialize, {"steps": (4, INT)}),
    "AbstractStrategy.error": (S.BandedToeplitz([1.0, 0.5]).error, {"steps": (4, INT), **ERROR}),
    # metrics
    "Mean": (
        M.Mean,
        {
            "values": ("losses", OPT_FUNCTION),
            "low": (-2.0, NUMBER),
            "high": (2.0, NUMBER),
            "noise_multiplier": (1.0, POSITIVE),
        },
    ),
    "Sum": (
        M.Sum,
        {
            "values": ("norms", OPT_FUNCTION),
            "low": (-2.0, NUMBER),
            "high": (2.0, NUMBER),
            "noise_multiplier": (1.0, POSITIVE),
        },
    ),
    "Count": (M.Count, {"values": (None, OPT_FUNCTION), "noise_multiplier": (1.0, POSITIVE)}),
    "Dropped": (M.Dropped, {"noise_multiplier": (1.0, POSITIVE)}),
    "Histogram": (
        M.Histogram,
        {"values": ("losses", OPT_FUNCTION), "edges": ([0.0, 1.0, 2.0], set()), "noise_multiplier": (1.0, POSITIVE)},
    ),
    "Quantile": (
        M.Quantile,
        {
            "values": ("losses", OPT_FUNCTION),
            "quantile": (0.5, PROBABILITY),
            "low": (-2.0, NUMBER),
            "high": (2.0, NUMBER),
            "noise_multiplier": (1.0, POSITIVE),
        },
    ),
    "AbstractMetric.release": (
        METRIC.release,
        {
            "values": (np.ones(2, np.float32), {"list", "array", "tuple"}),
            "mask": (None, {"None"}),
            "expected_size": (2, POSITIVE),
            "key": (jax.random.key(0), OPT_KEY),
        },
    ),
    # accounting
    "PrivacyLedger": (
        A.PrivacyLedger,
        {
            "adjacency": ("replace_one", WORD),
            "unit": ("example", TEXT),
            "entries": ((), {"tuple"}),
            "fixed_parts": (False, FLAG),
        },
    ),
    "PrivacyLedger.spend": (
        LEDGER.spend,
        {"event_or_plan": (PLAN, EVENT), "count": (1, INT), "label": (None, OPT_TEXT), "part": (None, OPT_TEXT)},
    ),
    "PrivacyLedger.epsilon": (LEDGER.epsilon, {"delta": (1e-5, PROBABILITY), "accountant": (None, {"None"})}),
    "PrivacyLedger.delta": (LEDGER.delta, {"epsilon": (1.0, FINITE), "accountant": (None, {"None"})}),
    "PrivacyLedger.statement": (LEDGER.statement, {"delta": (1e-5, PROBABILITY)}),
    "PrivacyLedger.from_json": (A.PrivacyLedger.from_json, {"text": (LEDGER.to_json(), set())}),
    "PrivacyFilter": (
        A.PrivacyFilter,
        {
            "epsilon": (1.0, POSITIVE),
            "delta": (1e-5, PROBABILITY),
            "adjacency": ("add_or_remove_one", WORD),
            "unit": ("example", TEXT),
            "accountant": ("rdp", WORD),
            "hint": (None, {"None", *EVENT}),
            "order": (32, OPT_INT),
            "spent": (0.0, AT_LEAST_ZERO),
        },
    ),
    "PrivacyFilter.spend": (FILTER.spend, {"event_or_plan": (GaussianDpEvent(100.0), None), "count": (1, INT)}),
    "PrivacyFilter.can_spend": (
        FILTER.can_spend,
        {"event_or_plan": (GaussianDpEvent(100.0), EVENT), "count": (1, INT)},
    ),
    "PrivacyFilter.room_for": (FILTER.room_for, {"event_or_plan": (GaussianDpEvent(100.0), EVENT)}),
    "TradeOffCurve": (
        A.TradeOffCurve,
        {"epsilons": ((0.0,), set()), "deltas": ((0.5,), {"list"})},
    ),
    "TradeOffCurve.true_positive_rate": (
        CURVE.true_positive_rate,
        {"false_positive_rate": (0.5, {"0", "1", "list", "jax", "tuple"})},
    ),
    "TradeOffCurve.bayes_risk": (CURVE.bayes_risk, {"prior": (0.5, UNIT)}),
    "accounting.epsilon": (
        A.epsilon,
        {
            "event": (GaussianDpEvent(1.0), EVENT),
            "delta": (1e-5, PROBABILITY),
            "adjacency": ("add_or_remove_one", WORD),
            "accountant": ("pld", WORD),
        },
    ),
    "accounting.epsilon_bracket": (
        A.epsilon_bracket,
        {
            "event": (GaussianDpEvent(1.0), EVENT),
            "delta": (1e-5, PROBABILITY),
            "adjacency": ("add_or_remove_one", WORD),
        },
    ),
    "accounting.delta": (
        A.delta,
        {
            "event": (GaussianDpEvent(1.0), EVENT),
            "epsilon": (1.0, FINITE),
            "adjacency": ("add_or_remove_one", WORD),
            "accountant": ("pld", WORD),
        },
    ),
    "group_epsilon": (
        A.group_epsilon,
        {
            "event_or_plan": (GaussianDpEvent(1.0), EVENT),
            "delta": (1e-5, PROBABILITY),
            "sizes": ((1, 2), {"list", "tuple", "set"}),
            "adjacency": (None, {"None"}),
        },
    ),
    "search_event": (
        A.search_event,
        {
            "event_or_plan": (GaussianDpEvent(1.0), {*EVENT}),
            "mean_runs": (2.0, POSITIVE),
            "shape": ("geometric", AT_LEAST_ZERO),
        },
    ),
    "fixed_search_epsilon": (
        A.fixed_search_epsilon,
        {
            "event_or_plan": (GaussianDpEvent(1.0), EVENT),
            "delta": (1e-5, PROBABILITY),
            "runs": (2, INT),
            "adjacency": (None, {"None"}),
        },
    ),
    "number_of_runs": (
        A.number_of_runs,
        {"mean_runs": (2.0, POSITIVE), "shape": ("geometric", AT_LEAST_ZERO), "seed": (0, OPT_SEED)},
    ),
    "shuffling_lower_bound": (
        A.shuffling_lower_bound,
        {"noise_multiplier": (1.0, POSITIVE), "steps": (4, INT), "epsilon": (1.0, AT_LEAST_ZERO)},
    ),
    # optimisers
    "ema": (O.ema, {"decay": (0.9, BELOW_ONE), "warm_up": (True, FLAG)}),
    "tail_average": (O.tail_average, {"start": (3, {"0", "1"})}),
    "scale_by_adam_bc": (
        O.scale_by_adam_bc,
        {"b1": (0.9, BELOW_ONE), "b2": (0.9, BELOW_ONE), "eps": (1e-8, POSITIVE), "floor": (None, OPT_POSITIVE)},
    ),
    "adam_bc": (O.adam_bc, {"learning_rate": (0.1, {*NUMBER, "function"})}),
    "scale_then_privatize": (
        O.scale_then_privatize,
        {"optimizer": (optax.adam(0.1), PART), "eps": (1e-8, POSITIVE), "normalize": (True, FLAG)},
    ),
    # plans
    "dp_sgd": (
        dpx.dp_sgd,
        {**SIZES, **BUDGET, "noise_multiplier": (1.0, POSITIVE), "max_batch_size": (None, {"None"})},
    ),
    "dp_sgd, of epochs": (
        lambda **kwargs: dpx.dp_sgd(100, 10, noise_multiplier=1.0, **kwargs),
        {"epochs": (1, POSITIVE)},
    ),
    "dp_sgd, calibrated": (
        lambda **kwargs: dpx.dp_sgd(100, 10, 5, **kwargs),
        {"epsilon": (1.0, POSITIVE), "delta": (1e-5, PROBABILITY)},
    ),
    "dp_mf": (
        dpx.dp_mf,
        {
            **SIZES,
            **BUDGET,
            "adjacency": ("add_or_remove_one", OPT_WORD),
            "bands": (2, INT),
            "amplified": (None, OPT_FLAG),
            "replay": (False, set()),
            "noise_multiplier": (1.0, POSITIVE),
        },
    ),
    "dp_mf, of a strategy": (
        lambda **kwargs: dpx.dp_mf(100, 10, 5, noise_multiplier=1.0, **kwargs),
        {"strategy": (S.Identity(), PART)},
    ),
    "PrivacyPlan": (
        dpx.PrivacyPlan,
        {
            **BUDGET,
            "sampler": (POISSON, {"sampler"}),
            "clipping": (FLAT, CLIPPING),
            "noise": (GAUSS, PART),
            "metrics": (None, {"None", "dict"}),
        },
    ),
    "PrivacyPlan.epsilon": (PLAN.epsilon, {"delta": (1e-5, PROBABILITY), "steps": (None, {"None", "0", "1"})}),
    "PrivacyPlan.epsilon_bracket": (PLAN.epsilon_bracket, {"delta": (1e-5, PROBABILITY)}),
    "PrivacyPlan.delta": (PLAN.delta, {"epsilon": (1.0, FINITE), "steps": (None, OPT_INT)}),
    "PrivacyPlan.calibrate": (
        PLAN.calibrate,
        {"epsilon": (1.0, POSITIVE), "delta": (1e-5, PROBABILITY), "parameter": ("noise_multiplier", WORD)},
    ),
    "PrivacyPlan.calibrate, to an advantage": (PLAN.calibrate, {"advantage": (0.3, PROBABILITY)}),
    "PrivacyPlan.calibrate, to rates": (
        PLAN.calibrate,
        {"true_positive_rate": (0.3, PROBABILITY), "false_positive_rate": (0.1, PROBABILITY)},
    ),
    "PrivacyPlan.error": (PLAN.error, {"workload": ("prefix", set()), "kind": ("mean", WORD)}),
    "PrivacyPlan.with_metrics": (PLAN.with_metrics, {"a_metric": (METRIC, PART)}),
    "PrivacyPlan.with_noise_multiplier": (PLAN.with_noise_multiplier, {"noise_multiplier": (1.0, OPT_POSITIVE)}),
    "PrivacyPlan.private_gradient": (
        PLAN.private_gradient,
        {"loss": (loss, FUNCTION), "method": (dpx.Auto(), PART), "has_aux": (False, FLAG)},
    ),
    "PrivacyPlan.private_sum": (PLAN.private_sum, {"fn": (a_function, FUNCTION), "microbatch_size": (None, OPT_INT)}),
    "PrivacyPlan.batches": (
        PLAN.batches,
        {"data": (DATA, set()), "seed": (0, OPT_SEED), "start": (0, {"0", "1"})},
    ),
    "PrivacyPlan.batches, a leaf": (
        lambda **kwargs: PLAN.batches((DATA[0], kwargs["data"]), seed=0),
        {"data": (DATA[0], {"None", "dict", "tuple", "sampler"})},  # trees without a leaf
    ),
    "PrivacyPlan.statement": (PLAN.statement, {"delta": (1e-5, PROBABILITY)}),
    "PrivacyPlan.report": (PLAN.report, {"delta": (1e-5, PROBABILITY)}),
    "PrivateGradient": (
        dpx.PrivateGradient,
        {
            "loss": (loss, FUNCTION),
            "clipping": (FLAT, CLIPPING),
            "noise": (GAUSS, PART),
            "normalizer": (1.0, POSITIVE),
            "method": (dpx.Vectorized(), PART),
            "steps": (None, OPT_INT),
            "filter_spec": (eqx.is_inexact_array, {"function", "True", "np.True", "class", "part's class"}),
            "has_aux": (False, FLAG),
            "participation": (None, {"None"}),
            "unit": ("example", WORD),
            "within_user": ("mean", WORD),
            "metrics": (None, {"None", "dict"}),
            "physical_batch_size": (None, OPT_INT),
        },
    ),
    "PrivateGradient.init": (GRADIENT.init, {"model": (MODEL, {"array", "jax"}), "key": (jax.random.key(0), OPT_KEY)}),
    "PrivateGradient.__call__": (
        GRADIENT,
        {
            "model": (MODEL, set()),
            "batch": (BATCH, set()),
            "state": (STATE, set()),
            "mask": (MASK, {"None"}),
            "key": (None, OPT_KEY),
            "scaling": (None, {"None"}),
        },
    ),
    "PrivateGradient.clipped_sum": (
        GRADIENT.clipped_sum,
        {"model": (MODEL, set()), "batch": (BATCH, set()), "mask": (None, {"None"}), "key": (None, OPT_KEY)},
    ),
    "Trainer": (
        dpx.Trainer,
        {
            "plan": (PLAN, PART),
            "loss": (loss, FUNCTION),
            "optimizer": (SGD, PART),
            "method": (dpx.Vectorized(), PART),
            "filter_spec": (eqx.is_inexact_array, {"function", "True", "np.True", "class", "part's class"}),
            "has_aux": (False, FLAG),
            "checkpoint": (None, {"None"}),
            "microbatch_size": ("auto", OPT_INT),
            "steps_per_call": (1, INT),
            "average": (None, {"None"}),
        },
    ),
    "Trainer.init": (TRAINER.init, {"model": (MODEL, {"array", "jax"}), "key": (jax.random.key(0), OPT_KEY)}),
    "Trainer.step": (
        TRAINER.step,
        {"state": (TRAIN_STATE, set()), "batch": (BATCH, set()), "mask": (MASK, {"None"})},
    ),
    "Trainer.compile": (
        TRAINER.compile,
        {"state": (TRAIN_STATE, set()), "batch": (BATCH, set()), "mask": (MASK, {"None"})},
    ),
    "Trainer.fit": (
        TRAINER.fit,
        {
            "model": (MODEL, set()),
            "data": (DATA, set()),
            "seed": (0, OPT_SEED),
            "key": (None, OPT_KEY),
            "evaluate": (None, {"None"}),
            "evaluate_every": (None, {"None"}),
            "callbacks": ((), {"tuple"}),
            "stop_at_epsilon": (50.0, {"None"}),
            "delta": (1e-5, {"None"}),
            "sharding": (None, {"None"}),
            "progress": (False, FLAG),
        },
    ),
    "Checkpoints": (
        lambda path, every, keep, rebuild_noise: dpx.Checkpoints(
            path, every=every, keep=keep, rebuild_noise=rebuild_noise
        ),
        {"path": ("run", TEXT), "every": (100, INT), "keep": (3, INT), "rebuild_noise": (False, FLAG)},
    ),
    "StepInfo": (
        dpx.StepInfo,
        {
            "step": (1, INT),
            "epsilon": (1.0, AT_LEAST_ZERO | {"function"}),
            "seconds": (1.0, NUMBER | {"inf", "-inf", "nan"}),
            "metrics": ({}, {"dict", "full dict"}),
            "delta": (None, {"None"}),
        },
    ),
    "Stop": (dpx.Stop, {"reason": ("done", TEXT), "is_public": (False, FLAG)}),
    "load_published": (
        dpx.load_published,
        {"path": (RELEASE, set()), "like": (MODEL, set()), "average": (False, FLAG)},
    ),
    "TrainResult.statement": (RESULT.statement, {"delta": (1e-5, {"None"})}),
    "TrainResult.epsilon": (RESULT.epsilon, {"delta": (1e-5, {"None"})}),
    "PrivateSum": (
        dpx.PrivateSum,
        {
            "fn": (a_function, FUNCTION),
            "clipping": (FLAT, CLIPPING),
            "noise": (GAUSS, PART),
            "normalizer": (1.0, POSITIVE),
            "microbatch_size": (None, OPT_INT),
            "steps": (None, OPT_INT),
            "participation": (None, {"None"}),
            "unit": ("example", WORD),
            "physical_batch_size": (None, OPT_INT),
        },
    ),
    "PrivateSum.init": (
        SUM.init,
        {"batch": (BATCH, set()), "model": (MODEL, None), "key": (jax.random.key(0), OPT_KEY)},
    ),
    "model_update": (
        dpx.model_update,
        {"loss": (loss, FUNCTION), "optimizer": (optax.sgd(0.1), PART), "steps": (1, INT)},
    ),
    "augment": (
        dpx.augment,
        {
            "loss": (loss, FUNCTION),
            "augmentation": (a_function, FUNCTION),
            "multiplicity": (2, INT),
            "has_aux": (False, FLAG),
        },
    ),
    "random.fresh_key": (dpx.random.fresh_key, {"impl": (None, {"None"})}),
}

# where it is the caller's own function that chokes on the value
NOT_OURS = {
    ("PrivateGradient.__call__", "model"): {"array", "jax"},
    ("PrivateGradient.clipped_sum", "model"): {"array", "jax"},
    ("Trainer.fit", "model"): {"array", "jax"},
    # for as long as there is no average, and no record
    ("load_published", "average"): {"True", "np.True"},
}
# made by dpx, or described by their own abstract methods: nobody types their arguments
NOT_TYPED = """
    AverageState ScaleByAdamBCState AdaptiveClippingState Released QuantileState ClippedSum LeafPlan Use EinsumUse ScatterUse Check Diagnostics
    Explanation PrivateGradientState Result Sensitive Participation LedgerEntry ExponentialAverage TailAverage ScaleThenPrivatize SlackClippingState
    check_accountant check_adjacency loss_distribution rough_epsilon is_monte_carlo largest_integer least_feasible
    rough_distribution rough_renyi_epsilon least_renyi_epsilon check_delta deltas
    check_metric check_metrics described is_tracing wide_dtype
    Domain LossDistribution LossPmf check_seed generator loss_rule multiply near_root with_side_queries
    Accountable Release attained_discrete_gaussian attained_epsilon check_bracket ghost_check ghost_rule chacha_key fresh_seed check_key
    key_words key_of_words draw laplace_from_words laplace_like normal_from_words shared_key shared_seed comparison explanation unreached_leaves
    watched Compiled DamagedRecord History TrainResult TrainState
    search_epsilon shard batch_axis axis_size shard_batch off_batch_axis like normal_like uniform_like bits_like
""".split()


def missing_rows():
    """Public classes and functions without a row."""
    covered = {name.split(",")[0].split(".")[-1] for name in TABLE} | {name.split(".")[0] for name in TABLE}
    rooms = (dpx, dpx.training, S, M, A, O, dpx.random, dpx.gradients, dpx.sharding)
    found = set()
    for room in rooms:
        for name, value in vars(room).items():
            is_ours = getattr(value, "__module__", "").startswith("dpx") and callable(value)
            if is_ours and not name.startswith(("_", "Abstract")):
                found.add(name)
    return sorted(found - covered - set(NOT_TYPED))


def complaint(row, call, arguments, name, value, may):
    """What is wrong with how one call treats one value; None if nothing is."""
    try:
        call(**{**arguments, name: value})
    except ValueError as error:
        message = str(error)
        if name not in message and f"`{row.split(',')[0]}(" not in message:
            return f"ValueError that does not name it: {message[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if may else "accepted"


def main():
    only = sys.argv[1:]
    failures, calls = [], 0
    for row, (call, parameters) in TABLE.items():
        if only and row not in only:
            continue
        arguments = {name: good for name, (good, _) in parameters.items()}
        try:
            call(**arguments)
        except Exception as error:
            failures.append(f"{row}: the right values are refused: {type(error).__name__}: {error}")
            continue
        named = [
            p for p in inspect.signature(call).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        for p in named:
            if p.name not in parameters and p.default is inspect.Parameter.empty:
                failures.append(f"{row}: no row for `{p.name}`")
        for name, (_, may) in parameters.items():
            if may is None:
                continue
            for label, value in VALUES.items():
                if label in NOT_OURS.get((row, name), ()):
                    continue
                calls += 1
                found = complaint(row, call, arguments, name, value, label.removeprefix("np.") in may)
                if found:
                    failures.append(f"{row}({name}={label}): {found}")
    integers: Any = ((1, 3), (np.int64(1), np.int64(3)), (1, np.uint8(3)))
    steps = [POISSON.indices(seed, step) for seed, step in integers]
    if not all(np.array_equal(steps[0], other) for other in steps):
        failures.append("AbstractSampler.indices: a batch depends on the type of an integer")
    print(json.dumps({"failures": failures, "missing": missing_rows(), "calls": calls}))


main()
