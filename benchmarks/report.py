"""The page: aims and what was reached, then every section, from the newest record of each machine.

python benchmarks/report.py      writes benchmarks/RESULTS.md and the plots again, from the records alone
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aims
import plots
from kimi_linear.recipes.bench.record import SCHEMA, fraction

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE / "RESULTS.md"

Record = dict[str, Any]
Row = Mapping[str, Any]

INTRODUCTION = """# Measurements

Made by `make bench`; do not edit. It measures only after the operators' tests are green and every peer agrees with us:
on outputs and gradients of the operator, and on the logits of the whole model.

**How.** Every engine runs in a process of its own, with the same inputs and the same number of threads. They take
turns, round after round; a turn counts with its median, a figure is the median of the turns. A first turn is not
counted, unless it alone used up the engine's time: then it is the figure. An engine that takes too long, or more than
two thirds of the free memory, has the reason in place of a number; nothing is extrapolated. What the machine can do is
measured before and after, in the same run, and the better reading is the ceiling; the speed of memory is measured
between the turns of every row that depends on it."""
EMPTY = "\n\nThere is no record yet: run `make bench`.\n"
CEILINGS = (
    ("fma_float32_core", "float32 multiply-adds in registers, one core", "GFLOP/s"),
    ("fma_float32", "the same, all threads", "GFLOP/s"),
    ("dot_bfloat16_core", "bfloat16 dot products in registers, one core", "GFLOP/s"),
    ("dot_bfloat16", "the same, all threads", "GFLOP/s"),
    ("dot_int8_core", "8-bit dot products in registers, one core", "Gop/s"),
    ("dot_int8", "the same, all threads", "Gop/s"),
    ("gemm_float32", "matrix product 2048³ through torch, float32", "GFLOP/s"),
    ("packed_gemm_float32", "the same, weight packed by oneDNN", "GFLOP/s"),
    ("gemm_bfloat16", "matrix product 2048³ through torch, bfloat16", "GFLOP/s"),
    ("packed_gemm_bfloat16", "the same, weight packed by oneDNN", "GFLOP/s"),
    ("packed_row_bfloat16", "one-row product, packed bfloat16 weight", "GB/s"),
    ("copy_gigabytes", "copy, read plus written", "GB/s"),
    ("read_gigabytes", "read", "GB/s"),
)


def load_newest(folder: Path = RESULTS) -> list[Record]:
    """Return the newest record of each machine, by name of the machine."""
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name = record["machine"]["machine"]
        if record.get("schema") == SCHEMA and (name not in newest or record["date"] > newest[name]["date"]):
            newest[name] = record
    return [newest[name] for name in sorted(newest)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; columns from `left` on are flush right."""
    marks = [" --- " if number < left else " ---: " for number in range(len(header))]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(marks)}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def number(value: float) -> str:
    """Return three digits, or whole thousands with a comma."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figures(row: Row, record: Record) -> list[str]:
    """Return a row's median, quartiles and part of the ceiling; or its reason."""
    if "median" not in row:
        return [row.get("reason", "") or "not measured", "", ""]
    part = fraction(row, record["ceilings"])
    of = "" if part is None else f"{100 * part:.{0 if part > 0.03 else 1}f} % of {row['ceiling'].replace('_', ' ')}"
    spread = "" if row["turns"] == 1 else f"{number(row['low'])} to {number(row['high'])}"
    return [number(row["median"]), spread, of]


def named(row: Row) -> str:
    """Return an engine with its version."""
    return f"{row['engine'].replace('kimi-linear:', 'kimi-linear ')} {row.get('version', '')}".strip()


def section(record: Record, name: str) -> list[Row]:
    """Return the rows of a section."""
    return [row for row in record["rows"] if row["section"] == name]


def aims_table(record: Record) -> str:
    """Return the table of aims."""
    rows = [[v.what, v.aim, v.reached, v.mark] for v in aims.verdicts(record)]
    return table(["what", "aim", "reached", "reached / aim"], rows, left=3)


def ceilings_table(record: Record) -> str:
    """Return the table of ceilings."""
    known = record["ceilings"]
    rows = [[text, f"{known[name]:.0f} {unit}"] for name, text, unit in CEILINGS if name in known]
    return table(["what the machine can do", ""], rows)


def agreement_table(record: Record) -> list[str]:
    """Return how well the peers agree with us."""
    found, rows = record.get("agreement", {}), []
    for peer, errors in found.get("operators", {}).items():
        rows.append([peer, "operator", f"{max(errors.values()):.1e}", "outputs and gradients, the largest"])
    for engine, figure in found.get("logits", {}).items():
        if "reason" in figure:
            rows.append([engine, "logits", "-", figure["reason"]])
        else:
            same = f"{100 * figure['same_first_choice']:.0f} % of {figure['positions']:.0f} first choices the same"
            rows.append([engine, "logits", f"{figure['relative_error']:.1e}", same])
    if not rows:
        return []
    return ["### Agreement, float32", table(["peer", "of", "relative RMS error", ""], rows, left=2)]


def operators_part(record: Record) -> list[str]:
    """Return the tables of the operator."""
    rows = section(record, "operators")
    if not rows:
        return []
    # The comparison is at the shapes the peers ran; the rest is the sweep.
    compared = {json.dumps(row["case"]) for row in rows if not row["engine"].startswith("kimi-linear")}
    parts = [
        "### Kimi Delta Attention beside other implementations",
        "`kimi_linear.ops.kda`, B = 1, H = 8, K = V = 128; microseconds per token-head per core. A token-head is one "
        "token of one head. Ceilings count the recurrence token by token: 7 K V operations a token-head forward, 20 "
        "K V more for the backward with states recomputed, whatever an implementation really computes.",
    ]
    for beside in (True, False):
        own = [row for row in rows if (json.dumps(row["case"]) in compared) == beside]
        if not own:
            continue
        if not beside:
            parts.append("### Kimi Delta Attention over shapes")
        header = ["direction", "dtype", "B", "T", "H", "implementation", "µs", "quartiles", "of the ceiling"]
        cells = []
        for row in own:
            case = row["case"]
            direction = "forward + backward" if case["backward"] else "forward"
            sizes = [str(case[letter]) for letter in "BTH"]
            cells.append([direction, case["dtype"], *sizes, named(row), *figures(row, record)])
        parts.append(table(header, cells, left=6))
    return [*parts, *memory_per_channel(rows)]


def memory_per_channel(rows: Sequence[Row]) -> list[str]:
    """Return the table of what a call of the operator needs beyond its inputs and outputs."""
    cells = []
    for row in rows:
        memory = row.get("memory")
        if memory is None:
            continue
        direction = "forward + backward" if row["case"]["backward"] else "forward"
        values = [memory.get(f"{kind}_per_channel") for kind in ("allocated", "resident")]
        texts = [memory["reason"], ""] if "reason" in memory else ["-" if v is None else f"{v:.1f}" for v in values]
        cells.append([direction, str(row["case"]["T"]), named(row), *texts])
    if not cells:
        return []
    return [
        "Extra memory at the peak beyond inputs and outputs (gradients are outputs), bytes per token-head-channel, "
        "float32, in a fresh process. Allocated: the largest sum of live bytes torch's allocator reports. "
        "Resident: what the process grew by, which also sees what does not go through torch.",
        table(["direction", "T", "implementation", "allocated", "resident"], cells, left=3),
    ]


def plain_part(record: Record, name: str, title: str, text: str, unit: str) -> list[str]:
    """Return the table of a section whose cases are plain values."""
    rows = section(record, name)
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row["case"]))
    extra = ["cache_bytes"] if any("cache_bytes" in row for row in rows) else []
    header = [*keys, "engine", unit, "quartiles", "of the ceiling", *(["cache, MiB"] if extra else [])]
    cells = []
    for row in rows:
        case = [str(row["case"].get(key, "")) for key in keys]
        more = [number(row["cache_bytes"] / 2**20)] if extra else []
        cells.append([*case, named(row), *figures(row, record), *more])
    return [f"### {title}", text, table(header, cells, left=len(keys) + 1)]


def model_part(record: Record) -> list[str]:
    """Return the tables of the whole model."""
    size = f"{record.get('parameters', 0) / 1e6:.0f} million parameters"
    about = (
        f"The preset `{record['model']}`: {size}, 6 layers of Kimi Delta Attention and 2 of latent attention, 16 "
        "experts of which 4 and a shared one are used, random weights. One checkpoint is read by all: transformers "
        "loads it as it is, llama.cpp as GGUF files of the same weights (8 bits: q8_0, 4 bits: q4_0). llama.cpp is "
        "built for this processor; xllamacpp is llama.cpp as its portable wheel ships it, without AVX-512."
    )
    prefill = "A prompt into an empty cache, until the logits of its last token."
    decode = "Greedy tokens behind a prompt. The ceiling is reading the active weights and the states once a token."
    training = (
        "Loss and gradients of all weights, held in float32; bfloat16 is autocast. transformers was given fewer "
        "tokens, as its rows say."
    )
    layer = "One layer of the model as a plain module, forward, a text read in pieces through its state."
    return [
        *plain_part(record, "prefill", "The whole model: prefill", f"{about}\n\n{prefill}", "tokens/s"),
        *plain_part(record, "decode", "The whole model: decode", decode, "tokens/s"),
        *plain_part(record, "training", "The whole model: training", training, "tokens/s"),
        *plain_part(record, "layer", "One Kimi Delta Attention layer over ever longer texts", layer, "µs per token"),
    ]


def picture(record: Record, name: str, text: str, folder: str) -> list[str]:
    """Return a link to a picture if it was drawn for this record."""
    return [f"![{text}]({folder}/{plots.file_name(record, name)})"] if plots.shows(record, name) else []


def record_part(record: Record, folder: str) -> list[str]:
    """Return everything about one machine."""
    machine = record["machine"]
    flags = ", ".join(machine["flags"]) or "none of note"
    quick = " A quick run: small cases and few rounds." if record["quick"] else ""
    head = (
        f"{record['date']}, commit {machine['commit']}, {machine['threads']} threads, torch {machine['torch']}, Python "
        f"{machine['python']}, {machine['system']}, native kernels {machine['native']}, instruction sets {flags}; load "
        f"average at the start {machine['load']:.1f}.{quick}"
    )
    decode_update = (
        "One token for each of N sequences, in place; the states together are larger than any cache, so each is read "
        "from memory and written back."
    )
    context = (
        "One sequence, one token, behind caches filled with random numbers: the hybrid, and models of the same shape "
        "whose layers are all latent attention (MLA) or all grouped-query attention. Weights and caches are bfloat16."
    )
    memory = (
        "What a process grows by at its peak during forward and backward of one sequence, gradients included (as many "
        "bytes as the weights), weights not. Recompute: blocks run again in the backward pass instead of keeping what "
        "they computed."
    )
    parts = [
        f"## {machine['cpu']}, {machine['cores']} cores",
        head,
        aims_table(record),
        *picture(record, "aims", "aims and what was reached", folder),
        "### Ceilings, measured in the same run",
        ceilings_table(record),
        *agreement_table(record),
    ]
    if (operators := operators_part(record)) != []:
        parts += [*operators[:1], *picture(record, "operators", "time per token-head", folder), *operators[1:]]
    parts += plain_part(record, "decode update", "A decode step of the operator", decode_update, "GB/s")
    if (model := model_part(record)) != []:
        parts += [*picture(record, "model", "tokens a second", folder), *model]
        parts += picture(record, "layer", "cost of a token against the length", folder)
    if long := plain_part(record, "context", "Decoding behind a long context", context, "ms per token"):
        parts += [*long, *picture(record, "context", "cost of a token and cache against the context", folder)]
    return [*parts, *plain_part(record, "memory", "Memory of a training step", memory, "GiB")]


def render(records: Sequence[Record], folder: str) -> str:
    """Return the whole page."""
    if not records:
        return INTRODUCTION + EMPTY
    return "\n\n".join([INTRODUCTION, *(part for record in records for part in record_part(record, folder))]) + "\n"


def write(folder: Path = RESULTS, target: Path = PAGE) -> None:
    """Write the plots and the page of the newest record of every machine."""
    records = load_newest(folder)
    for record in records:
        plots.write(record, folder)
    target.write_text(render(records, os.path.relpath(folder, target.parent)), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"wrote {PAGE.relative_to(HERE.parent)}")
