"""`augment`, by the path that it had before `dpx.problem`; `dpx.augment` is the same."""

from .problem import Augmented as Augmented, augment as augment
