"""What mixers remember, by itself: growth, rings, rows, refusals."""

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import ShapeError, StateError
from kimi_linear.nn.state import Cache, GDNState, GQAState, KDAState, LayerState, MLAState


def latents(rows: int = 2) -> MLAState:
    return MLAState(
        lengths=torch.zeros(rows, dtype=torch.int64), latent=torch.zeros(rows, 0, 3), key_rope=torch.zeros(rows, 0, 2)
    )


def ring(window: int, rows: int = 1) -> GQAState:
    empty = torch.zeros(rows, 0, 1, 1)
    return GQAState(lengths=torch.zeros(rows, dtype=torch.int64), window=window, keys=empty, values=empty.clone())


def tokens(*values: float) -> tuple[Tensor, Tensor]:
    row = torch.tensor(values).view(1, -1, 1, 1)
    return row, -row


def delta(cls: type, rows: int = 2) -> LayerState:
    return cls(
        conv_q=torch.randn(rows, 4, 3),
        conv_k=torch.randn(rows, 4, 3),
        conv_v=torch.randn(rows, 4, 3),
        recurrent=torch.randn(rows, 1, 4, 4),
    )


def test_buffers_grow_by_doubling_and_keep_what_they_hold() -> None:
    state, capacities, seen = latents(), [], []
    for step in range(70):
        new = (torch.full((2, 3), float(step)), torch.full((2, 2), float(-step)))
        state.append(new)
        seen.append(float(step))
        capacities.append(state.capacity)
    assert sorted(set(capacities)) == [16, 32, 64, 128]
    assert state.lengths.tolist() == [70, 70]
    assert state.latent[1, :70, 0].tolist() == seen
    assert state.key_rope[0, :70, 1].tolist() == [-x for x in seen]
    assert state.nbytes == 2 * 70 * 5 * 4
    assert state.allocated_nbytes == 2 * 128 * 5 * 4


def test_a_long_prompt_reserves_what_it_needs_at_once() -> None:
    state = latents(1)
    state.extend((torch.ones(1, 100, 3), torch.ones(1, 100, 2)), None)
    assert state.capacity == 100


def test_a_ring_never_exceeds_its_window_and_keeps_the_last_tokens() -> None:
    state = ring(window=4)
    state.extend(tokens(0, 1, 2), None)
    assert state.capacity == 4
    history = state.extend(tokens(3, 4), None)
    assert history.tensors[0].flatten().tolist() == [0, 1, 2, 3, 4]
    state.append(tuple(x[:, 0] for x in tokens(5)))
    history = state.extend(tokens(6, 7, 8, 9, 10, 11), None)
    # The window of the first new token reaches three tokens back.
    assert history.tensors[0].flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert state.capacity == 4
    assert sorted(state.keys.flatten().tolist()) == [8, 9, 10, 11]
    assert [state.keys[0, t % 4].item() for t in (8, 9, 10, 11)] == [8, 9, 10, 11]
    assert state.lengths.tolist() == [12]
    assert state.used.tolist() == [4]


def test_rows_of_different_lengths_come_back_packed() -> None:
    state = latents()
    values = torch.arange(5.0).view(1, 5, 1)
    state.extend((values.expand(-1, -1, 3), values.expand(-1, -1, 2)), torch.tensor([0, 4, 5]))
    assert state.lengths.tolist() == [4, 1]
    new = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]])
    history = state.extend((new.expand(-1, -1, 3), new.expand(-1, -1, 2)), None)
    assert history.tensors[0][0, :, 0].tolist() == [0, 1, 2, 3, 10, 11, 4, 20, 21]
    assert history.cu_seqlens is not None
    assert history.cu_seqlens.tolist() == [0, 2, 4]
    assert history.cu_seqlens_k is not None
    assert history.cu_seqlens_k.tolist() == [0, 6, 9]
    assert state.latent[1, :3, 0].tolist() == [4, 20, 21]


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [0, 2, 4], [1, 2, 5]], ids=str)
def test_wrong_offsets_are_refused_before_anything_changes(offsets: list[int]) -> None:
    state = latents(len(offsets) - 1)
    new = (torch.ones(1, 5, 3), torch.ones(1, 5, 2))
    with pytest.raises(ShapeError, match="cu_seqlens"):
        state.extend(new, torch.tensor(offsets))
    assert state.capacity == 0
    assert int(state.lengths.sum()) == 0


def test_new_tokens_keep_their_gradient_and_past_ones_have_none() -> None:
    state = latents(1)
    first = torch.ones(1, 2, 3, requires_grad=True)
    state.extend((first, torch.ones(1, 2, 2)), None)
    second = torch.ones(1, 2, 3, requires_grad=True)
    history = state.extend((second, torch.ones(1, 2, 2)), None)
    history.tensors[0].sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert not state.latent.requires_grad


@pytest.mark.parametrize("make", [lambda: delta(KDAState), lambda: delta(GDNState), latents], ids=["kda", "gdn", "mla"])
def test_forks_and_chosen_rows_share_no_memory(make: type[LayerState]) -> None:
    state = make()
    if isinstance(state, MLAState):
        state.append((torch.ones(2, 3), torch.ones(2, 2)))
    for other in (state.fork(), state.select_rows(torch.tensor([0, 1]))):
        for name, tensor in other.tensors().items():
            assert torch.equal(tensor, state.tensors()[name])
            tensor.fill_(7)
            assert not torch.equal(tensor, state.tensors()[name])


def test_a_state_of_the_same_shape_and_another_kind_is_refused() -> None:
    state = delta(KDAState)
    before = state.recurrent.clone()
    with pytest.raises(StateError, match="kind 'gdn', this state has 'kda'"):
        state.restore(delta(GDNState).snapshot())
    assert torch.equal(state.recurrent, before)


def test_a_transposed_layout_is_refused_though_every_shape_agrees() -> None:
    state = delta(KDAState)
    snapshot = state.snapshot()
    recurrent = snapshot["recurrent"]
    assert isinstance(recurrent, Tensor)
    with pytest.raises(StateError, match="layout 'NHVK', this state has 'NHKV'"):
        state.restore({**snapshot, "layout": "NHVK", "recurrent": recurrent.mT})


def test_a_ring_of_another_length_is_refused() -> None:
    short, long = ring(4), ring(5)
    for state in (short, long):
        state.extend(tokens(0, 1, 2), None)
    with pytest.raises(StateError, match="ring of 4"):
        long.restore(short.snapshot())


def test_a_snapshot_holds_only_the_used_part() -> None:
    state = latents()
    state.append((torch.ones(2, 3), torch.ones(2, 2)))
    assert state.capacity == 16
    latent = state.snapshot()["latent"]
    assert isinstance(latent, Tensor)
    assert latent.shape == (2, 1, 3)


def cache() -> Cache:
    mla = latents()
    mla.append((torch.randn(2, 3), torch.randn(2, 2)))
    return Cache((delta(KDAState), mla), torch.ones(2, dtype=torch.int64))


def test_a_cache_survives_its_snapshot() -> None:
    one, two = cache(), cache()
    two.restore(one.snapshot())
    for left, right in zip(one.layers, two.layers, strict=True):
        for name, tensor in left.tensors().items():
            size = 1 if isinstance(left, MLAState) and name != "lengths" else None
            expected = tensor if size is None else tensor[:, :size]
            assert torch.equal(right.tensors()[name], expected)
    assert one.nbytes == two.nbytes == sum(layer.nbytes for layer in one.layers)


def test_a_cache_is_unchanged_by_a_snapshot_it_refuses() -> None:
    one, other = cache(), cache()
    before = [layer.fork() for layer in one.layers]
    broken = other.snapshot()
    broken["layers.1.layout"] = "NRT"
    with pytest.raises(StateError, match="layout"):
        one.restore(broken)
    for kept, layer in zip(before, one.layers, strict=True):
        for name, tensor in kept.tensors().items():
            assert torch.equal(tensor, layer.tensors()[name])


def test_a_cache_refuses_other_rows_and_other_layers() -> None:
    one = cache()
    with pytest.raises(StateError, match="2 rows"):
        one.restore(one.select_rows(torch.tensor([0])).snapshot())
    with pytest.raises(StateError, match="1 layers, this cache has 2"):
        one.restore(Cache(one.layers[:1], one.lengths).snapshot())
    with pytest.raises(StateError, match="2 rows"):
        one.restore({})


def test_chosen_rows_of_a_cache_follow_their_lengths() -> None:
    one = cache()
    one.lengths[1] = 5
    assert one.select_rows(torch.tensor([1, 1, 0])).lengths.tolist() == [5, 5, 1]
    assert one.select_rows(torch.tensor([1])).batch_size == 1
