"""Which rows belong to a user: in memory, in a file that is mapped, or plain to see where rows are sorted by user."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._files import write_atomically, write_text_atomically

_CHUNK = 2**24  # rows looked at together, of data that may not fit into memory
_RECORD = "index.json"


class UserIndex(NamedTuple):
    """The rows of every user.

    **Arguments:**

    - `rows`: the rows of the data, sorted by user; None where they are as they stand.
    - `edges`: where each user's rows begin there, and where the last's end.
    """

    rows: np.ndarray | None
    edges: np.ndarray


def counted(ids: np.ndarray, users: int) -> np.ndarray:
    """How many rows each user has."""
    counts = np.zeros(users, np.int64)
    for _, chunk in _chunks(ids):
        counts += np.bincount(chunk, minlength=users)
    return counts


def user_index(ids: np.ndarray, counts: np.ndarray, folder: str | None) -> UserIndex:
    """The rows of every user, of which there are so many each; kept in `folder`, and found there the next time, where one is given."""
    edges = np.concatenate([[0], np.cumsum(counts)])
    if _is_sorted(ids):
        return UserIndex(None, edges)
    if folder is None:
        return UserIndex(np.argsort(ids, kind="stable"), edges)
    path, record = Path(folder) / "rows.npy", Path(folder) / _RECORD
    print_of_ids = {"sha256": _hash_of(ids), "rows": len(ids), "users": len(counts)}
    if record.exists():
        if json.loads(record.read_text()) != print_of_ids:
            raise ValueError(
                f"`UserSampler(index={folder!r})` holds the index of other `user_ids`. Give another folder, or remove this one."
            )
    else:
        write_atomically(path, lambda half: _write_sorted(half, ids, edges), mode=0o600)
        write_text_atomically(record, json.dumps(print_of_ids), mode=0o600)
    rows = np.load(path, mmap_mode="r")
    if rows.shape != (len(ids),) or rows.dtype != np.int64:
        raise ValueError(
            f"`UserSampler(index={folder!r})` holds a file that is no index. Remove the folder, and it is made again."
        )
    return UserIndex(rows, edges)


def _write_sorted(path: Path, ids: np.ndarray, edges: np.ndarray) -> None:
    """Sorts by counting, a chunk at a time, so that memory holds a chunk and a number for every user."""
    out = np.lib.format.open_memmap(path, "w+", np.int64, (len(ids),))
    following = edges[:-1].copy()
    for begin, chunk in _chunks(ids):
        order = np.argsort(chunk, kind="stable")
        users, first, counts = np.unique(chunk[order], return_index=True, return_counts=True)
        within = np.arange(len(chunk)) - np.repeat(first, counts)
        out[np.repeat(following[users], counts) + within] = begin + order
        following[users] += counts
    out.flush()


def _chunks(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for begin in range(0, len(ids), _CHUNK):
        yield begin, np.asarray(ids[begin : begin + _CHUNK], np.int64)


def _is_sorted(ids: np.ndarray) -> bool:
    last = -1
    for _, chunk in _chunks(ids):
        if chunk[0] < last or (chunk[1:] < chunk[:-1]).any():
            return False
        last = chunk[-1]
    return True


def _hash_of(ids: np.ndarray) -> str:
    digest = hashlib.sha256()
    for _, chunk in _chunks(ids):
        digest.update(np.ascontiguousarray(chunk, "<i8").data)
    return digest.hexdigest()


def folder_name(index: str | os.PathLike[str] | None) -> str | None:
    """A folder as a text, which does not depend on where a process is started."""
    return None if index is None else str(Path(index).absolute())


def random_subsets(sizes: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """For each size a uniformly random subset of `number` of the integers below it, sorted; all sizes are above `number`.

    Integers are drawn until there are enough different ones, those again that were there already: the first so many different ones of a sequence are
    a uniformly random subset. Where that would take long, because more than half are wanted, the ones to leave out are drawn instead.
    """
    out = np.empty((len(sizes), number), np.int64)
    is_most = 2 * number > sizes
    few, large = sizes[~is_most], sizes[is_most]
    out[~is_most] = _distinct(few, np.full(len(few), number), rng).reshape(-1, number) - _begins(few)[:, None]
    is_kept = np.ones(int(np.sum(large)), bool)
    is_kept[_distinct(large, large - number, rng)] = False
    out[is_most] = np.flatnonzero(is_kept).reshape(-1, number) - _begins(large)[:, None]
    return out


def _begins(sizes: np.ndarray) -> np.ndarray:
    """Where ranges of these sizes begin, one after another."""
    return np.cumsum(sizes) - sizes


def _distinct(sizes: np.ndarray, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """So many different integers of each range, where ranges of these sizes stand one after another; all sorted."""
    begins, every = _begins(sizes), np.arange(len(sizes))
    complete, rest = [np.empty(0, np.int64)], np.empty(0, np.int64)
    missing = numbers
    while missing.any():
        owners = np.repeat(every, missing)
        rest = np.unique(np.concatenate([rest, begins[owners] + rng.integers(0, sizes[owners])]))
        of_range = np.searchsorted(begins, rest, side="right") - 1
        missing = numbers - np.bincount(of_range, minlength=len(sizes))
        is_open = missing > 0
        complete.append(rest[~is_open[of_range]])
        rest, numbers = rest[is_open[of_range]], np.where(is_open, numbers, 0)
        missing = np.where(is_open, missing, 0)
    return np.sort(np.concatenate(complete))
