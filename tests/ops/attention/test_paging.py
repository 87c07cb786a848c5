from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_linear.base.errors import DeviceError, DtypeError, ShapeError
from kimi_linear.ops import attention_decode, mla_decode
from kimi_linear.ops.attention.specs import DecodeSpec
from support import ops

SPEC = DecodeSpec("paged", S=67, lengths=(67, 0, 1, 16, 33), Hq=4, Hkv=2, K=8, V=6, R=16)
PAGES = pytest.mark.parametrize("page_size", [1, 7, 16, 67, 100])
GQA = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("attention_decode"), ids=str)
MLA = pytest.mark.parametrize(("backend", "dtype"), ops.backend_dtypes("mla_decode"), ids=str)


def paged(caches: list[Tensor], lengths: Tensor, page_size: int) -> tuple[list[Tensor], Tensor]:
    """Cut caches [N, S, ...] into shuffled pages; what no token stands in holds NaN, entries not in use nonsense."""
    N, S = caches[0].shape[:2]
    most = -(-S // page_size)
    order = torch.randperm(N * most + 3, generator=torch.Generator().manual_seed(5))
    table = order[: N * most].view(N, most).to(torch.int32)
    pools = [x.new_full((len(order), page_size, *x.shape[2:]), torch.nan) for x in caches]
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            for pool, cache in zip(pools, caches, strict=True):
                pool[table[n, t // page_size], t % page_size] = cache[n, t]
        table[n, -(-length // page_size) :] = 10**6 if n % 2 else -1
    return pools, table


def padded(cache: Tensor, page_size: int) -> Tensor:
    """Return the contiguous cache with the capacity of whole pages."""
    more = -cache.shape[1] % page_size
    return torch.cat([cache, cache.new_full((cache.shape[0], more, *cache.shape[2:]), torch.nan)], dim=1)


@PAGES
@MLA
def test_mla_decode_from_pages_gives_the_bits_of_the_contiguous_cache(
    backend: str, dtype: torch.dtype, page_size: int
) -> None:
    inputs = SPEC.mla_inputs(dtype)
    (latent, key_rope), table = paged([inputs["latent"], inputs["key_rope"]], inputs["lengths"], page_size)
    pages = {"latent": latent, "key_rope": key_rope, "block_table": table}
    whole = {name: padded(inputs[name], page_size) for name in ("latent", "key_rope")}
    o = mla_decode(**{**inputs, **pages}, backend=backend)
    assert torch.equal(o, mla_decode(**{**inputs, **whole}, backend=backend))


@pytest.mark.parametrize("window", [None, 5])
@PAGES
@GQA
def test_attention_decode_from_pages_gives_the_bits_of_the_contiguous_cache(
    backend: str, dtype: torch.dtype, page_size: int, window: int | None
) -> None:
    inputs = SPEC.inputs(dtype) | {"window": window}
    (k, v), table = paged([inputs["k"], inputs["v"]], inputs["lengths"], page_size)
    o = attention_decode(**{**inputs, "k": k, "v": v, "block_table": table}, backend=backend)
    whole = {name: padded(inputs[name], page_size) for name in ("k", "v")}
    assert torch.equal(o, attention_decode(**{**inputs, **whole}, backend=backend))


@pytest.mark.parametrize("backend", ops.backends("mla_decode"))
def test_sequences_may_share_pages(backend: str) -> None:
    inputs = SPEC.mla_inputs(torch.float32)
    same = {name: inputs[name][:1].expand(2, *inputs[name].shape[1:]) for name in ("q", "latent", "key_rope")}
    inputs |= same | {"lengths": torch.tensor([67, 67], dtype=torch.int32)}
    (latent, key_rope), table = paged([same["latent"], same["key_rope"]], inputs["lengths"], 67)
    table[1] = table[0]
    pages = {"latent": latent, "key_rope": key_rope, "block_table": table}
    assert torch.equal(mla_decode(**{**inputs, **pages}, backend=backend), mla_decode(**inputs, backend=backend))


@pytest.mark.parametrize("backend", ops.backends("mla_decode"))
def test_a_paged_call_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()
    inputs = SPEC.mla_inputs(torch.float32)
    (latent, key_rope), table = paged([inputs["latent"], inputs["key_rope"]], inputs["lengths"], 16)
    inputs |= {"latent": latent, "key_rope": key_rope, "block_table": table}
    call = torch.compile(lambda **a: mla_decode(**a, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(**inputs), mla_decode(**inputs, backend=backend))


TABLE = torch.zeros(5, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_table": TABLE.long()}, DtypeError, "block_table is torch.int64, expected int32"),
        ({"block_table": TABLE[:4]}, ShapeError, r"block_table is \[4, 5\], expected \[5, any\] \(N, max_pages\)"),
        ({"block_table": TABLE.to("meta")}, DeviceError, "block_table is on meta but latent is on cpu"),
        ({"block_table": TABLE + 3}, ShapeError, r"block_table\[0, 0\] is 3, expected a page of the pool, 0 to 2"),
        ({"block_table": TABLE - 1}, ShapeError, r"block_table\[0, 0\] is -1, expected a page of the pool, 0 to 2"),
        ({"block_table": TABLE[:, :4]}, ShapeError, r"lengths\[0\] is 67, expected 0 to S = 64"),
        ({"key_rope": torch.zeros(3, 15, 2)}, ShapeError, r"key_rope is \[3, 15, 2\], expected \[3, 16, any\]"),
    ],
)
@pytest.mark.parametrize("backend", ops.backends("mla_decode"))
def test_wrong_pages_are_named(backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = SPEC.mla_inputs(torch.float32)
    inputs |= {"latent": torch.zeros(3, 16, 16), "key_rope": torch.zeros(3, 16, 2), "block_table": TABLE}
    with pytest.raises(error, match=message):
        mla_decode(**{**inputs, **change}, backend=backend)
