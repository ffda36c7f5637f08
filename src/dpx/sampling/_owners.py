"""Examples with several owners: a subset in which nobody has many."""

from collections import Counter
from collections.abc import Collection, Hashable
from typing import Any, cast

import numpy as np

from .._checks import described, positive_int
from ..random import Domain, check_seed, generator


def bound_contributions(owners: Any, per_owner: Any, *, seed: int = 0) -> np.ndarray:
    r"""Examples such that every owner has at most `per_owner` of them: greedily, in a random order, each that exceeds nobody's share.

    An e-mail belongs to its sender and to everybody it was sent to, and counts for all of them. To protect owners, train on
    `[leaf[rows] for leaf in data]` only, with a plan for `len(rows)` examples.

    !!! success "Guarantee"

        The subset depends on who owns what, and on nothing else that is in the data. Let two data sets be neighbours if they have the same
        examples with the same owners, and differ in the contents of examples that one owner has. Then their subsets are the same rows, of which
        at most $k$ = `per_owner` differ, and a plan for them protects

        - with $k = 1$, owners exactly as well as examples: `adjacency="replace_one"` if their contents become any others,
            `"replace_special"` if they become empty;
        - with $k > 1$, groups of $k$ examples: with $(\varepsilon, \delta)$ for one, $(k \varepsilon, \delta\, (e^{k \varepsilon} - 1) /
            (e^\varepsilon - 1))$ for an owner.

    Nothing is said about data sets with other owners. Who owns what is taken to be public, as is the number of rows, for if an owner
    left, examples of others would take the place of theirs: `adjacency="add_or_remove_one"` does not protect owners.

    **Arguments:**

    - `owners`: for every example its owners, any hashable values; or an array of shape `(examples,)`, for one owner each, or
        `(examples, owners)`, in which negative numbers stand for nobody.
    - `per_owner`: $k$.
    - `seed`: of the order. It is as public as the owners are.

    **Returns:**

    The chosen rows, sorted, as int64. None can be added to them without exceeding somebody's share.

    **Raises:** `ValueError` if an example has no owner, since nobody's privacy would cover it.

    ??? cite "Reference"

        Ganesh et al., *It's my data too: private ML for datasets with multi-user training examples*, ICML 2025 (arXiv:2503.03622), of
        which this is the greedy baseline under the fixed-graph definition.
    """
    per_owner = positive_int("bound_contributions(per_owner=...)", per_owner)
    seed = check_seed("bound_contributions(seed=...)", seed)
    sets = _owner_sets(owners)
    counts: Counter[Hashable] = Counter()
    chosen = []
    for row in generator(seed, 0, Domain.OWNERS).permutation(len(sets)).tolist():
        if all(counts[owner] < per_owner for owner in sets[row]):
            counts.update(sets[row])
            chosen.append(row)
    return np.sort(np.asarray(chosen, np.int64))


def _owner_sets(owners: Any) -> list[set[Hashable]]:
    if isinstance(owners, np.ndarray):
        if owners.ndim not in (1, 2) or owners.dtype == object or len(owners) == 0:
            raise ValueError(
                f"`bound_contributions(owners=...)` must be an array of shape `(examples,)` or `(examples, owners)`; got {owners.dtype} of shape "
                f"{owners.shape}. Give a list of collections where numbers of owners differ."
            )
        rows = owners.reshape(len(owners), -1).tolist()
        padded = np.issubdtype(owners.dtype, np.signedinteger)
        sets = [{owner for owner in row if not (padded and owner < 0)} for row in rows]
    else:
        is_many = isinstance(owners, list | tuple | set) or hasattr(owners, "iloc")
        if not is_many or any(isinstance(row, str | bytes) or not isinstance(row, Collection) for row in owners):
            raise ValueError(
                "`bound_contributions(owners=...)` must have a collection of owners for every example, such as `[['ada', 'bob'], ['ada']]`; got "
                f"{described(owners)}."
            )
        try:
            sets = [set(row) for row in cast(Collection[Collection[Hashable]], owners)]
        except TypeError as error:
            raise ValueError(
                f"`bound_contributions(owners=...)`: owners must be hashable, such as names ({error})."
            ) from None
    missing = [i for i, row in enumerate(sets) if not row]
    if missing:
        raise ValueError(
            f"`bound_contributions(owners=...)` gives no owner to {len(missing)} of {len(sets)} examples, the first of them {missing[0]}, so that "
            "nobody's privacy would cover them. Give each an owner of its own, or leave them out."
        )
    return sets
