"""Lines on which a guarantee rests, each broken on purpose: a test must notice.

    python -m tests.mutants [--only name] [--jobs 2]

Every mutant is a text that occurs once in the source, what it becomes, and the tests that must fail then. They run in a copy. Ends with status 1 if one
survives, or if a text is not there any more: the line was changed, and so must be its mutant. Takes about half an hour on two cores.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """What is broken, as a text and its replacement, and who must notice: arguments of pytest."""

    name: str
    before: str
    after: str
    tests: str


MUTANTS = [
    # clipping
    Mutant("examples that are not finite are kept", "keep = mask & jnp.all(jnp.isfinite(norms), axis=1)", "keep = mask", "test_clipping.py test_ghost_attacks.py"),
    Mutant("the mask is forgotten", "keep = mask & jnp.all(jnp.isfinite(norms), axis=1)", "keep = jnp.all(jnp.isfinite(norms), axis=1)", "test_private_gradient.py test_units.py"),
    Mutant("overflowing squares are not measured again", "    return lax.cond(overflows, again, lambda: plain)", "    return plain", "test_ghost_attacks.py -k known"),
    Mutant("Gram's cancellation is not paid for", "square, 0) + count * UNIT * reach**2)", "square, 0) + 0 * UNIT * reach**2)", "test_ghost_attacks.py -k known"),
    Mutant("imaginary parts are left out of norms", "    if all(is_complex):", "    if False:", "test_ghost_attacks.py"),
    Mutant("a gradient may be computed twice", "if not inexact or not firsts:", "if True:", "test_ghost_attacks.py -k twice"),
    Mutant("the added sum's rounding is not paid for", "+ added * reach", "+ 0 * reach", "test_ghost_attacks.py -k known"),
    Mutant("one of two roundings is not paid for", "added = 2 * (sum(map(roundings, terms))", "added = 1 * (sum(map(roundings, terms))", "test_ghost_attacks.py -k known"),
    Mutant("weighted factors underflow", "        term = balanced(term)", "        term = term", "test_ghost_attacks.py -k known"),
    Mutant("squares of factors underflow", "return [divide(balanced(term)) for term in terms], shift", "return [divide(term) for term in terms], shift", "test_ghost_attacks.py -k known"),
    Mutant("slack fills what is not left", "unused = 1 - jnp.minimum(norms / state.norm, 1)", "unused = 1.001 - jnp.minimum(norms / state.norm, 1)", "test_slack_clipping.py"),
    Mutant("who is left out leaves slack", "is_kept = mask & jnp.isfinite(norms)", "is_kept = jnp.isfinite(norms)", "test_slack_clipping.py"),
    # noise
    Mutant("every step has the same Gaussian noise", "return standard_normal(jr.fold_in(key, jnp.maximum(step - age, 0)), total)", "return standard_normal(key, total)", "test_registry.py -k noise-correlated"),
    Mutant("Laplace noise is two per cent smaller", "return x + scale.astype(z.dtype) * z", "return x + 0.98 * scale.astype(z.dtype) * z", "test_registry.py -k noise-laplace -m 'slow or not slow'"),
    Mutant("the strategy's sensitivity is left out", "np.float32(factor * PRODUCT_UP) * PRODUCT_UP", "np.float32(PRODUCT_UP) * PRODUCT_UP", "test_correlated.py"),
    Mutant("the clipping's own counts are free", "scale * (JOINT_UP / jnp.sqrt(1 - load))", "scale", "test_clipping_beyond_flat.py"),
    Mutant("counts are paid for once a run", "return fitting if most is None else min(most, fitting)", "return 1", "test_clipping_beyond_flat.py test_correlated.py test_plan.py"),
    Mutant("integers outside of the ball are kept", "return [jnp.where(expand_like(is_inside, v), v, 0) for v in integers]", "return integers", "test_discrete_gaussian.py"),
    Mutant("noise of metrics has gaps", "large * (scale / wide)) * wide, jnp.round(small * (scale / 2**_FINER / step)) * step", "large * (scale / wide)) * wide, jnp.round(small * 0) * step", "test_metrics.py -k digit"),
    # steps
    Mutant("a step more than was paid for", "return state.step < (_NO_LIMIT if steps is None else steps)", "return state.step <= (_NO_LIMIT if steps is None else steps)", "test_private_gradient.py"),
    Mutant("a step without budget teaches the clipping", "jax.tree.map(lambda x, y: jnp.where(is_good, x, y), (clipping, metrics), old)", "jax.tree.map(lambda x, y: x, (clipping, metrics), old)", "test_clipping_beyond_flat.py test_metrics.py test_private_gradient.py"),
    # sampling
    Mutant("Poisson's rate is understated", "if self.max_batch_size is None or self.max_batch_size > self.num_examples:\n            once", "q = 0.98 * q if self.max_batch_size is None else q\n        if self.max_batch_size is None or self.max_batch_size > self.num_examples:\n            once", "test_sampling.py test_accounting.py test_registry.py"),
    Mutant("who comes when a batch is full is forgotten", "self.num_examples + 1, q, self.max_batch_size", "self.num_examples, q, self.max_batch_size", "test_brackets.py -k truncated"),
    Mutant("batches of one size under add or remove", "return ADJACENCIES[1:]\n\n    @property\n    def physical_batch_size(self) -> int:\n        return self.batch_size\n\n    @property\n    def assumption(self) -> str:\n        return (\n            f\"every batch is exactly", "return ADJACENCIES\n\n    @property\n    def physical_batch_size(self) -> int:\n        return self.batch_size\n\n    @property\n    def assumption(self) -> str:\n        return (\n            f\"every batch is exactly", "test_sampling_schemes.py test_sampling.py"),
    # accounting
    Mutant("what is replaced moves a sum once", 'return event.noise_multiplier / (2 if adjacency == "replace_one" else 1)', "return event.noise_multiplier", "test_accounting.py test_every_budget.py"),
    Mutant("couplings cost nothing", "worst += self.coupling * (1 + math.exp(min(epsilon, 700.0)))", "worst += 0.0", "test_accounting.py test_accounting_sampling.py"),
    Mutant("the rounding of transforms is not paid for", "mass = np.maximum(mass, 0.0) + 4 * error / math.sqrt(length)", "mass = np.maximum(mass, 0.0)", "test_every_budget.py"),
    Mutant("tails that are cut off are forgotten", "infinity = min(1.0, infinity + aim.tail)", "infinity = min(1.0, infinity)", "test_every_budget.py test_accounting.py"),
    Mutant("repeated Gaussians count once", "total = math.fsum(count * part.noise_multiplier**-2 for part, count in pairs)", "total = math.fsum(part.noise_multiplier**-2 for part, count in pairs)", "test_foreign_events.py test_accounting.py"),
    Mutant("addition costs what removal does", "factor = np.where(count == 2, 1.0, 3.0)", "factor = np.where(count == 2, 1.0, 1.0)", "test_poisson_renyi.py"),
    Mutant("a calibration ends on the wrong side", "    return math.exp(high)\n\n\ndef near_root", "    return math.exp(low)\n\n\ndef near_root", "test_every_budget.py -k 'search or met'"),
    # bookkeeping
    Mutant("what all units were in is left out of a part", "if entry.part in (None, part)", "if entry.part == part", "test_ledger_parts.py"),
    Mutant("parts may move under replacement", 'if self.adjacency == "replace_one" and not self.fixed_parts:', "if False:", "test_ledger_parts.py"),
    Mutant("a full filter lets steps through", "if not ready.spent + cost <= ready.budget:", "if False:", "test_ledger.py"),
    Mutant("a filter takes replacement for removal", 'sensitivity = 2.0 if self.adjacency == "replace_one" else 1.0', "sensitivity = 1.0", "test_ledger.py test_tuning.py"),
    # training and data
    Mutant("a record's checksum is not looked at", "if file.read() != digest.digest():", "if False:", "test_training.py"),
    Mutant("a step is taken before it is on record", "if self.is_program_new:", "if False:", "test_training.py"),
    Mutant("who stops by looking pays for fewer steps", "return horizon if stopped is not None and not stopped.is_public else steps", "return steps", "test_training.py -k looking"),
    Mutant("a record gives way to another seed", 'if seed is not None and str(seed) != meta["seed"]:', "if False:", "test_training.py -k win"),
    Mutant("keys of losses go by position", "ranks = jnp.maximum(jnp.cumsum(off_batch_axis(mask, axis)) - 1, 0)", "ranks = jnp.arange(mask.shape[0])", "test_feed.py -k padding_between"),
    # auditing
    Mutant("a lower bound of a probability is one success too high", "bound = special.betaincinv(np.maximum(k, 0.5), n - k + 1, failure)", "bound = special.betaincinv(k + 1, np.maximum(n - k, 0.5), failure)", "test_audit_estimators.py -k reference"),
    # metrics
    Mutant("entries that are not finite are counted", "steps = jnp.where(expand_like(is_real, steps), steps, 0.0).astype(jnp.int32)", "steps = steps.astype(jnp.int32)", "test_metrics.py"),
]  # fmt: skip


def survives(mutant: Mutant) -> str | None:
    """What is wrong, if no test noticed."""
    hits = [p for p in (ROOT / "src").rglob("*.py") if mutant.before in p.read_text()]
    if len(hits) != 1 or hits[0].read_text().count(mutant.before) != 1:
        return f"the text is in {len(hits)} files, and must be once in one: {mutant.before!r}"
    names = [name for name in shlex.split(mutant.tests) if name.endswith(".py")]
    options = [name for name in shlex.split(mutant.tests) if not name.endswith(".py")]
    if missing := [name for name in names if not (ROOT / "tests" / name).exists()]:
        return f"no such tests: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("src", "tests", "docs"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "mkdocs.yml"):
            shutil.copy(ROOT / part, copy / part)
        path = copy / hits[0].relative_to(ROOT)
        path.write_text(path.read_text().replace(mutant.before, mutant.after))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            [*command, *(f"tests/{name}" for name in names)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy / "src")},
            capture_output=True,
            text=True,
        )
    # 1: a test failed. Anything else (2: nothing could be collected, 5: nothing was) is no test that noticed
    return None if done.returncode == 1 else f"pytest ended with {done.returncode}: {done.stdout.strip()[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Shows that every recorded mutant is caught.")
    parser.add_argument("--only", default="", help="mutants whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    escaped = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, wrong in zip(chosen, pool.map(survives, chosen), strict=True):
            escaped += wrong is not None
            print(
                f"{'caught' if wrong is None else 'SURVIVED'}  {mutant.name}{'' if wrong is None else ': ' + wrong}",
                flush=True,
            )
    print(f"{len(chosen) - escaped} of {len(chosen)} mutants caught")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
