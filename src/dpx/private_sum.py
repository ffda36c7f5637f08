"""`PrivateSum`, by the path that it had before it moved to `dpx.private_gradient`; `dpx.PrivateSum` is the same."""

from .private_gradient import PrivateSum as PrivateSum, model_update as model_update
