"""Who is in a batch: pure functions of (seed, step), on the host."""

from ..random import check_seed as check_seed
from ._allocation import RandomAllocationSampler as RandomAllocationSampler
from ._balls_in_bins import BallsInBinsSampler as BallsInBinsSampler
from ._base import AbstractSampler as AbstractSampler, check_step as check_step
from ._cyclic import CyclicPoissonSampler as CyclicPoissonSampler
from ._fixed_size import FixedSizeSampler as FixedSizeSampler
from ._min_sep import MinSepSampler as MinSepSampler
from ._owners import bound_contributions as bound_contributions
from ._poisson import PoissonSampler as PoissonSampler
from ._resume import resume as resume, resume_state as resume_state
from ._shuffle import ShuffleSampler as ShuffleSampler
from ._users import UserSampler as UserSampler
