"""Weights in the layout that the native products read (csrc/linear.h), and products with them."""

import dataclasses
import functools

import torch
from torch import Tensor

from kimi_linear.inference.native.structs import PackedWeight
from kimi_linear.ops import native
from kimi_linear.ops.native.library import DTYPES

# What a packed weight may be made of, in the numbers of csrc/linear.h.
KINDS: dict[str, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
# Packed weights begin at a multiple of these bytes.
_ALIGNMENT = 64


def _packed_bytes(kind: str, outputs: int, inputs: int) -> int:
    size = torch.empty(1, dtype=torch.int64)
    native.kernel("linear_packed_bytes", "iiip")(KINDS[kind], outputs, inputs, size)
    return int(size)


@functools.cache
def tile() -> int:
    """Return the outputs of a panel: a range of outputs may begin at a multiple."""
    # A panel of float32 with one input is a float for each output.
    return _packed_bytes("float32", 1, 1) // 4


def round_up(size: int) -> int:
    """Return the next whole number of tiles."""
    return -(-size // tile()) * tile()


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight [outputs, inputs]; `memory` is what it points to."""

    kind: str
    outputs: int
    inputs: int
    memory: Tensor

    @property
    def struct(self) -> PackedWeight:
        """What the native code takes."""
        return PackedWeight(self.memory.data_ptr(), KINDS[self.kind], self.outputs, self.inputs)

    def rows(self, begin: int, count: int) -> "Packed":
        """Return some of the outputs, in the same memory; `begin` is at a tile."""
        first = begin // tile() * _packed_bytes(self.kind, 1, self.inputs)
        return Packed(self.kind, count, self.inputs, self.memory[first:])

    def product(self, x: Tensor) -> Tensor:
        """Return x [..., inputs] times the weight, [..., outputs], in the dtype of x."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs)
        native.kernel("linear_packed", "ippppiiiii")(
            *(KINDS[self.kind], self.memory, None, x, y, x.numel() // self.inputs, self.outputs, self.inputs),
            *(DTYPES[x.dtype], DTYPES[y.dtype]),
        )
        return y


def pack(weight: Tensor, kind: str) -> Packed:
    """Return the weight [N, K] packed."""
    weight = weight.detach()
    weight = (weight if weight.dtype in DTYPES else weight.float()).contiguous()
    outputs, inputs = weight.shape
    size = _packed_bytes(kind, outputs, inputs)
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % _ALIGNMENT :][:size]
    native.kernel("linear_pack", "ipiiip")(KINDS[kind], weight, outputs, inputs, DTYPES[weight.dtype], memory)
    return Packed(kind, outputs, inputs, memory)
