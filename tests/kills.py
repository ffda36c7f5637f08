"""Kills runs, and looks at what they end with: started by `test_kills.py` in a Python of its own.

JAX is imported here and never started, so that a child can be forked in no time and start a JAX of its own: importing takes seconds, and a killed
run needs one each time.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import dp_accounting  # noqa: F401  # imported once, for all children
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from dp_accounting.pld import pld_privacy_accountant  # noqa: F401

import dpx
import dpx.data
from dpx.training import _checkpoints, _record

STEPS, EVERY = 24, 3


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def small():
    return dpx.dp_sgd(60, 8, STEPS, noise_multiplier=2.0)


def rich():
    sampler = dpx.CyclicPoissonSampler(60, 8, STEPS, cycle_length=3)
    noise = dpx.CorrelatedGaussian(dpx.BandedToeplitz.square_root(3), 2.0)
    plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), noise)
    return plan.with_metrics(loss=dpx.metrics.Mean("losses", 0.0, 5.0, noise_multiplier=20.0))


def run(folder, kind, tell):
    """One run, from its start or its last record, to its publication; tells the number of every step that it has taken."""
    # restarts find what is compiled
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(60, 2)).astype(np.float32)
    plan = {"small": small, "rich": rich}[kind]()
    checkpoint = dpx.Checkpoints(folder / "run", every=EVERY, keep=2, rebuild_noise=kind == "rich")
    average = dpx.optimizers.ema(0.9) if kind == "rich" else None
    optimizer = optax.adam(0.1) if kind == "rich" else optax.sgd(0.1, momentum=0.9)
    trainer = dpx.Trainer(plan, loss, optimizer, method=dpx.Vectorized(), checkpoint=checkpoint, average=average)
    model = eqx.nn.Linear(4, 2, key=jr.key(0))
    # with callbacks the run waits for its records; without, they are written while it goes on
    callbacks = [lambda info: tell(info.step)] if kind == "small" else []
    key = jr.key(5, impl=dpx.random.CHACHA20 if kind == "rich" else None)
    result = trainer.fit(model, data, seed=3, key=key, callbacks=callbacks, progress=False)
    tell(STEPS)
    result.publish(folder / "release", delta=1e-5)


def forked(job):
    """A child that does the job, and the end of a pipe where it tells numbers; `os._exit`, so that it runs nothing of its parent's."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        os.close(reader)
        job(lambda number: os.write(writer, bytes([number])))
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(child):
    """How a child ended: 0, 1, or the negative number of a signal."""
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def contents(folder):
    """What a run ended with: hashes of its publication, and of what its last record holds."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "release").iterdir())
    }
    last = dpx.Checkpoints(folder / "run").steps[-1]
    record = _record.read(_checkpoints.file_of(folder / "run", last))
    for name, array in record.arrays.items():
        found[name] = hashlib.sha256(array.tobytes()).hexdigest()
    assert last == STEPS and not [name for name in os.listdir(folder) if name not in ("run", "release")]
    return found


def signals(base, kind, number, seed):
    """So many SIGKILLs at random instants of runs; every run that ends must end like the one that nobody killed."""
    rng = random.Random(seed)
    child, reader = forked(lambda tell: run(base / "whole", kind, tell))
    assert ended(child) == 0
    os.close(reader)
    expected = contents(base / "whole")
    took = 1.5
    if kind != "small":
        begun = time.monotonic()
        child, reader = forked(lambda tell: run(base / "timed", kind, tell))
        assert ended(child) == 0
        os.close(reader)
        took = time.monotonic() - begun
    kills, runs, wrong, at = 0, 0, [], []
    while kills < number or (base / "killed").exists():
        folder = base / "killed"
        child, reader = forked(lambda tell, folder=folder: run(folder, kind, tell))
        if kills < number:
            if kind == "small":
                # some steps on, and a little later: before, in and after the writing of records, and in the publication
                wanted, seen = rng.randint(0, 6), -1
                while wanted and (told := os.read(reader, 1)):
                    seen, wanted = told[0], wanted - 1
                time.sleep(rng.choice([0.0, 0.003, 0.02]) * rng.random() if seen >= 0 else took * rng.random())
            else:
                time.sleep(took * rng.uniform(0.3, 1.1))
            os.kill(child, signal.SIGKILL)
        end = ended(child)
        os.close(reader)
        if end == -signal.SIGKILL:
            kills += 1
            steps = dpx.Checkpoints(folder / "run").steps
            at.append(steps[-1] if steps else -1)
            for step in steps:  # whatever is there can be read
                _record.read(_checkpoints.file_of(folder / "run", step))
        elif end != 0:
            wrong.append(f"a run ended with {end} after {kills} kills")
            break
        else:
            runs += 1
            if contents(folder) != expected:
                wrong.append(f"run {runs} ended differently, after {kills} kills")
            shutil.rmtree(folder)
    return {"kills": kills, "runs": runs, "wrong": wrong, "records": sorted(set(at)), "seed": seed}


def instants(base):
    """Dies at every single call that changes files while records are written, one after the other, and looks at what is there then."""
    import builtins
    import fcntl

    def job(folder, deadline):
        count = 0

        def deadly(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == deadline:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in ("open", "fsync", "replace", "unlink", "mkdir", "write"):
            setattr(os, name, deadly(getattr(os, name)))
        fcntl.flock = deadly(fcntl.flock)
        real_open = builtins.open

        def opened(path, mode="r", *args, **kwargs):
            file = real_open(path, mode, *args, **kwargs)
            if "b" not in mode or "+" not in mode:
                return file
            raw: Any = file
            raw = raw.detach()  # unbuffered, so that what was written before a kill is there

            class Writer:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    raw.close()

                write = staticmethod(deadly(raw.write))

            return Writer()

        builtins.open = opened
        records = _checkpoints.RunFolder(dpx.Checkpoints(folder, keep=2))
        for step in range(1, 5):
            record = _record.Record({"step": step}, {"x": np.full(100, step, np.float32)})
            records._write(step, lambda record=record: record)
        records.close()
        os._exit(0)

    deadline, died, wrong, before = 0, 0, [], -1
    while True:
        deadline += 1
        folder = base / f"run{deadline}"
        child, reader = forked(lambda tell, folder=folder, deadline=deadline: job(folder, deadline))
        os.close(reader)
        end = ended(child)
        if end == 0:
            break
        died += end == 9
        records = _checkpoints.RunFolder(dpx.Checkpoints(folder, keep=2))
        newest = records.newest()
        records.close()
        step = -1 if newest is None else newest[0]
        if newest is not None and not (newest[1].arrays["x"] == step).all():
            wrong.append(f"call {deadline}: the record of step {step} is another")
        # what was committed a call earlier is committed still; and nothing half written stays
        if step < before or any(name.startswith(".") for name in os.listdir(folder)) or end != 9:
            wrong.append(f"call {deadline}: step {step} after {before}, {sorted(os.listdir(folder))}, {end}")
        before = step
    return {"instants": died, "wrong": wrong, "last": before}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["signals", "instants", "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="small")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = {}
    if args.mode in ("instants", "all"):
        found["instants"] = instants(args.folder)
    if args.mode in ("signals", "all"):
        found["signals"] = signals(args.folder, args.kind, args.number, args.seed)
    print(json.dumps(found if args.mode == "all" else found[args.mode]))
