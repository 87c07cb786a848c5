"""Rotary position embedding, used only where a mixer asks for positions: Kimi Linear's own layers have none."""

from torch import Tensor

from kimi_linear.base.errors import ConfigError, ShapeError
from kimi_linear.ops.checks import describe_call, expect_floating, expect_integer, expect_same_device, expect_shape
from kimi_linear.ops.native import refuse
from kimi_linear.ops.registry import Backend, Call, define
from kimi_linear.ops.rope.cpu import rope_cpu
from kimi_linear.ops.rope.reference import rope_reference


def _runs_all(call: Call) -> list[str]:
    return []


ROPE = define(
    "rope",
    Backend("cpu", rope_cpu, refuse, "native, one pass over memory"),
    Backend("reference", rope_reference, _runs_all, "angles in float64, rotation in float32"),
)


def apply_rope(x: Tensor, positions: Tensor, *, theta: float, backend: str | None = None) -> Tensor:
    """Rotate each pair of channels (i, i + K/2) by its angle at the token's position.

        angle_i = position * theta ** (-2 i / K)
        [y_i ; y_{i+K/2}] = R(angle_i) [x_i ; x_{i+K/2}],   R = [[cos, -sin], [sin, cos]]
        RoFormer, arXiv:2104.09864, Eq. 15, in the rotate-halves order of Llama checkpoints (not the interleaved pairs).

    Scores of rotated queries and keys depend on the difference of their positions only.

    Args:
        x: Queries or keys, [B, T, H, K], K even. To rotate a part of the channels, pass that part.
        positions: Position of each token, [T] or [B, T], int32 or int64.
        theta: Base of the frequencies, > 0; 10000 is customary.
        backend: "cpu", "reference" or None.

    Returns:
        [B, T, H, K] in the dtype of x. Differentiable in x, any number of times.

    Raises:
        ShapeError: K is odd, or positions do not fit x.
        ConfigError: theta is not positive.
        DtypeError, DeviceError: x is not floating, positions are not integers, or they lie on different devices.

    Numerics: angles in float64, their cosines and sines and the rotation in float32 (float64 for float64).
    Cost: 4 multiply-adds a pair of channels, and K / 2 cosines and sines a position.

    Example:
        >>> import torch
        >>> apply_rope(torch.randn(1, 8, 2, 16), torch.arange(8), theta=10000.0).shape
        torch.Size([1, 8, 2, 16])
    """
    expect_shape("rope", "x", x, [None] * 4, "B, T, H, K")
    B, T, H, K = x.shape
    if K % 2:
        raise ShapeError(f"rope: x has {K} channels, expected an even number: they turn in pairs (i, i + K/2).")
    if positions.ndim == 2:
        expect_shape("rope", "positions", positions, [B, T], "B, T")
    else:
        expect_shape("rope", "positions", positions, [T], "T")
    if not theta > 0:
        raise ConfigError(f"rope: theta is {theta}, expected a positive number such as 10000.")
    expect_floating("rope", x=x)
    expect_integer("rope", "positions", positions)
    expect_same_device("rope", x=x, positions=positions)
    call = describe_call(x, sizes={"B": B, "T": T, "H": H, "K": K})
    return ROPE.choose(call, backend).run(x, positions, float(theta), False)
