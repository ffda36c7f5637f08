"""What a plan costs: events, accountants, calibration, trade-off curves."""

from ._accountable import Accountable as Accountable, Release as Release
from ._filter import PrivacyFilter as PrivacyFilter
from ._group_privacy import group_epsilon as group_epsilon
from ._ledger import LedgerEntry as LedgerEntry, PrivacyLedger as PrivacyLedger
from ._lower_bounds import (
    attained_discrete_gaussian as attained_discrete_gaussian,
    attained_epsilon as attained_epsilon,
    check_bracket as check_bracket,
    epsilon_bracket as epsilon_bracket,
)
from ._neighbours import (
    NEIGHBOURS as NEIGHBOURS,
    AccountantName as AccountantName,
    Adjacency as Adjacency,
    check_accountant as check_accountant,
    check_adjacency as check_adjacency,
    check_delta as check_delta,
)
from ._questions import (
    delta as delta,
    deltas as deltas,
    epsilon as epsilon,
    loss_distribution as loss_distribution,
    rough_distribution as rough_distribution,
    rough_epsilon as rough_epsilon,
    rough_renyi_epsilon as rough_renyi_epsilon,
)
from ._renyi import least_renyi_epsilon as least_renyi_epsilon
from ._root_finding import (
    largest_integer as largest_integer,
    least_feasible as least_feasible,
    near_root as near_root,
)
from ._rules import (
    is_monte_carlo as is_monte_carlo,
    loss_rule as loss_rule,
    with_side_queries as with_side_queries,
)
from ._search import (
    fixed_search_epsilon as fixed_search_epsilon,
    number_of_runs as number_of_runs,
    search_epsilon as search_epsilon,
    search_event as search_event,
)
from ._shuffling import shuffling_lower_bound as shuffling_lower_bound
from ._trade_off import TradeOffCurve as TradeOffCurve
from .losses._distribution import LossDistribution as LossDistribution
from .losses._pmf import LossPmf as LossPmf
