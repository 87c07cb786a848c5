"""The delta rule cut over two and four processes equals one process: outputs, final states and every gradient."""

from pathlib import Path

import pytest
import torch

from kimi_linear.base.numerics import relative_error
from kimi_linear.ops import ContextParallel
from support import context_parallel as support
from support import ops, ranks


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_equal_one_process(size: int, tmp_path: Path) -> None:
    cuts = support.delta_cuts(size)
    shares = ranks.run(size, support.delta_work, tmp_path, size)
    wrong = {}
    for cut, *parts in zip(cuts, *shares, strict=True):
        wrong |= support.differences(cut, support.joined(cut, parts), support.one_process(cut, torch.float64))
    assert wrong == {}


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_with_convolutions_equal_one_process(recompute: bool, tmp_path: Path) -> None:
    """Several exchanges in one graph meet in the same order on every rank, recomputed activations or not."""
    shares = ranks.run(4, support.layer_work, tmp_path, recompute)
    whole = (0, support.LAYER_BORDERS[-1])
    expected = support.layer_gradients(ContextParallel(0, whole, support.LAYER_OFFSETS, is_packed=True), recompute)
    assert all(bool(gradient.any()) for gradient in expected)
    found = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
    assert max(relative_error(x, y) for x, y in zip(found, expected, strict=True)) < 1e-10


def test_a_call_without_gradients_gives_the_same_bits(tmp_path: Path) -> None:
    assert all(all(same) for same in ranks.run(4, support.plain_call_work, tmp_path, 4))


def test_a_second_backward_to_some_inputs_gives_the_gradients_of_the_first(tmp_path: Path) -> None:
    assert all(ranks.run(4, support.second_backward_work, tmp_path))


@pytest.mark.parametrize("op", ["delta_rule", "kda", "kda_core"])
@pytest.mark.parametrize("borders", [(130, 130, 133), (0, 133, 197)])
def test_documents_that_are_not_cut_give_the_bits_of_one_process(op: str, borders: tuple[int, ...]) -> None:
    """Nothing is exchanged: there is no process group here."""
    kind = support.support.KINDS[op]
    case = kind(name="packed", lengths=support.LONG, H=1, HV=2, K=5, V=3)
    for backend, dtype in ops.backend_dtypes(support.support.REGISTERED[op]):
        if backend == "reference":
            continue
        cut = support.Cut("", op, case, (0, *borders, 198), dtype, backend)
        found = support.joined(cut, [support.one_rank(cut, rank) for rank in range(4)])
        expected = support.one_process(cut)
        tokens = [name for name in expected if name.removeprefix("d_") not in cut.names[1]]
        assert [name for name in tokens if not torch.equal(found[name], expected[name])] == []
