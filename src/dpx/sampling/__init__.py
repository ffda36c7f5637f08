"""Who is in a batch: pure functions of (seed, step), on the host."""

from ._base import AbstractSampler as AbstractSampler
from ._batches import gather_batches as gather_batches
from ._cyclic import CyclicPoissonSampler as CyclicPoissonSampler
from ._philox import check_seed as check_seed
from ._poisson import PoissonSampler as PoissonSampler
from ._shuffle import ShuffleSampler as ShuffleSampler
