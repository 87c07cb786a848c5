"""What the native kernels promise beyond the contract: sizes that fit no tile, the same bits however work is cut."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import attention, attention_decode, mla_decode
from kimi_linear.ops.attention.specs import AttentionSpec, DecodeSpec
from support import ops

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = ops.NATIVE
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Sizes about those of tiles: 6 and 16 and 64 queries, 96 and 192 keys.
SIZES = [
    AttentionSpec("checkpoint", T=70, S=70, Hq=2, K=192, V=128),
    AttentionSpec("odd_widths", T=97, S=97, K=7, V=13),
    AttentionSpec("one_channel", T=5, S=5, K=1, V=1),
    AttentionSpec("second_tile", T=193, S=193, K=33, V=17),
    AttentionSpec("long_history", T=3, S=401, Hq=4, K=24, V=40),
    AttentionSpec("second_block", T=131, S=389, Hq=3, Hkv=1, K=16, V=70),
    AttentionSpec("window_across_tiles", T=330, S=330, window=150),
    AttentionSpec("narrow_window", T=300, S=420, window=5, K=9),
    AttentionSpec("ragged", T=300, S=300, Hq=4, cu_seqlens=(0, 0, 1, 98, 98, 195, 300)),
    AttentionSpec(
        "ragged_continued", T=150, S=500, cu_seqlens=(0, 6, 6, 71, 150), cu_seqlens_k=(0, 6, 40, 300, 500), window=190
    ),
]
DECODES = [
    DecodeSpec(f"heads_{H}", S=300, lengths=(300, 257, 1), Hq=H, Hkv=1, K=20, V=9, R=50) for H in (1, 2, 3, 5, 8, 15)
] + [
    DecodeSpec("checkpoint", S=70, lengths=(70,), Hq=8, Hkv=8, K=128, V=128, R=512),
    DecodeSpec("pieces", S=1000, lengths=(1000, 512, 513), Hq=4, Hkv=2, K=33, V=65, R=33),
    DecodeSpec("longer_pieces", S=17000, lengths=(17000, 40), Hq=2, Hkv=1, K=8, V=8, R=16),
]


@EACH_DTYPE
@pytest.mark.parametrize("spec", SIZES, ids=lambda spec: spec.name)
def test_sizes_that_fit_no_tile_match_the_reference(spec: AttentionSpec, dtype: torch.dtype) -> None:
    ops.assert_matches_reference(attention, spec.inputs(dtype), "cpu", dtype)


@EACH_DTYPE
@pytest.mark.parametrize("spec", DECODES, ids=lambda spec: spec.name)
def test_decode_of_many_sizes_matches_the_reference(spec: DecodeSpec, dtype: torch.dtype) -> None:
    for function, inputs in ((attention_decode, spec.inputs(dtype)), (mla_decode, spec.mla_inputs(dtype))):
        expected = function(**ops.in_float64(inputs), backend="reference")
        with ops.nan_in_new_memory():
            o = function(**inputs, backend="cpu")
        assert relative_error(o, expected) <= tolerance(dtype).output


def with_threads(count: int, function: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@EACH_DTYPE
@pytest.mark.parametrize("spec", SIZES, ids=lambda spec: spec.name)
def test_bits_do_not_depend_on_the_threads(spec: AttentionSpec, dtype: torch.dtype) -> None:
    def run() -> Any:
        return ops.run_with_gradients(lambda **a: attention(**a, backend="cpu"), spec.inputs(dtype))

    ops.assert_equal(with_threads(1, run), with_threads(3, run))


@EACH_DTYPE
@pytest.mark.parametrize("spec", DECODES, ids=lambda spec: spec.name)
def test_decoded_bits_depend_neither_on_threads_nor_neighbours(spec: DecodeSpec, dtype: torch.dtype) -> None:
    mla, gqa = spec.mla_inputs(dtype), spec.inputs(dtype)
    for function, inputs, rows in ((mla_decode, mla, "latent key_rope"), (attention_decode, gqa, "k v")):
        o = with_threads(1, lambda f=function, i=inputs: f(**i, backend="cpu"))
        assert torch.equal(with_threads(3, lambda f=function, i=inputs: f(**i, backend="cpu")), o)
        for n, length in enumerate(spec.lengths):
            alone = {name: inputs[name][n : n + 1] for name in ("q", "lengths")}
            alone |= {name: inputs[name][n : n + 1, :length] for name in rows.split()}
            assert torch.equal(function(**{**inputs, **alone}, backend="cpu")[0], o[n])


@EACH_DTYPE
@pytest.mark.parametrize("copies", [1, 5, 33])
def test_absorbed_rows_of_a_large_batch_have_the_bits_of_a_single_one(copies: int, dtype: torch.dtype) -> None:
    inputs = DecodeSpec("row", S=40, lengths=(40,) * copies, Hq=3, K=20, V=9, R=50).mla_inputs(dtype)
    o = mla_decode(**inputs, backend="cpu")
    for n in (0, copies // 2, copies - 1):
        alone = {name: inputs[name][n : n + 1] for name in ("q", "latent", "key_rope", "lengths")}
        assert torch.equal(mla_decode(**{**inputs, **alone}, backend="cpu")[0], o[n])


@EACH_DTYPE
@pytest.mark.parametrize("name", ["ragged", "ragged_continued"])
def test_packed_sequences_have_the_bits_of_separate_calls(name: str, dtype: torch.dtype) -> None:
    def call(**arguments: Any) -> Tensor:
        return attention(**arguments, backend="cpu")

    spec = next(spec for spec in SIZES if spec.name == name)
    inputs = spec.inputs(dtype)
    (o,), grads = ops.run_with_gradients(call, inputs)
    d_o = ops.cotangents([o])[0]
    starts, starts_k = spec.cu_seqlens or (), spec.cu_seqlens_k or spec.cu_seqlens or ()
    for (a, b), (c, d) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        cuts = {"q": slice(a, b), "k": slice(c, d), "v": slice(c, d)}
        alone = {x: inputs[x][:, cut] for x, cut in cuts.items()} | {"window": spec.window}
        ops.assert_equal(
            ops.run_with_gradients(call, alone, [d_o[:, a:b]]),
            ([o[:, a:b]], {x: grads[x][:, cut] for x, cut in cuts.items()}),
        )


@EACH_DTYPE
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("cut", [1, 100, 192, 299])
def test_a_prompt_cut_anywhere_has_the_bits_of_the_whole(cut: int, window: int | None, dtype: torch.dtype) -> None:
    inputs = AttentionSpec("whole", T=300, S=300, K=24, V=20, window=window).inputs(dtype)
    whole = attention(**inputs, backend="cpu")
    head = attention(**{**inputs, **{x: inputs[x][:, :cut] for x in "qkv"}}, backend="cpu")
    tail = attention(**{**inputs, "q": inputs["q"][:, cut:]}, backend="cpu")
    assert torch.equal(torch.cat([head, tail], 1), whole)


def test_scores_beyond_any_exponent_pick_the_largest() -> None:
    inputs = AttentionSpec("far", T=200, S=200, K=16, V=8).inputs(torch.float32)
    inputs["q"] = inputs["q"] * 1e6
    o = attention(**inputs, backend="cpu")
    assert relative_error(o, attention(**ops.in_float64(inputs), backend="reference")) <= 1e-3


def test_all_scores_equal_average_the_values() -> None:
    inputs = AttentionSpec("zero", T=200, S=200, K=16, V=8).inputs(torch.float32)
    inputs["q"] = torch.zeros_like(inputs["q"])
    averages = inputs["v"].double().cumsum(1) / torch.arange(1, 201, dtype=torch.float64)[:, None, None]
    ops.assert_close(attention(**inputs, backend="cpu"), averages.float())
