from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import BackendError, DtypeError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import attention, attention_decode, mla_attention, mla_decode
from kimi_linear.ops.attention import cpu_decode, decode_reference, decode_tiled
from kimi_linear.ops.attention.lengths import seen
from kimi_linear.ops.attention.specs import DECODE_SPECS, DecodeSpec
from support import ops

EACH_SPEC = pytest.mark.parametrize("spec", DECODE_SPECS, ids=lambda spec: spec.name)
GQA_BACKEND = pytest.mark.parametrize("backend", ops.backends("attention_decode"))
MLA_BACKEND = pytest.mark.parametrize("backend", ops.backends("mla_decode"))
# Those that run float64, where another order of a few operations cannot hide a mistake.
GQA_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("attention_decode", torch.float64))
MLA_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("mla_decode", torch.float64))
BY_NAME = {spec.name: spec for spec in DECODE_SPECS}


@pytest.fixture(params=["sequences", "batch"], autouse=True)
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run everything as on the CPU, each sequence alone, and as off it, the batch under a mask."""

    def batch(lengths: Tensor, S: int, window: int | None) -> Iterator[decode_tiled.Part]:
        yield slice(0, lengths.shape[0]), slice(0, S), seen(lengths, S, window)

    if request.param == "batch":
        monkeypatch.setattr(decode_tiled, "_parts", batch)


def assert_close_to(o: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert o.dtype == dtype
    assert relative_error(o, expected) <= tolerance(dtype).output


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("attention_decode"), ids=str)
def test_attention_decode_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: DecodeSpec) -> None:
    inputs = spec.inputs(dtype)
    expected = attention_decode(**ops.in_float64(inputs), backend="reference")
    with ops.nan_in_new_memory():
        assert_close_to(attention_decode(**inputs, backend=backend), expected, dtype)


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("mla_decode"), ids=str)
def test_mla_decode_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: DecodeSpec) -> None:
    inputs = spec.mla_inputs(dtype)
    expected = mla_decode(**ops.in_float64(inputs), backend="reference")
    with ops.nan_in_new_memory():
        assert_close_to(mla_decode(**inputs, backend=backend), expected, dtype)


@pytest.mark.parametrize("name", ["full", "ragged", "window", "multi_query"])
@GQA_FLOAT64
def test_attention_decode_is_the_last_row_of_prefill(backend: str, name: str) -> None:
    spec = BY_NAME[name]
    inputs = spec.inputs(torch.float64)
    o = attention_decode(**inputs, backend=backend)
    for n, length in enumerate(spec.lengths):
        k, v = inputs["k"][n : n + 1, :length], inputs["v"][n : n + 1, :length]
        whole = attention(inputs["q"][n, None, None], k, v, window=spec.window, backend="reference")
        ops.assert_close(o[n], whole[0, -1])


@pytest.mark.parametrize("name", ["full", "ragged", "multi_query"])
@MLA_FLOAT64
def test_absorbed_decode_is_the_last_row_of_expanded_prefill(backend: str, name: str) -> None:
    spec = BY_NAME[name]
    inputs = spec.mla_inputs(torch.float64)
    lengths = inputs.pop("lengths")
    o = mla_decode(**inputs, lengths=lengths, backend=backend)
    for n, length in enumerate(spec.lengths):
        cut = {name: inputs[name][n : n + 1, :length] for name in ("latent", "key_rope")}
        whole = mla_attention(**{**inputs, **cut, "q": inputs["q"][n, None, None]}, backend="reference")
        ops.assert_close(o[n], whole[0, -1])


@GQA_FLOAT64
def test_a_ring_buffer_decodes_as_the_window(backend: str) -> None:
    window, spec = 4, DecodeSpec("ring", S=11, lengths=(11,))
    inputs = spec.inputs(torch.float64)
    ring = {name: torch.empty_like(inputs[name][:, :window]) for name in ("k", "v")}
    for s in range(11):
        for name, buffer in ring.items():
            buffer[:, s % window] = inputs[name][:, s]
        lengths = torch.tensor([min(s + 1, window)])
        o = attention_decode(inputs["q"], **ring, lengths=lengths, backend=backend)
        whole = attention_decode(
            inputs["q"], inputs["k"], inputs["v"], torch.tensor([s + 1]), window=window, backend=backend
        )
        ops.assert_close(o, whole)


@GQA_BACKEND
def test_a_window_of_one_returns_the_last_value(backend: str) -> None:
    inputs = replace(BY_NAME["ragged"], window=1).inputs(torch.float32)
    last = inputs["v"][torch.arange(3), inputs["lengths"] - 1]
    assert torch.equal(attention_decode(**inputs, backend=backend), last.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("filler", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["ragged", "unused_row", "two_tiles"])
@GQA_BACKEND
def test_attention_decode_ignores_what_lies_behind_the_length(backend: str, name: str, filler: float) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    o = attention_decode(**inputs, backend=backend)
    unused = ~seen(inputs["lengths"], inputs["k"].shape[1], None)
    changed = {name: inputs[name].masked_fill(unused[:, :, None, None], filler) for name in ("k", "v")}
    assert torch.equal(attention_decode(**{**inputs, **changed}, backend=backend), o)


@pytest.mark.parametrize("filler", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["ragged", "unused_row", "two_tiles"])
@MLA_BACKEND
def test_mla_decode_ignores_what_lies_behind_the_length(backend: str, name: str, filler: float) -> None:
    inputs = BY_NAME[name].mla_inputs(torch.float32)
    o = mla_decode(**inputs, backend=backend)
    unused = ~seen(inputs["lengths"], inputs["latent"].shape[1], None)
    changed = {name: inputs[name].masked_fill(unused[:, :, None], filler) for name in ("latent", "key_rope")}
    assert torch.equal(mla_decode(**{**inputs, **changed}, backend=backend), o)


@GQA_BACKEND
def test_attention_decode_of_no_position_is_zero(backend: str) -> None:
    o = attention_decode(**BY_NAME["unused_row"].inputs(torch.float32), backend=backend)
    assert torch.equal(o[0], torch.zeros_like(o[0]))
    assert o[1].abs().max() > 0


@MLA_BACKEND
def test_mla_decode_of_no_position_is_zero(backend: str) -> None:
    o = mla_decode(**BY_NAME["unused_row"].mla_inputs(torch.float32), backend=backend)
    assert torch.equal(o[0], torch.zeros_like(o[0]))
    assert o[1].abs().max() > 0


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@GQA_BACKEND
def test_attention_decode_takes_a_cache_of_another_dtype(backend: str, dtype: torch.dtype, cache: torch.dtype) -> None:
    inputs = BY_NAME["ragged"].inputs(torch.bfloat16)
    inputs |= {"q": inputs["q"].to(dtype), "k": inputs["k"].to(cache), "v": inputs["v"].to(cache)}
    expected = attention_decode(**ops.in_float64(inputs), backend="reference")
    assert_close_to(attention_decode(**inputs, backend=backend), expected, dtype)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@MLA_BACKEND
def test_mla_decode_takes_a_cache_of_another_dtype(backend: str, dtype: torch.dtype, cache: torch.dtype) -> None:
    inputs = BY_NAME["ragged"].mla_inputs(torch.bfloat16)
    inputs |= {"q": inputs["q"].to(dtype), "kv_b": inputs["kv_b"].to(dtype)}
    inputs |= {"latent": inputs["latent"].to(cache), "key_rope": inputs["key_rope"].to(cache)}
    expected = mla_decode(**ops.in_float64(inputs), backend="reference")
    assert_close_to(mla_decode(**inputs, backend=backend), expected, dtype)


@GQA_BACKEND
def test_attention_decode_leaves_inputs_alone_and_takes_any_strides(backend: str) -> None:
    inputs = BY_NAME["ragged"].inputs(torch.float32)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    o = attention_decode(**inputs, backend=backend)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    strided = {name: ops.strided(x) for name, x in before.items()}
    ops.assert_close(attention_decode(**{**inputs, **strided}, backend=backend), o)


@MLA_BACKEND
def test_mla_decode_leaves_inputs_alone_and_takes_any_strides(backend: str) -> None:
    inputs = BY_NAME["ragged"].mla_inputs(torch.float32)
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    o = mla_decode(**inputs, backend=backend)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    strided = {name: ops.strided(x) for name, x in before.items()}
    ops.assert_close(mla_decode(**{**inputs, **strided}, backend=backend), o)


def test_absorbed_decode_expands_no_key_and_no_value() -> None:
    spec = DecodeSpec("long", S=4096, lengths=(4096,), Hq=4, Hkv=2, K=8, V=8, R=4)
    inputs = spec.mla_inputs(torch.float32)
    _, largest = ops.profile(lambda: mla_decode(**inputs))
    # Float32 scores of four heads are the largest thing; keys of four heads would be ten times that.
    assert largest <= 2 * 4 * 4096 * 4


def test_autocast_casts_the_query_and_not_the_cache() -> None:
    inputs = BY_NAME["ragged"].mla_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = mla_decode(**inputs)
    low = {name: inputs[name].bfloat16() for name in ("q", "kv_b")}
    assert torch.equal(o, mla_decode(**{**inputs, **low}))
    gqa = BY_NAME["ragged"].inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention_decode(**gqa)
    assert torch.equal(o, attention_decode(**{**gqa, "q": gqa["q"].bfloat16()}))


def test_no_gradient_flows_through_decode() -> None:
    inputs = BY_NAME["ragged"].mla_inputs(torch.float32)
    inputs["kv_b"].requires_grad_()
    assert not mla_decode(**inputs).requires_grad
    gqa = BY_NAME["ragged"].inputs(torch.float32)
    gqa["k"].requires_grad_()
    assert not attention_decode(**gqa).requires_grad


@GQA_BACKEND
def test_attention_decode_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    inputs = BY_NAME["window"].inputs(torch.float32)
    call = torch.compile(lambda **a: attention_decode(**a, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(**inputs), attention_decode(**inputs, backend=backend))


@MLA_BACKEND
def test_mla_decode_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    inputs = BY_NAME["ragged"].mla_inputs(torch.float32)
    call = torch.compile(lambda **a: mla_decode(**a, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(**inputs), mla_decode(**inputs, backend=backend))


@pytest.mark.parametrize("name", ["ragged", "window", "no_sequence"])
@pytest.mark.parametrize(
    ("gqa", "mla"),
    [
        pytest.param(
            decode_reference.attention_decode_reference, decode_reference.mla_decode_reference, id="reference"
        ),
        pytest.param(decode_tiled.attention_decode_tiled, decode_tiled.mla_decode_absorbed, id="tiled"),
        pytest.param(cpu_decode.attention_decode_cpu, cpu_decode.mla_decode_cpu, id="cpu", marks=ops.NATIVE),
    ],
)
def test_custom_ops_pass_opcheck(gqa: Any, mla: Any, name: str) -> None:
    a, m = BY_NAME[name].inputs(torch.float32), BY_NAME[name].mla_inputs(torch.float32)
    ops.opcheck(gqa, a["q"], a["k"], a["v"], a["lengths"], 0.3, a["window"])
    ops.opcheck(mla, m["q"], m["latent"], m["key_rope"], m["lengths"], m["kv_b"], m["nope_dim"], 0.3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 8)}, ShapeError, r"attention_decode: q is \[3, 8\], expected \[any, any, any\]"),
        ({"k": torch.zeros(3, 11, 2, 7)}, ShapeError, r"k is \[3, 11, 2, 7\], expected \[3, any, any, 8\]"),
        ({"v": torch.zeros(3, 10, 2, 6)}, ShapeError, r"v is \[3, 10, 2, 6\], expected \[3, 11, 2, any\]"),
        ({"q": torch.zeros(3, 3, 8)}, ShapeError, "q has 3 heads, expected a multiple of the 2 heads of k"),
        ({"lengths": torch.tensor([1, 2])}, ShapeError, r"lengths is \[2\], expected \[3\] \(N\)"),
        ({"lengths": torch.ones(3)}, DtypeError, "lengths is torch.float32, expected int64 or int32"),
        ({"lengths": torch.tensor([1, 12, 2])}, ShapeError, r"lengths\[1\] is 12, expected 0 to S = 11"),
        ({"lengths": torch.tensor([1, 2, -1])}, ShapeError, r"lengths\[2\] is -1, expected 0 to S = 11"),
        ({"window": 0}, ShapeError, "window is 0, expected at least 1"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_of_attention_decode_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention_decode(**{**BY_NAME["ragged"].inputs(torch.float32), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 10)}, ShapeError, r"mla_decode: q is \[3, 10\], expected .* \(N, H, dn \+ dr\)"),
        ({"latent": torch.zeros(2, 11, 16)}, ShapeError, r"latent is \[2, 11, 16\], expected \[3, any, any\]"),
        ({"key_rope": torch.zeros(3, 10, 2)}, ShapeError, r"key_rope is \[3, 10, 2\], expected \[3, 11, any\]"),
        ({"nope_dim": 9}, ShapeError, r"q is 10 wide, expected nope_dim \+ dr = 9 \+ 2"),
        ({"kv_b": torch.zeros(55, 16)}, ShapeError, r"kv_b has 55 rows, expected 4 \* \(nope_dim \+ dv\)"),
        ({"kv_b": torch.zeros(56, 16).double()}, DtypeError, "kv_b is torch.float64 but q is torch.float32"),
        ({"lengths": torch.tensor([1, 12, 2])}, ShapeError, r"lengths\[1\] is 12, expected 0 to S = 11"),
        ({"backend": "tiled"}, BackendError, "unknown backend 'tiled'"),
    ],
)
def test_wrong_arguments_of_mla_decode_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_decode(**{**BY_NAME["ragged"].mla_inputs(torch.float32), **change})
