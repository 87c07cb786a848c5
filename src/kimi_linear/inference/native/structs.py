"""The structs of csrc/engine.h, field by field: pointers, 64-bit integers and doubles alone."""

import ctypes
from typing import Any, ClassVar

from kimi_linear.ops.linear.packed import FORMATS, PackedLinear

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class PackedWeight(ctypes.Structure):
    """A packed weight (csrc/linear.h)."""

    _fields_: ClassVar = _fields(("data", _POINTER), ("kind outputs inputs", _INT))

    @classmethod
    def of(cls, packed: PackedLinear) -> "PackedWeight":
        """Describe a weight, which must outlive the struct."""
        return cls(packed.data.data_ptr(), FORMATS[packed.format], packed.out_features, packed.in_features)


class KdaLayer(ctypes.Structure):
    """A Kimi Delta Attention mixer."""

    _fields_: ClassVar = _fields(
        ("in_ decay gate out", PackedWeight),
        ("conv_q conv_k conv_v rate dt_bias out_norm", _POINTER),
        ("H HV K V W decay_rows gate_rows at_k at_v at_decay at_gate at_beta", _INT),
        ("lower_bound scale out_eps", _FLOAT),
    )


class MlaLayer(ctypes.Structure):
    """A latent attention mixer."""

    _fields_: ClassVar = _fields(
        ("in_ out", PackedWeight),
        ("kv_b latent_norm frequencies", _POINTER),
        ("H R dn dr dv kv_dtype at_latent", _INT),
        ("latent_eps scale", _FLOAT),
    )


class SwiGluLayer(ctypes.Structure):
    """A dense feed-forward network, or the shared experts."""

    _fields_: ClassVar = _fields(("in_ down", PackedWeight), ("F at_up", _INT))


class MoeLayer(ctypes.Structure):
    """A mixture of experts."""

    _fields_: ClassVar = _fields(
        ("in_ down", PackedWeight),
        ("shared", SwiGluLayer),
        ("router bias", _POINTER),
        ("E k F at_up in_rows down_rows softmax renormalize", _INT),
        ("scaling", _FLOAT),
    )


class Layer(ctypes.Structure):
    """A layer: its norms, and what its mixer and its feed-forward network are."""

    _fields_: ClassVar = _fields(
        ("mixer_norm ffn_norm", _POINTER), ("mixer_kind ffn_kind", _INT), ("mixer ffn", _POINTER)
    )


class Model(ctypes.Structure):
    """A model."""

    _fields_: ClassVar = _fields(
        ("layers embedding norm", _POINTER),
        ("head", PackedWeight),
        ("num_layers D embedding_dtype", _INT),
        ("norm_eps", _FLOAT),
    )


class LayerState(ctypes.Structure):
    """What a layer remembers."""

    _fields_: ClassVar = _fields(("conv_q conv_k conv_v recurrent latent key_rope", _POINTER), ("capacity", _INT))


class Call(ctypes.Structure):
    """One step."""

    _fields_: ClassVar = _fields(("tokens lengths states logits", _POINTER), ("rows dtype", _INT))
