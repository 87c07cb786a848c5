"""The Triton kernels of MLA decode, interpreted where there is no GPU: the operator's contract, and their own."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_linear.base.errors import BackendError, ShapeError
from kimi_linear.base.numerics import relative_error, tolerance
from kimi_linear.ops import mla_decode
from kimi_linear.ops.attention.api_decode import MLA_DECODE
from kimi_linear.ops.attention.lengths import seen
from kimi_linear.ops.attention.specs import DECODE_SPECS, DecodeSpec
from kimi_linear.ops.attention.triton import backend
from kimi_linear.ops.registry import Call
from support import ops
from support.source_tree import ROOT

pytestmark = [
    ops.TRITON,
    # The interpreter takes a loop's bound for a scalar, which numpy 2.3 warns of and 2.4 refuses.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
ON_CPU = pytest.mark.skipif(ops.DEVICE != "cpu", reason="values are looked at on the CPU alone")
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EACH_DTYPE = pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
BY_NAME = {spec.name: spec for spec in DECODE_SPECS}
# No size a power of two; two blocks of heads, the second with one; a single channel of everything; no shared key part.
ODD = DecodeSpec("odd", S=70, lengths=(70, 65), Hq=5, Hkv=3, K=7, V=5, R=20)
SHAPES = [
    ODD,
    DecodeSpec("heads_33", S=17, lengths=(17,), Hq=33),
    DecodeSpec("heads_17", S=17, lengths=(16,), Hq=17),
    DecodeSpec("one_channel", S=5, lengths=(5,), Hq=1, Hkv=1, K=1, V=1, R=1),
    DecodeSpec("wide", S=19, lengths=(19,), Hq=2, R=130, Hkv=17),
    DecodeSpec("no_rope", S=9, lengths=(9, 4), Hkv=0),
]
CASES = [
    *((spec, F32) for spec in (*DECODE_SPECS, *SHAPES)),
    *((spec, dtype) for spec in (BY_NAME["ragged"], BY_NAME["unused_row"], *SHAPES[:2]) for dtype in (BF16, FP16)),
]
# Around tiles of 16 and 64 positions, around pieces of 64, and around the most pieces, four, whose size then grows.
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)

decode = functools.partial(mla_decode, backend="triton")


def inputs_of(spec: DecodeSpec, dtype: torch.dtype = F32) -> dict[str, Any]:
    return spec.mla_inputs(dtype, ops.DEVICE)


def expected_of(inputs: dict[str, Any]) -> Tensor:
    return mla_decode(**ops.in_float64(inputs), backend="reference")


def assert_matches_reference(inputs: dict[str, Any], dtype: torch.dtype) -> None:
    with ops.nan_in_new_memory():
        o = decode(**inputs)
    assert o.dtype == dtype
    assert relative_error(o, expected_of(inputs)) <= tolerance(dtype).output


def attend(inputs: dict[str, Any], **changes: Any) -> Tensor:
    """Run the launches alone, with the queries' parts for absorbed ones; return [N, H, R]."""
    x = inputs | changes
    R, dr = x["latent"].shape[-1], x["key_rope"].shape[-1]
    q = torch.cat([x["q"]] * (1 + (R + dr) // x["q"].shape[-1]), dim=-1)
    queries, caches = (q[..., :R], q[..., R : R + dr]), (x["latent"], x["key_rope"])
    return backend.attend(*queries, *caches, x["lengths"], 0.3, x.get("block_table")).transpose(0, 1)


def small_pieces(monkeypatch: pytest.MonkeyPatch, piece: int = 64, most: int = 4) -> None:
    monkeypatch.setattr(backend, "PIECE", piece)
    monkeypatch.setattr(backend, "MOST_PIECES", most)


def paged(inputs: dict[str, Any], page_size: int) -> dict[str, Any]:
    """Cut the caches into shuffled pages; what no token stands in holds NaN, entries not in use nonsense."""
    lengths, (N, S) = inputs["lengths"].tolist(), inputs["latent"].shape[:2]
    most = -(-S // page_size)
    order = torch.randperm(N * most + 3, generator=torch.Generator().manual_seed(5))
    table = order[: N * most].view(N, most).to(torch.int32)
    changes: dict[str, Any] = {}
    for name in ("latent", "key_rope"):
        cache = inputs[name]
        pool = cache.new_full((N * most + 3, page_size, cache.shape[-1]), torch.nan)
        for n, length in enumerate(lengths):
            at = torch.arange(length)
            pool[table[n, at // page_size].long(), at % page_size] = cache[n, :length]
        changes[name] = pool
    for n, length in enumerate(lengths):
        table[n, -(-length // page_size) :] = 10**6 if n % 2 else -1
    return inputs | changes | {"block_table": table.to(ops.DEVICE)}


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{s.name}-{str(d)[6:]}" for s, d in CASES])
def test_it_matches_the_float64_reference(spec: DecodeSpec, dtype: torch.dtype) -> None:
    assert_matches_reference(inputs_of(spec, dtype), dtype)


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 20.0), (BF16, 0.3)])
def test_every_length_matches_the_float64_reference(
    dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large scale one position takes all, and pieces differ by far."""
    small_pieces(monkeypatch)
    inputs = inputs_of(DecodeSpec("lengths", S=300, lengths=LENGTHS, Hq=1, Hkv=2), dtype) | {"scale": scale}
    assert_matches_reference(inputs, dtype)
    assert torch.equal(decode(**inputs)[0], torch.zeros_like(inputs["q"][0, :, :6]))


@pytest.mark.parametrize(("cache", "rope"), [(F32, F32), (BF16, BF16), (torch.float64, torch.float64), (BF16, F32)])
@EACH_DTYPE
def test_a_cache_of_another_dtype(dtype: torch.dtype, cache: torch.dtype, rope: torch.dtype) -> None:
    inputs = inputs_of(BY_NAME["ragged"], BF16)
    inputs |= {"q": inputs["q"].to(dtype), "kv_b": inputs["kv_b"].to(dtype)}
    inputs |= {"latent": inputs["latent"].to(cache), "key_rope": inputs["key_rope"].to(rope)}
    assert_matches_reference(inputs, dtype)


@pytest.mark.parametrize(
    ("query", "cache", "work"),
    [
        (F32, BF16, F32),
        (BF16, F32, F32),
        (BF16, BF16, BF16),
        (FP16, FP16, FP16),
        (FP16, BF16, BF16),
        (BF16, FP16, BF16),
    ],
)
def test_products_run_in_a_dtype_that_holds_query_and_cache(
    query: torch.dtype, cache: torch.dtype, work: torch.dtype
) -> None:
    assert backend.work_dtype(query, cache) == work


@pytest.mark.parametrize("filler", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["ragged", "unused_row"])
def test_what_lies_behind_the_length_is_not_used(name: str, filler: float) -> None:
    inputs = inputs_of(BY_NAME[name])
    unused = ~seen(inputs["lengths"], inputs["latent"].shape[1], None)
    changed = {name: inputs[name].masked_fill(unused[:, :, None], filler) for name in ("latent", "key_rope")}
    assert torch.equal(decode(**{**inputs, **changed}), decode(**inputs))


PAGED = DecodeSpec("paged", S=67, lengths=(67, 0, 1, 16, 33), Hq=4, Hkv=2, K=8, V=6, R=16)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16, 100])
def test_pages_give_the_bits_of_the_contiguous_cache(
    page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, piece=32)
    inputs = inputs_of(PAGED, dtype)
    assert torch.equal(decode(**paged(inputs, page_size)), decode(**inputs))


def test_sequences_may_share_pages() -> None:
    inputs = inputs_of(replace(PAGED, lengths=(67,)))
    pages = paged(inputs, 16)
    twice = {name: pages[name].expand(2, *pages[name].shape[1:]) for name in ("q", "lengths", "block_table")}
    o = decode(**{**pages, **twice})
    ops.assert_close(o[:1], decode(**inputs))
    assert torch.equal(o[0], o[1])


def test_a_page_outside_of_the_pool_is_not_read() -> None:
    """On a GPU nobody looks at the table first."""
    inputs = inputs_of(replace(PAGED, lengths=(9,)))
    pools = {name: inputs[name][0].view(67, 1, -1) for name in ("latent", "key_rope")}
    wrong, right = torch.arange(67, dtype=torch.int32)[None].to(ops.DEVICE), torch.arange(67, dtype=torch.int32)[None]
    wrong[0, 3], wrong[0, 5] = 2**31 - 1, -(2**31)
    right[0, 3], right[0, 5] = 66, 0
    o = attend(inputs, **pools, block_table=wrong)
    assert torch.equal(o, attend(inputs, **pools, block_table=right.to(ops.DEVICE)))


def test_a_length_outside_of_the_cache_is_cut_off() -> None:
    """On a GPU nobody looks at the lengths first."""
    inputs = inputs_of(replace(PAGED, lengths=(67, 0)))
    wrong = torch.tensor([2**31 - 1, -7], dtype=torch.int32, device=ops.DEVICE)
    assert torch.equal(attend(inputs, lengths=wrong), attend(inputs))
    assert torch.equal(attend(inputs, lengths=wrong.long() * 4), attend(inputs))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_launches_give_a_sequence_the_same_bits_in_every_batch_and_every_cache(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch, piece=32, most=3)
    inputs = inputs_of(DecodeSpec("batch", S=140, lengths=(140, 33, 0, 97), Hq=3, R=24), dtype)
    names = ("q", "latent", "key_rope", "lengths")
    together = attend(inputs)
    for n, length in enumerate(inputs["lengths"].tolist()):
        alone = {name: inputs[name][n : n + 1] for name in names}
        assert torch.equal(attend(inputs, **alone)[0], together[n])
        # A cache that holds just the sequence, whose pieces have fewer places.
        cut = alone | {name: alone[name][:, :length] for name in ("latent", "key_rope")}
        assert torch.equal(attend(inputs, **cut)[0], together[n])
    turned = {name: inputs[name].flip(0) for name in names}
    assert torch.equal(attend(inputs, **turned).flip(0), together)


def test_neighbours_change_no_bit_of_the_whole_call() -> None:
    inputs = inputs_of(BY_NAME["ragged"], BF16)
    other = {name: inputs[name].clone() for name in ("q", "latent", "key_rope", "lengths")}
    for name in ("q", "latent", "key_rope"):
        other[name][1:] *= -3
    other["lengths"][1:] = torch.tensor([0, 11])
    assert torch.equal(decode(**{**inputs, **other})[0], decode(**inputs)[0])


def test_inputs_stay_and_strides_and_runs_do_not_matter() -> None:
    inputs = inputs_of(BY_NAME["ragged"])
    before = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    o = decode(**inputs)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    assert torch.equal(decode(**inputs), o)
    ops.assert_close(decode(**{**inputs, **{name: ops.strided(x) for name, x in before.items()}}), o)
    # Latents and key parts of one buffer, as caches have them.
    whole = torch.cat([inputs["latent"], inputs["key_rope"]], dim=-1)
    views = {"latent": whole[..., :16], "key_rope": whole[..., 16:]}
    assert torch.equal(decode(**{**inputs, **views}), o)


def test_autocast_casts_the_query_and_not_the_cache() -> None:
    inputs = inputs_of(BY_NAME["ragged"])
    with torch.autocast(ops.DEVICE, dtype=BF16):
        o = decode(**inputs)
    assert torch.equal(o, decode(**{**inputs, **{name: inputs[name].bfloat16() for name in ("q", "kv_b")}}))


def test_no_gradient_flows() -> None:
    inputs = inputs_of(BY_NAME["ragged"])
    inputs["kv_b"].requires_grad_()
    assert not decode(**inputs).requires_grad


def test_the_call_compiles_whole() -> None:
    torch._dynamo.reset()
    inputs = paged(inputs_of(BY_NAME["ragged"]), 4)
    call = torch.compile(lambda **a: decode(**a), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(**inputs), decode(**inputs))


@pytest.mark.parametrize("name", ["ragged", "no_sequence"])
def test_the_operator_passes_opcheck(name: str) -> None:
    x = inputs_of(BY_NAME[name])
    tensors = [x[name] for name in ("q", "latent", "key_rope", "lengths", "kv_b")]
    # All of torch's checks but the one that compiles, which is made above.
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.mla_decode_triton, (*tensors, x["nope_dim"], 0.3), test_utils=kinds)


@ON_CPU
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([1, 12, 2])}, r"lengths\[1\] is 12, expected 0 to S = 11"),
        ({"lengths": torch.tensor([1, 2, -1])}, r"lengths\[2\] is -1, expected 0 to S = 11"),
        ({"block_table": torch.full((3, 11), 33, dtype=torch.int32)}, r"block_table\[0, 0\] is 33, expected a page"),
    ],
)
def test_wrong_values_are_named_on_the_cpu(change: dict[str, Any], message: str) -> None:
    inputs = inputs_of(BY_NAME["ragged"])
    if "block_table" in change:
        inputs |= {name: inputs[name].view(33, 1, -1) for name in ("latent", "key_rope")}
    with pytest.raises(ShapeError, match=message):
        decode(**{**inputs, **change})


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    for spec, message in (
        (DecodeSpec("x", S=2, lengths=(1,), Hq=1, R=513), "R is above 512"),
        (DecodeSpec("x", S=2, lengths=(1,), Hq=1, Hkv=65), "dr is above 64"),
    ):
        with pytest.raises(BackendError, match=message):
            decode(**inputs_of(spec))
    with pytest.raises(BackendError, match="float64 is not one of float32, bfloat16, float16"):
        decode(**inputs_of(BY_NAME["ragged"], torch.float64))


def test_it_runs_on_a_gpu_when_asked_for_by_name() -> None:
    call = Call("cuda", "bfloat16", needs_grad=False, sizes={"R": 512, "dr": 64})
    assert MLA_DECODE.choose(call).name == "absorbed"
    assert MLA_DECODE.choose(call, "triton").name == "triton"


class Allocated(TorchDispatchMode):
    """Adds up the bytes of new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.bytes += result.numel() * result.element_size()
        return result


@pytest.mark.parametrize("page_size", [None, 16])
def test_nothing_waits_for_the_device_and_the_workspace_is_as_large_as_it_says(
    page_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor without memory has no value the host could read."""
    from kimi_linear.ops.triton import launch

    launched = []
    monkeypatch.setattr(launch, "start", lambda kernel, programs, *_, **__: launched.append(programs))
    N, H, R, S = 3, 40, 160, 1040
    inputs = inputs_of(DecodeSpec("x", S=S, lengths=(S, 5, 0), Hq=H, R=R), BF16)
    inputs = inputs if page_size is None else paged(inputs, page_size)
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with Allocated() as allocated:
        attend(inputs)
    assert backend.pieces(S) == 3
    # Two blocks of heads; two of channels.
    assert launched == [2 * 3 * N, H * N * 2]
    assert allocated.bytes == backend.workspace_bytes(N, H, R, S) + H * N * R * 2


def test_pieces_of_a_cache_are_at_most_as_many_as_a_sequence_has() -> None:
    for S in (0, 1, 512, 513, 512 * 64, 512 * 64 + 1, 10**6):
        size = 512 * max(1, -(-S // (512 * 64)))
        assert -(-S // size) <= backend.pieces(S) <= 64
    assert [backend.pieces(S) for S in (0, 1, 512, 513, 10**6)] == [0, 1, 1, 2, 64]


COMPILE = """
import compile_gpu
for name, call in compile_gpu.calls():
    if name == "mla_decode H=32 R=512 dr=64 bfloat16 cache bfloat16 page=64":
        for kernel, args, options in compile_gpu.launches(call):
            used = compile_gpu.compile_launch(kernel, args, options)
            print(kernel.__name__, used["spilled"], used["shared"] <= compile_gpu.SHARED_LIMIT)
"""


def test_the_kernels_compile_for_a_gpu_without_a_spill() -> None:
    """In a process of its own, for here kernels are interpreted. scripts/compile_gpu.py compiles all of them."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for NVIDIA's GPUs")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'scripts'}"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["piece_kernel 0 True", "join_kernel 0 True"]
