import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.base.errors import BackendError, DtypeError, ShapeError
from kimi_linear.ops import attention
from kimi_linear.ops.attention import blocks, cpu, reference, sdpa
from kimi_linear.ops.attention.specs import SPECS, AttentionSpec
from support import ops

BACKENDS = ops.backends("attention")
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# Those that run float64, where another order of a few operations cannot hide a mistake.
EACH_IN_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("attention", torch.float64))
EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
BY_NAME = {spec.name: spec for spec in SPECS}
SMALL = [spec for spec in SPECS if spec.T < 100]
PACKED = [spec for spec in SPECS if spec.cu_seqlens is not None]


@EACH_SPEC
@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("attention"), ids=str)
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype, spec: AttentionSpec) -> None:
    ops.assert_matches_reference(attention, spec.inputs(dtype), backend, dtype)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
@EACH_IN_FLOAT64
def test_blocks_of_the_least_height_match_the_reference(
    backend: str, spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "block_rows", lambda *_: 3)
    ops.assert_matches_reference(attention, spec.inputs(torch.float64), backend, torch.float64)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec("grouped_heads", T=3, S=3, B=2, Hq=4, K=2, V=3),
        AttentionSpec("continued", T=2, S=5, K=3, V=2),
        AttentionSpec("window", T=5, S=5, K=2, V=2, window=2),
        AttentionSpec("packed", T=5, S=5, K=2, V=2, cu_seqlens=(0, 2, 2, 5)),
        AttentionSpec("packed_continued", T=3, S=6, K=2, V=3, cu_seqlens=(0, 1, 1, 3), cu_seqlens_k=(0, 2, 3, 6)),
    ],
    ids=lambda spec: spec.name,
)
@EACH_IN_FLOAT64
def test_gradients_match_finite_differences(backend: str, spec: AttentionSpec) -> None:
    assert ops.gradcheck(lambda **a: attention(**a, backend=backend), spec.inputs(torch.float64))


@EACH_IN_FLOAT64
def test_each_output_is_the_equation_written_out(backend: str) -> None:
    inputs = AttentionSpec("loop", T=3, S=5, Hq=4, Hkv=2, window=3).inputs(torch.float64)
    q, k, v = inputs["q"][0], inputs["k"][0], inputs["v"][0]
    o = attention(**inputs, backend=backend)[0]
    for t in range(3):
        for h in range(4):
            seen = range(max(0, t + 2 - 3 + 1), t + 2 + 1)
            weights = [math.exp(float(q[t, h] @ k[s, h // 2]) / math.sqrt(8)) for s in seen]
            expected = sum(w * v[s, h // 2] for w, s in zip(weights, seen, strict=True)) / sum(weights)
            ops.assert_close(o[t, h], expected)


@EACH_IN_FLOAT64
def test_square_call_is_torchs_own_attention_and_gradients(backend: str) -> None:
    def torchs(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(17, 17, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    inputs = BY_NAME["square"].inputs(torch.float64)
    (o,), grads = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), inputs)
    (expected,), expected_grads = ops.run_with_gradients(torchs, inputs)
    ops.assert_close(o, expected)
    for name, grad in grads.items():
        ops.assert_close(grad, expected_grads[name])


@pytest.mark.parametrize(("Hkv", "repeats"), [(1, 4), (2, 2)], ids=["multi_query", "grouped"])
@EACH_IN_FLOAT64
def test_grouped_heads_equal_all_heads_on_repeated_keys(backend: str, Hkv: int, repeats: int) -> None:
    inputs = AttentionSpec("grouped", T=11, S=11, Hq=4, Hkv=Hkv).inputs(torch.float64)
    repeated = {name: inputs[name].repeat_interleave(repeats, dim=2) for name in ("k", "v")}
    ops.assert_close(attention(**inputs, backend=backend), attention(**{**inputs, **repeated}, backend=backend))


@pytest.mark.parametrize("window", [17, 18, 1000])
@EACH_IN_FLOAT64
def test_window_of_at_least_all_keys_changes_nothing(backend: str, window: int) -> None:
    inputs = BY_NAME["square"].inputs(torch.float64)
    plain = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), inputs)
    wide = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), {**inputs, "window": window})
    ops.assert_equal(wide, plain)


@EACH_BACKEND
def test_window_of_one_returns_the_tokens_own_value(backend: str) -> None:
    inputs = BY_NAME["window_one"].inputs(torch.float32)
    assert torch.equal(attention(**inputs, backend=backend), inputs["v"])


@pytest.mark.parametrize("name", ["square", "window", "grouped_heads"])
@pytest.mark.parametrize("cut", [0, 1, 6, 12])
@EACH_IN_FLOAT64
def test_queries_cut_anywhere_continue_from_the_cached_keys(backend: str, cut: int, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float64)
    whole = attention(**inputs, backend=backend)
    head = {**inputs, **{x: inputs[x][:, :cut] for x in "qkv"}}
    tail = {**inputs, "q": inputs["q"][:, cut:]}
    ops.assert_close(torch.cat([attention(**part, backend=backend) for part in (head, tail)], 1), whole)


@pytest.mark.parametrize("spec", PACKED, ids=lambda spec: spec.name)
@EACH_IN_FLOAT64
def test_packed_sequences_equal_separate_calls(backend: str, spec: AttentionSpec) -> None:
    inputs = spec.inputs(torch.float64)
    (o,), grads = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), inputs)
    d_o = ops.cotangents([o])[0]
    starts, starts_k = spec.cu_seqlens or (), spec.cu_seqlens_k or spec.cu_seqlens or ()
    for (a, b), (c, d) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        cuts = {"q": slice(a, b), "k": slice(c, d), "v": slice(c, d)}
        alone = {name: inputs[name][:, cut] for name, cut in cuts.items()} | {"window": spec.window}
        (o_alone,), grads_alone = ops.run_with_gradients(
            lambda **a: attention(**a, backend=backend), alone, [d_o[:, a:b]]
        )
        ops.assert_close(o[:, a:b], o_alone)
        for name, cut in cuts.items():
            ops.assert_close(grads[name][:, cut], grads_alone[name])


@pytest.mark.parametrize("name", ["square", "window", "continued", "packed"])
@EACH_BACKEND
def test_changing_a_token_changes_nothing_before_it(backend: str, name: str) -> None:
    spec = BY_NAME[name]
    inputs = spec.inputs(torch.float32)
    changed = {x: inputs[x].clone() for x in "qkv"}
    for x in changed.values():
        x[:, -3] = 50.0
    o, other = attention(**inputs, backend=backend), attention(**{**inputs, **changed}, backend=backend)
    assert torch.equal(other[:, :-3], o[:, :-3])
    assert not torch.equal(other[:, -3], o[:, -3])


@EACH_BACKEND
def test_a_row_of_the_batch_does_not_depend_on_the_others(backend: str) -> None:
    inputs = BY_NAME["grouped_heads"].inputs(torch.float32)
    alone = {name: x[1:] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    ops.assert_close(attention(**inputs, backend=backend)[1:], attention(**alone, backend=backend))


@EACH_BACKEND
def test_scores_far_apart_stay_finite(backend: str) -> None:
    inputs = AttentionSpec("far", T=9, S=9).inputs(torch.float32)
    inputs["q"] = inputs["q"] * 1e4
    (o,), grads = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), inputs)
    assert all(bool(x.isfinite().all()) for x in (o, *grads.values()))


@EACH_IN_FLOAT64
def test_the_scale_multiplies_the_scores(backend: str) -> None:
    inputs = BY_NAME["square"].inputs(torch.float64)
    default = attention(**inputs, backend=backend)
    ops.assert_close(attention(**inputs, scale=8**-0.5, backend=backend), default)
    doubled = attention(**{**inputs, "q": 2 * inputs["q"]}, backend=backend)
    ops.assert_close(attention(**inputs, scale=2 * 8**-0.5, backend=backend), doubled)


@pytest.mark.parametrize("name", ["grouped_heads", "wide_value", "continued", "window", "packed_continued"])
@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str, name: str) -> None:
    def call(**arguments: Any) -> Any:
        return attention(**arguments, backend=backend)

    inputs = BY_NAME[name].inputs(torch.float32)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@pytest.mark.parametrize("name", ["square", "continued", "window", "wide_value", "packed", "packed_continued"])
@EACH_BACKEND
def test_the_call_compiles_whole(backend: str, name: str) -> None:
    ops.assert_compiles_whole(lambda **a: attention(**a, backend=backend), BY_NAME[name].inputs(torch.float32))


@pytest.mark.parametrize("name", ["grouped_heads", "wide_value", "window", "packed", "packed_continued"])
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (reference.attention_reference, reference.attention_reference_backward),
        (sdpa.attention_sdpa, sdpa.attention_sdpa_backward),
    ],
    ids=["reference", "sdpa"],
)
def test_custom_ops_pass_opcheck(forward: Any, backward: Any, name: str) -> None:
    a = BY_NAME[name].inputs(torch.float32)
    offsets_k = a["cu_seqlens"] if a["cu_seqlens_k"] is None else a["cu_seqlens_k"]
    args = (a["q"], a["k"], a["v"], a["cu_seqlens"], offsets_k, 0.3, a["window"])
    ops.opcheck(forward, *ops.requiring_grad(*args))
    ops.opcheck(backward, torch.randn_like(forward(*args)), *args)


@ops.NATIVE
@pytest.mark.parametrize("name", ["grouped_heads", "wide_value", "window", "packed", "packed_continued"])
def test_native_custom_ops_pass_opcheck(name: str) -> None:
    a = BY_NAME[name].inputs(torch.float32)
    packing = (a["cu_seqlens"], a["cu_seqlens"] if a["cu_seqlens_k"] is None else a["cu_seqlens_k"])
    tensors, rest = (a["q"], a["k"], a["v"]), (*packing, 0.3, a["window"])
    ops.opcheck(cpu.attention_cpu, *ops.requiring_grad(*tensors), *rest)
    kept = cpu.attention_cpu(*tensors, *rest)
    ops.opcheck(cpu.attention_cpu_backward, torch.randn_like(kept[0]), *tensors, *kept, *rest)


@pytest.mark.parametrize("name", ["square", "packed"])
@EACH_BACKEND
def test_autocast_is_a_cast_of_the_inputs(backend: str, name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (o,), grads = ops.run_with_gradients(lambda **a: attention(**a, backend=backend), inputs)
    low = {x: inputs[x].bfloat16() for x in "qkv"}
    (expected,), expected_grads = ops.run_with_gradients(
        lambda **a: attention(**a, backend=backend), {**inputs, **low}, ops.cotangents([o])
    )
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected)
    for x, grad in grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected_grads[x].float())


@pytest.mark.parametrize("name", ["square", "wide_value", "grouped_heads", "continued", "window", "window_continued"])
def test_what_runs_off_the_cpu_has_the_gradients_of_the_op(name: str) -> None:
    # run() leaves an unpacked call on an accelerator to torch's autograd over the same composition.
    spec = BY_NAME[name]
    inputs = {x: spec.inputs(torch.float64)[x] for x in "qkv"}
    composed = ops.run_with_gradients(lambda **a: sdpa.attend(**a, scale=0.3, window=spec.window), inputs)
    expected = ops.run_with_gradients(lambda **a: attention(**a, scale=0.3, window=spec.window), inputs)
    ops.assert_close(composed[0][0], expected[0][0])
    for x, grad in composed[1].items():
        ops.assert_close(grad, expected[1][x])


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec("square", T=2048, S=2048, Hq=1, Hkv=1, V=4),
        AttentionSpec("continued", T=2048, S=2100, Hq=1, Hkv=1, V=4),
        AttentionSpec("window", T=2048, S=2048, Hq=1, Hkv=1, window=100),
        AttentionSpec("packed", T=2048, S=2048, Hq=1, Hkv=1, cu_seqlens=(0, 900, 2048)),
    ],
    ids=lambda spec: spec.name,
)
def test_no_tensor_is_as_large_as_all_the_scores(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_BUDGET", 1 << 15)
    inputs = spec.inputs(torch.float32)
    _, largest = ops.profile(lambda: ops.run_with_gradients(attention, inputs))
    assert largest <= 4 * 2048 * 2048 // 8


@pytest.mark.parametrize(("T", "S", "window"), [(10, 10, None), (10, 25, None), (10, 25, 4), (7, 7, 3)])
def test_blocks_cover_exactly_what_is_visible(T: int, S: int, window: int | None) -> None:
    found = torch.zeros(T, S, dtype=torch.bool)
    for block in blocks.blocks(T, S, window, rows=3):
        found[block] = blocks.block_mask(T, S, window, block, torch.device("cpu"))
    assert torch.equal(found, reference.visible(T, S, window, None, None, torch.device("cpu")))


@pytest.mark.parametrize(("per_row", "rows"), [(1, 256), (100, 100), (10**9, 16), (0, 256)])
def test_blocks_are_as_high_as_the_budget_allows(per_row: int, rows: int) -> None:
    assert blocks.block_rows(per_row, budget=10_000) == rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, ShapeError, r"attention: q is \[2, 3, 8\], expected \[any, any, any, any\]"),
        ({"k": torch.zeros(2, 3, 8)}, ShapeError, r"k is \[2, 3, 8\], expected \[2, any, any, 8\] \(B, S, Hkv, K\)"),
        ({"k": torch.zeros(2, 3, 2, 7)}, ShapeError, r"k is \[2, 3, 2, 7\], expected \[2, 3, 2, 8\] \(B, S, Hkv, K\)"),
        ({"v": torch.zeros(2, 4, 2, 8)}, ShapeError, r"v is \[2, 4, 2, 8\], expected \[2, 3, 2, any\]"),
        ({"q": torch.zeros(2, 3, 3, 8)}, ShapeError, "q has 3 heads, expected a multiple of the 2 heads of k"),
        ({"q": torch.zeros(2, 4, 2, 8)}, ShapeError, "4 queries but 3 keys; give the keys of every query too"),
        ({"window": 0}, ShapeError, "window is 0, expected at least 1"),
        ({"q": torch.zeros(2, 3, 2, 8, dtype=torch.int32)}, DtypeError, "q is torch.int32, expected float32"),
        ({"v": torch.zeros(2, 3, 2, 8).double()}, DtypeError, "v is torch.float64 but q is torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ShapeError, "B is 2 with cu_seqlens, expected 1"),
        ({"cu_seqlens_k": torch.tensor([0, 3])}, ShapeError, "cu_seqlens_k is given without cu_seqlens"),
        ({"backend": "nonesuch"}, BackendError, "unknown backend 'nonesuch'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = AttentionSpec("right", B=2, T=3, S=3).inputs(torch.float32)
    with pytest.raises(error, match=message):
        attention(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": (0, 2, 4)}, "cu_seqlens runs from 0 to 4, expected from 0 to T = 5"),
        ({"cu_seqlens": (0, 4, 2, 5)}, "cu_seqlens falls from 4 to 2 at index 2"),
        ({"S": 6}, "5 packed queries but 6 keys; give cu_seqlens_k"),
        ({"S": 6, "cu_seqlens_k": (0, 6)}, "cu_seqlens_k has 1 sequences, expected 2"),
        ({"S": 6, "cu_seqlens_k": (0, 1, 6)}, "sequence 0 has 3 queries but 1 keys"),
        ({"S": 6, "cu_seqlens_k": (0, 3, 5)}, "runs from 0 to 5, expected from 0 to T = 6"),
    ],
)
@EACH_BACKEND
def test_wrong_offsets_are_named(backend: str, change: dict[str, Any], message: str) -> None:
    spec = replace(AttentionSpec("right", T=5, S=5, cu_seqlens=(0, 3, 5)), **change)
    with pytest.raises(ShapeError, match=message):
        attention(**spec.inputs(torch.float32), backend=backend)
