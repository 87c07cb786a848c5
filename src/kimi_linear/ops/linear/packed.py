"""A weight packed once for inference, as float32, bfloat16, or integers in groups (csrc/linear.h).

    int8, int4:  w[n, k] = scale[n, g] q[n, k],  groups g of 32 neighbours in k, bfloat16 scales               (1)

q lies in [-127, 127] or [-8, 7]. Where the processor has int8 dot products, rows are rounded to int8 as well, with a
scale for each group of 32: the products are exact integers, and the scales are applied in float32.
"""

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
        >>> from kimi_linear.ops import native
        >>> plain = torch.nn.Linear(64, 64)
        >>> layer = PackedLinear(plain.weight, format="int8") if native.why_unavailable() is None else plain
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 64])
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
        self.data = _pack(weight.detach(), FORMATS[format])

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
        rows = x.detach().contiguous()
        y = rows.new_empty((*x.shape[:-1], N))
        M, of = y.numel() // max(N, 1), DTYPES[x.dtype]
        kernel("linear_packed", "ippppiiiii")(FORMATS[self.format], self.data, self.bias, rows, y, M, N, K, of, of)
        return y

    def weight(self) -> Tensor:
        """Return the weight it stands for, [N, K] float32."""
        weight = torch.empty(self.out_features, self.in_features)
        kernel("linear_unpack", "ippii")(FORMATS[self.format], self.data, weight, *weight.shape)
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, padding included."""
        return self.data.numel()


def _pack(weight: Tensor, kind: int) -> Tensor:
    # The memory begins at a cache line; a tensor of bytes that views it keeps the rest alive.
    known = (weight if weight.dtype in DTYPES else weight.float()).contiguous()
    size = torch.empty(1, dtype=torch.int64)
    kernel("linear_packed_bytes", "iiip")(kind, *known.shape, size)
    memory = torch.empty(int(size) + _ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGNMENT
    data = memory[start : start + int(size)]
    kernel("linear_pack", "ipiiip")(kind, known, *known.shape, DTYPES[known.dtype], data)
    return data
