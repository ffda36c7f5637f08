"""The `dpx` command, as a person runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conftest import ENVIRONMENT

COMMAND = [sys.executable, "-c", "from dpx.cli import main; main()"]


def run(*arguments):
    return subprocess.run([*COMMAND, *arguments], env={**ENVIRONMENT, "COLUMNS": "200"}, capture_output=True, text=True)


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
    done = run("demo", *arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


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
