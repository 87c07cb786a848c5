"""What the delta-rule layers remember: a fixed size, whatever the length."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from kimi_linear.nn.state.base import LayerState


@dataclasses.dataclass
class DeltaState(LayerState):
    """A delta-rule layer: the last inputs of its three convolutions, and its recurrent state.

    Fields: `conv_q` and `conv_k` [N, H K, W - 1], `conv_v` [N, HV V, W - 1], oldest first, before the convolution;
    `recurrent` [N, HV, K, V], float32 (float64 in a float64 model).
    """

    LAYOUT: ClassVar[str] = "NHKV"

    conv_q: Tensor
    conv_k: Tensor
    conv_v: Tensor
    recurrent: Tensor


@dataclasses.dataclass
class KDAState(DeltaState):
    """What Kimi Delta Attention remembers."""

    KIND: ClassVar[str] = "kda"


@dataclasses.dataclass
class GDNState(DeltaState):
    """What Gated DeltaNet remembers."""

    KIND: ClassVar[str] = "gdn"
