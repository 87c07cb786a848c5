"""Argument checks the operators share: what was given, what was expected, what to do.

Static checks (shape, dtype, device) run in an operator's `api.py` and cost nothing under `torch.compile`. Checks that
need values (`check_cu_seqlens_values`, `check_slots_values`) run inside the operator's implementation, where the
compiler never looks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.base.errors import DeviceError, DtypeError, ShapeError
from kimi_linear.ops.registry import Call

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER = (torch.int64, torch.int32)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype an operator computes in for this input: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def expect_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """Raise ShapeError unless `tensor` has this shape; None matches any size, `letters` is the legend "B, T, D"."""
    given = tensor.shape
    if len(given) == len(shape) and all(want is None or want == have for want, have in zip(shape, given, strict=True)):
        return
    expected = ", ".join("any" if size is None else str(size) for size in shape)
    raise ShapeError(f"{op}: {name} is {list(given)}, expected [{expected}] ({letters}).")


def expect_floating(op: str, **tensors: Tensor | None) -> None:
    """Raise DtypeError for the first tensor that is not float32, bfloat16, float16 or float64; None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise DtypeError(
                f"{op}: {name} is {tensor.dtype}, expected float32, bfloat16, float16 or float64; convert it."
            )


def expect_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise DtypeError unless all tensors that are not None share the dtype of the first."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.dtype != first.dtype:
            raise DtypeError(
                f"{op}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; convert one to the other's dtype."
            )


def expect_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise DeviceError unless all tensors that are not None lie on the device of the first."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.device != first.device:
            raise DeviceError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; move them to one device."
            )


def expect_integer(op: str, name: str, tensor: Tensor) -> None:
    """Raise DtypeError unless the tensor holds int64 or int32."""
    if tensor.dtype not in _INTEGER:
        raise DtypeError(f"{op}: {name} is {tensor.dtype}, expected int64 or int32; convert it.")


def expect_cu_seqlens(op: str, cu_seqlens: Tensor, batch: int, device: torch.device) -> int:
    """Check what can be seen of `cu_seqlens` without its values, and return the number of sequences N."""
    expect_integer(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ShapeError(f"{op}: cu_seqlens is {list(cu_seqlens.shape)}, expected [N + 1] with N >= 1 sequences.")
    if batch != 1:
        raise ShapeError(
            f"{op}: B is {batch} with cu_seqlens, expected 1; concatenate the sequences along T, or drop cu_seqlens."
        )
    if cu_seqlens.device != device:
        raise DeviceError(f"{op}: cu_seqlens is on {cu_seqlens.device}, expected {device}; move it there.")
    return cu_seqlens.shape[0] - 1


def check_cu_seqlens_values(cu_seqlens: Tensor, total: int) -> None:
    """Raise ShapeError unless `cu_seqlens` starts at 0, never falls and ends at `total`. Waits for the device once."""
    # One read per call is cheaper than one per condition, above all on an accelerator.
    bad = (cu_seqlens[0] != 0) | (cu_seqlens[-1] != total) | (cu_seqlens[1:] < cu_seqlens[:-1]).any()
    if not bad:
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != total:
        raise ShapeError(
            f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}, expected from 0 to T = {total}; "
            "it holds where each sequence starts, then the number of tokens."
        )
    fall = next(n for n in range(len(offsets) - 1) if offsets[n + 1] < offsets[n])
    raise ShapeError(
        f"cu_seqlens falls from {offsets[fall]} to {offsets[fall + 1]} at index {fall + 1}, expected offsets that "
        "never fall; an empty sequence repeats its offset."
    )


def check_slots_values(slots: Tensor, size: int) -> list[int]:
    """Return the slots as a list; raise ShapeError for one outside [-1, size) or one used twice (-1 means skip)."""
    values: list[int] = slots.tolist()
    if not values:
        return values
    if min(values) < -1 or max(values) >= size:
        wrong = next(slot for slot in values if slot < -1 or slot >= size)
        raise ShapeError(f"slots holds {wrong}, expected -1 (skip) or a slot of the pool, 0 to {size - 1}.")
    used = [slot for slot in values if slot >= 0]
    if len(set(used)) != len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ShapeError(f"slots names slot {twice} twice; two rows cannot update one state in one call.")
    return values


def describe_call(main: Tensor, *others: Tensor | None, sizes: dict[str, int], features: Sequence[str] = ()) -> Call:
    """Describe a call to the registry: device and dtype of `main`, and whether any of the tensors needs a gradient."""
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (main, *others))
    return Call(
        device=main.device.type,
        dtype=str(main.dtype).removeprefix("torch."),
        needs_grad=needs_grad,
        sizes=sizes,
        features=frozenset(features),
    )
