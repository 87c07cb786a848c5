"""Named cases that tests and benchmarks share. Letters as in api.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """One call of `attention`."""

    name: str
    T: int
    S: int
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    K: int = 8
    V: int = 8
    window: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `attention`, the same values for every dtype up to rounding."""
        keys = (self.B, self.S, self.Hkv)
        q, k, v = _normal([(self.B, self.T, self.Hq, self.K), (*keys, self.K), (*keys, self.V)], dtype, device, seed)
        offsets = {"cu_seqlens": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens_k}
        packing = {name: None if x is None else _offsets(x, device) for name, x in offsets.items()}
        return {"q": q, "k": k, "v": v, "window": self.window, **packing}


@dataclass(frozen=True)
class DecodeSpec:
    """One call of `attention_decode`, and of `mla_decode` with H = Hq, dn = K, dr = Hkv, dv = V."""

    name: str
    S: int
    lengths: tuple[int, ...]
    Hq: int = 4
    Hkv: int = 2
    K: int = 8
    V: int = 6
    R: int = 16
    window: int | None = None

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `attention_decode`."""
        N, cache = len(self.lengths), (len(self.lengths), self.S, self.Hkv)
        q, k, v = _normal([(N, self.Hq, self.K), (*cache, self.K), (*cache, self.V)], dtype, device, seed)
        return {"q": q, "k": k, "v": v, "lengths": _offsets(self.lengths, device), "window": self.window}

    def mla_inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Return the keyword arguments of `mla_decode`."""
        N, dr = len(self.lengths), self.Hkv
        rows = self.Hq * (self.K + self.V)
        shapes = [(N, self.Hq, self.K + dr), (N, self.S, self.R), (N, self.S, dr), (rows, self.R)]
        q, latent, key_rope, kv_b = _normal(shapes, dtype, device, seed)
        return {
            "q": q,
            "latent": latent,
            "key_rope": key_rope,
            "lengths": _offsets(self.lengths, device),
            "kv_b": kv_b * self.R**-0.5,
            "nope_dim": self.K,
        }


def _normal(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def _offsets(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


SPECS = (
    AttentionSpec("one_token", T=1, S=1, B=2),
    AttentionSpec("square", T=17, S=17, B=2),
    AttentionSpec("grouped_heads", T=13, S=13, B=2, Hq=6, Hkv=2),
    AttentionSpec("multi_query", T=13, S=13, Hq=4, Hkv=1),
    AttentionSpec("narrow_value", T=13, S=13, K=12, V=5),
    AttentionSpec("wide_value", T=13, S=13, K=5, V=12, Hq=4),
    AttentionSpec("continued", T=5, S=29, B=2, Hq=4),
    AttentionSpec("continued_by_one", T=1, S=29, B=2, Hq=4),
    AttentionSpec("window", T=19, S=19, window=4),
    AttentionSpec("window_one", T=7, S=7, window=1),
    AttentionSpec("window_longer", T=7, S=7, window=100),
    AttentionSpec("window_continued", T=5, S=29, Hq=4, window=7),
    AttentionSpec("window_continued_by_one", T=1, S=29, Hq=4, window=7),
    AttentionSpec("packed", T=23, S=23, Hq=4, cu_seqlens=(0, 11, 11, 12, 23)),
    AttentionSpec("packed_window", T=23, S=23, window=3, cu_seqlens=(0, 0, 11, 23, 23)),
    AttentionSpec("packed_continued", T=9, S=30, cu_seqlens=(0, 5, 5, 9), cu_seqlens_k=(0, 7, 12, 30), V=5),
    AttentionSpec("packed_all_empty", T=0, S=0, cu_seqlens=(0, 0, 0)),
    AttentionSpec("empty", T=0, S=6, B=2),
    AttentionSpec("two_blocks_window", T=263, S=263, window=9),
    AttentionSpec("two_blocks_continued", T=259, S=270, Hq=4, V=5),
)

DECODE_SPECS = (
    DecodeSpec("full", S=9, lengths=(9, 9)),
    DecodeSpec("ragged", S=11, lengths=(11, 1, 7)),
    DecodeSpec("unused_row", S=6, lengths=(0, 6)),
    DecodeSpec("window", S=13, lengths=(13, 2, 8), window=3),
    DecodeSpec("multi_query", S=7, lengths=(5,), Hkv=1),
    DecodeSpec("two_tiles", S=1030, lengths=(1030, 1024)),
    DecodeSpec("no_sequence", S=4, lengths=()),
)

# Long calls at the checkpoint's head sizes, for benchmarks alone.
BENCHMARK_SPECS = (
    AttentionSpec("mla_2k", T=2048, S=2048, Hq=8, Hkv=8, K=192, V=128),
    AttentionSpec("mla_8k", T=8192, S=8192, Hq=8, Hkv=8, K=192, V=128),
    AttentionSpec("gqa_8k_window", T=8192, S=8192, Hq=8, Hkv=2, K=128, V=128, window=2048),
)
