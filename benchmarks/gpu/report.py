"""The page of the GPU: aims and what was reached, then every table, from the newest record of each GPU.

python benchmarks/gpu/report.py      writes benchmarks/GPU.md and the plots again, from the records alone
"""

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # Run as a file, it stands beside the modules of its own package.
    sys.path[0] = str(HERE.parent)

from gpu import aims, plots, record  # noqa: E402
from gpu.shapes import case_of  # noqa: E402
from report import number, table  # noqa: E402

RESULTS = HERE.parent / "results" / "gpu"
PAGE = HERE.parent / "GPU.md"
Record = dict[str, Any]
Row = dict[str, Any]

INTRODUCTION = """# Measurements on a GPU

Made by `make gpu-check`; do not edit.

**How.** Cases run in a process apart; one that loses the GPU is replaced, its case has the reason and the next goes on.
A result that differs from the plain backend's (of the delta rule: in float64) is not timed. Calls are timed between
events, the L2 flushed before each, inputs rotated; contenders take turns, and the figure is the median of the turns'
medians. The fewest bytes of the operator (each input read once, each output written once; a backward reads a state
every 64 tokens) over the time, against the copy measured in the same run, is its part of the bandwidth; its operations,
against bfloat16 products, its part of the arithmetic. Host: the processor's time to launch a call. The incumbent is
flash-linear-attention's Triton, in the same run."""
EMPTY = "\n\nNo GPU has run this yet, so there is no figure: run `make gpu-check` on one.\n"
CEILINGS = (
    ("copy_gigabytes", "copy, read plus written", "GB/s"),
    ("read_gigabytes", "read", "GB/s"),
    ("gemm_bfloat16", "matrix product 8192³, bfloat16", "TFLOP/s"),
    ("gemm_tf32", "matrix product 8192³, tf32", "TFLOP/s"),
)
SECTIONS = {
    "kda": ("Kimi Delta Attention over many tokens", "`kda_core`, B x T x H, head size 128 unless it says otherwise."),
    "decode": ("One token a sequence", "`kda_core_decode`, sequences x heads; a token-head is a state-head here."),
    "layer": (
        "One layer, forward and backward",
        "Width 2304, 32 heads of 128, one sequence. KDA: with the kernels of every operator that has some; core: of "
        "the delta rule alone. MLA SDPA: as the library runs it; padded: values as wide as keys, which opens SDPA's "
        "flash kernels.",
    ),
    "operators": ("The other operators", "rows x width."),
}


def percent(part: float | None) -> str:
    """Return a part as a percentage."""
    return "" if part is None else f"{100 * part:.{0 if part > 0.03 else 1}f} %"


def incumbent(row: Row, found: Record) -> str:
    """Return how many times as fast as fla a row is."""
    theirs = [r for r in aims.rows(found, row["section"], aims.FLA) if r["case"] == row["case"]]
    return f"{theirs[0]['median'] / row['median']:.2f}x" if theirs and row["engine"] != aims.FLA else ""


def cells(row: Row, found: Record) -> list[str]:
    """Return a row's cells."""
    name = f"{row['engine']} {row.get('version', '')}".strip()
    label = case_of(row["section"], row["case"]).label
    if "median" not in row:
        return [label, name, (row.get("reason") or "not measured").replace("|", "/"), *[""] * 7]
    heads = row.get("token_heads")
    return [
        label,
        name,
        f"{row['median']:.3f}" if row["median"] < 100 else number(row["median"]),
        f"{row['low']:.3f} to {row['high']:.3f}",
        "" if not heads else f"{1e6 * row['median'] / heads:.2f}",
        percent(aims.bandwidth(row, found)),
        percent(aims.arithmetic(row, found)),
        "" if "host_us" not in row else number(row["host_us"]),
        "" if "peak_bytes" not in row else number(row["peak_bytes"] / 2**20),
        incumbent(row, found),
    ]


def section(found: Record, name: str) -> list[str]:
    """Return a section's table."""
    rows = [row for row in found["rows"] if row["section"] == name]
    if not rows:
        return []
    title, text = SECTIONS[name]
    header = ["case", "engine", "ms", "quartiles", "ns per token-head", "of bandwidth", "of arithmetic"]
    header += ["host, µs", "peak, MiB", "beside fla"]
    return [f"### {title}", text, table(header, [cells(row, found) for row in rows], left=2)]


def contracts(found: Record) -> list[str]:
    """Return the table of suites, and the first failures of each."""
    if not found["contracts"]:
        return []
    rows = [
        [name, *(str(outcome[kind]) for kind in ("passed", "failed", "skipped"))]
        for name, outcome in found["contracts"].items()
    ]
    parts = ["### Contracts", table(["suite", "passed", "failed", "skipped"], rows)]
    failures = [f"- {failure}" for outcome in found["contracts"].values() for failure in outcome["failures"]]
    return parts + (["What failed first:", "\n".join(failures[:40])] if failures else [])


def head(found: Record) -> str:
    """Return what identifies a run."""
    machine = found["machine"]
    clocks = ", ".join(f"{name} {value}" for name, value in machine.get("clocks", {}).items())
    loaded = found["ceilings"].get("clocks", {})
    busy = f" After the matrix products: {', '.join(f'{n} {v}' for n, v in loaded.items())}." if loaded else ""
    rehearsal = "**A rehearsal on a CPU with tiny shapes: none of these figures says anything.** "
    return (
        f"{rehearsal if found['rehearsal'] else ''}{found['date']}, commit {machine['commit']}, "
        f"{machine.get('multiprocessors', '?')} multiprocessors, driver {machine.get('driver') or '?'}, torch "
        f"{machine['torch']}, Triton {machine['triton']}, assembler {machine['ptxas']}, fla {machine['fla']}, Python "
        f"{machine['python']}; {found['seconds']:.0f} s. {clocks}.{busy}"
    )


def part(found: Record, folder: str) -> list[str]:
    """Return everything about one GPU."""
    verdicts = [[v.what, v.aim, v.reached, v.mark] for v in aims.verdicts(found)]
    known = found["ceilings"]
    ceilings = [[text, f"{known[name]:,.0f} {unit}"] for name, text, unit in CEILINGS if name in known]
    parts = [
        f"## {found['machine']['gpu']}",
        head(found),
        table(["what", "aim", "reached", "verdict"], verdicts, left=4),
    ]
    for name, text in plots.PICTURES.items():
        if plots.shows(found, name):
            parts.append(f"![{text[0]}]({folder}/{plots.file_name(found, name)})")
    if ceilings:
        parts += ["### Ceilings, measured in the same run", table(["what the machine can do", ""], ceilings)]
    for name in SECTIONS:
        parts += section(found, name)
    parts += contracts(found)
    if found["problems"]:
        parts += ["### Problems", "\n".join(f"- {problem}" for problem in found["problems"])]
    if found["unmeasured"]:
        parts += ["### Not measured, for lack of time", ", ".join(found["unmeasured"]) + "."]
    return parts


def render(records: list[Record], folder: str) -> str:
    """Return the whole page."""
    if not records:
        return INTRODUCTION + EMPTY
    return "\n\n".join([INTRODUCTION, *(text for found in records for text in part(found, folder))]) + "\n"


def write(folder: Path = RESULTS, target: Path = PAGE) -> None:
    """Write the plots and the page of the newest record of every GPU."""
    records = record.load_newest(folder)
    for found in records:
        plots.write(found, folder)
    target.write_text(render(records, os.path.relpath(folder, target.parent)), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"wrote {PAGE.relative_to(HERE.parents[1])}")
