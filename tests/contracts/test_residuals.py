"""The contract of every registered residual scheme."""

import pytest
import torch
from torch import Tensor

from kimi_linear.nn.residual import RESIDUALS, build_residual
from kimi_linear.nn.residual.base import ResidualScheme

schemes = pytest.mark.parametrize("kind", list(RESIDUALS))
SUBLAYERS = 4


def run(residual: ResidualScheme, embedding: Tensor, outputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return what each sub-layer reads, and the end of the stream."""
    stream, reads = residual.start(embedding), []
    for sublayer, output in enumerate(outputs):
        reads.append(residual.read(stream, sublayer))
        stream = residual.write(stream, output, sublayer)
    return reads, residual.finish(stream)


def tensors(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 8, dtype=torch.float64, generator=generator) for _ in range(count)]


@schemes
def test_reads_and_the_end_have_the_shape_of_the_embedding(kind: str) -> None:
    embedding, *outputs = tensors(SUBLAYERS + 1)
    reads, end = run(build_residual(kind), embedding, outputs)
    assert {tuple(x.shape) for x in [*reads, end]} == {tuple(embedding.shape)}


@schemes
def test_the_first_sublayer_reads_the_embedding(kind: str) -> None:
    residual, (embedding,) = build_residual(kind), tensors(1)
    assert torch.equal(residual.read(residual.start(embedding), 0), embedding)


@schemes
def test_no_method_changes_its_arguments(kind: str) -> None:
    given = tensors(SUBLAYERS + 1)
    copies = [x.clone() for x in given]
    run(build_residual(kind), given[0], given[1:])
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


@schemes
def test_a_read_depends_on_earlier_outputs_only(kind: str) -> None:
    embedding, *outputs = tensors(SUBLAYERS + 1)
    residual = build_residual(kind)
    reads, end = run(residual, embedding, outputs)
    changed = [*outputs[:-1], outputs[-1] + 1.0]
    other_reads, other_end = run(residual, embedding, changed)
    assert all(torch.equal(x, y) for x, y in zip(reads, other_reads, strict=True))
    assert not torch.equal(end, other_end)


@schemes
def test_a_token_does_not_depend_on_other_tokens(kind: str) -> None:
    given = tensors(SUBLAYERS + 1)
    residual = build_residual(kind)
    _, end = run(residual, given[0], given[1:])
    for x in given:
        x[:, 3:] += 1.0
    _, other = run(residual, given[0], given[1:])
    assert torch.equal(end[:, :3], other[:, :3])


@schemes
def test_gradients_reach_the_embedding_every_output_and_every_parameter(kind: str) -> None:
    given = [x.requires_grad_() for x in tensors(SUBLAYERS + 1)]
    residual = build_residual(kind).double()
    reads, end = run(residual, given[0], given[1:])
    sum((x * x).sum() for x in [*reads, end]).backward()
    for tensor in [*given, *residual.parameters()]:
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
        assert float(tensor.grad.abs().max()) > 0
