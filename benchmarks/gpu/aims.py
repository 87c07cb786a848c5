"""What the kernels are held to on a GPU, and what a record says was reached: one line an aim."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu.delta import FLA, OURS
from gpu.layers import KDA, KDA_CORE, MLA, MLA_PADDED

Record = dict[str, Any]
Row = dict[str, Any]
# Milliseconds of a forward; how many times as fast as the incumbent, fla, in the same run.
FORWARD_MS = {96: 1.15, 64: 0.90}
FORWARD_TIMES = {96: 2.0, 64: 2.0, 16: 2.4}
SHORT_TIMES, TRAINING_TIMES = 4.0, 1.8
DECODE_SHARE, DECODE_STATES = 0.8, (1000, 8192)
LAYER_LENGTHS = (4096, 32768)
NOTHING = "not measured"


@dataclass(frozen=True)
class Verdict:
    """One aim and what was reached: the aim, or this part of it."""

    what: str
    aim: str
    reached: str
    # 1 or more: reached. None: not measured, or nothing to reach.
    ratio: float | None = None
    measured: bool = False

    @property
    def met(self) -> bool:
        """Whether the aim was reached."""
        return self.ratio is not None and self.ratio >= 1

    @property
    def mark(self) -> str:
        """The verdict in a word and a percentage."""
        if self.ratio is None:
            return "measured" if self.measured else NOTHING
        return f"{'reached' if self.met else 'missed'}, {100 * self.ratio:.0f} %"


def rows(record: Record, section: str, engine: str, **case: Any) -> list[Row]:
    """Return an engine's rows with a time whose case has these values."""
    return [
        row
        for row in record["rows"]
        if row["section"] == section
        and row["engine"] == engine
        and "median" in row
        and all(row["case"].get(name) == value for name, value in case.items())
    ]


def dense(T: int, H: int, **others: Any) -> dict[str, Any]:
    """Return the values of one row of T tokens of H heads of the released size, in bfloat16, launched."""
    fixed = {"D": 128, "lengths": None, "dtype": "bfloat16", "bounded": False, "graph": False, "backward": False}
    return {"B": 1, "T": T, "H": H, **fixed, **others}


def milliseconds(record: Record, section: str, engine: str, **case: Any) -> float | None:
    """Return an engine's time on a case, or None."""
    found = rows(record, section, engine, **case)
    return found[0]["median"] if found else None


def faster(record: Record, what: str, limit: float, *cases: dict[str, Any]) -> Verdict:
    """Return the verdict on being so many times as fast as the incumbent on every one of some cases."""
    aim = f">= {limit:g}x the incumbent"
    pairs = [[milliseconds(record, "kda", engine, **case) for engine in (OURS, FLA)] for case in cases]
    found = [(theirs / ours, ours, theirs) for ours, theirs in pairs if ours and theirs]
    if not found:
        ours = [f"{ours:.3f} ms" for ours, _ in pairs if ours]
        return Verdict(what, aim, f"ours {', '.join(ours)}; the incumbent was not measured" if ours else NOTHING)
    ratio, ours, theirs = min(found)
    more = f", the least of {len(found)} shapes" if len(cases) > 1 else ""
    return Verdict(what, aim, f"{ratio:.2f}x ({ours:.3f} and {theirs:.3f} ms{more})", ratio / limit)


def kda_aims(record: Record) -> Iterator[Verdict]:
    """Yield the aims of forward, and of forward and backward."""
    for H, times in FORWARD_TIMES.items():
        what = f"forward, T=8192, H={H}"
        if limit := FORWARD_MS.get(H):
            ms = milliseconds(record, "kda", OURS, **dense(8192, H))
            text = NOTHING if ms is None else f"{ms:.3f} ms"
            yield Verdict(what, f"<= {limit:g} ms", text, None if ms is None else limit / ms)
        yield faster(record, what, times, dense(8192, H))
    short = [dense(T, H) for T in (128, 512, 1024) for H in (16, 64)]
    yield faster(record, "forward, T <= 1024, eager", SHORT_TIMES, *short)
    yield faster(record, "forward + backward, T=8192, H=96", TRAINING_TIMES, dense(8192, 96, backward=True))


def decode_aim(record: Record) -> Verdict:
    """Return the aim of decoding: the least share of bandwidth over the range."""
    low, high = DECODE_STATES
    what, aim = f"decode, {low:,} to {high:,} state-heads", f">= {100 * DECODE_SHARE:.0f} % of bandwidth"
    found = [
        (share, row["token_heads"])
        for row in rows(record, "decode", OURS, pool="float32", graph=False)
        if low <= row["token_heads"] <= high and (share := bandwidth(row, record)) is not None
    ]
    if not found:
        return Verdict(what, aim, NOTHING)
    share, states = min(found)
    best = max(found)[0]
    return Verdict(what, aim, f"{100 * share:.0f} % at {states:,} to {100 * best:.0f} %", share / DECODE_SHARE)


def layer_verdicts(record: Record) -> Iterator[Verdict]:
    """Yield how a KDA layer compares with latent attention, the faster form of each; there is nothing to reach."""
    for T in LAYER_LENGTHS:
        what, aim = f"KDA layer beside SDPA-based MLA, forward + backward, T={T}", "measured"
        ours, theirs = (
            min((ms for name in names if (ms := milliseconds(record, "layer", name, T=T))), default=None)
            for names in ((KDA, KDA_CORE), (MLA, MLA_PADDED))
        )
        if ours is None or theirs is None:
            yield Verdict(what, aim, NOTHING)
        else:
            yield Verdict(what, aim, f"{theirs / ours:.2f}x ({ours:.2f} and {theirs:.2f} ms)", measured=True)


def bandwidth(row: Row, record: Record) -> float | None:
    """Return which part of the copy bandwidth a row's fewest bytes over its time are."""
    ceiling = record["ceilings"].get("copy_gigabytes")
    return row["bytes"] / row["median"] / 1e6 / ceiling if ceiling and row.get("bytes") else None


def arithmetic(row: Row, record: Record) -> float | None:
    """Return which part of the bfloat16 products' rate a row's operations over its time are."""
    ceiling = record["ceilings"].get("gemm_bfloat16")
    return row["flop"] / row["median"] / 1e9 / ceiling if ceiling and row.get("flop") else None


def contract_verdict(record: Record) -> Verdict:
    """Return whether the contracts hold."""
    what, aim = "operators' contracts on this GPU", "all pass"
    outcomes = record["contracts"].values()
    passed, failed = (sum(outcome[kind] for outcome in outcomes) for kind in ("passed", "failed"))
    if not passed + failed:
        return Verdict(what, aim, "not run")
    unfinished = any(not outcome["passed"] + outcome["failed"] + outcome["skipped"] for outcome in outcomes)
    unfinished = unfinished or any(problem.startswith("contracts:") for problem in record["problems"])
    text = f"{passed} passed, {failed} failed{'; not all were run' if unfinished else ''}"
    ratio = passed / (passed + failed)
    return Verdict(what, aim, text, None if unfinished and not failed else ratio)


def verdicts(record: Record) -> list[Verdict]:
    """Return every aim with what a record says was reached."""
    return [contract_verdict(record), *kda_aims(record), decode_aim(record), *layer_verdicts(record)]
