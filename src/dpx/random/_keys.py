"""Keys and seeds: fresh ones come from the operating system's entropy, never from a configuration."""

import os
import secrets
import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, UInt32

from .._checks import described, is_tracing
from ._chacha import CHACHA20

_MSG_TRACED = (
    "`dpx.random.{name}()` was called while JAX was tracing a function: the compiled function would use the same randomness every "
    "time it is called, and `vmap` the same one in every lane; two runs that share their noise have no privacy. Draw it outside "
    "`jit`/`vmap`/`grad`, and pass it in (for `PrivateGradient.init`, as `key=`; for a sweep, one of `jax.random.split(key, lanes)` for each lane)."
)
_MSG_PROCESSES = (
    "`dpx.random.{name}()` was called in a run of {number} processes: each would draw its own, so that their noise and their batches differ, and "
    "replicas publish the same sum under several noises. Call `{shared}` in every process: process 0 draws, and all get what it drew. Pass it in "
    "(for `PrivateGradient.init`, as `key=`; for `PrivacyPlan.batches`, as `seed=`)."
)


def fresh_key(impl: Any = None) -> Key[Array, ""]:
    """A PRNG key made of entropy from the operating system.

    **Arguments:**

    - `impl`: the key type: a name of JAX's, or `dpx.random.CHACHA20`; by default `jax_default_prng_impl`.

    **Returns:**

    A typed key. Two calls never share noise, in one run or in two.

    **Raises:**

    - `RuntimeError` inside any transformation of JAX's (`jit`, `vmap`, `grad`, ...), where the key would become a constant of the compiled
        program, or the same in every lane; and in a run of several processes, which must share one: see `shared_key`.
    """
    _check_alone("fresh_key", "dpx.random.shared_key()")
    return _drawn_key(impl)


def shared_key(impl: Any = None) -> Key[Array, ""]:
    """A fresh key that all processes of a run share: process 0 draws it and sends it to the others, which must call this too.

    **Arguments:**

    - `impl`: as for `fresh_key`, which this is where there is one process.

    **Raises:** `RuntimeError` inside any transformation of JAX's.
    """
    _check_outside("shared_key")
    key = _drawn_key(impl)
    return jr.wrap_key_data(jnp.asarray(_from_first_process(np.asarray(jr.key_data(key)))), impl=jr.key_impl(key))


def shared_seed() -> int:
    """A fresh seed that all processes of a run share, in the same way."""
    _check_outside("shared_seed")
    words = _from_first_process(np.frombuffer(os.urandom(16), np.uint32))
    return int.from_bytes(words.tobytes(), sys.byteorder)


def _drawn_key(impl: Any) -> Key[Array, ""]:
    like = _key_like(impl)
    shape = jax.random.key_data(like).shape
    words = np.frombuffer(os.urandom(4 * int(np.prod(shape))), np.uint32).reshape(shape)
    return jr.wrap_key_data(jnp.asarray(words), impl=jr.key_impl(like))


def _from_first_process(words: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return words
    from jax.experimental import multihost_utils

    # what the others drew is never looked at
    return np.asarray(multihost_utils.broadcast_one_to_all(words))


def _check_outside(name: str) -> None:
    if is_tracing():
        raise RuntimeError(_MSG_TRACED.format(name=name))


def _check_alone(name: str, shared: str) -> None:
    _check_outside(name)
    if (number := jax.process_count()) > 1:
        raise RuntimeError(_MSG_PROCESSES.format(name=name, number=number, shared=shared))


def chacha_key() -> Key[Array, ""]:
    """A ChaCha20 key of 256 bits of entropy from the operating system: cryptographic randomness for `jax.random` and all of dpx.

    ```python
    state = private_grad.init(model, key=dpx.random.chacha_key())
    ```

    JAX's own generator, threefry, has keys of 64 bits and is not meant to withstand an attacker, who sees noisy gradients and may know
    most of the noise. With ChaCha20 (RFC 8439), to predict the rest is to break the cipher.

    !!! success "Guarantee"

        Streams of keys derived by `split` and `fold_in` do not overlap, and no stream repeats. The numbers are the same eager, jitted,
        vmapped, and on any number of devices, each of which computes its own without communication.

    **Returns:**

    A typed key, as for `fresh_key(impl=dpx.random.CHACHA20)`. `jax.random.key(seed, impl=dpx.random.CHACHA20)` is one that can be guessed as
    easily as the seed: for tests.

    **Raises:**

    - `RuntimeError` where `fresh_key` does; in several processes use `dpx.random.shared_key(dpx.random.CHACHA20)`.

    ??? cite "Reference"

        Nir and Langley, *ChaCha20 and Poly1305 for IETF protocols*, RFC 8439, 2018; Bernstein, *ChaCha, a variant of Salsa20*, 2008.
    """
    _check_alone("chacha_key", "dpx.random.shared_key(dpx.random.CHACHA20)")
    return _drawn_key(CHACHA20)


def fresh_seed() -> int:
    """A 128-bit seed for a sampler, from the operating system's entropy.

    Who can guess it knows who was in each batch, and loses the amplification by sampling: keep it as secret as the data.

    **Raises:** `RuntimeError` where `fresh_key` does; in several processes use `shared_seed`.
    """
    _check_alone("fresh_seed", "dpx.random.shared_seed()")
    return secrets.randbits(128)


def check_key(call: str, key: Any) -> None:
    """Raises unless `key` is one typed key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"`{call}` must be a typed PRNG key, as from `jax.random.key(seed)`; got {described(key)}.")
    if key.shape != ():
        raise ValueError(
            f"`{call}` must be one key; got an array of keys of shape {key.shape}. Use `jax.vmap` over seeds."
        )


def key_words(key: Key[Array, "*lanes"]) -> tuple[UInt32[Array, "*lanes words"], Any]:
    """A typed key as plain numbers, which any file format can hold, and the name of its type."""
    impl = jr.key_impl(key)
    return jr.key_data(key), "chacha20" if impl == CHACHA20 else impl


def key_of_words(words: UInt32[Array, "*lanes words"], impl: Any) -> Key[Array, "*lanes"]:
    """The typed key that `key_words` took apart."""
    return jr.wrap_key_data(jnp.asarray(words), impl=CHACHA20 if impl == "chacha20" else impl)


def _key_like(impl: Any) -> Key[Array, ""]:
    try:
        return jr.key(0, impl=impl)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"`dpx.random.fresh_key(impl=...)` must be a name of JAX's, such as 'threefry2x32', or `dpx.random.CHACHA20`; got {described(impl)}."
        ) from error
