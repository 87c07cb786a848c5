"""The Triton kernels of the delta rule at the sizes and in the circumstances that only a GPU has."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import kda_core, kda_core_decode
from kimi_linear.ops.delta_rule.specs import CoreCase
from support import ops
from support.delta_rule import KINDS, call, draw, errors, run

pytestmark = [pytest.mark.gpu, ops.GPU, ops.TRITON]
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# The released model's heads.
D: dict[str, Any] = {"K": 128, "V": 128}
MIB = 2**20
every_dtype = pytest.mark.parametrize("dtype", [BF16, F32, FP16], ids=lambda dtype: str(dtype)[6:])
every_op = pytest.mark.parametrize("op", KINDS)


def drawn(B: int, T: int, H: int, dtype: torch.dtype = BF16, seed: int = 0) -> dict[str, Any]:
    """Return inputs of `kda_core` at the released head size, drawn on the device."""
    generator = torch.Generator(ops.DEVICE).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=ops.DEVICE)

    tokens = {name: normal(B, T, H, 128) for name in ("q", "k", "v", "gate")}
    return {**tokens, "beta": normal(B, T, H), "A_log": normal(H, dtype=F32), "dt_bias": normal(H * 128, dtype=F32)}


def token_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the first token of every sequence."""
    return {n: x[:, 0].contiguous() if x.dim() > 2 else x for n, x in inputs.items()}


def forward(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    return kda_core(**inputs, backend="triton")


def both_ways(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = {n: x.detach().requires_grad_() if ops.is_floating(x) else x for n, x in inputs.items()}
    o, state = kda_core(**leaves, backend="triton")
    wanted = [x for x in leaves.values() if ops.is_floating(x)]
    return o.detach(), state.detach(), *torch.autograd.grad(o, wanted, torch.ones_like(o))


@every_dtype
@every_op
def test_long_prompts_match_the_plain_chunks_in_float64(op, dtype) -> None:
    inputs = draw(KINDS[op](name="long", T=8192, H=2, **D), dtype)
    with ops.nan_in_new_memory():
        found = run(op, inputs, "triton")
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    assert errors(found, run(op, ops.in_float64(inputs), "chunk", cotangents), dtype) == {}


@pytest.mark.parametrize(("H", "dims"), [(8, 64), (4, 256), (96, 128)], ids=["D64", "D256", "H96"])
def test_other_widths_match_too(H, dims) -> None:
    inputs = draw(CoreCase(name="wide", T=1024, H=H, K=dims, V=dims), BF16)
    found = run("kda_core", inputs, "triton")
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    assert errors(found, run("kda_core", ops.in_float64(inputs), "chunk", cotangents), BF16) == {}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=lambda dtype: str(dtype)[6:])
def test_nothing_drifts_over_131072_tokens(dtype) -> None:
    inputs = drawn(1, 131072, 1, dtype)
    o, state = forward(inputs)
    expected, expected_state = kda_core(**ops.in_float64(inputs), backend="chunk")
    limit = tolerance(dtype).output
    assert relative_error(o[:, -1024:], expected[:, -1024:]) <= limit
    assert relative_error(o, expected) <= limit
    assert relative_error(state, expected_state) <= limit


@pytest.mark.parametrize("lengths", [(1300, 547, 2048, 963, 271, 3063), (1024,) * 8], ids=["mixed", "equal"])
def test_packed_prompts_match_the_plain_chunks(lengths) -> None:
    inputs = draw(CoreCase(name="packed", lengths=lengths, H=4, **D), BF16)
    found = run("kda_core", inputs, "triton")
    cotangents = ops.cotangents([found["o"], found["final_state"]])
    assert errors(found, run("kda_core", ops.in_float64(inputs), "chunk", cotangents), BF16) == {}


def test_seventy_thousand_packed_members() -> None:
    """More than 65,535, where a grid's other axes end."""
    case = CoreCase(name="ones", lengths=(1,) * 70000, H=2, K=16, V=16)
    inputs = draw(case, F32)
    o, state = call("kda_core", inputs, "triton")
    tokens = {n: inputs[n].transpose(0, 1) for n in ("q", "k", "v", "gate", "beta")}
    rows, row_states = call("kda_core", {**inputs, **tokens, "cu_seqlens": None}, "chunk")
    assert relative_error(o, rows.transpose(0, 1)) <= tolerance(F32).output
    assert relative_error(state, row_states) <= tolerance(F32).output


def test_offsets_beyond_two_to_the_31st() -> None:
    B, T, H = 16, 17477, 64
    assert B * T * H * 128 > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 52 * 2**30:
        pytest.skip(f"needs 52 GiB of GPU memory, {free / 2**30:.0f} are free")
    inputs = drawn(B, T, H)
    o, state = forward(inputs)
    alone = {n: x[-1:].contiguous() if x.dim() > 2 else x for n, x in inputs.items()}
    o_alone, state_alone = forward(alone)
    # Not by bits: a lone sequence may be cut into segments.
    assert relative_error(o[-1:], o_alone) <= tolerance(BF16).output
    assert relative_error(state[-1:], state_alone) <= tolerance(BF16).output


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Turn every wait of the host for the device into an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=ops.DEVICE)


@pytest.mark.parametrize("T", [50, 1024])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("function", [forward, both_ways])
def test_the_host_never_waits(function, packed, T) -> None:
    inputs = drawn(1, T, 4)
    if packed:
        inputs["cu_seqlens"] = offsets(20, 0, T - 20)
    function(inputs)
    with no_host_sync():
        function(inputs)


def test_the_host_never_waits_for_a_decoded_token() -> None:
    inputs = token_of(drawn(8, 1, 4))
    pool, slots = torch.zeros(9, 4, 128, 128, device=ops.DEVICE), torch.arange(8, device=ops.DEVICE)
    kda_core_decode(**inputs, pool=pool, slots=slots, backend="triton")
    with no_host_sync():
        kda_core_decode(**inputs, pool=pool, slots=slots, backend="triton")


def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Return a graph of a call, and what its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@pytest.mark.parametrize("function", [forward, both_ways])
@pytest.mark.parametrize("T", [50, 1024])
def test_a_replayed_graph_equals_the_eager_call(function, T) -> None:
    static, other = drawn(1, T, 4), drawn(1, T, 4, seed=1)
    graph, found = captured(lambda: function(static))
    for name, x in other.items():
        static[name].copy_(x)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, function(other), strict=True))


def test_a_replayed_graph_sees_other_offsets_of_packed_sequences() -> None:
    static = {**drawn(1, 1024, 4), "cu_seqlens": offsets(100, 0, 924)}
    graph, found = captured(lambda: forward(static))
    other = {**static, "cu_seqlens": offsets(1, 1022, 1)}
    expected = forward(other)
    static["cu_seqlens"].copy_(other["cu_seqlens"])
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_replayed_graph_of_a_decoded_token_equals_the_eager_call() -> None:
    inputs, other = token_of(drawn(8, 1, 4)), token_of(drawn(8, 1, 4, seed=1))
    start = torch.randn(20, 4, 128, 128, device=ops.DEVICE)
    pool, slots = start.clone(), torch.arange(8, device=ops.DEVICE)
    graph, (found,) = captured(lambda: (kda_core_decode(**inputs, pool=pool, slots=slots, backend="triton"),))
    for name, x in other.items():
        inputs[name].copy_(x)
    slots.copy_(torch.tensor([19, 3, -1, 7, 0, 12, 5, 1]))
    pool.copy_(start)
    graph.replay()
    expected = start.clone()
    assert torch.equal(found, kda_core_decode(**other, pool=expected, slots=slots, backend="triton"))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("lengths", [None, (700, 0, 1, 1347)], ids=["dense", "packed"])
def test_two_runs_are_bit_identical(lengths) -> None:
    inputs = drawn(1, 2048, 16)
    if lengths is not None:
        inputs["cu_seqlens"] = offsets(*lengths)
    one, other = both_ways(inputs), both_ways(inputs)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_many_states_decode_as_in_float64() -> None:
    inputs, rows = token_of(drawn(512, 1, 32)), 512
    pool = torch.randn(rows, 32, 128, 128, device=ops.DEVICE)
    slots = torch.randperm(rows, device=ops.DEVICE)
    wide = pool.double()
    expected = kda_core_decode(**ops.in_float64(inputs), pool=wide, slots=slots, backend="chunk")
    o = kda_core_decode(**inputs, pool=pool, slots=slots, backend="triton")
    assert relative_error(o, expected) <= tolerance(BF16).output
    assert relative_error(pool, wide) <= tolerance(F32).output


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return by how much a call's peak exceeds what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("H", [4, 32])
def test_the_peak_of_memory_is_what_the_workspace_says(H) -> None:
    from kimi_linear.ops.delta_rule.triton import plan
    from kimi_linear.ops.delta_rule.triton.inputs import Inputs

    T, x = 8192, drawn(1, 8192, H)
    flat = {n: y.flatten(0, 1) if y.dim() > 2 else y for n, y in x.items()}
    parameters = [flat[n] for n in ("beta", "A_log", "dt_bias")]
    inputs = Inputs(flat["q"], flat["k"], None, flat["v"], flat["gate"], *parameters, None, 1.0, raw=True)
    workspace, backward = plan.workspace_bytes(inputs, None, 1, T)
    # Offsets, and what the allocator rounds up: at most a MiB a tensor.
    slack = 16 * MIB
    o, state = forward(x)
    assert peak_bytes(lambda: forward(x)) <= workspace + nbytes(o, state) + slack
    leaves = {n: y.detach().requires_grad_() for n, y in x.items()}
    o, _ = kda_core(**leaves, backend="triton")
    d_o = torch.ones_like(o)
    found = peak_bytes(lambda: torch.autograd.grad(o, list(leaves.values()), d_o))
    # The gradient of the state that nothing used is zeros, and the initial state's is made and dropped.
    assert found <= backward + nbytes(*x.values()) + 2 * nbytes(state) + slack


def test_the_smallest_chunks_do_not_depend_on_the_length() -> None:
    """A prompt continued after any token equals the whole, across the table's borders of chunk lengths."""
    inputs = draw(dataclasses.replace(CoreCase(name="cut", T=300, H=4, **D), initial_state=True), BF16)
    o, state = call("kda_core", inputs, "triton")
    tokens = ("q", "k", "v", "gate", "beta")
    for cut in (1, 31, 64, 257):
        first = {**inputs, **{n: inputs[n][:, :cut] for n in tokens}}
        o_1, middle = call("kda_core", first, "triton")
        rest = {**inputs, **{n: inputs[n][:, cut:] for n in tokens}, "initial_state": middle}
        o_2, last = call("kda_core", rest, "triton")
        assert relative_error(torch.cat([o_1, o_2], 1), o) <= tolerance(BF16).output
        assert relative_error(last, state) <= tolerance(BF16).output
