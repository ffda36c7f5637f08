"""What is differentiated, for whom: the loss of one example or user, and what it is given, checked."""

from ._augment import Augmented as Augmented, augment as augment
from ._per_example import (
    PerExample as PerExample,
    Scaled as Scaled,
    check_batch as check_batch,
    check_mask as check_mask,
    check_model as check_model,
    check_scaling as check_scaling,
    has_parameter as has_parameter,
    keywords as keywords,
    trainable as trainable,
)
from ._user import PerUser as PerUser, WithinUser as WithinUser, check_user_batch as check_user_batch
