"""The gated delta rule: one recurrence for KDA, Gated DeltaNet, GDN-2, Comba, GLA and Mamba-2."""

from kimi_linear.ops.delta_rule.api import delta_rule, delta_rule_decode
from kimi_linear.ops.delta_rule.context_parallel import delta_rule_cp, gated_delta_rule_cp, kda_core_cp, kda_cp
from kimi_linear.ops.delta_rule.core import kda_core, kda_core_decode
from kimi_linear.ops.delta_rule.fronts import comba, gated_delta_rule, gated_delta_rule_decode, gdn2, kda, ssd
from kimi_linear.ops.delta_rule.layer_decode import KDAPools, KDAWeights, kda_layer_decode
from kimi_linear.ops.delta_rule.verify import Trace, delta_rule_replay, delta_rule_verify, kda_core_verify

__all__ = [
    "KDAPools",
    "KDAWeights",
    "Trace",
    "comba",
    "delta_rule",
    "delta_rule_cp",
    "delta_rule_decode",
    "delta_rule_replay",
    "delta_rule_verify",
    "gated_delta_rule",
    "gated_delta_rule_cp",
    "gated_delta_rule_decode",
    "gdn2",
    "kda",
    "kda_core",
    "kda_core_cp",
    "kda_core_decode",
    "kda_core_verify",
    "kda_cp",
    "kda_layer_decode",
    "ssd",
]
