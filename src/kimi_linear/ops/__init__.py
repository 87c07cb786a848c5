"""The operators. Each has a reference and one or more backends; `why` explains which one runs a call."""

from kimi_linear.ops.attention import attention, attention_decode, mla_attention, mla_decode
from kimi_linear.ops.context_parallel import ContextParallel
from kimi_linear.ops.conv import short_conv, short_conv_cp, short_conv_decode
from kimi_linear.ops.cross_entropy import linear_cross_entropy
from kimi_linear.ops.delta_rule import (
    KDAPools,
    KDAWeights,
    Trace,
    comba,
    delta_rule,
    delta_rule_cp,
    delta_rule_decode,
    delta_rule_replay,
    delta_rule_verify,
    gated_delta_rule,
    gated_delta_rule_cp,
    gated_delta_rule_decode,
    gdn2,
    kda,
    kda_core,
    kda_core_cp,
    kda_core_decode,
    kda_core_verify,
    kda_cp,
    kda_layer_decode,
    ssd,
)
from kimi_linear.ops.gate import forget_gate
from kimi_linear.ops.linear import PackedLinear, linear
from kimi_linear.ops.moe import grouped_mlp, route
from kimi_linear.ops.norm import gated_rms_norm, l2_norm, rms_norm
from kimi_linear.ops.orthogonalise import orthogonalise
from kimi_linear.ops.registry import OPS, Call, why
from kimi_linear.ops.rope import apply_rope
from kimi_linear.ops.swiglu import swiglu

__all__ = [
    "OPS",
    "Call",
    "ContextParallel",
    "KDAPools",
    "KDAWeights",
    "PackedLinear",
    "Trace",
    "apply_rope",
    "attention",
    "attention_decode",
    "comba",
    "delta_rule",
    "delta_rule_cp",
    "delta_rule_decode",
    "delta_rule_replay",
    "delta_rule_verify",
    "forget_gate",
    "gated_delta_rule",
    "gated_delta_rule_cp",
    "gated_delta_rule_decode",
    "gated_rms_norm",
    "gdn2",
    "grouped_mlp",
    "kda",
    "kda_core",
    "kda_core_cp",
    "kda_core_decode",
    "kda_core_verify",
    "kda_cp",
    "kda_layer_decode",
    "l2_norm",
    "linear",
    "linear_cross_entropy",
    "mla_attention",
    "mla_decode",
    "orthogonalise",
    "rms_norm",
    "route",
    "short_conv",
    "short_conv_cp",
    "short_conv_decode",
    "ssd",
    "swiglu",
    "why",
]
