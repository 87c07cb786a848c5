"""What is measured: every case as plain values, with its work and its groups. No torch.

The shapes are those the public kernels are compared by, B x T x H at head size 128 unless it says otherwise.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from gpu import counts
from gpu.counts import Work

ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}
MIXED = (1300, 547, 2048, 963, 271, 3063)
EQUAL = (1024,) * 8
# The released model.
WIDTH, HEADS, LATENT, ROPE = 2304, 32, 512, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; `section` is the table it belongs to."""

    section: ClassVar[str] = ""

    def work(self) -> Work:
        """Return bytes and operations."""
        raise NotImplementedError

    def tiny(self) -> "Case":
        """Return the same case at a size a CPU runs in no time."""
        raise NotImplementedError

    @property
    def token_heads(self) -> int | None:
        """What a time may be divided by, if anything."""
        return None

    @property
    def label(self) -> str:
        """A name for people, and for --profile."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """The name of the case: its section and label."""
        return f"{self.section} {self.label}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the record."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Kda(Case):
    """A call of `kda_core` on B rows of T tokens, or on packed sequences."""

    section: ClassVar[str] = "kda"

    B: int = 1
    T: int
    H: int
    D: int = 128
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    backward: bool = False
    bounded: bool = False
    # Replayed from a CUDA graph rather than launched.
    graph: bool = False

    @property
    def token_heads(self) -> int:
        """B T H."""
        return self.B * self.T * self.H

    def work(self) -> Work:
        """Return bytes and operations."""
        D, item = self.D, ITEM[self.dtype]
        if self.backward:
            each = Work(counts.training_bytes(D, D, item), counts.forward_flop(D, D) + counts.backward_flop(D, D))
        else:
            each = Work(counts.forward_bytes(D, D, item), counts.forward_flop(D, D))
        return each * self.token_heads

    def tiny(self) -> "Kda":
        """Return at most 24 tokens of two heads."""
        lengths = None if self.lengths is None else (9, 0, 15)
        return replace(self, B=min(self.B, 2), T=24, H=2, D=16, lengths=lengths, dtype="float32")

    @property
    def label(self) -> str:
        """Direction, sizes and whatever is unusual."""
        parts = ["fwd+bwd" if self.backward else "fwd", f"{self.B}x{self.T}x{self.H}"]
        parts += [f"D{self.D}"] if self.D != 128 else []
        parts += [f"packed{len(self.lengths)}"] if self.lengths else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        parts += ["bounded"] if self.bounded else []
        return " ".join(parts + (["graph"] if self.graph else []))


@dataclass(frozen=True, kw_only=True)
class Decode(Case):
    """One token of N sequences, in place on a pool of states."""

    section: ClassVar[str] = "decode"

    N: int
    H: int
    D: int = 128
    pool: str = "float32"
    dtype: str = "bfloat16"
    graph: bool = False

    @property
    def token_heads(self) -> int:
        """State-heads: N H."""
        return self.N * self.H

    def work(self) -> Work:
        """Return bytes and operations."""
        moved = counts.decode_bytes(self.D, self.D, ITEM[self.dtype], ITEM[self.pool])
        return Work(moved, counts.decode_flop(self.D, self.D)) * self.token_heads

    def tiny(self) -> "Decode":
        """Return two sequences of two heads."""
        return replace(self, N=2, H=2, D=16, dtype="float32")

    @property
    def label(self) -> str:
        """Sizes and the pool."""
        pool = "" if self.pool == "float32" else f" {self.pool} pool"
        return f"{self.N}x{self.H}{pool}{' graph' if self.graph else ''}"


@dataclass(frozen=True, kw_only=True)
class Layer(Case):
    """A layer of the released model's width, forward and backward."""

    section: ClassVar[str] = "layer"

    T: int
    width: int = WIDTH
    heads: int = HEADS
    head_dim: int = 128
    dtype: str = "bfloat16"

    def work(self) -> Work:
        """Return the delta layer's own operations; its bytes are not said."""
        delta = replace(Kda(T=self.T, H=self.heads, backward=True), D=self.head_dim).work()
        channels = self.heads * self.head_dim
        weights = 4 * self.width * channels + 2 * self.head_dim * (self.width + channels) + self.width * self.heads
        return Work(0, 6 * weights * self.T + delta.flop)

    def tiny(self) -> "Layer":
        """Return a narrow layer on 24 tokens."""
        return replace(self, T=24, width=32, heads=2, head_dim=16, dtype="float32")

    @property
    def label(self) -> str:
        """The length."""
        return f"T={self.T}"


@dataclass(frozen=True, kw_only=True)
class Operator(Case):
    """One of the other operators: `rows` of `width`, and what else its kind needs."""

    section: ClassVar[str] = "operators"

    op: str
    rows: int
    width: int
    backward: bool = False
    # Heads; cached positions; vocabulary; experts and how many a token has; their width.
    heads: int = 1
    positions: int = 0
    vocabulary: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    dtype: str = "bfloat16"

    def work(self) -> Work:
        """Return bytes and operations."""
        item, elements = ITEM[self.dtype], self.rows * self.width
        if self.op == "short_conv":
            return Work((5 if self.backward else 2) * elements * item, (24 if self.backward else 8) * elements)
        if self.op == "gated_rms_norm":
            return Work((8 if self.backward else 3) * elements * item, (24 if self.backward else 8) * elements)
        if self.op == "linear_cross_entropy":
            products = 3 if self.backward else 1
            weights = self.vocabulary * self.width * item
            moved = products * weights + 2 * elements * item
            return Work(moved, 2 * products * elements * self.vocabulary)
        if self.op == "mla_decode":
            cached = self.rows * self.positions
            return Work(cached * (LATENT + ROPE) * item, 2 * cached * self.heads * (2 * LATENT + ROPE))
        products = 3 if self.backward else 1
        # As many experts as so many choices name when all are as likely.
        named = self.experts * (1 - (1 - self.top_k / self.experts) ** self.rows)
        weights = 3 * named * self.width * self.expert_width * item
        moved = products * weights + 2 * products * elements * item
        return Work(moved, 6 * products * elements * self.top_k * self.expert_width)

    def tiny(self) -> "Operator":
        """Return a few rows of a few channels."""
        small = {"rows": 24, "width": 16, "heads": min(self.heads, 2), "positions": min(self.positions, 12)}
        experts = {"experts": min(self.experts, 4), "top_k": min(self.top_k, 2), "expert_width": 8}
        return replace(self, **small, **experts, vocabulary=min(self.vocabulary, 40), dtype="float32")

    @property
    def label(self) -> str:
        """Operator, direction, sizes."""
        parts = [self.op, "fwd+bwd" if self.backward else "fwd", f"{self.rows}x{self.width}"]
        parts += [f"S={self.positions}"] if self.positions else []
        parts += [f"V={self.vocabulary}"] if self.vocabulary else []
        parts += [f"E={self.experts} k={self.top_k}"] if self.experts else []
        return " ".join(parts)


MAIN = ((1, 8192, 96), (1, 8192, 64), (1, 8192, 16))
MORE = ((2, 16384, 16), (4, 2048, 16), (4, 4096, 64), (1, 65536, 32), (1, 65536, 16), (1, 65536, 8), (1, 65536, 4))
SHORT = tuple((1, T, H) for T in (1024, 512, 128) for H in (64, 16))


def kda(shapes: tuple[tuple[int, int, int], ...], **others: Any) -> tuple[Kda, ...]:
    """Return the cases of shapes (B, T, H)."""
    return tuple(Kda(B=B, T=T, H=H, **others) for B, T, H in shapes)


def both(*cases: Any) -> tuple[Any, ...]:
    """Return every case launched, and from a CUDA graph."""
    return tuple(replace(case, graph=graph) for case in cases for graph in (False, True))


OTHER_SIZES = (Kda(B=8, T=2048, H=32, D=256), Kda(B=8, T=1024, H=8, D=64), *kda(((1, 4096, 64), (1, 4096, 16))))
PACKED = tuple(Kda(T=8192, H=H, lengths=lengths) for lengths in (MIXED, EQUAL) for H in (96, 64))
POOLS = [(32, N) for N in (256, 128, 64, 32, 16, 4, 1)] + [(64, N) for N in (128, 64, 16, 1)]
DECODE = (
    *(Decode(N=N, H=H) for H, N in POOLS),
    Decode(N=256, H=64),
    Decode(N=256, H=96),
    Decode(N=1, H=8),
    *(Decode(N=N, H=H, pool="bfloat16") for H, N in ((32, 256), (32, 128), (32, 32), (64, 128))),
    *(Decode(N=N, H=H, graph=True) for H, N in ((8, 1), (32, 1), (32, 4), (32, 32))),
)
TOKENS = 8192
OPERATORS = (
    *(Operator(op="short_conv", rows=TOKENS, width=HEADS * 128, backward=b) for b in (False, True)),
    *(Operator(op="gated_rms_norm", rows=TOKENS * HEADS, width=128, backward=b) for b in (False, True)),
    Operator(op="linear_cross_entropy", rows=TOKENS, width=WIDTH, vocabulary=163840, backward=True),
    *(Operator(op="mla_decode", rows=N, width=192, heads=HEADS, positions=S) for N, S in ((32, 8192), (1, 131072))),
    *(
        Operator(op="grouped_mlp", rows=rows, width=WIDTH, experts=256, top_k=8, expert_width=1024, backward=backward)
        for rows, backward in ((TOKENS, True), (TOKENS, False), (16, False))
    ),
)
# Most important first: what no time is left for is the end of the last.
GROUPS: dict[str, tuple[Case, ...]] = {
    "forward": kda(MAIN),
    "training": kda(MAIN, backward=True),
    "short": both(*kda(SHORT)),
    "decode": DECODE,
    "layer": tuple(Layer(T=T) for T in (4096, 32768, 1024, 16384)),
    "packed": PACKED,
    "sizes": (*kda(MORE), *OTHER_SIZES, *kda(MAIN[:1], bounded=True), *kda(MAIN[2:], dtype="float32")),
    "operators": OPERATORS,
    "long-training": (*kda(MORE[:4], backward=True), *(replace(case, backward=True) for case in OTHER_SIZES[:2])),
}


def find(key: str) -> Case:
    """Return the case of a key, or of a label that only one section has."""
    cases = {case.key: case for group in GROUPS.values() for case in group}
    found = [case for case in cases.values() if key in (case.key, case.label)]
    if not found:
        raise KeyError(f"there is no case {key!r}; --dry-run shows all")
    return found[0]


def case_of(section: str, values: dict[str, Any]) -> Case:
    """Return the case that a record's values, or a request's, describe."""
    kinds: dict[str, type[Case]] = {kind.section: kind for kind in (Kda, Decode, Layer, Operator)}
    lengths = values.get("lengths")
    return kinds[section](**{**values, **({"lengths": tuple(lengths)} if lengths else {})})
