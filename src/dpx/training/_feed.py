"""The run's batches, on the devices before they are needed."""

from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data import Batches, feed, gather_batches
from ..plan import PrivacyPlan


def batches_of(
    plan: PrivacyPlan, data: Any, seed: int, start: int, sharding: Any, microbatch_size: int | None, prefetch: int
) -> Batches[Any]:
    """The run's batches and masks from step `start` on.

    For one device they stay in memory: the program that takes them moves them there more quickly than one array at a time would get there. On several
    devices rows are dealt so that all skip the same padding, which takes the microbatch size.
    """
    if sharding is None:
        return gather_batches(plan.sampler, data, seed=seed, start=start, prefetch=prefetch)
    # along the batch's axis
    devices = sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]
    per_device = None if microbatch_size is None or devices == 1 else -(-microbatch_size // devices)
    options: Any = {"sharding": sharding, "microbatch_size": per_device, "prefetch": prefetch}
    return feed(plan.sampler, data, seed=seed, start=start, **options)


def sharding_of_batches(sharding: Any, mesh: Mesh | None) -> Any:
    """How batches are laid out: as given, else their rows over the first axis of the mesh; None without one."""
    if sharding is not None or mesh is None:
        return sharding
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
