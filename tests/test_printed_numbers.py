"""What is printed is a bound: numbers read back from statements, reports and figures are never on the wrong side of what they stand for."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import dpx
from dpx._round import exactly, round_down, round_epsilon, round_up
from dpx.accounting import PrivacyLedger

CLIPPINGS: dict[str, tuple[Any, tuple[str, ...], float]] = {
    "flat": (dpx.FlatClipping(0.3), ("l2 clip norm 0.3;",), 0.3),
    "flat-unit": (dpx.FlatClipping(0.3, unit_norm=True), ("l2 clip norm 0.3, divided by it",), 1.0),
    "group": (dpx.GroupClipping({"a": 3.0, "b": 4.0}), ("l2 clip norms 3, 4", "global allocation"), 5.0),
    "group-unit": (dpx.GroupClipping({"a": 3.0, "b": 4.0}, unit_norm=True), ("l2 clip norms 3, 4", "divided"), 1.0),
    "adaptive": (
        dpx.AdaptiveClipping(0.25, quantile=0.75, count_noise_multiplier=50.0),
        ("l2 clip norm 0.25 at first", "quantile 0.75", "counts of noise multiplier 50"),
        0.25,
    ),
    "normalized": (dpx.NormalizedClipping(0.5, 0.125), ("norm 0.5, gamma 0.125",), 0.5),
    "psac": (dpx.PSACClipping(0.5, 0.25), ("norm 0.5, r 0.25",), 0.5),
    "hard-threshold": (dpx.HardThresholdClipping(0.5, 8.0), ("norm above 8 are left out", "0.5 / 8"), 0.5),
}


@given(st.floats(1e-300, 1e300) | st.floats(0, 10), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_rounding_has_a_direction(value, digits):
    above, below = round_up(value, digits), round_down(value, digits)
    assert float(below) <= value <= float(above)
    assert float(above) - float(below) <= value * 1.0001 * 10.0 ** (1 - digits)
    assert value <= float(round_epsilon(value)) <= value + 1e-4 + 1e-14 * value
    assert float(exactly(value)) == value or float(np.float32(exactly(value))) == value


def test_rounding_of_what_is_typed_changes_nothing():
    assert [round_up(x) for x in (1e-5, 1e-6, 0.1, 2.0, 123456.0, 0.0)] == ["1e-05", "1e-06", "0.1", "2", "123456", "0"]
    assert (
        round_up(1.0000004e-5) == "1.00001e-05"
        and round_up(math.inf) == "inf"
        and round_epsilon(math.inf) == "infinity"
    )
    assert exactly(float(np.float32(0.3))) == "0.3" and exactly(0.5) == "0.5" and exactly(3.0) == "3"


def numbers_of(text: str) -> dict[str, float]:
    number = r"([0-9.]+(?:e[-+]?[0-9]+)?)"
    patterns = {
        "epsilon": rf"This run is \({number},",
        "delta": rf"This run is \([^,]*, {number}\)",
        "epsilon again": rf"- Epsilon: {number} at",
        "delta again": rf"- Epsilon: [^ ]* at delta {number},",
        "multiplier": rf"- Noise multiplier: {number};",
        "scale": rf"noise of scale {number}",
        "advantage": rf"minus false-positive rate at most {number} whether",
        "probability": rf"independently with probability {number}",
    }
    return {name: float(re.search(pattern, text)[1].rstrip(".")) for name, pattern in patterns.items()}  # pyright: ignore[reportOptionalSubscript]


@given(
    st.floats(0.5, 5.0),
    st.floats(1e-7, 5e-4),
    st.floats(1e-3, 1e3),
    st.integers(2, 60),
    st.integers(100, 997),
)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_a_statement_read_back_is_a_bound(multiplier, delta, norm, batch, examples):
    plan = dpx.dp_sgd(examples, batch, 12, noise_multiplier=multiplier, clipping=dpx.FlatClipping(norm))
    read = numbers_of(plan.statement(delta))
    assert read["epsilon"] == read["epsilon again"] >= plan.epsilon(delta)
    assert delta <= read["delta"] == read["delta again"] <= delta * 1.0001
    assert plan.noise_multiplier <= read["multiplier"] <= plan.noise_multiplier * (1 + 1e-7)
    assert plan.noise_multiplier * norm * (1 - 1e-6) <= read["scale"] <= plan.noise_multiplier * norm * 1.0001
    assert read["advantage"] >= plan.trade_off().advantage
    assert read["probability"] >= batch / examples
    # a run with the printed numbers keeps the printed guarantee
    again = dpx.dp_sgd(examples, batch, 12, noise_multiplier=read["multiplier"])
    assert again.epsilon(read["delta"]) <= read["epsilon"]
    for epsilon, bound in plan.report(delta)["delta_of_epsilon"].items():
        assert plan.delta(float(epsilon)) <= bound * (1 + 1e-9)
    ledger = PrivacyLedger("add_or_remove_one").spend(plan)
    epsilon, printed = (float(x) for x in re.findall(r"\(([^,]*), ([^)]*)\)-diff", ledger.statement(delta))[0])
    assert epsilon >= ledger.epsilon(delta) and printed >= delta


@pytest.mark.parametrize("unit", ["example", "patient", "user"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_statements_name_what_was_chosen(name, unit):
    clipping, parts, sensitivity = CLIPPINGS[name]
    sampler = dpx.PoissonSampler(1000, 50, 5)
    if unit == "user":
        sampler = dpx.UserSampler(sampler, np.arange(3000) % 1000, examples_per_user=2)
    plan = dpx.PrivacyPlan(sampler, clipping, dpx.IndependentGaussian(2.0), unit=unit)
    report = plan.report(1e-4)
    text = report["statement"]
    for part in (
        f"`{type(clipping).__name__}`: ",
        *parts,
        f"one {unit} contributes at most {exactly(float(clipping.sensitivity))} in",
    ):
        assert part in text, (part, text)
    assert report["clipping"]["sensitivity"] == pytest.approx(sensitivity, rel=1e-6)
    assert "f32[" not in json.dumps(report) and report["clipping"]["description"].startswith(type(clipping).__name__)
    if unit == "patient":
        assert "every patient is in every batch" in text and "example" not in text
    if unit == "user":
        assert "here an example is a user" in text


def test_settings_are_those_that_were_typed():
    report = dpx.dp_sgd(100, 10, 5, noise_multiplier=2.0, clipping=dpx.FlatClipping(0.3, unit_norm=True)).report(1e-3)
    assert report["clipping"]["settings"] == {"norm": 0.3, "unit_norm": True, "order": 2}
    groups = dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), CLIPPINGS["group"][0], dpx.IndependentGaussian(2.0))
    assert groups.report(1e-3)["clipping"]["settings"]["grouping"] == {"['a']": 0, "['b']": 1}


def test_a_clip_norm_that_is_not_chosen_is_not_stated():
    plan = dpx.dp_sgd(100, 10, 5, noise_multiplier=2.0, clipping=dpx.FlatClipping(0.5))
    report = plan.report(1e-3, in_clip_norms=True)
    assert report["clipping"]["sensitivity"] is None and report["noise"]["scale"] == pytest.approx(2.0)
    assert (
        re.search(r"noise of scale 2(\.00001)? clip norms", report["statement"])
        and "clip norm is not chosen yet" in report["statement"]
    )
    assert "0.5" not in report["statement"].split("Sampling")[0]
    assert 1.0 <= plan.report(1e-3)["noise"]["scale"] <= 1.0 + 1e-6  # as it is on the device: rounded up


def test_figures_draw_bounds(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (drawn.append(self), real(self, *args, **options))[1]
    )
    plan = dpx.dp_sgd(1000, 50, 400, noise_multiplier=2.0)
    plan.plot(tmp_path / "plan.png", 1e-4)
    rates, spent, profile = drawn[0].axes
    curve = plan.trade_off()
    line = rates.lines[0].get_xydata()
    for rate in (1e-4, 0.0013, 0.01, 0.1234, 0.5):
        assert np.interp(rate, *line.T) >= curve.true_positive_rate(rate) - 1e-12
    advantage = float(re.search(r"([0-9.]+)$", rates.get_title())[1])  # pyright: ignore[reportOptionalSubscript]
    assert curve.advantage <= advantage <= curve.advantage + 1e-4
    line = spent.lines[0].get_xydata()
    for steps in (1, 2, 7, 50, 123, 399, 400):
        assert np.interp(steps - 1e-9, *line.T) >= plan.epsilon(1e-4, steps) * (1 - 1e-6)
    line = profile.lines[0].get_xydata()
    for epsilon in np.linspace(0.01, curve.epsilons[-1] * 0.9, 7):
        assert np.interp(epsilon, *line[::-1].T) >= plan.delta(epsilon) * (1 - 1e-6)
