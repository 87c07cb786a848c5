"""Orthogonalisation by Newton-Schulz iteration: check the call, choose a backend, run it."""

from torch import Tensor

from kimi_linear.base.errors import ShapeError
from kimi_linear.ops.checks import describe_call, expect_floating
from kimi_linear.ops.native import refuse
from kimi_linear.ops.orthogonalise import bmm, cpu, reference
from kimi_linear.ops.registry import Backend, Call, define


def _no_gradient(call: Call) -> list[str]:
    return ["has no gradient; it belongs in an optimizer step"] if call.needs_grad else []


ORTHOGONALISE = define(
    "orthogonalise",
    Backend("cpu", cpu.run, lambda call: _no_gradient(call) + refuse(call), "native, symmetric products by half"),
    Backend("bmm", bmm.run, _no_gradient, "batched products in bfloat16, any device"),
    Backend("reference", reference.run, _no_gradient, "the iteration in the dtype of its input"),
)


def orthogonalise(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Replace the singular values of every matrix by values near one, keeping its singular vectors.

        X_0 = x / |x|_F;   A = X X^T;   X <- a X + (b A + c A^2) X,   five times, (a, b, c) = (3.4445, -4.775, 2.0315)
        Muon (Jordan et al., 2024); Moonlight, arXiv:2502.16982, §2.1. The coefficients are Jordan's: singular values
        end in about [0.68, 1.14] where they were not tiny, and do not converge to one.

    Args:
        x: [..., R, C]. A matrix of zeros stays zero.
        backend: "cpu", "bmm", "reference", or None for the best that supports the call.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        ShapeError, DtypeError: x holds no matrices, or is not floating.
        BackendError: A gradient is needed, or the named backend cannot run this call.

    Numerics: bfloat16 products but in `reference`; a scale of x does not matter unless its squares overflow.
    Cost: with r = min(R, C) and s = max(R, C), 10 r r (2 s + r) multiply-adds a matrix.

    Example:
        >>> import torch
        >>> y = orthogonalise(torch.diag(torch.tensor([3.0, -4.0])), backend="reference")
        >>> bool(y.diag().abs().sub(0.95).abs().max() < 0.3), y[0, 1].item()
        (True, 0.0)
    """
    op = "orthogonalise"
    expect_floating(op, x=x)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ShapeError(f"{op}: x is {list(x.shape)}, expected [..., R, C] with R and C at least 1.")
    matrices = x.reshape(-1, *x.shape[-2:])
    call = describe_call(x, sizes=dict(zip(("M", "R", "C"), matrices.shape, strict=True)))
    y: Tensor = ORTHOGONALISE.choose(call, backend).run(matrices)
    return y.view(x.shape)
