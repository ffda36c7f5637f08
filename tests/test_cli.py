"""The `dpx` command, as a person runs it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import dpx
from conftest import ENVIRONMENT

COMMAND = [sys.executable, "-c", "from dpx.cli import main; main()"]


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], env={**ENVIRONMENT, "COLUMNS": "200"}, capture_output=True, text=True)


RUN = ["--examples", "1000", "--batch-size", "100", "--steps", "20", "--delta", "1e-5"]


def call(*arguments):
    """In this process, which has imported everything already."""
    from typer.testing import CliRunner

    from dpx.cli._app import app

    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})


def answer(*arguments):
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)  # nothing else is printed


def test_calibrate_meets_the_budget():
    found = answer("calibrate", *RUN, "--epsilon", "1")
    plan = dpx.dp_sgd(1000, 100, 20, epsilon=1.0, delta=1e-5)
    assert found["noise_multiplier"] == plan.noise_multiplier and 0.99 < found["epsilon"] <= 1.0
    assert found["advantage"] == plan.trade_off().advantage and found["sampler"] == "PoissonSampler"
    table = call("calibrate", *RUN, "--epsilon", "1", "--sampling", "shuffle")
    assert table.exit_code == 0 and "ShuffleSampler" in table.stdout and "replace_special" in table.stdout


def test_calibrate_solves_for_steps_or_an_attack():
    found = answer("calibrate", *RUN, "--epsilon", "2", "--solve", "steps", "--noise-multiplier", "2")
    assert dpx.dp_sgd(1000, 100, found["steps"], noise_multiplier=2.0).epsilon(1e-5) <= 2.0
    assert dpx.dp_sgd(1000, 100, found["steps"] + 1, noise_multiplier=2.0).epsilon(1e-5) > 2.0
    found = answer("calibrate", *RUN, "--advantage", "0.1")
    assert 0.099 < found["advantage"] <= 0.1 and found["epsilon"] > 0


@pytest.mark.parametrize(
    ("options", "sampler", "adjacency"),
    [
        (["--sampling", "shuffle", "--adjacency", "replace_one"], "ShuffleSampler", "replace_one"),
        (["--sampling", "fixed-size"], "FixedSizeSampler", "replace_special"),
        (["--sampling", "random-allocation"], "RandomAllocationSampler", "add_or_remove_one"),
        (["--bands", "2"], "CyclicPoissonSampler", "add_or_remove_one"),
    ],
)
def test_account_knows_the_samplers(options, sampler, adjacency):
    found = answer("account", *RUN, "--noise-multiplier", "4", *options)
    assert found["sampling"]["kind"] == sampler and found["adjacency"] == adjacency
    assert 0 < found["epsilon"] < 50 and found["statement"]


def test_account_shows_how_epsilon_grows():
    done = call("account", *RUN, "--noise-multiplier", "2", "--sampling", "shuffle")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    for part in ("epsilon as the run goes on", "attacks", "ShuffleSampler", "replace_special"):
        assert part in shown
    plan = dpx.PrivacyPlan(
        dpx.ShuffleSampler(1000, 100, 20),
        dpx.FlatClipping(1.0),
        dpx.IndependentGaussian(2.0),
        adjacency="replace_special",
    )
    stated = re.search(r"epsilon │ ([0-9.]+)", shown)  # rounded up
    assert stated and plan.epsilon(1e-5) <= float(stated[1]) < plan.epsilon(1e-5) + 1e-4


def test_compare_ranks_by_error_at_equal_epsilon():
    found = answer("compare", *RUN, "--epsilon", "8")
    plans = found["plans"]
    errors = [plan["error"] for plan in plans]
    assert len(plans) == 4 and None not in errors and errors == sorted(errors)
    assert {p["mechanism"] for p in plans} == {"DP-SGD", "banded, 4 bands", "buffered (BLT), 3 buffers"}
    for plan in plans:
        assert 7.9 < plan["epsilon"] <= 8.0
    sgd = dpx.dp_sgd(1000, 100, 20, epsilon=8.0, delta=1e-5)
    assert next(p for p in plans if p["sampling"] == "Poisson")["error"] == sgd.error()


def test_compare_says_why_a_plan_is_not_there():
    few = ["--examples", "30", "--batch-size", "10", "--steps", "3", "--delta", "1e-3", "--epsilon", "8"]
    plans = answer("compare", *few, "--accountant", "rdp", "--adjacency", "replace_one")["plans"]
    refused = [p for p in plans if p["error"] is None]
    assert len(plans) == 3 and all("replace_one" in p["reason"] for p in refused)
    assert {p["sampling"] for p in plans if p not in refused} == {
        "fixed order"
    }  # one Gaussian, whose distance is doubled


def test_report_writes_what_can_be_published(tmp_path):
    out = tmp_path / "report"
    done = call("report", *RUN, "--epsilon", "1", "--sampling", "shuffle", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "differentially private for one example" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == ["privacy.png", "report.json"]
    assert (out / "privacy.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / "report.json").read_text())
    assert 0.99 < written["epsilon"] <= 1.0 and written["versions"]["dp-accounting"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", *RUN], "A budget is needed"),
        (["calibrate", *RUN[:-2], "--epsilon", "1"], "needs a `delta=` too"),
        (["calibrate", *RUN, "--epsilon", "1", "--noise-multiplier", "2"], "is what is looked for"),
        (["calibrate", *RUN, "--epsilon", "1", "--solve", "steps"], "must be given"),
        (["calibrate", *RUN, "--epsilon", "1", "--solve", "luck"], "noise-multiplier"),
        (["calibrate", *RUN, "--epsilon", "1", "--batch-size", "5000"], "got 5000 of 1000"),
        (["calibrate", *RUN, "--epsilon", "1", "--sampling", "shuffle", "--max-batch-size", "200"], "goes with"),
        (["account", *RUN, "--noise-multiplier", "-1"], "must be positive"),
        (["account", *RUN, "--noise-multiplier", "1", "--adjacency", "cousins"], "replace_special"),
        (
            ["account", *RUN, "--noise-multiplier", "1", "--sampling", "shuffle", "--adjacency", "add_or_remove_one"],
            "adjac",
        ),
        (["report", *RUN], "one of the two"),
    ],
)
def test_wrong_options_are_told_without_a_traceback(arguments, message):
    done = call(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_demo_trains_reports_and_plots(tmp_path):
    done = run("demo", "--steps", "3", "--batch-size", "100", "--out", str(tmp_path), "--seed", "3", "--epsilon", "2")
    assert done.returncode == 0, done.stderr
    assert "differentially private for one example" in done.stdout and "not private" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    for key in ("test_accuracy", "baseline_test_accuracy", "epsilon", "delta", "noise_multiplier", "steps", "seconds"):
        assert isinstance(report[key], float | int), key
    assert report["steps"] == 3 and 1.9 < report["epsilon"] <= 2.0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "report.json"]
    spent = [point["epsilon"] for point in report["curve"]]
    assert spent == sorted(spent) and spent[-1] == report["epsilon"]


@pytest.mark.slow
def test_demo_trains_with_correlated_noise(tmp_path):
    done = run("demo", "--noise", "banded", "--steps", "6", "--no-baseline", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "BandedToeplitz" in done.stdout and "cyclic Poisson" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["noise"] == "banded" and report["epsilon"] <= 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "-1"], "must be positive"),
        (["--batch-size", "5000"], "got 5000 of 4000"),
        (["--learning-rate", "0"], "must be positive"),
        (["--steps", "many"], "valid integer"),
    ],
)
def test_demo_with_wrong_options(arguments, message, tmp_path):
    done = call("demo", *arguments, "--out", str(tmp_path))
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_demo_reaches_85_per_cent_at_epsilon_3(tmp_path):
    accuracies = []
    for seed in range(3):
        done = run("demo", "--seed", str(seed), "--no-baseline", "--out", str(tmp_path / str(seed)))
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / str(seed) / "report.json").read_text())
        assert report["epsilon"] <= 3.0 and report["delta"] == 1e-5 and report["baseline_test_accuracy"] is None
        accuracies.append(report["test_accuracy"])
    assert np.mean(accuracies) >= 0.85


@pytest.mark.slow
def test_audit_writes_what_it_found(tmp_path):
    done = call("audit", "--steps", "4", "--canaries", "50", "--seed", "1", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (
        found["laws"]["passed"]
        and found["attack"]["passed"]
        and found == json.loads((tmp_path / "audit.json").read_text())
    )
    assert (tmp_path / "audit.png").stat().st_size > 1000
