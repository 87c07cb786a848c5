"""Forward, backward and decoding of the delta rule."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.delta_rule.triton import decode, launch
from kimi_linear.ops.delta_rule.triton.inputs import Inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# K and V, and the kinds of calls compiled for them (None: all); float16, which differs in loads alone, takes the first.
FEW = ("core", "scalar", "erase pre", "no erase")
WIDTHS: dict[tuple[int, int], tuple[str, ...] | None] = {
    (128, 128): None,
    **dict.fromkeys(((64, 64), (256, 256)), FEW),
    **dict.fromkeys(((16, 16), (32, 32), (60, 60), (100, 100), (192, 192), (64, 128), (128, 64)), FEW[:2]),
    **dict.fromkeys(((256, 64), (16, 256)), FEW[:1]),
}
# Heads and tokens: many and few heads, and sequences of every chunk length.
SIZES = ((96, 8192), (4, 8192), (96, 32), (4, 32), (96, 16), (4, 16))


def core_inputs(H: int, T: int, K: int, V: int, dtype: torch.dtype, group: int = 1) -> Inputs:
    """Return inputs of `kda_core` without memory."""
    q, k, v, gate, beta = (empty(T, H, *n, dtype=dtype) for n in ((K,), (K,), (V,), (K,), ()))
    if group > 1:
        q, k = (empty(T, H // group, K, dtype=dtype) for _ in range(2))
    return Inputs(q, k, None, v, gate, beta, empty(H), empty(H * K), None, K**-0.5, raw=True)


def variants(H: int, T: int, K: int, V: int, dtype: torch.dtype) -> dict[str, Inputs]:
    """Return inputs of `kda_core` and of every other kind of call, by name."""
    core = core_inputs(H, T, K, V, dtype)
    plain = dataclasses.replace(core, g=empty(T, H, K), A_log=None, dt_bias=None, raw=False)
    scalar = dataclasses.replace(plain, g=empty(T, H))
    free = dataclasses.replace(plain, beta=None, erase=empty(T, H, K, dtype=dtype), initial=empty(1, H, K, V))
    return {
        "core": core,
        "core bounded": dataclasses.replace(core, lower_bound=-5.0, beta_scale=2.0),
        "core bounded no rate": dataclasses.replace(core, lower_bound=-5.0, A_log=None, dt_bias=None),
        "core no bias": dataclasses.replace(core, dt_bias=None, initial=empty(1, H, K, V)),
        "kda": plain,
        "scalar": scalar,
        "erase": free,
        "erase pre": dataclasses.replace(free, pre=True),
        "scalar erase pre": dataclasses.replace(free, g=empty(T, H), pre=True),
        "no erase": dataclasses.replace(free, erase=None),
        "scalar no erase": dataclasses.replace(free, g=empty(T, H), erase=None),
    }


def both_ways(inputs: Inputs, T: int, cu_seqlens: torch.Tensor | None = None) -> None:
    """Run forward and backward."""
    o, final, _ = launch.forward(inputs, cu_seqlens, 1, T)
    launch.backward(inputs, cu_seqlens, 1, T, torch.empty_like(o), final)


def chosen(*given: Any) -> Iterator[tuple[str, Inputs]]:
    """Return the kinds of inputs of heads, tokens, K, V and dtype that the table takes, by name."""
    H, T, K, V, dtype = given
    kinds = WIDTHS[K, V] if dtype != torch.float16 else FEW[:1]
    for kind, x in variants(H, T, K, V, dtype).items():
        if kinds is None or kind in kinds:
            yield kind, x


def sized(K: int, V: int, dtype: torch.dtype) -> str:
    """Return how calls of these sizes are named."""
    return f"D={K} {str(dtype)[6:]}" if K == V else f"K={K} V={V} {str(dtype)[6:]}"


def trained() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return the calls forward and backward by name."""
    for (K, V), dtype, (H, T) in itertools.product(WIDTHS, DTYPES, SIZES):
        for kind, x in chosen(H, T, K, V, dtype):
            yield f"{sized(K, V, dtype)} H={H} T={T} {kind}", lambda x=x, T=T: both_ways(x, T)


def others() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return calls of grouped heads, and of packed sequences, whose offsets may be either integer."""
    D, T = 128, 8192
    for dtype in DTYPES:
        grouped = core_inputs(96, T, D, D, dtype, group=4)
        yield f"D={D} {str(dtype)[6:]} grouped", lambda x=grouped: both_ways(x, T)
        packed = core_inputs(96, T, D, D, dtype)
        for integer in (torch.int32, torch.int64):
            offsets = empty(9, dtype=integer)
            name = f"D={D} {str(dtype)[6:]} packed {str(integer)[6:]}"
            yield name, lambda x=packed, cu=offsets: both_ways(x, T, cu)


def decoded() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return the calls of one token by name."""
    for (K, V), dtype, N in itertools.product(WIDTHS, DTYPES, (1, 256)):
        for kind, x in chosen(8, N, K, V, dtype):
            pool, slots = empty(N, 8, K, V), empty(N, dtype=torch.int32)
            name = f"{sized(K, V, dtype)} N={N} decode {kind}"
            yield name, lambda x=x, p=pool, s=slots: decode.decode(x, p, s)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name."""
    yield from trained()
    yield from others()
    yield from decoded()
