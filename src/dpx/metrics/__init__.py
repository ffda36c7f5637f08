"""Private numbers about single examples: sums, means, histograms and quantiles of losses, accuracies, gradient norms."""

from ._base import (
    AbstractMetric as AbstractMetric,
    AbstractQuery as AbstractQuery,
    Released as Released,
    check_metric as check_metric,
    check_metrics as check_metrics,
)
from ._histogram import Histogram as Histogram
from ._quantile import Quantile as Quantile, QuantileState as QuantileState
from ._sums import Count as Count, Dropped as Dropped, Mean as Mean, Sum as Sum
