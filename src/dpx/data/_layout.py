"""Where a batch lies: which rows are on which device, and which of them this process loads."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from .._checks import described
from ..gradients import microbatch_count

_MSG_SHARDING = "`feed(sharding=...)` must lay out the leading axis of a batch, such as `NamedSharding(mesh, jax.P('data'))`; got {given}. {remedy}"


class Part(NamedTuple):
    """What one process holds of one batch.

    **Arguments:**

    - `rows`: the numbers of its real rows, of shape `(units,)`, or `(units, rows)` with -1 where a unit has fewer.
    - `positions`: where these units stand among the positions that the process holds.
    - `begins`: where each of its blocks begins in the batch.
    - `block`: how long each of them is.
    - `size`: how long the whole batch is.
    """

    rows: np.ndarray
    positions: np.ndarray
    begins: tuple[int, ...]
    block: int
    size: int


class Layout:
    """How batches lie on devices.

    **Arguments:**

    - `sharding`: of the leading axis; None for one device.
    - `microbatch_size`: how many rows a device computes at once; None for all of them.
    """

    def __init__(self, sharding: Sharding | None, microbatch_size: int | None):
        self.sharding = sharding
        self.microbatch_size = microbatch_size
        axes = _batch_axes(sharding)
        mesh: Any = getattr(sharding, "mesh", None)
        self.devices = int(np.prod([mesh.shape[name] for name in axes], dtype=np.int64)) if axes else 1
        # as `gradients` sees it: on explicit axes every device keeps its rows, otherwise microbatches are rows in a row
        self.is_cut_by_device = bool(axes) and all(kind is AxisType.Explicit for kind in mesh.axis_types)

    def physical_size(self, least: int) -> int:
        """The least multiple of devices x microbatch that is at least `least`."""
        step = self.devices * (self.microbatch_size or 1)
        return step * -(-least // step)

    def part(self, rows: np.ndarray, size: int) -> Part:
        """What this process holds of a batch of `rows`, padded to `size`.

        Real rows stand in their order at positions that are chosen for speed: every device has as many as any other, give or take one, in the same
        places of its block, which fill as few of its microbatches as possible.
        """
        share = size // self.devices
        begins = _begins(self.sharding, size) if self.devices > 1 else (0,)
        filled, ranks = [], []
        for number, begin in enumerate(begins):
            if self._is_packed:
                count, first = int(np.clip(len(rows) - begin, 0, share)), min(begin, len(rows))
            else:
                device = begin // share
                # how many of the rows k = device, device + devices, ... there are, and how many the devices before have
                count = -(-(len(rows) - device) // self.devices) if len(rows) > device else 0
                first = device * (len(rows) // self.devices) + min(device, len(rows) % self.devices)
            filled.append(number * share + self._places(count, share, size))
            ranks.append(rows[first : first + count])
        return Part(np.concatenate(ranks), np.concatenate(filled), begins, share, size)

    @property
    def _is_packed(self) -> bool:
        return self.devices == 1 or not self.is_cut_by_device and self.microbatch_size is not None

    def _places(self, count: int, share: int, size: int) -> np.ndarray:
        """Where the real rows of a device stand in its block, sorted."""
        if not self.is_cut_by_device or self.microbatch_size is None or count in (0, share):
            return np.arange(count)
        # Row r is in microbatch r mod n: fill one after another and, within each, one after another of its halves, and so on, so that few
        # microbatches run where the method's are smaller than they were said to be, too.
        number = microbatch_count(size, self.devices * self.microbatch_size, self.devices)
        numbers = np.arange(share)
        keys = [numbers % number]
        while number < share:
            number *= next(factor for factor in range(2, share + 1) if share // number % factor == 0)
            keys.insert(0, numbers % number)
        return np.sort(np.lexsort(keys)[:count])


def checked_sharding(sharding: Any) -> Sharding | None:
    """A sharding of batches that this process can fill, or None for one device."""
    if sharding is None:
        mesh = jax.sharding.get_mesh()
        if not mesh.empty:
            return NamedSharding(mesh, PartitionSpec())
        if jax.process_count() > 1:
            raise ValueError(
                f"`feed(sharding=None)` in a run of {jax.process_count()} processes would load all of every batch in each of them. Say over which "
                "devices a batch is sharded, such as `sharding=NamedSharding(mesh, jax.P('data'))`."
            )
        return None
    remedy = ""
    if isinstance(sharding, jax.sharding.Mesh):
        remedy = f"Write `NamedSharding(mesh, jax.P({sharding.axis_names[0]!r}))`."
    elif isinstance(sharding, PartitionSpec):
        remedy = "Write `NamedSharding(mesh, spec)`."
    elif isinstance(sharding, jax.Device):
        remedy = "Write `jax.sharding.SingleDeviceSharding(device)`."
    if not isinstance(sharding, NamedSharding | SingleDeviceSharding):
        raise ValueError(_MSG_SHARDING.format(given=described(sharding), remedy=remedy))
    if isinstance(sharding, NamedSharding) and (
        any(axis is not None for axis in sharding.spec[1:]) or not isinstance(sharding.mesh, jax.sharding.Mesh)
    ):
        remedy = "Other axes of the data are the loss's business, and have no examples to share."
        raise ValueError(_MSG_SHARDING.format(given=sharding.spec, remedy=remedy))
    if not sharding.addressable_devices:
        raise ValueError(
            f"`feed(sharding=...)`: process {jax.process_index()} has no device in the mesh, so it has nothing to load. Make the mesh of all "
            "processes' devices, `jax.devices()`."
        )
    return sharding


def _batch_axes(sharding: Sharding | None) -> tuple[str, ...]:
    """The mesh axes over which the leading axis is sharded."""
    if not isinstance(sharding, NamedSharding) or not len(sharding.spec) or sharding.spec[0] is None:
        return ()
    first: Any = sharding.spec[0]
    return first if isinstance(first, tuple) else (first,)


def _begins(sharding: Sharding | None, size: int) -> tuple[int, ...]:
    """Where the blocks begin that this process's devices hold."""
    assert sharding is not None
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return tuple(sorted({index[0].start or 0 for index in slices if index is not None}))


def on_devices(part: Part, local: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """What this process holds of a batch, as its part of the array of all processes."""
    if sharding is None:
        return jax.device_put(local)
    where = {begin: number * part.block for number, begin in enumerate(part.begins)}
    shape = (part.size, *local.shape[1:])

    def block(index: Any) -> np.ndarray:
        begin, end, _ = index[0].indices(part.size)
        return local[where[begin] : where[begin] + end - begin]

    return jax.make_array_from_callback(shape, sharding, block)
