"""What a plan costs: events, accountants, calibration, trade-off curves."""

from ._accountants import (
    NEIGHBOURS as NEIGHBOURS,
    AccountantName as AccountantName,
    Adjacency as Adjacency,
    check_accountant as check_accountant,
    check_adjacency as check_adjacency,
    delta as delta,
    discretisation as discretisation,
    epsilon as epsilon,
    loss_distribution as loss_distribution,
    rough_epsilon as rough_epsilon,
)
from ._calibrate import largest_integer as largest_integer, least_feasible as least_feasible
from ._trade_off import TradeOffCurve as TradeOffCurve
