"""Temporary memory is bounded by a tile: nothing grows with the length but results, gradients and a few states."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_linear.ops.delta_rule import chunk
from kimi_linear.ops.delta_rule.chunk import PlainSource, Settings, chunk_backward, chunk_forward
from kimi_linear.ops.delta_rule.specs import DeltaRuleCase, make_inputs


class Peak(TorchDispatchMode):
    """The bytes of tensors made inside and alive at one time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (ref := StorageWeakRef(x.untyped_storage())) not in given:
                self._alive[ref] = x.untyped_storage().nbytes()
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return result


def peak(T: int, H: int, K: int, V: int, *, packed: bool) -> tuple[int, int]:
    """Return the peaks of a forward and of a backward."""
    lengths = (T // 2, T // 4, T - T // 2 - T // 4) if packed else None
    x = make_inputs(DeltaRuleCase(name="x", T=T, H=H, K=K, V=V, lengths=lengths, initial_state=False), torch.float32)
    inputs = [x[n] for n in ("q", "k", "erase_key", "write_value", "log_decay")]
    settings = Settings(1.0, "post", False)
    with Peak() as forward:
        source = PlainSource(*inputs)
        o, state = chunk_forward(source, settings, None, x["cu_seqlens"])
    cotangents = torch.ones_like(o), torch.zeros_like(state)
    with Peak() as backward:
        source = PlainSource(*inputs)
        source.allocate()
        chunk_backward(source, settings, *cotangents, None, x["cu_seqlens"])
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "K", "V"), [(1, 32, 16), (2, 32, 32)])
def test_only_results_grow_with_the_length(monkeypatch, H, K, V, packed) -> None:
    """Per token and head: an output; or four gradients over K, one over V and a state a tile."""
    # Small tiles, so that short sequences have many.
    monkeypatch.setattr(chunk, "TILE_ELEMENTS", 4 * 32 * 32)
    short, long = peak(1024, H, K, V, packed=packed), peak(3072, H, K, V, packed=packed)
    forward, backward = ((b - a) / (2048 * H) for a, b in zip(short, long, strict=True))
    # What a pack adds is one index and one mask, 9 bytes a token.
    index = 9 / H if packed else 0
    assert forward <= 4 * V + index
    # Tokens a sequence has in a tile; in a pack it shares the tile with others.
    tile = 32 if packed else 4 * 32 // H
    assert backward <= 4 * (4 * K + V) + 4 * K * V / tile + index
    # One factor of a chunk's scores alone would be 4 C K, and pairwise decays C times that.
    assert backward < 4 * 32 * K


def test_the_peak_sees_a_temporary() -> None:
    with Peak() as found:
        x = torch.ones(1000)
        y = x.view(10, 100) * 2
        del x
        y += 1
    assert found.bytes == 8000
