"""A weight packed once for inference, as float32, bfloat16, or integers in groups (csrc/linear.h).

    int8, int4:  w[n, k] = scale[n, g] q[n, k],  groups g of 32 neighbours in k, bfloat16 scales               (1)

q lies in [-127, 127] or [-8, 7]. Where the processor has int8 dot products, rows are rounded to int8 as well, with a
scale for each group of 32: the products are exact integers, and the scales are applied in float32.
"""

import copy
import functools
from typing import Literal

import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, ConfigError, ShapeError
from kimi_linear.ops.checks import expect_floating, expect_shape
from kimi_linear.ops.native import kernel, why_unavailable
from kimi_linear.ops.native.library import DTYPES

WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
# What a cache line needs.
_ALIGNMENT = 64


def _packed_bytes(format: WeightFormat, outputs: int, inputs: int) -> int:
    size = torch.empty(1, dtype=torch.int64)
    kernel("linear_packed_bytes", "iiip")(FORMATS[format], outputs, inputs, size)
    return int(size)


@functools.cache
def panel_width() -> int:
    """Return the outputs of a panel, the unit in which weights are packed."""
    # A panel of float32 with one input is a float for each output.
    return _packed_bytes("float32", 1, 1) // 4


class PackedLinear:
    """A linear map whose weight was packed once: for few rows at the speed of memory, for many near that of arithmetic.

    A row of the result has the same bits whatever rows are beside it. There are no gradients.

    Args:
        weight: [N, K], float32 or bfloat16 (other floating dtypes are widened first), on the CPU. Not kept.
        bias: [N], or None.
        format: "float32", "bfloat16", "int8" or "int4": 4, 2, 1.06 and 0.56 bytes a weight.

    Raises:
        ShapeError, DtypeError: weight or bias is not what it should be.
        ConfigError: Unknown format.
        BackendError: There are no native kernels here, or weight is not on the CPU.

    Example:
        >>> import torch
        >>> layer = PackedLinear(torch.randn(48, 64), format="int8")
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 48])
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, format: WeightFormat = "bfloat16") -> None:
        op = "PackedLinear"
        if format not in FORMATS:
            raise ConfigError(f"{op}: format is {format!r}, expected one of {', '.join(FORMATS)}.")
        expect_floating(op, weight=weight, bias=bias)
        expect_shape(op, "weight", weight, (None, None), "N, K")
        if bias is not None:
            expect_shape(op, "bias", bias, (weight.shape[0],), "N, the rows of weight")
        if weight.device.type != "cpu" or (reason := why_unavailable()):
            raise BackendError(f"{op}: {'weight is not on the CPU' if weight.device.type != 'cpu' else reason}.")
        self.format, self.bias = format, None if bias is None else bias.detach().float().contiguous()
        self.out_features, self.in_features = weight.shape
        self.data = _pack(weight.detach(), format)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x weight^T + bias, [..., N] in the dtype of x, float32 or bfloat16.

        Raises:
            ShapeError: x is not [..., K].
            BackendError: x is neither float32 nor bfloat16.
        """
        N, K = self.out_features, self.in_features
        if x.dim() == 0 or x.shape[-1] != K:
            raise ShapeError(f"PackedLinear: x is {list(x.shape)}, expected [..., {K}].")
        if x.dtype not in DTYPES:
            raise BackendError(f"PackedLinear: x is {x.dtype}, expected float32 or bfloat16.")
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], N))
        if y.numel():
            M, of = y.numel() // N, DTYPES[x.dtype]
            kernel("linear_packed", "ippppiiiii")(FORMATS[self.format], self.data, self.bias, x, y, M, N, K, of, of)
        return y

    def outputs(self, begin: int, count: int) -> "PackedLinear":
        """Return the map to `count` of the outputs from `begin` on, which is a multiple of `panel_width()`; no copy.

        Raises:
            ShapeError: There are no such outputs, or no panel begins there.
        """
        if begin % panel_width() or not 0 <= begin <= begin + count <= self.out_features:
            raise ShapeError(
                f"PackedLinear: outputs {begin} to {begin + count} of {self.out_features}, "
                f"expected a beginning at a multiple of {panel_width()} and no more than there are."
            )
        part = copy.copy(self)
        start = _packed_bytes(self.format, begin, self.in_features)
        part.data = self.data[start : start + _packed_bytes(self.format, count, self.in_features)]
        part.bias = None if self.bias is None else self.bias[begin : begin + count]
        part.out_features = count
        return part

    def weight(self) -> Tensor:
        """Return the weight it stands for, [N, K] float32."""
        weight = torch.empty(self.out_features, self.in_features)
        kernel("linear_unpack", "ippii")(FORMATS[self.format], self.data, weight, *weight.shape)
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.data.numel()


def _pack(weight: Tensor, format: WeightFormat) -> Tensor:
    # The memory begins at a cache line; a tensor of bytes that views it keeps the rest alive.
    known = (weight if weight.dtype in DTYPES else weight.float()).contiguous()
    size = _packed_bytes(format, *known.shape)
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    data = memory[-memory.data_ptr() % _ALIGNMENT :][:size]
    kernel("linear_pack", "ipiiip")(FORMATS[format], known, *known.shape, DTYPES[known.dtype], data)
    return data
