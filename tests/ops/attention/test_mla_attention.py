from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import DtypeError, ShapeError
from kimi_linear.ops import attention, mla_attention
from support import ops

EACH_BACKEND = pytest.mark.parametrize("backend", ops.backends("attention"))
EACH_IN_FLOAT64 = pytest.mark.parametrize("backend", ops.backends("attention", torch.float64))
# Heads, key parts without and with positions, value width, latent rank.
H, DN, DR, DV, R = 3, 4, 2, 5, 7


def draw(dtype: torch.dtype, T: int = 6, S: int = 6, B: int = 1) -> dict[str, Any]:
    """Return the keyword arguments of `mla_attention`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, T, H, DN + DR), "latent": (B, S, R), "key_rope": (B, S, DR), "kv_b": (H * (DN + DV), R)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()} | {
        "nope_dim": DN
    }


@EACH_IN_FLOAT64
def test_each_output_is_the_equation_written_out(backend: str) -> None:
    inputs = draw(torch.float64)
    q, c, r = inputs["q"][0], inputs["latent"][0], inputs["key_rope"][0]
    o = mla_attention(**inputs, backend=backend)[0]
    for h, weight in enumerate(inputs["kv_b"].split(DN + DV)):
        k_nope, v = (c @ weight[:DN].T), (c @ weight[DN:].T)
        for t in range(6):
            scores = torch.stack([q[t, h, :DN] @ k_nope[s] + q[t, h, DN:] @ r[s] for s in range(t + 1)])
            p = (scores / (DN + DR) ** 0.5).softmax(0)
            ops.assert_close(o[t, h], p @ v[: t + 1])


@pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("attention"), ids=str)
def test_backend_matches_the_float64_reference(backend: str, dtype: torch.dtype) -> None:
    ops.assert_matches_reference(mla_attention, draw(dtype, T=9, S=13, B=2), backend, dtype)


@EACH_IN_FLOAT64
def test_gradients_match_finite_differences(backend: str) -> None:
    assert ops.gradcheck(lambda **a: mla_attention(**a, backend=backend), draw(torch.float64, T=3, S=4))


@EACH_IN_FLOAT64
def test_rank_large_enough_and_no_shared_key_reproduce_plain_attention(backend: str) -> None:
    # The latent holds all heads' keys and values side by side, and kv_b picks them.
    inputs = draw(torch.float64)
    k, v = torch.randn(1, 6, H, DN, dtype=torch.float64), torch.randn(1, 6, H, DV, dtype=torch.float64)
    rank = H * (DN + DV)
    chosen = {
        "latent": torch.cat([k, v], -1).reshape(1, 6, rank),
        "key_rope": torch.zeros(1, 6, DR, dtype=torch.float64),
        "kv_b": torch.eye(rank, dtype=torch.float64),
    }
    expected = attention(inputs["q"][..., :DN], k, v, scale=0.4, backend=backend)
    ops.assert_close(mla_attention(**{**inputs, **chosen}, scale=0.4, backend=backend), expected)


@EACH_IN_FLOAT64
def test_packed_sequences_with_caches_equal_separate_calls(backend: str) -> None:
    inputs = draw(torch.float64, T=5, S=9)
    offsets = {"cu_seqlens": torch.tensor([0, 2, 2, 5]), "cu_seqlens_k": torch.tensor([0, 5, 6, 9])}
    o = mla_attention(**inputs, **offsets, backend=backend)
    for queries, keys in ((slice(0, 2), slice(0, 5)), (slice(2, 5), slice(6, 9))):
        parts = {"q": inputs["q"][:, queries], "latent": inputs["latent"][:, keys]}
        alone = {**inputs, **parts, "key_rope": inputs["key_rope"][:, keys]}
        ops.assert_close(o[:, queries], mla_attention(**alone, backend=backend))


@EACH_IN_FLOAT64
def test_queries_cut_anywhere_continue_from_the_cached_latents(backend: str) -> None:
    inputs = draw(torch.float64)
    whole = mla_attention(**inputs, backend=backend)
    for cut in range(1, 6):
        tail = {**inputs, "q": inputs["q"][:, cut:]}
        ops.assert_close(mla_attention(**tail, backend=backend), whole[:, cut:])


@EACH_BACKEND
def test_inputs_strides_and_repeated_runs(backend: str) -> None:
    def call(**arguments: Any) -> Any:
        return mla_attention(**arguments, backend=backend)

    inputs = draw(torch.float32, B=2)
    ops.assert_inputs_unchanged(call, inputs)
    ops.assert_strides_do_not_matter(call, inputs, torch.float32)
    ops.assert_runs_are_identical(call, inputs)


@EACH_BACKEND
@pytest.mark.parametrize("offsets", [None, [0, 2, 6]], ids=["plain", "packed"])
def test_the_call_compiles_whole(offsets: list[int] | None, backend: str) -> None:
    inputs = draw(torch.float32)
    inputs["cu_seqlens"] = None if offsets is None else torch.tensor(offsets)
    ops.assert_compiles_whole(lambda **a: mla_attention(**a, backend=backend), inputs)


@EACH_BACKEND
def test_autocast_casts_the_weight_too(backend: str) -> None:
    inputs = draw(torch.float32)
    inputs["q"] = inputs["q"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (o,), grads = ops.run_with_gradients(lambda **a: mla_attention(**a, backend=backend), inputs)
    low = {name: x.bfloat16() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert torch.equal(o, mla_attention(**low, backend=backend))
    assert grads["kv_b"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"q": torch.zeros(1, 6, 6)},
            ShapeError,
            r"mla_attention: q is \[1, 6, 6\], expected .* \(B, T, H, dn \+ dr\)",
        ),
        ({"latent": torch.zeros(2, 6, R)}, ShapeError, r"latent is \[2, 6, 7\], expected \[1, any, any\] \(B, S, R\)"),
        ({"key_rope": torch.zeros(1, 5, DR)}, ShapeError, r"key_rope is \[1, 5, 2\], expected \[1, 6, any\]"),
        ({"nope_dim": 5}, ShapeError, r"q is 6 wide, expected nope_dim \+ dr = 5 \+ 2"),
        ({"nope_dim": 0}, ShapeError, r"q is 6 wide, expected nope_dim \+ dr = 0 \+ 2"),
        ({"kv_b": torch.zeros(27, 8)}, ShapeError, r"kv_b is \[27, 8\], expected \[any, 7\] \(H \* \(dn \+ dv\), R\)"),
        ({"kv_b": torch.zeros(26, R)}, ShapeError, r"kv_b has 26 rows, expected 3 \* \(nope_dim \+ dv\)"),
        ({"kv_b": torch.zeros(H * DN, R)}, ShapeError, r"kv_b has 12 rows, expected 3 \* \(nope_dim \+ dv\)"),
        ({"kv_b": torch.zeros(27, R).double()}, DtypeError, "kv_b is torch.float64 but q is torch.float32"),
        ({"q": torch.zeros(1, 7, H, 6)}, ShapeError, "7 queries but 6 keys"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_attention(**{**draw(torch.float32), **change})
