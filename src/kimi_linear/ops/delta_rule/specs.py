"""Named cases that tests and benchmarks share: what a call looks like, and how its inputs are drawn.

The cases are plain values; `make_inputs` draws the keyword arguments of `delta_rule`, `make_kda_inputs` those of `kda`
and `gated_delta_rule`, `make_core_inputs` those of `kda_core`. All draw in float64 and round once, so that one case has
the same values in every dtype, up to rounding.
Letters as in api.py.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# How the log decay is drawn; see `_log_decay`.
GATES = ("slow", "medium", "fast", "none", "separators", "closed", "floor", "strong", "mixed")
# How the keys are drawn; see `_keys`.
KEYS = ("gaussian", "correlated", "identical")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a call. `lengths` packs sequences and sets T; `HV` defaults to H."""

    name: str
    T: int = 37
    B: int = 1
    H: int = 2
    HV: int | None = None
    K: int = 8
    V: int = 6
    lengths: tuple[int, ...] | None = None
    initial_state: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a row: T, or the packed sequences' sum."""
        return self.T if self.lengths is None else sum(self.lengths)

    @property
    def value_heads(self) -> int:
        """HV."""
        return self.H if self.HV is None else self.HV

    @property
    def sequences(self) -> int:
        """N."""
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def offsets(self) -> list[int] | None:
        """Token offsets of packed sequences."""
        return None if self.lengths is None else [0, *itertools.accumulate(self.lengths)]


@dataclass(frozen=True, kw_only=True)
class KdaCase(Shape):
    """One call of `kda`, or with a scalar decay of `gated_delta_rule`."""

    scalar_decay: bool = False
    gate: str = "medium"
    keys: str = "gaussian"
    # The strength of every token; None: drawn, or for `delta_rule` none, erase key and write value being free.
    beta: float | None = None
    state_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DeltaRuleCase(KdaCase):
    """One call of `delta_rule`."""

    # "key": [B, T, H, K]; "value": [B, T, HV, K]; "none": nothing is erased.
    erase: str = "value"
    read: str = "post"


@dataclass(frozen=True, kw_only=True)
class CoreCase(Shape):
    """One call of `kda_core`."""

    lower_bound: float | None = None
    allow_neg_eigval: bool = False
    has_rate: bool = True
    has_bias: bool = True
    logits: float = 1.0
    bias: float = 1.0
    rate: float = 1.0
    # Rows of q and of k that are zero: the epsilon of the norm.
    zero_rows: bool = False


def make_inputs(case: DeltaRuleCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Return the keyword arguments of `delta_rule` for a case; the decay is float32 beside narrower dtypes."""
    draw = _Draw(seed)
    B, T, H, HV, K, V = case.B, case.tokens, case.H, case.value_heads, case.K, case.V
    q, k = F.normalize(draw(B, T, H, K), dim=-1), _keys(draw, case.keys, (B, T, H, K))
    z, e = draw(B, T, HV, V), None
    if case.erase != "none":
        heads = H if case.erase == "key" else HV
        e = k.repeat_interleave(heads // H, 2)
        e = e * (draw.uniform(B, T, heads, K) if case.beta is None else case.beta)
    if case.beta is not None:
        z = z * case.beta
    g = _log_decay(draw, case.gate, (B, T, HV) if case.scalar_decay else (B, T, HV, K))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = draw(case.sequences, HV, K, V) * case.state_scale
    return {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "erase_key": None if e is None else e.to(device, dtype),
        "write_value": z.to(device, dtype),
        "log_decay": g.to(device, wide),
        "scale": None,
        "initial_state": state.to(device, wide) if case.initial_state else None,
        "cu_seqlens": _offsets(case, device),
        "read": case.read,
    }


def make_kda_inputs(case: KdaCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Return the keyword arguments of `kda` or `gated_delta_rule`; the decay is float32 beside narrower dtypes."""
    draw = _Draw(seed)
    B, T, H, HV, K, V = case.B, case.tokens, case.H, case.value_heads, case.K, case.V
    q, k = F.normalize(draw(B, T, H, K), dim=-1), _keys(draw, case.keys, (B, T, H, K))
    v, beta = draw(B, T, HV, V), draw.uniform(B, T, HV)
    g = _log_decay(draw, case.gate, (B, T, HV) if case.scalar_decay else (B, T, HV, K))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = draw(case.sequences, HV, K, V) * case.state_scale
    return {
        "q": q.to(device, dtype),
        "k": k.to(device, dtype),
        "v": v.to(device, dtype),
        "log_decay": g.to(device, wide),
        "beta": (beta if case.beta is None else torch.full_like(beta, case.beta)).to(device, dtype),
        "scale": None,
        "initial_state": state.to(device, wide) if case.initial_state else None,
        "cu_seqlens": _offsets(case, device),
    }


def make_core_inputs(case: CoreCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Return the keyword arguments of `kda_core` for a case; A_log, dt_bias and the state are never narrow."""
    draw = _Draw(seed)
    B, T, H, HV, K, V = case.B, case.tokens, case.H, case.value_heads, case.K, case.V
    q, k = draw(B, T, H, K), draw(B, T, H, K)
    if case.zero_rows:
        q[:, ::5] = 0
        k[:, 1::3] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = {
        "q": q,
        "k": k,
        "v": draw(B, T, HV, V),
        "gate": draw(B, T, HV, K) * case.logits,
        "beta": draw(B, T, HV) * case.logits,
    }
    A_log, dt_bias = (2 * draw.uniform(HV) - 1) * case.rate, (2 * draw.uniform(HV * K) - 1) * case.bias
    state = draw(case.sequences, HV, K, V)
    return {
        **{name: x.to(device, dtype) for name, x in tokens.items()},
        "A_log": A_log.to(device, wide) if case.has_rate else None,
        "dt_bias": dt_bias.to(device, wide) if case.has_bias else None,
        "lower_bound": case.lower_bound,
        "allow_neg_eigval": case.allow_neg_eigval,
        "scale": None,
        "initial_state": state.to(device, wide) if case.initial_state else None,
        "cu_seqlens": _offsets(case, device),
    }


class _Draw:
    """Standard normal or uniform(0, 1) numbers in float64 from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64)


def _keys(draw: _Draw, kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "gaussian":
        return F.normalize(draw(*shape), dim=-1)
    if kind == "correlated":
        return F.normalize(draw.uniform(*shape), dim=-1)
    return F.normalize(draw(1, 1, *shape[2:]), dim=-1).expand(shape).contiguous()


def _log_decay(draw: _Draw, kind: str, shape: tuple[int, ...]) -> Tensor:
    medium = F.logsigmoid(draw(*shape))
    some = draw.uniform(*shape[:2], *[1] * (len(shape) - 2)) < 0.15
    kinds = {
        "slow": medium / 10,
        "medium": medium,
        "fast": medium * 10,
        "none": torch.zeros(shape, dtype=torch.float64),
        # Document separators: everything forgotten at some tokens.
        "separators": torch.where(some, -1000.0, medium / 10),
        "closed": torch.full(shape, -1000.0, dtype=torch.float64),
        # The least value of the bounded gate.
        "floor": torch.full(shape, -5.0, dtype=torch.float64),
        "strong": torch.full(shape, -100.0, dtype=torch.float64),
        # Channel by channel: kept, decayed, forgotten.
        "mixed": torch.where(draw.uniform(*shape) < 0.1, -1000.0, medium) * (draw.uniform(*shape) < 0.7),
    }
    return kinds[kind]


def _offsets(case: Shape, device: str) -> Tensor | None:
    return None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32, device=device)


# One under, at and over powers of two and the chunk length; primes; several tiles.
LENGTHS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 37, 63, 64, 65, 97, 160, 500)
PACKED = {
    "empty_first": (0, 9, 40),
    "empty_middle": (33, 0, 0, 5),
    "empty_last": (7, 64, 0),
    "empty_all": (0, 0),
    "one_token": (1,),
    "ones": (1,) * 20,
    "ragged": (17, 1, 65, 32, 2, 31),
    "one_long": (3, 200, 1),
}

DELTA_RULE_CASES: dict[str, DeltaRuleCase] = {
    case.name: case
    for case in (
        *(DeltaRuleCase(name=f"T{T}", T=T) for T in LENGTHS),
        *(DeltaRuleCase(name=f"scalar_T{T}", T=T, scalar_decay=True, erase="key") for T in (1, 2, 33, 97, 160)),
        DeltaRuleCase(name="pre", read="pre", T=65),
        DeltaRuleCase(name="pre_scalar", read="pre", T=65, scalar_decay=True),
        DeltaRuleCase(name="pre_one_token", read="pre", T=1, B=2),
        DeltaRuleCase(name="no_erase", erase="none", T=65),
        DeltaRuleCase(name="no_erase_scalar", erase="none", scalar_decay=True, T=65),
        DeltaRuleCase(name="key_erase", erase="key", HV=4, T=40),
        DeltaRuleCase(name="grouped_2", HV=4, T=40, B=2),
        DeltaRuleCase(name="grouped_4", H=1, HV=4, T=40, scalar_decay=True, erase="key"),
        DeltaRuleCase(name="many_heads", H=40, HV=40, K=4, V=3, T=35),
        DeltaRuleCase(name="batch", B=5, T=70, H=3),
        DeltaRuleCase(name="no_state", initial_state=False, T=40),
        DeltaRuleCase(name="large_state", state_scale=1e3, T=40),
        DeltaRuleCase(name="K60_V100", K=60, V=100, T=70, H=1),
        DeltaRuleCase(name="K100_V60", K=100, V=60, T=70, H=1, scalar_decay=True),
        DeltaRuleCase(name="K1_V1", K=1, V=1, T=40),
        DeltaRuleCase(name="V1", K=16, V=1, T=40),
        DeltaRuleCase(name="K128", K=128, V=128, T=66, H=1, keys="correlated", gate="slow", beta=1.0),
        *(DeltaRuleCase(name=f"gate_{gate}", gate=gate, T=64) for gate in GATES),
        *(DeltaRuleCase(name=f"gate_{gate}_scalar", gate=gate, T=64, scalar_decay=True) for gate in GATES),
        *(DeltaRuleCase(name=f"gate_{gate}_pre", gate=gate, T=64, read="pre") for gate in ("separators", "closed")),
        *(DeltaRuleCase(name=f"keys_{keys}", keys=keys, gate="slow", beta=1.0, T=64, K=16) for keys in KEYS),
        *(DeltaRuleCase(name=f"beta_{beta:g}", beta=beta, gate="slow", T=64, K=16) for beta in (0.0, 1.0, 2.0)),
        DeltaRuleCase(name="identical_undecayed", keys="identical", gate="none", beta=1.0, T=64, K=16),
        *(DeltaRuleCase(name=f"packed_{name}", lengths=lengths, H=1, HV=2) for name, lengths in PACKED.items()),
        DeltaRuleCase(name="packed_scalar", lengths=PACKED["ragged"], scalar_decay=True, read="pre", erase="key"),
        DeltaRuleCase(name="packed_no_state", lengths=PACKED["empty_middle"], initial_state=False, erase="none"),
    )
}

KDA_CASES: dict[str, KdaCase] = {
    case.name: case
    for case in (
        *(KdaCase(name=f"T{T}", T=T) for T in LENGTHS),
        *(KdaCase(name=f"scalar_T{T}", T=T, scalar_decay=True) for T in (1, 33, 160)),
        KdaCase(name="grouped_2", HV=4, T=40, B=2),
        KdaCase(name="grouped_4", H=1, HV=4, T=40, scalar_decay=True),
        KdaCase(name="no_state", initial_state=False, T=40),
        KdaCase(name="large_state", state_scale=1e3, T=40),
        KdaCase(name="K60_V100", K=60, V=100, T=70, H=1),
        KdaCase(name="K128", K=128, V=128, T=66, H=1, keys="correlated", gate="slow"),
        *(KdaCase(name=f"gate_{gate}", gate=gate, T=64) for gate in GATES),
        *(KdaCase(name=f"keys_{keys}", keys=keys, gate="slow", beta=1.0, T=64, K=16) for keys in KEYS),
        *(KdaCase(name=f"beta_{beta:g}", beta=beta, gate="slow", T=64, K=16) for beta in (0.0, 1.0, 2.0)),
        *(KdaCase(name=f"packed_{name}", lengths=lengths, H=1, HV=2) for name, lengths in PACKED.items()),
    )
}

CORE_CASES: dict[str, CoreCase] = {
    case.name: case
    for case in (
        *(CoreCase(name=f"T{T}", T=T) for T in LENGTHS),
        CoreCase(name="bounded", lower_bound=-5.0, T=65),
        CoreCase(name="bounded_no_rate", lower_bound=-5.0, has_rate=False, T=40),
        CoreCase(name="no_bias", has_bias=False, T=40),
        CoreCase(name="neg_eigval", allow_neg_eigval=True, T=65),
        CoreCase(name="grouped_2", HV=4, B=2, T=40, initial_state=False),
        CoreCase(name="grouped_4", H=1, HV=4, T=40),
        CoreCase(name="K60_V100", K=60, V=100, H=1, T=40),
        CoreCase(name="zero_rows", zero_rows=True, T=40),
        CoreCase(name="extreme", logits=50.0, bias=8.0, rate=4.0, T=65),
        CoreCase(name="extreme_bounded", logits=50.0, bias=8.0, rate=4.0, lower_bound=-5.0, T=65),
        *(CoreCase(name=f"packed_{name}", lengths=lengths, H=1, HV=2) for name, lengths in PACKED.items()),
    )
}

# At the released model's head size, for benchmarks alone.
BENCHMARK_CASES = tuple(
    CoreCase(name=f"H8_T{T}", T=T, H=8, K=128, V=128, initial_state=False) for T in (512, 2048, 8192)
)
