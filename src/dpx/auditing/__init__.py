"""Attacks on training, and what they prove: lower bounds on epsilon, each with its condition, and assertions for tests.

A bound from below says what was found. That nothing was found says no more than the audit's power.
"""

from ._assert_private import assert_private as assert_private, audit_laws as audit_laws
from ._assert_step import assert_private_step as assert_private_step
from ._attack_report import AttackReport as AttackReport, RateReport as RateReport, attack_report as attack_report
from ._audit_plan import audit_plan as audit_plan
from ._binomial import (
    clopper_pearson_lower as clopper_pearson_lower,
    clopper_pearson_upper as clopper_pearson_upper,
    equal_local_level as equal_local_level,
)
from ._canaries import (
    GradientCanaries as GradientCanaries,
    InputCanaries as InputCanaries,
    RandomDirections as RandomDirections,
    gradient_canaries as gradient_canaries,
    input_canaries as input_canaries,
)
from ._coins import Coins as Coins, flip_coins as flip_coins
from ._exposure import (
    credible_epsilon as credible_epsilon,
    exposure as exposure,
    hits_lower_bound as hits_lower_bound,
    secrets_lower_bound as secrets_lower_bound,
)
from ._gaussian import (
    auc_ceiling as auc_ceiling,
    gaussian_delta as gaussian_delta,
    gaussian_epsilon as gaussian_epsilon,
    two_gaussians_epsilon as two_gaussians_epsilon,
)
from ._likelihood import log_likelihood_ratio as log_likelihood_ratio
from ._lower_bound import LowerBound as LowerBound
from ._membership import logit_scores as logit_scores, membership_inference as membership_inference
from ._one_run import (
    is_refuted as is_refuted,
    one_run as one_run,
    one_run_curve_p_value as one_run_curve_p_value,
    one_run_mu as one_run_mu,
    one_run_p_value as one_run_p_value,
)
from ._only_private import assert_only_private as assert_only_private
from ._recorder import Recorder as Recorder
from ._report import (
    AuditedLaw as AuditedLaw,
    AuditReport as AuditReport,
    Evidence as Evidence,
    PrivacyAuditError as PrivacyAuditError,
)
from ._sequential import SequentialTest as SequentialTest, sequential_test as sequential_test
from ._shadows import train_shadows as train_shadows
from ._statistics import binomial_p_value as binomial_p_value, noise_draws_to_see as noise_draws_to_see
from ._thresholds import (
    Threshold as Threshold,
    epsilon_lower_bound as epsilon_lower_bound,
    mu_lower_bound as mu_lower_bound,
)
