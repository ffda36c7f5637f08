"""Sampling, clipping, noise and neighbours, and the arithmetic that binds them."""

from ._facts import versions as versions
from ._plan import PrivacyPlan as PrivacyPlan
from ._recipes import dp_mf as dp_mf, dp_sgd as dp_sgd
