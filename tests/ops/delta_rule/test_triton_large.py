"""The Triton kernels at many sequences and beyond 2^31 elements: their last programs, on memory that is never filled.

A pack's last sequence must come out as it does alone, bit for bit. Whatever an int32 cannot hold is an error here.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from support import interpreted, ops
from support.interpreted import Launch, sparse

pytestmark = [
    ops.TRITON,
    pytest.mark.skipif(ops.DEVICE != "cpu", reason="chooses programs, which only the interpreter lets it"),
    # As in test_triton.py.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
# Tokens of a chunk, as few as there can be; and of the last sequence: more than a chunk, so that the chains take a step
# from one to the next.
CHUNK, LAST = 16, 20
FORWARD = ["prepare_kernel", "forward_kernel"]
BACKWARD = ["prepare_kernel", "forward_kernel", "reverse_kernel", "scores_kernel", "collect_kernel"]


def draw(tokens: int, K: int, last: int, raw: bool, heads: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Return bfloat16 inputs of so many tokens, all zero but for the last ones, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}
    for name, dim in (("q", K), ("k", K), ("value", K), ("g", K), ("beta", 0), ("d_o", K)):
        x = torch.randn(last, heads, *([dim] if dim else []), generator=generator)
        if name == "g":
            x = -x.abs() if not raw else x
        if name == "beta" and not raw:
            x = x.sigmoid()
        if name in ("q", "k") and not raw:
            x = torch.nn.functional.normalize(x, dim=-1)
        drawn[name] = sparse(tokens, *x.shape[1:], dtype=torch.bfloat16)
        drawn[name][-last:] = x.bfloat16()
    d_o = drawn.pop("d_o")
    return drawn, d_o


def room(_: Any, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return new memory, which is zero: writing zeros to it would fill it."""
    x = sparse(*shape, dtype=dtype)
    x.zero_ = lambda: x
    return x


class Pack:
    """A pack of which only the last sequence's programs run, forward and backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cu_seqlens: Tensor, K: int, raw: bool, tiles: Any) -> None:
        from kimi_linear.ops.delta_rule.triton import launch, plan
        from kimi_linear.ops.delta_rule.triton.inputs import Inputs

        # All of a sequence's chunks in one chain, which one program runs.
        monkeypatch.setenv("KIMI_LINEAR_TRITON_SEGMENTS", "0")
        self.N, begin, tokens = cu_seqlens.shape[0] - 1, int(cu_seqlens[-2]), int(cu_seqlens[-1])
        self.last = tokens - begin
        x, d_o = draw(tokens, K, self.last, raw)
        gate = (
            {"A_log": torch.zeros(1), "dt_bias": torch.full((K,), 0.25)} if raw else dict.fromkeys(("A_log", "dt_bias"))
        )
        initial = sparse(self.N, 1, K, K)
        initial[-1] = torch.randn(K, K, generator=torch.Generator().manual_seed(1))
        inputs = Inputs(
            x["q"], x["k"], None, x["value"], x["g"], x["beta"], **gate, initial=initial, scale=0.5, raw=raw
        )
        self.tiles = tiles or dataclasses.replace(plan.tiles(inputs, tokens, self.N, True), chunk=CHUNK)
        monkeypatch.setattr(plan, "tiles", lambda *_: self.tiles)
        monkeypatch.setattr(launch.Run, "room", room)
        monkeypatch.setattr(launch.Parts, "finish", lambda parts, _: self.finish(parts))
        self.parts: list[Any] = []
        self.chunks = launch.cut(cu_seqlens, 1, tokens, self.tiles.chunk, x["q"].device)
        with interpreted.programs(self.chosen) as self.launches:
            o, final, _ = launch.forward(inputs, cu_seqlens, 1, tokens)
            found = launch.backward(inputs, cu_seqlens, 1, tokens, d_o, initial)
        self.found = {"o": o, "final": final, **{n: x for n, x in found.items() if x is not None}}

    def finish(self, parts: Any) -> dict[str, Tensor]:
        """Finish q and k, by the kernel; sums over all tokens or chunks would fill memory, so keep their parts."""
        from kimi_linear.ops.delta_rule.triton import launch

        self.parts.append(parts)
        x = parts.run.inputs
        return {
            n: launch._finish(parts.run, given, part, x.raw)
            for n, given, part in (("q", x.q, parts.q), ("k", x.k, parts.k))
        }

    def chosen(self, name: str, count: int) -> Iterable[int]:
        """Return the programs that the last sequence has, of a kernel over sequences, over chunks or over rows."""
        if name in ("forward_kernel", "reverse_kernel"):
            return range(count - count // self.N, count)
        if name == "finish_kernel":
            return range(max(0, count - self.last), count)
        share = count // self.chunks.count
        return range(int(self.chunks.first[-2]) * share, int(self.chunks.first[-1]) * share)

    def results(self) -> dict[str, Tensor]:
        """Return everything that belongs to the last sequence."""
        tokens = {"o", "q", "k", "value", "g"}
        rows = {n: x[-self.last :] if n in tokens else x[-1:] for n, x in self.found.items()}
        (parts,) = self.parts
        chunks = slice(int(self.chunks.first[-2]), int(self.chunks.first[-1]))
        by_chunk = {n: getattr(parts, n) for n in ("diagonal", "norms", "rate", "bias")}
        rows |= {f"parts of {n}": x[chunks] for n, x in by_chunk.items() if x is not None}
        return rows | {"parts of beta": parts.beta[:, -self.last :]}


def assert_like_alone(monkeypatch: pytest.MonkeyPatch, cu_seqlens: Tensor, K: int, raw: bool) -> list[Launch]:
    """Compare a pack's last sequence with the same one alone; return the pack's launches."""
    pack = Pack(monkeypatch, cu_seqlens, K, raw, None)
    alone = Pack(monkeypatch, torch.tensor([0, pack.last], dtype=torch.int32), K, raw, pack.tiles)
    assert [launch.name for launch in pack.launches] == FORWARD + BACKWARD + ["finish_kernel"] * (2 if raw else 0)
    found, expected = pack.results(), alone.results()
    assert all(x.float().abs().sum() > 0 for x in expected.values())
    assert [n for n, x in expected.items() if not torch.equal(found[n], x)] == []
    return pack.launches


def test_beyond_2_31_elements_of_tokens_and_chunks(monkeypatch) -> None:
    tokens = 2**27
    cu_seqlens = torch.tensor([0, tokens, tokens + LAST], dtype=torch.int32)
    launches = assert_like_alone(monkeypatch, cu_seqlens, K=16, raw=True)
    # q, and the factors of the chunks, end beyond.
    assert launches[0].args[0].numel() > 2**31
    assert launches[0].args[10].numel() > 2**31


def test_beyond_2_31_elements_of_states(monkeypatch) -> None:
    cu_seqlens = torch.zeros(2**23 + 2, dtype=torch.int32)
    cu_seqlens[-1] = LAST
    launches = assert_like_alone(monkeypatch, cu_seqlens, K=16, raw=False)
    # The initial states.
    assert launches[1].args[8].numel() > 2**31


def test_more_sequences_than_a_grid_has_along_any_axis_but_the_first(monkeypatch) -> None:
    N = 70_000
    lengths = torch.arange(N) % 2
    lengths[-1] = 1
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    launches = assert_like_alone(monkeypatch, cu_seqlens, K=16, raw=True)
    grids = {launch.name: launch.grid for launch in launches}
    assert all(len(grid) == 1 for grid in grids.values())
    assert grids["forward_kernel"] == grids["reverse_kernel"] == (N,)
    # Room for every token's chunk and a partial one of every sequence; one block of 16 channels.
    room = -(-int(cu_seqlens[-1]) // CHUNK) + N
    assert grids["prepare_kernel"] == grids["scores_kernel"] == grids["collect_kernel"] == (room,)
    assert grids["finish_kernel"] == (-(-int(cu_seqlens[-1]) // 128),)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("longest", [1, 200])
def test_chunks_of_70_000_sequences(longest, size) -> None:
    from kimi_linear.ops.delta_rule.triton.chunks import cut

    N = 70_000
    lengths = torch.randint(0, longest + 1, (N,), generator=torch.Generator().manual_seed(longest))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    T = int(cu_seqlens[-1])
    found = cut(cu_seqlens, 1, T, size, cu_seqlens.device)
    owners: list[int] = []
    first = [0]
    for sequence, length in enumerate(lengths.tolist()):
        owners += [sequence] * -(-length // size)
        first.append(len(owners))
    assert found.first.tolist() == first
    assert found.owner[: len(owners)].tolist() == owners
    assert found.count == -(-T // size) + N >= len(owners)
    assert found.owner[len(owners) :].eq(N).all()


def test_the_largest_grid_of_a_long_pack_fits_its_axis(monkeypatch) -> None:
    """2^31 - 1 programs are the most; what would need more does not fit a GPU's memory either."""
    from kimi_linear.ops.delta_rule.triton import launch
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    counts: dict[str, int] = {}
    monkeypatch.setattr(launch, "start", lambda kernel, count, *_, **__: counts.update({kernel.__name__: count}))
    N, T, H, D = 70_000, 2**22, 96, 128
    x = [empty(T, H, D) for _ in range(4)]
    inputs = Inputs(*x[:2], None, x[2], x[3], empty(T, H), empty(H), empty(H * D), None, 1.0, raw=True)
    launch.backward(inputs, empty(N + 1, dtype=torch.int32), 1, T, x[0], empty(N, H, D, D, dtype=torch.float32))
    assert set(counts) == {*BACKWARD, "finish_kernel"}
    assert counts["collect_kernel"] == (T // 64 + N) * H * 4
    assert max(counts.values()) < 2**31


def collect_launch(monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Return the launch of the collecting kernel of a short call with two heads and one decay a head."""
    from kimi_linear.ops.delta_rule.triton import launch
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    x, d_o = draw(5, 64, 5, raw=False, heads=2)
    inputs = Inputs(x["q"], x["k"], None, x["value"], x["g"][..., 0].contiguous(), x["beta"], None, None, None, 1.0)
    with interpreted.programs(lambda name, count: range(count)) as seen:
        launch.backward(inputs, None, 1, 5, d_o, torch.zeros(1, 2, 64, 64))
    return next(launch for launch in seen if launch.name == "collect_kernel")


def test_beyond_2_31_elements_of_parts_of_channel_blocks(monkeypatch) -> None:
    """Each block of channels has a plane [tokens, heads] of its own; here, planes that lie as far apart as of 2^30."""
    from kimi_linear.ops.delta_rule.triton import gradients

    given = collect_launch(monkeypatch)
    names = gradients.collect_kernel.arg_names
    args = dict(zip(names, given.args, strict=False))
    near = {name: args[name] for name in ("d_strength", "d_decay_parts")}
    tokens = 2**30 + 3
    far = {name: sparse(x.shape[0], tokens, 2) for name, x in near.items()}
    with interpreted.programs(lambda name, count: range(count)):
        gradients.collect_kernel[given.grid](*{**args, **far, "tokens": tokens}.values(), **given.options)
    assert torch.equal(far["d_decay_parts"][:, :5], near["d_decay_parts"])
    # The first plane holds the values' part, of another kernel.
    assert torch.equal(far["d_strength"][1:, :5], near["d_strength"][1:])
    assert near["d_strength"][1:].abs().amax((1, 2)).gt(0).all()


def token(N: int, K: int) -> tuple[Any, Tensor]:
    """Return inputs of one token of N sequences, all zero but the last, and slots."""
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    x, _ = draw(N, K, 1, raw=True)
    gate = {"A_log": torch.zeros(1), "dt_bias": torch.full((K,), 0.25)}
    inputs = Inputs(x["q"], x["k"], None, x["value"], x["g"], x["beta"], **gate, initial=None, scale=0.5, raw=True)
    return inputs, sparse(N, dtype=torch.int32)


def decode_last(inputs: Any, pool: Tensor, slots: Tensor) -> Tensor:
    """Advance the last sequence alone; return its output."""
    from kimi_linear.ops.delta_rule.triton.decode import decode

    blocks = 2
    with interpreted.programs(lambda name, count: range(count - blocks, count)) as seen:
        o = decode(inputs, pool, slots)
    assert seen[0].grid == (slots.shape[0] * blocks,)
    return o[-1:]


def decoded(K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a state, and what decoding makes of it and puts out, for one sequence alone."""
    state = torch.randn(1, 1, K, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    pool = state.clone()
    o = decode_last(token(1, K)[0], pool, torch.zeros(1, dtype=torch.int32))
    assert o.abs().sum() > 0
    assert not torch.equal(pool, state)
    return state, pool, o


def test_decoding_beyond_2_31_elements_of_sequences() -> None:
    state, after, o = decoded(64)
    inputs, slots = token(2**25 + 1, 64)
    assert torch.equal(decode_last(inputs, pool := state.clone(), slots), o)
    assert torch.equal(pool, after)


@pytest.mark.parametrize(
    "strides",
    [(2**30 + 64, 2**13, 64, 1), (64 * 2**26, 64 * 2**26, 2**26, 1), (64 * 2**26, 64 * 2**26, 1, 2**26)],
    ids=["slots", "rows", "columns"],
)
def test_decoding_in_a_pool_that_ends_beyond_2_31_elements(strides) -> None:
    state, after, o = decoded(64)
    inputs, slots = token(1, 64)
    slot = 2 if strides[0] < 2**31 else 0
    pool = sparse(max(3 * strides[0], 64 * 2**26), dtype=torch.bfloat16).as_strided((slot + 1, 1, 64, 64), strides)
    pool[slot] = state[0]
    slots[0] = slot
    assert torch.equal(decode_last(inputs, pool, slots), o)
    assert torch.equal(pool[slot], after[0])
