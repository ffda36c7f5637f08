"""Sources of rows, and the feed from who is in a batch to batches on devices."""

from ._arrays import ArraySource as ArraySource
from ._as_source import Data as Data, DataSet as DataSet, as_source as as_source
from ._base import AbstractSource as AbstractSource
from ._batches import Batches as Batches
from ._examples import ExampleSource as ExampleSource
from ._feed import feed as feed, gather_batches as gather_batches
from ._hugging_face import HuggingFaceSource as HuggingFaceSource
