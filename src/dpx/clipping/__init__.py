"""How much one example may contribute."""

from ._base import AbstractClipping as AbstractClipping, AbstractStatelessClipping as AbstractStatelessClipping
from ._flat import FlatClipping as FlatClipping
from ._none import NoClipping as NoClipping
