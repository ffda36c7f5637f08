"""A run in several processes is one run: one key, one seed, one history, and records that another number of processes can go on from."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ENVIRONMENT

SCRIPT = """
import sys
import jax
number, processes, port, folder, kind, until = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", num_processes=processes, process_id=number)
import hashlib, json, os, signal
import equinox as eqx, jax.numpy as jnp, jax.random as jr, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
import dpx

def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)

rng = np.random.default_rng(0)
data = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(60, 8)).astype(np.float32)
sampler = dpx.CyclicPoissonSampler(60, 8, 12, cycle_length=3)
plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), dpx.CorrelatedGaussian(dpx.BandedToeplitz.square_root(3), 2.0))
plan = plan.with_metrics(loss=dpx.metrics.Mean("losses", 0.0, 5.0, noise_multiplier=20.0))
if kind == "disagree" and number == 1:
    plan = plan.with_noise_multiplier(3.0)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
model = eqx.nn.Linear(4, 8, key=jr.key(0))

def shard(x):
    if not eqx.is_array(x):
        return x
    value = np.asarray(x)
    spec = P("data") if kind == "sharded" else P()
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

model = jax.tree.map(shard, model)
seen = []

def callback(info):
    seen.append(info.metrics["loss"])
    if info.step == int(until):
        return dpx.Stop("half of it") if kind == "stop" else os.kill(os.getpid(), signal.SIGKILL)

trainer = dpx.Trainer(plan, loss, optax.adam(0.1), method=dpx.Vectorized(), checkpoint=dpx.Checkpoints(folder, every=2))
try:
    result = trainer.fit(model, data, progress=False, callbacks=[callback])
except ValueError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
weights = np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(result.model.weight).addressable_data(0))
out = result.publish(folder + "-release", delta=1e-5)
name = hashlib.sha256(weights.tobytes()).hexdigest()
found = {"weights": name, "values": weights.tolist(), "remarks": result.remarks, "history": list(result.history)}
print(json.dumps({**found, "steps": result.steps, "seen": len(seen)}))
"""


def started(processes, folder, kind, until):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    rest = [str(processes), str(port), str(folder), kind, str(until)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(n), *rest], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
        )
        for n in range(processes)
    ]


def ended(processes, *, killed=False):
    if killed:
        # process 0 has killed itself; the others would wait for it for ever
        processes[0].wait(timeout=300)
        for process in processes[1:]:
            process.kill()
            process.wait()
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert killed or process.returncode == 0, err[-3000:]
        found.append(None if killed else json.loads(out.splitlines()[-1]))
    return found


@pytest.mark.slow  # processes import and connect
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_are_one_run_that_one_process_can_end(tmp_path, kind):
    ended(started(2, tmp_path / "run", kind, 7), killed=True)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert any(name.endswith(".orbax") for name in before) == (kind == "sharded")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    first, second = ended(started(2, tmp_path / "run", kind, -1))
    assert first["weights"] == second["weights"] and first["history"] == second["history"] and first["steps"] == 12
    assert first["seen"] > 0 and second["seen"] == 0
    (alone,) = ended(started(1, tmp_path / "copy", kind, -1))
    # the same mesh on another number of processes: what was on record has the same bits; after that sums over devices are made in another order
    assert alone["history"][:6] == first["history"][:6] and "on other devices" in alone["remarks"][0]
    np.testing.assert_allclose(alone["values"], first["values"], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run-release" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_stop_together_and_must_agree(tmp_path):
    first, second = ended(started(2, tmp_path / "run", "stop", 5))
    assert first["steps"] == second["steps"] == 5 and first["weights"] == second["weights"]
    for found in ended(started(2, tmp_path / "other", "disagree", -1)):
        assert "do not agree on the plan" in found["error"]


def test_texts_and_errors_travel_alone():
    """With one process nothing is sent, and an error stays what it was."""
    from dpx.training import _processes

    assert _processes.text_from_first("ä") == "ä"
    np.testing.assert_array_equal(_processes.from_first(np.arange(3)), np.arange(3))
    with pytest.raises(KeyError):
        _processes.raise_together(KeyError("x"))
    assert Path(__file__).exists()
