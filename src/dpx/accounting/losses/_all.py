"""The files that register rules: a new event's file is one line here."""

from . import (
    _allocation as _allocation,
    _bins as _bins,
    _coupled as _coupled,
    _fixed_size as _fixed_size,
    _gaussian as _gaussian,
    _laplace as _laplace,
    _min_sep as _min_sep,
    _mixture as _mixture,
    _poisson as _poisson,
    _pure as _pure,
    _truncated as _truncated,
    _zcdp as _zcdp,
)
