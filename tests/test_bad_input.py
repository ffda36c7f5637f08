"""Every public call refuses every wrong value with a `ValueError` that names the parameter, before anything compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import dpx
from conftest import ENVIRONMENT
from dpx._checks import described

BATTERY = Path(__file__).with_name("bad_input_battery.py")


def test_wrong_values_are_refused_by_name():
    """In one Python of its own: the runtime type checks of this one would raise a `TypeError` of theirs first."""
    environment = {**ENVIRONMENT, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    run = subprocess.run(
        [sys.executable, str(BATTERY)], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["calls"] > 8_000
    assert not found["missing"], f"public names without a row in {BATTERY.name}: {found['missing']}"
    assert not found["failures"], "\n".join(found["failures"][:40])


def test_what_was_given_is_described_without_its_contents():
    """An error message ends in logs: it says of what kind data are, and never what is in them."""
    secret = np.array([[123456.75]])
    for value in (
        secret,
        secret.astype(object),
        jnp.asarray(secret),
        [secret],
        {"a": secret},
        (secret,),
        {secret.tobytes()},
    ):
        assert "123456" not in described(value)
    assert described(secret) == "an array of float64 and shape (1, 1)"
    assert described(dpx.FlatClipping) == "the class FlatClipping"
    assert described("x" * 500).endswith("(a str)") and len(described("x" * 500)) < 120
