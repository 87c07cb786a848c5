"""Forward, backward and decoding of the delta rule."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_table.meta import empty
from kimi_linear.ops.delta_rule.triton import decode, launch
from kimi_linear.ops.delta_rule.triton.inputs import Inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Many heads and few, long; and short.
SIZES = ((96, 8192), (4, 8192), (4, 32), (4, 16))


def core_inputs(H: int, T: int, K: int, V: int, dtype: torch.dtype) -> Inputs:
    """Return inputs of `kda_core` without memory."""
    q, k, v, gate, beta = (empty(T, H, *n, dtype=dtype) for n in ((K,), (K,), (V,), (K,), ()))
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
        "kda": plain,
        "scalar": scalar,
        "erase": free,
        "erase pre": dataclasses.replace(free, pre=True),
        "scalar erase pre": dataclasses.replace(free, g=empty(T, H), pre=True),
        "no erase": dataclasses.replace(free, erase=None),
    }


def both_ways(inputs: Inputs, T: int) -> None:
    """Run forward and backward."""
    o, final, _ = launch.forward(inputs, None, 1, T)
    launch.backward(inputs, None, 1, T, torch.empty_like(o), final)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name. Kinds other than `kda_core` come at two sizes."""
    for D in (128, 64, 256):
        for dtype in DTYPES:
            for H, T in SIZES:
                name = f"D={D} {str(dtype)[6:]} H={H} T={T}"
                few = T == 8192 and dtype != torch.float16
                for kind, x in variants(H, T, D, D, dtype).items():
                    if kind == "core" or few:
                        yield f"{name} {kind}", lambda x=x, T=T: both_ways(x, T)
            for N in (1, 256):
                for kind, x in variants(8, N, D, D, dtype).items():
                    pool, slots = empty(N, 8, D, D), empty(N, dtype=torch.int32)
                    yield (
                        f"D={D} {str(dtype)[6:]} N={N} decode {kind}",
                        lambda x=x, p=pool, s=slots: decode.decode(x, p, s),
                    )
