"""How much one example may contribute."""

from ._adaptive import AdaptiveClipping as AdaptiveClipping, AdaptiveClippingState as AdaptiveClippingState
from ._base import (
    AbstractClipping as AbstractClipping,
    AbstractOneGroupClipping as AbstractOneGroupClipping,
    AbstractQueryFreeClipping as AbstractQueryFreeClipping,
    AbstractSlackClipping as AbstractSlackClipping,
    AbstractStatelessClipping as AbstractStatelessClipping,
)
from ._flat import FlatClipping as FlatClipping, as_clipping as as_clipping
from ._group import GroupClipping as GroupClipping
from ._hard_threshold import HardThresholdClipping as HardThresholdClipping
from ._none import NoClipping as NoClipping
from ._normalized import NormalizedClipping as NormalizedClipping
from ._psac import PSACClipping as PSACClipping
from ._slack import SlackClipping as SlackClipping, SlackClippingState as SlackClippingState
