"""The contract of every registered mixer; a mixer without an example here fails the first test."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_linear.base.errors import ShapeError, StateError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.nn.mixers import MIXERS, MixerConfig
from kimi_linear.nn.mixers.base import Mixer
from kimi_linear.nn.state import LayerState
from support.flops import measured_flops
from support.parts import HIDDEN, MIXER_CASES, without_examples

T = 19

mixers = pytest.mark.parametrize("config", MIXER_CASES.values(), ids=MIXER_CASES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def build(config: MixerConfig, dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(0)
    return MIXERS.build(config, HIDDEN).to(dtype)


def inputs(batch: int, tokens: int = T, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def new_state(layer: Mixer, rows: int, x: Tensor) -> LayerState:
    return layer.new_state(rows, device=x.device, dtype=x.dtype)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def in_pieces(layer: Mixer, x: Tensor, sizes: list[int]) -> tuple[Tensor, LayerState]:
    state = new_state(layer, x.shape[0], x)
    return torch.cat([layer(piece, state) for piece in x.split(sizes, dim=1)], dim=1), state


def assert_close(x: Tensor, reference: Tensor) -> None:
    assert relative_error(x, reference) <= tolerance(x.dtype).output


def test_every_registered_part_has_examples() -> None:
    assert without_examples() == set()


@mixers
@dtypes
@pytest.mark.parametrize(
    "sizes", [[T], [1] * T, [7, T - 7], [1, 8, T - 9], [T - 3, 1, 1, 1]], ids=lambda sizes: str(len(sizes))
)
@torch.no_grad()
def test_a_whole_prompt_equals_its_pieces(config: MixerConfig, dtype: torch.dtype, sizes: list[int]) -> None:
    layer, x = build(config, dtype), inputs(2, dtype=dtype)
    assert_close(in_pieces(layer, x, sizes)[0], layer(x))


@mixers
def test_single_tokens_with_gradients_recorded_equal_the_whole(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2, 6)
    assert_close(in_pieces(layer, x, [1] * 6)[0], layer(x))


@mixers
@pytest.mark.parametrize("changed", [1, 10, T - 1])
@torch.no_grad()
def test_a_changed_token_changes_nothing_before_it(config: MixerConfig, changed: int) -> None:
    layer, x = build(config), inputs(2)
    other = x.clone()
    other[:, changed] += 1.0
    before, after = layer(x), layer(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@mixers
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(config: MixerConfig) -> None:
    layer, x = build(config), inputs(3)
    other = x.clone()
    other[1:] = inputs(2, seed=5)
    assert torch.equal(layer(x)[0], layer(other)[0])
    assert_close(layer(x[:1]), layer(x)[:1])


@mixers
@pytest.mark.parametrize("lengths", [(4, 15), (0, 4, 0, 14, 1, 0), (T,)], ids=str)
def test_packed_sequences_equal_separate_ones(config: MixerConfig, lengths: tuple[int, ...]) -> None:
    layer, x = build(config), inputs(1).requires_grad_()
    weight = inputs(1, seed=3)
    separate = torch.cat([layer(piece) for piece in x.split(lengths, dim=1) if piece.shape[1]], dim=1)
    expected = torch.autograd.grad((separate * weight).sum(), [x, *layer.parameters()])
    packed = layer(x, cu_seqlens=offsets(*lengths))
    found = torch.autograd.grad((packed * weight).sum(), [x, *layer.parameters()])
    assert_close(packed, separate)
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) <= tolerance(torch.float64).gate_gradient


@mixers
@torch.no_grad()
def test_rows_of_different_lengths_continue_like_separate_sequences(config: MixerConfig) -> None:
    layer = build(config)
    prompts = [inputs(1, tokens, seed=tokens) for tokens in (12, 3, 7)]
    state = new_state(layer, 3, prompts[0])
    # Packed prompts with an empty one, then packed pieces, then dense pieces, then single tokens.
    first = layer(torch.cat([prompts[0][:, :9], prompts[2][:, :1]], dim=1), state, offsets(9, 0, 1))
    second = layer(
        torch.cat([p[:, a:b] for p, a, b in zip(prompts, (9, 0, 1), (9, 2, 5), strict=True)], 1),
        state,
        offsets(0, 2, 4),
    )
    tail = [
        torch.cat([prompts[0][0, 9:11], inputs(1, 4, seed=8)[0]]),
        inputs(1, 6, seed=9)[0],
        inputs(1, 6, seed=10)[0],
    ]
    dense = layer(torch.stack([t[:3] for t in tail]), state)
    steps = [layer(torch.stack([t[i : i + 1] for t in tail]), state) for i in range(3, 6)]
    last = torch.cat([dense, *steps], dim=1)
    whole = [
        layer(torch.cat([prompts[0][:, :9], tail[0][None]], 1)),
        layer(torch.cat([prompts[1][:, :2], tail[1][None]], 1)),
        layer(torch.cat([prompts[2][:, :5], tail[2][None]], 1)),
    ]
    assert_close(torch.cat([first[:, :9], last[0:1]], 1), whole[0])
    assert_close(torch.cat([second[:, :2], last[1:2]], 1), whole[1])
    assert_close(torch.cat([first[:, 9:], second[:, 2:], last[2:3]], 1), whole[2])


@mixers
@torch.no_grad()
def test_a_forked_state_continues_alone(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2)
    _, state = in_pieces(layer, x[:, :8], [8])
    fork = state.fork()
    other = layer(inputs(2, 5, seed=4), fork)
    expected = layer(x)[:, 8:]
    assert_close(torch.cat([layer(x[:, t : t + 1], state) for t in range(8, T)], dim=1), expected)
    assert not torch.equal(other, expected[:, :5])


@mixers
@torch.no_grad()
def test_a_snapshot_survives_a_file_and_continues_bit_identically(config: MixerConfig, tmp_path: Path) -> None:
    layer, x = build(config), inputs(2)
    _, state = in_pieces(layer, x[:, :9], [4, 1, 4])
    snapshot = state.snapshot()
    tags = {name: value for name, value in snapshot.items() if isinstance(value, str)}
    tensors = {name: value.contiguous() for name, value in snapshot.items() if isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "state.safetensors", metadata=tags)
    restored = new_state(layer, 2, x)
    restored.restore({**load_file(tmp_path / "state.safetensors"), **tags})
    for t in range(9, T):
        assert torch.equal(layer(x[:, t : t + 1], restored), layer(x[:, t : t + 1], state))
    # Restored a second time from the same snapshot, so it was not written to.
    restored.restore(snapshot)
    assert_close(layer(x[:, 9:], restored), layer(x)[:, 9:])


@mixers
@torch.no_grad()
def test_selected_rows_continue_their_own_sequences(config: MixerConfig) -> None:
    layer, x = build(config), inputs(3)
    _, state = in_pieces(layer, x[:, :8], [8])
    rows = torch.tensor([2, 0, 2, 1])
    assert_close(layer(x[rows, 8:], state.select_rows(rows)), layer(x)[rows, 8:])


@mixers
@torch.no_grad()
def test_a_snapshot_of_another_layout_batch_or_dtype_is_refused(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2)
    _, state = in_pieces(layer, x, [T])
    snapshot = state.snapshot()
    for tag in ("kind", "layout"):
        with pytest.raises(StateError, match=tag):
            state.restore({**snapshot, tag: "NHVK"})
    with pytest.raises(StateError, match="batch size"):
        new_state(layer, 3, x).restore(snapshot)
    with pytest.raises(StateError, match="dtype"):
        new_state(layer, 2, x.bfloat16()).restore(snapshot)
    name = next(name for name, value in snapshot.items() if isinstance(value, Tensor))
    with pytest.raises(StateError, match=name):
        state.restore({key: value for key, value in snapshot.items() if key != name})


@mixers
def test_predicted_parameters_equal_the_built_ones(config: MixerConfig) -> None:
    layer = build(config)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == config.shapes(HIDDEN)
    assert sum(p.numel() for p in layer.parameters()) == config.parameters(HIDDEN)
    assert config.float32 == layer.FLOAT32


@mixers
def test_predicted_flops_equal_the_measured(config: MixerConfig) -> None:
    layer, x = build(config, torch.float32), inputs(1, dtype=torch.float32)
    predicted = sum(config.flops_per_token(HIDDEN, context) for context in range(1, T + 1))
    assert measured_flops(lambda: layer(x)) == predicted


@mixers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_predicted_state_bytes_equal_the_measured(config: MixerConfig, dtype: torch.dtype) -> None:
    layer, x = build(config, dtype), inputs(3, dtype=dtype)
    state = new_state(layer, 3, x)
    assert state.nbytes == 3 * config.state_bytes(0, dtype.itemsize)
    layer(x, state)
    assert state.nbytes == 3 * config.state_bytes(T, dtype.itemsize) <= state.allocated_nbytes
    layer(x[:, :1], state)
    assert state.nbytes == 3 * config.state_bytes(T + 1, dtype.itemsize) <= state.allocated_nbytes


@mixers
def test_gradients_are_finite_and_reach_every_parameter(config: MixerConfig) -> None:
    layer, x = build(config, torch.float32), inputs(2, dtype=torch.float32).requires_grad_()
    (layer(x) * inputs(2, dtype=torch.float32, seed=3)).sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        if seen_by_loss(config, name):
            assert tensor.grad is not None, name
            assert bool(tensor.grad.isfinite().all()), name
            assert float(tensor.grad.abs().max()) > 0, name


def seen_by_loss(config: MixerConfig, name: str) -> bool:
    # A query that sees one token gives it all its weight, whatever the score.
    return getattr(config, "window", None) != 1 or not name.startswith(("q_proj", "k_proj"))


@mixers
def test_a_state_takes_no_gradient(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2, 6).requires_grad_()
    state = new_state(layer, 2, x)
    for piece in x.split([4, 2], dim=1):
        layer(piece, state).sum().backward()
    assert not any(tensor.requires_grad for tensor in state.tensors().values())


@mixers
@torch.no_grad()
def test_bfloat16_follows_float64(config: MixerConfig) -> None:
    layer, x = build(config, torch.float64), inputs(2).bfloat16()
    expected = layer(x.double())
    layer.bfloat16()
    whole, (pieces, _) = layer(x), in_pieces(layer, x, [7, 1, 11])
    # A layer rounds after each of about four operators in a row, each within the table's row for one.
    for y in (whole, pieces):
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) <= 4 * tolerance(torch.bfloat16).output


@mixers
def test_wrong_inputs_are_refused_with_the_expected_shape(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2)
    with pytest.raises(ShapeError, match=rf"\[B, T, {HIDDEN}\]"):
        layer(x[..., :-1])
    with pytest.raises(ShapeError, match=r"\[1, T, "):
        layer(x, cu_seqlens=offsets(4, 15))
    with pytest.raises(StateError, match="2 rows, the call has 3"):
        layer(inputs(3), new_state(layer, 2, x))
    with pytest.raises(StateError, match="2 rows, the call has 1"):
        layer(x[:1], new_state(layer, 2, x), offsets(T))
    with pytest.raises(ShapeError, match="cu_seqlens"):
        layer(x[:1], new_state(layer, 2, x), offsets(4, 4))


@mixers
def test_a_state_of_another_mixer_is_refused(config: MixerConfig) -> None:
    layer, x = build(config), inputs(2)
    other = next(c for c in MIXER_CASES.values() if c.kind != config.kind)
    with pytest.raises(StateError, match="new_state"):
        layer(x, new_state(build(other), 2, x))
