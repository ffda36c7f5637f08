"""Clipping, noise and metrics in a run of so many steps: the one place of privacy arithmetic."""

from ._mechanism import Mechanism as Mechanism
from ._participation import check_participation as check_participation
