"""A renewal process for every example: it takes part, rests, and then takes part again after a geometric wait."""

import functools
import hashlib
import threading
from typing import Any, NamedTuple

import numpy as np

from ..random import Domain, generator
from ._permutation import permuted

_AHEAD = (
    8  # batches kept beyond those that a step depends on, for a checkpoint of a step behind a feed that works ahead
)
_BYTES_PER_RESTING = 128  # a table of all examples may take so many bytes for each of those who rest


class Renewal(NamedTuple):
    """Everybody who took part in none of the `rest` steps before takes part, independently with probability `rate`.

    With `is_warm` the steps before step 0 are as any others, in which an example takes part with probability `share`; otherwise nobody rests.

    **Arguments:**

    - `num_examples`, `rate`, `share`, `rest`, `is_warm`: as above.
    - `seed`: of the sampling.
    """

    num_examples: int
    rate: float
    share: float
    rest: int
    is_warm: bool
    seed: int

    def batch(self, step: int) -> np.ndarray:
        """Who takes part in `step`.

        A step depends on the `rest` steps before it, so it is replayed from the beginning, or from the latest step that was asked for with the
        same seed, which is remembered: in order, a step costs what it draws, and looks up who rests.
        """
        memory = _memory(self)
        with memory.lock:
            return memory.batch(step).copy()

    def state(self, step: int) -> dict[str, np.ndarray]:
        """The batches that `step` and those after it depend on, sealed."""
        memory = _memory(self)
        with memory.lock:
            recent = memory.before(step)
        batches = np.concatenate([np.zeros(0, np.int64), *recent])
        sizes = np.array([len(batch) for batch in recent], np.int64)
        return {"batches": batches, "sizes": sizes, "seal": self._seal(step, batches, sizes)}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Goes on before `step` from what `state(step)` gave, which spares the replay.

        **Raises:** `ValueError` where it is of another run or step, or was changed.
        """
        try:
            batches, sizes = np.asarray(state["batches"], np.int64), np.asarray(state["sizes"], np.int64)
            seal = np.asarray(state["seal"], np.uint8)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`MinSepSampler.resume(state=...)` must be what `resume_state` gave; got {error!r}."
            ) from None
        if not np.array_equal(seal, self._seal(step, batches, sizes)):
            raise ValueError(
                f"`MinSepSampler.resume(state=...)` is of another run than this, of another step than {step}, or was changed. Without it the batches "
                "are the same, and the first takes a replay of all before it."
            )
        memory = _memory(self)
        with memory.lock:
            memory.go_on(step - 1, tuple(np.split(batches, np.cumsum(sizes)[:-1])) if len(sizes) else ())

    def _seal(self, step: int, batches: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """A checksum keyed by the seed, so that it tells nothing of it."""
        text = repr((tuple(self)[:-1], step, sizes.tolist())).encode()
        key = self.seed.to_bytes(16, "little")
        digest = hashlib.blake2b(text, key=key, digest_size=32)
        digest.update(np.ascontiguousarray(batches, "<i8").data)
        return np.frombuffer(digest.digest(), np.uint8)


class _Memory:
    """The latest batches of a process, and who of them rests.

    **Arguments:**

    - `process`: the process.
    """

    def __init__(self, process: Renewal):
        self.process = process
        self.lock = threading.Lock()
        # where a bit for every example takes about as much as those who rest, it is quicker than looking them up
        resting = process.num_examples * process.share * process.rest
        self.bits = None
        if process.rest and process.num_examples / 8 <= _BYTES_PER_RESTING * resting:
            self.bits = np.zeros(process.num_examples // 8 + 1, np.uint8)
        self.latest = -1
        # drawn when it is needed, which it is not where a run is resumed
        self.recent: tuple[np.ndarray, ...] | None = None

    def go_on(self, latest: int, recent: tuple[np.ndarray, ...]) -> None:
        """Takes these for the batches up to `latest`."""
        self.recent = None
        if self.bits is not None:
            self.bits[:] = 0
            for batch in self._resting(recent):
                _taken_where_clear(self.bits, batch)
        self.latest, self.recent = latest, recent

    def batch(self, step: int) -> np.ndarray:
        recent = self._reach(step, 1)
        return recent[step - self.latest - 1]

    def before(self, step: int) -> tuple[np.ndarray, ...]:
        """The batches of the `rest` steps before `step`."""
        rest = self.process.rest
        recent = self._reach(step - 1, rest)
        end = len(recent) - (self.latest - (step - 1))
        return recent[end - rest : end]

    def _reach(self, step: int, number: int) -> tuple[np.ndarray, ...]:
        """Goes on, or starts again, until the last `number` batches up to `step` are remembered."""
        if self.recent is None or len(self.recent) < self.latest - step + number:
            self.go_on(-1, _before(self.process))
        assert self.recent is not None
        while self.latest < step:
            # nothing is remembered meanwhile, so that after an interruption nobody believes bits that are half turned
            recent, self.recent = self.recent, None
            recent = self._advanced(recent)
            self.latest, self.recent = self.latest + 1, recent
        return self.recent

    def _advanced(self, recent: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        rest = self.process.rest
        resting = self._resting(recent)
        rng = generator(self.process.seed, self.latest + 1, Domain.RENEWAL_STEPS)
        # a coin for everybody, of which the coins of those who rest are not looked at
        taken = _heads(self.process.num_examples, self.process.rate, rng)
        if self.bits is not None:
            taken = _taken_where_clear(self.bits, taken)
            _clear(self.bits, resting[0])
        else:
            for batch in resting:
                taken = taken[~_are_in(batch, taken)]
        return (*recent, taken)[-(rest + _AHEAD) :]

    def _resting(self, recent: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        return recent[len(recent) - self.process.rest :] if self.process.rest else ()


def _heads(number: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of so many coins show heads, each with probability `rate`, sorted: waits between heads are geometric and independent."""
    mean = number * rate
    chunk = int(mean + 6 * mean**0.5) + 16
    parts, last = [], -1
    while last < number:
        part = last + np.cumsum(rng.geometric(rate, chunk))
        parts.append(part)
        last = int(part[-1])
    heads = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return heads[: np.searchsorted(heads, number)]


def _are_in(batch: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Which numbers are in a batch, both sorted."""
    if len(batch) == 0:
        return np.zeros(len(numbers), bool)
    places = np.minimum(np.searchsorted(batch, numbers), len(batch) - 1)
    return batch[places] == numbers


def _taken_where_clear(bits: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Those of these numbers whose bits are clear, which are set. Numbers are sorted, each once."""
    places, first, weights = _bytes_of(numbers)
    before = bits.take(places)
    is_clear = before & weights == 0
    if len(numbers):
        bits[places[first]] = before[first] | np.bitwise_or.reduceat(weights, first)
    return numbers[is_clear]


def _clear(bits: np.ndarray, numbers: np.ndarray) -> None:
    """Clears the bits of these numbers, which are set."""
    places, first, weights = _bytes_of(numbers)
    if len(numbers):
        bits[places[first]] ^= np.bitwise_or.reduceat(weights, first)


def _bytes_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In which byte each number has its bit, which numbers are the first ones of a byte, and the bits."""
    places = numbers >> 3
    is_first = np.ones(len(numbers), bool)
    is_first[1:] = places[1:] != places[:-1]
    weights = np.left_shift(1, (numbers & 7).astype(np.uint8), dtype=np.uint8)
    return places, np.flatnonzero(is_first), weights


def _before(process: Renewal) -> tuple[np.ndarray, ...]:
    """The batches of the `rest` steps before the first."""
    number, share, rest = process.num_examples, process.share, process.rest
    if not process.is_warm or rest == 0:
        return (np.zeros(0, np.int64),) * rest
    sizes = generator(process.seed, 0, Domain.RENEWAL_RESTS).multinomial(number, [*[share] * rest, 1 - share * rest])
    edges = np.cumsum(sizes[:-1])
    batches = np.split(permuted(np.arange(edges[-1]), number, process.seed), edges[:-1])
    return tuple(np.sort(batch) for batch in batches)


@functools.lru_cache(maxsize=4)
def _memory(process: Renewal) -> _Memory:
    """What is remembered of one process."""
    return _Memory(process)
