"""Sampling users instead of examples, over any scheme."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np

from .._checks import described, instance, positive_int
from .._types import Adjacency, FilePath, Integer, Participation, Unchecked
from ..random import Domain, generator
from ..strategies import AbstractStrategy
from ._base import AbstractSampler
from ._resume import resume, resume_state
from ._user_index import UserIndex, counted, folder_name, random_subsets, user_index

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class UserSampler(AbstractSampler):
    r"""`base` samples users; each that it takes contributes up to `examples_per_user` of their examples, drawn afresh in every step.

    What is clipped is a user's contribution, so that what is protected is everything a user ever gave. `num_examples` and `batch_size` count
    users, and all that the privacy depends on is that of `base`.

    !!! success "Guarantee"

        The distribution of what a user contributes in a step depends on that user's examples alone. A user with no more than
        `examples_per_user` examples contributes them all, others a uniformly random subset; time and memory are proportional to the batch.

    **Arguments:**

    - `base`: who of the users is in a batch; its `num_examples` is the number of users.
    - `user_ids`: for each row of the data the user that it belongs to: a number from 0, or a name (text, or whatever can be hashed), of which there
        are as many different ones as `base` samples. Every user owns at least one row.
    - `examples_per_user`: at most so many rows of one user are in a batch.
    - `index`: a folder for the index of which rows a user owns, which is made there, for nobody else to read, and mapped into memory. Without it the
        index is in memory, 8 bytes a row. Rows that are sorted by user need none. Where `user_ids` are a memory map, memory then holds a number
        for every user and what a batch takes, however many rows there are.

    ??? example

        ```python
        sampler = UserSampler(PoissonSampler(len(set(names)), 100, 1_000), names, examples_per_user=4)
        ```

    ??? cite "Reference"

        McMahan et al., *Learning differentially private recurrent language models*, ICLR 2018; Charles et al., *Fine-tuning large language models
        with user-level differential privacy*, 2024 (arXiv:2407.07737).
    """

    base: AbstractSampler
    user_ids: np.ndarray
    examples_per_user: int = eqx.field(static=True)
    index: str | None = eqx.field(static=True)
    _index: UserIndex = eqx.field(init=False)
    unit: ClassVar[str] = "user"

    def __init__(
        self, base: AbstractSampler, user_ids: Any, examples_per_user: Integer, *, index: FilePath | None = None
    ):
        name = "UserSampler"
        instance(f"{name}(base=...)", base, AbstractSampler, "PoissonSampler(num_users, 100, 1_000)")
        if base.unit != "example":
            raise ValueError(f"`{name}(base=...)` must sample examples, one for each user; got {type(base).__name__}.")
        self.base = base
        self.examples_per_user = positive_int(f"{name}(examples_per_user=...)", examples_per_user)
        users = base.num_examples
        ids = _numbered(f"{name}(user_ids=...)", user_ids, users)
        counts = counted(ids, users)
        if not counts.all():
            raise ValueError(
                f"`{name}(user_ids=...)` gives no row to {np.sum(counts == 0)} of the {users} users that `base` samples, the first of them "
                f"{np.argmin(counts)}. Number those that have any with `np.unique(..., return_inverse=True)`, and give `base` their number."
            )
        self.user_ids = ids
        self.index = folder_name(index)
        self._index = user_index(ids, counts, self.index)

    @property
    def num_examples(self) -> int:
        return self.base.num_examples

    @property
    def batch_size(self) -> int:
        return self.base.batch_size

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def num_rows(self) -> int:
        return len(self.user_ids)

    @property
    def participation(self) -> Participation:
        return self.base.participation

    @property
    def participation_per_event(self) -> Participation:
        return self.base.participation_per_event

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]:
        return self.base.adjacencies

    @property
    def physical_batch_size(self) -> int:
        return self.base.physical_batch_size

    @property
    def assumption(self) -> str:
        return f"{self.base.assumption}; here an example is a user, with at most {self.examples_per_user} rows of theirs in a batch, drawn at random"

    def indices(self, seed: int, step: int) -> np.ndarray:
        users = self.base.indices(seed, step)
        rows, edges = self._index
        begins, sizes = edges[users], edges[users + 1] - edges[users]
        places = np.arange(self.examples_per_user)
        positions = np.where(places < sizes[:, None], begins[:, None] + places, -1)
        is_over = sizes > self.examples_per_user
        subsets = random_subsets(sizes[is_over], self.examples_per_user, generator(seed, step, Domain.ROWS_OF_USERS))
        positions[is_over] = begins[is_over, None] + subsets
        if rows is None:
            return positions
        batch = np.where(positions >= 0, rows[positions], -1)
        # a file that somebody changed may not give users the rows of others
        if self.index is not None:
            owners = self.user_ids[np.clip(batch, 0, self.num_rows - 1)]
            if ((owners != users[:, None]) & (positions >= 0)).any() or batch.max(initial=-1) >= self.num_rows:
                raise ValueError(
                    f"`UserSampler(index={self.index!r})` gives users rows that are not theirs: the file was changed. Remove the folder, and it is "
                    "made again."
                )
        return batch

    def resume_state(self, seed: Integer, step: Integer) -> dict[str, np.ndarray]:
        """What `base` needs: see `dpx.sampling.resume_state`."""
        return resume_state(self.base, seed, step)

    def resume(self, seed: Integer, step: Integer, state: Unchecked[dict[str, np.ndarray]]) -> None:
        """Hands it over to `base`: see `dpx.sampling.resume`."""
        resume(self.base, seed, step, state)

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        return self.base.event(mechanism, bands, steps, strategy)


def _numbered(call: str, user_ids: Any, users: int) -> np.ndarray:
    """The users of the rows as numbers from 0: as they are where they are numbers, else names in the order in which they first appear."""
    # arrays, and pandas, which has types of its own
    is_array = isinstance(getattr(user_ids, "dtype", None), np.dtype) and getattr(user_ids, "ndim", 0) > 0
    is_array |= hasattr(user_ids, "iloc")
    if not (is_array and user_ids.ndim == 1 or isinstance(user_ids, list | tuple)):
        raise ValueError(
            f"`{call}` must be one integer for each row of the data, or one name, in order; got {described(user_ids)}."
        )
    try:
        ids = np.asarray(user_ids)
    except ValueError:  # tuples of several lengths
        ids = np.empty(len(user_ids), object)
    if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) and len(ids):
        if ids.min() < 0 or ids.max() >= users:
            outside = ids[(ids < 0) | (ids >= users)]
            raise ValueError(
                f"`{call}` must lie between 0 and {users - 1}, since `base` samples {users} users; got {outside[0]} and {len(outside) - 1} more "
                "outside. Number users with `np.unique(user_ids, return_inverse=True)[1]`."
            )
        return ids.astype(np.int64, copy=False) if ids.dtype.itemsize < 4 else ids
    # names as they were given: NumPy would make texts of what is mixed, and a table of tuples
    given: Any = user_ids
    names: list[Any] = given.tolist() if is_array else list(given)
    is_number = np.issubdtype(ids.dtype, np.number) or ids.dtype == bool
    if not names or is_number and ids.ndim == 1 or not all(map(_is_hashable, names)):
        raise ValueError(
            f"`{call}` must be one integer for each row of the data, or one name (a text, or whatever can be hashed); got {ids.dtype} of shape "
            f"{ids.shape}. Number users with `np.unique(names, return_inverse=True)[1]`."
        )
    missing = [row for row, name in enumerate(names) if _is_missing(name)]
    if missing:
        raise ValueError(
            f"`{call}` gives no user to {len(missing)} of {len(names)} rows, the first of them {missing[0]}, so that nobody's privacy would cover "
            "them. Leave these rows out."
        )
    numbers: dict[Hashable, int] = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) != users:
        raise ValueError(
            f"`{call}` names {len(numbers)} users, and `base` samples {users}: give `base` as many as there are."
        )
    return np.array([numbers[name] for name in names], np.int64)


def _is_hashable(name: Any) -> bool:
    try:
        hash(name)
    except TypeError:
        return False
    return True


def _is_missing(name: Any) -> bool:
    """Whether a name is None, NaN (which differs from itself) or pandas' NA (which will not say)."""
    try:
        return name is None or bool(name != name)
    except (TypeError, ValueError):
        return True
