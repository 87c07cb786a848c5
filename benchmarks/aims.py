"""What we hold ourselves to, and what a record says was reached: one line an aim.

A ratio of 1 or more means reached: what was reached over the aim where more is better, the aim over it where less is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_linear.recipes.bench.record import fraction

Record = Mapping[str, Any]
Row = Mapping[str, Any]
LLAMA = ("llama.cpp", "xllamacpp")
MILLION = 1048576


@dataclass(frozen=True)
class Verdict:
    """One aim and what was reached."""

    what: str
    aim: str
    reached: str
    ratio: float | None
    # The ratio is at least this, where the other side could not be measured.
    bound: bool = False

    @property
    def met(self) -> bool:
        """Whether the aim was reached."""
        return self.ratio is not None and self.ratio >= 1

    @property
    def mark(self) -> str:
        """The ratio in words."""
        if self.ratio is None:
            return "-"
        if self.bound:
            return f"at least {self.ratio:.2f}{', reached' if self.met else ''}"
        return f"{self.ratio:.2f} {'reached' if self.met else 'missed'}"


def find(record: Record, section: str, engine: str | tuple[str, ...] = "", **case: Any) -> list[Row]:
    """Return the rows of a section with a figure whose engine begins with a name and whose case has these values."""
    return [
        row
        for row in record["rows"]
        if row["section"] == section
        and "median" in row
        and row["engine"].startswith(engine)
        and all(row["case"].get(name) == value for name, value in case.items())
    ]


def least(rows: list[Row]) -> float | None:
    """Return the smallest median, or None without rows."""
    return min((row["median"] for row in rows), default=None)


def most(rows: list[Row]) -> float | None:
    """Return the largest median, or None without rows."""
    return max((row["median"] for row in rows), default=None)


def share(rows: list[Row], record: Record) -> float | None:
    """Return the largest part of its ceiling that a row reached."""
    parts = [part for row in rows if (part := fraction(row, record["ceilings"])) is not None]
    return max(parts, default=None)


def at_most(what: str, limit: float, unit: str, reached: float | None) -> Verdict:
    """Return the verdict where less is better."""
    text = "not measured" if reached is None else f"{reached:.2f} {unit}"
    return Verdict(what, f"<= {limit:g} {unit}", text, None if reached is None else limit / reached)


def percent(what: str, limit: float, of: str, reached: float | None) -> Verdict:
    """Return the verdict on a part of a ceiling."""
    text = "not measured" if reached is None else f"{100 * reached:.0f} %"
    return Verdict(what, f">= {100 * limit:g} % of {of}", text, None if reached is None else reached / limit)


def times(what: str, limit: float, peer: str, ours: float | None, theirs: float | None, unit: str) -> Verdict:
    """Return the verdict on a rate of ours over a peer's."""
    aim = f">= {limit:g}x {peer}"
    if not ours or not theirs:
        missing = "ours was" if not ours else f"{peer} was"
        return Verdict(what, aim, f"{missing} not measured", None)
    return Verdict(what, aim, f"{ours / theirs:.2f}x ({ours:,.0f} and {theirs:,.0f} {unit})", ours / theirs / limit)


def operator_aims(record: Record) -> Iterator[Verdict]:
    """Yield the aims of the operator alone."""
    limits = {("float32", False): 0.75, ("float32", True): 3.3, ("bfloat16", False): 0.6, ("bfloat16", True): 2.6}
    for (dtype, backward), limit in limits.items():
        rows = find(record, "operators", "kimi-linear:", dtype=dtype, backward=backward, B=1, T=4096, H=8, K=128)
        direction = "forward + backward" if backward else "forward"
        yield at_most(f"KDA {direction}, {dtype} inputs, T=4096, H=8, K=V=128", limit, "us", least(rows))
    cold = find(record, "decode update", operator="kda_core_decode", N=16)
    yield percent("decode update, cold states", 0.8, "copy bandwidth", share(cold, record))


def model_aims(record: Record) -> Iterator[Verdict]:
    """Yield the aims of the whole model."""
    for weights, limit in (("bfloat16", 4.0), ("float32", 3.0)):
        case = {"weights": weights, "tokens": 4096}
        ours, theirs = (most(find(record, "prefill", name, **case)) for name in ("kimi-linear", LLAMA))
        yield times(f"297M model, prefill 4096, {weights}", limit, f"llama.cpp {weights}", ours, theirs, "tokens/s")
    for weights, limit, name in (("bfloat16", 1.75, "bf16"), ("int8", 1.25, "q8_0"), ("int4", 1.0, "q4_0")):
        ours, theirs = (most(find(record, "decode", name, weights=weights)) for name in ("kimi-linear", LLAMA))
        yield times(f"297M model, decode, {weights}", limit, f"llama.cpp {name}", ours, theirs, "tokens/s")
    what = "297M model, training forward + backward, batch x 1024 tokens"
    training = find(record, "training", "kimi-linear", arithmetic="bfloat16", tokens=1024)
    yield times(what, 50.0, "transformers", most(training), most(find(record, "training", "transformers")), "tokens/s")
    yield percent(what, 0.3, "the bf16 ceiling", share(training, record))


def length_aims(record: Record) -> Iterator[Verdict]:
    """Yield the aims about length and memory."""
    what, aim = "KDA layer prefill, cost of a token, 1k to 256k", "flat within 10 %"
    spans = [spans_of(find(record, "layer", weights=weights)) for weights in ("bfloat16", "float32")]
    known = [span for span in spans if span is not None]
    if known:
        yield Verdict(what, aim, f"within {100 * max(known):.0f} %", 1.1 / (1 + max(known)))
    else:
        yield Verdict(what, aim, "not measured", None)
    hybrid, full = (least(find_exact(record, record["model"] + end, MILLION)) for end in ("", "-mla"))
    what, aim = "hybrid decode at 1M context", ">= 3x full MLA of the same shape"
    if hybrid and full:
        yield Verdict(what, aim, f"{full / hybrid:.2f}x ({hybrid:.1f} and {full:.1f} ms)", full / hybrid / 3)
    else:
        yield Verdict(what, aim, "not measured", None)
    yield memory_aim(record)


def spans_of(rows: list[Row]) -> float | None:
    """Return by how much the dearest length exceeds the cheapest, if 1k and 256k are among them."""
    costs = {row["case"]["tokens"]: row["median"] for row in rows}
    if not {1024, 262144} <= costs.keys():
        return None
    return max(costs.values()) / min(costs.values()) - 1


def find_exact(record: Record, engine: str, context: int) -> list[Row]:
    """Return the rows of exactly this network behind a context."""
    return [row for row in find(record, "context", engine, context=context) if row["engine"] == engine]


def memory_aim(record: Record) -> Verdict:
    """Return the verdict on the peak memory of a training step."""
    what, aim = "peak memory of a training step, T=8192", "<= 1/20 of transformers'"
    kept, recomputed = (
        least(find(record, "memory", "kimi-linear", tokens=8192, arithmetic="fp32", recompute=recompute))
        for recompute in (False, True)
    )
    theirs = most(find(record, "memory", "transformers", tokens=8192))
    if kept is None or recomputed is None:
        return Verdict(what, aim, "not measured", None)
    ours = f"{kept:.2f} GiB, {recomputed:.2f} with recomputed blocks"
    if theirs is not None:
        return Verdict(what, aim, f"1/{theirs / recomputed:.1f} ({ours}; {theirs:.2f} GiB)", theirs / recomputed / 20)
    bounds = [r["more_than_gib"] for r in record["rows"] if r["section"] == "memory" and "more_than_gib" in r]
    if not bounds:
        return Verdict(what, aim, f"{ours}; transformers was not measured", None)
    text = f"{ours}; transformers did not fit into {max(bounds):.1f} GiB"
    return Verdict(what, aim, text, max(bounds) / recomputed / 20, bound=True)


PARTS: tuple[Callable[[Record], Iterator[Verdict]], ...] = (operator_aims, model_aims, length_aims)


def verdicts(record: Record) -> list[Verdict]:
    """Return every aim with what a record says was reached."""
    return [verdict for part in PARTS for verdict in part(record)]
