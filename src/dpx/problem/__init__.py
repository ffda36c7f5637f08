"""What is differentiated, for whom: the loss of one example or user, and what it is given, checked."""

from ._augment import Augmented as Augmented, augment as augment
from ._batch import check_batch as check_batch
from ._call import check_arguments as check_arguments, warn_of_strange_batch as warn_of_strange_batch
from ._model import check_filter_spec as check_filter_spec, check_model as check_model, trainable as trainable
from ._per_example import has_parameter as has_parameter, keywords as keywords, takes_key as takes_key
from ._problem import Problem as Problem, prepare as prepare
from ._user import WithinUser as WithinUser, check_user_batch as check_user_batch
