"""The tables and the plot, made from the records in `results/`; nothing in RESULTS.md is typed by hand.

Make them again without measuring: python benchmarks/report.py
"""

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, TABLES = HERE / "results", HERE / "RESULTS.md"
NAMES = {"fla": "fla `naive_chunk_kda`", "attn-gym": 'attn-gym `chunk_kda(impl="reference")`'}
PEERS = tuple(NAMES)
DIRECTIONS = {False: "forward", True: "forward + backward"}
INTRODUCTION = """\
# Measurements

Made by `make bench`; do not edit. It measures only after the operator's tests are green and every peer agrees with ours
on outputs and gradients.

**How.** Kimi Delta Attention, `kimi_linear.ops.kda`, B = 1, H = 8, K = V = 128. Each implementation runs in a process
of its own, with the same inputs, threads and allocator settings (freed memory is kept: otherwise page faults at first
touch decide, in favour of whoever allocates less). They take turns, round after round. A turn counts with its median
wall-clock time of a call; the time is the median of the turns, the spread their quartiles. A token-head is one token of
one head. GFLOP/s counts the recurrence token by token: 7 K V a token-head forward, 20 K V more for the backward with
states recomputed, whatever an implementation really computes; "of GEMM" is that rate over the float32 matrix product
measured in the same run. An implementation whose call takes too long, or more than two thirds of the free memory, has
the reason in place of a number; nothing is extrapolated. With bfloat16 inputs q, k, v and beta are bfloat16 and the
decays float32.

**Memory** is what a call needs beyond its inputs and outputs (gradients are outputs), at its peak, in bytes per
token-head-channel (T H K of them), in a fresh process with the system's allocator as it comes. "Allocated" is exact and
repeatable: the largest sum of live bytes torch's allocator reports, inside custom operators and native code too.
"Resident" is what the process grew by: it includes what does not go through torch, and also fragmentation and freed
memory not yet handed back, so it is the check on the first and not the claim.
"""


def load_newest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the newest record of each machine, by machine."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name = record["machine"]["machine"]
        if name not in newest or newest[name]["date"] < record["date"]:
            newest[name] = record
    return [newest[name] for name in sorted(newest)]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def display(row: dict[str, Any]) -> str:
    """Return an implementation's name for people."""
    name = row["implementation"]
    version = f" {row['version']}" if row["version"] and name in NAMES else ""
    return NAMES[name].replace(" ", f"{version} ", 1) if name in NAMES else name.replace(":", " ")


def median_of(row: dict[str, Any]) -> float | None:
    """Return the microseconds per token-head, or None where there are none."""
    return row["us_per_token_head"]["median"] if "us_per_token_head" in row else None


def ratio(row: dict[str, Any], peers: list[dict[str, Any]]) -> list[str]:
    """Return how many times faster a row is than each peer on the same case; "-" for peers themselves."""
    own, cells = median_of(row), []
    for name in PEERS:
        other = next((median_of(peer) for peer in peers if peer["implementation"] == name), None)
        known = own is not None and other is not None and row["implementation"] not in PEERS
        cells.append(f"{other / own:.2f}x" if known and own and other else "-")
    return cells


def speed_cells(row: dict[str, Any], record: dict[str, Any], same_case: list[dict[str, Any]]) -> list[str]:
    """Return the cells of one row of a speed table."""
    name, T = display(row), str(row["case"]["T"])
    if row["reason"]:
        return [name, T, row["reason"], "", "", "", "", ""]
    us, gflops = row["us_per_token_head"], row["gflops"]
    gemm = 100 * gflops / record["ceilings"]["gemm_float32"]
    spread = f"{us['low']:.2f} to {us['high']:.2f}"
    return [name, T, f"{us['median']:.2f}", spread, f"{gflops:.1f}", f"{gemm:.1f} %", *ratio(row, same_case)]


def memory_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one row of a memory table."""
    memory, name, T = row["memory"], display(row), str(row["case"]["T"])
    if memory is None or "reason" in memory:
        return [name, T, (memory or row)["reason"], ""]
    resident = memory["resident_per_channel"]
    return [name, T, f"{memory['allocated_per_channel']:.1f}", "-" if resident is None else f"{resident:.1f}"]


def sections(record: dict[str, Any], plots: str) -> list[str]:
    """Return the Markdown of one machine; `plots` is the folder of its plot, seen from the document."""
    machine, rates = record["machine"], record["ceilings"]
    flags = ", ".join(machine["flags"]) or "none of note"
    parts = [
        f"## {machine['cpu']}, {machine['cores']} cores\n\n{record['date']}, commit {machine['commit']}, torch "
        f"{machine['torch']}, Python {machine['python']}, {machine['system']}, {machine['threads']} threads, "
        f"instruction sets {flags}; load average at the start {machine['load']:.1f}."
        + (" A quick run: T = 512 and few rounds." if record["quick"] else ""),
        f"![time per token-head]({plots}/{machine['machine']}.png)",
        "Ceilings, measured in the same run\n\n"
        + table(
            ["", "float32", "bfloat16"],
            [
                ["matrix product 2048³, GFLOP/s", f"{rates['gemm_float32']:.0f}", f"{rates['gemm_bfloat16']:.0f}"],
                [
                    "256 products 64x128x128, GFLOP/s",
                    f"{rates['batched_gemm_float32']:.0f}",
                    f"{rates['batched_gemm_bfloat16']:.0f}",
                ],
                ["copy, GB/s read and written", f"{rates['copy_gigabytes']:.0f}", ""],
            ],
        ),
    ]
    for dtype in ("float32", "bfloat16"):
        for backward, direction in DIRECTIONS.items():
            rows = [r for r in record["rows"] if r["case"]["dtype"] == dtype and r["case"]["backward"] == backward]
            if rows:
                parts.append(f"### {direction.capitalize()}, {dtype} inputs")
                parts += tables_of(rows, record)
    return parts


def tables_of(rows: list[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    """Return the speed and the memory table of one direction and dtype."""
    rows = sorted(rows, key=lambda row: row["case"]["T"])
    same = {row["case"]["T"]: [r for r in rows if r["case"]["T"] == row["case"]["T"]] for row in rows}
    header = ["implementation", "T", "µs per token-head", "quartiles", "GFLOP/s", "of GEMM"]
    speed = [speed_cells(row, record, same[row["case"]["T"]]) for row in rows]
    memory = [memory_cells(row) for row in rows]
    return [
        table([*header, "faster than fla", "faster than attn-gym"], speed),
        "Extra memory at the peak, bytes per token-head-channel\n\n"
        + table(["implementation", "T", "allocated", "resident"], memory),
    ]


def render(records: list[dict[str, Any]], plots: str) -> str:
    """Return the whole of RESULTS.md."""
    return (
        "\n\n".join([INTRODUCTION.rstrip(), *(part for record in records for part in sections(record, plots))]) + "\n"
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw time per token-head against T, forward and forward + backward, float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (backward, direction) in zip(axes, DIRECTIONS.items(), strict=True):
        rows = [r for r in record["rows"] if r["case"]["backward"] == backward and r["case"]["dtype"] == "float32"]
        for number, name in enumerate(dict.fromkeys(r["implementation"] for r in rows)):
            own = [r for r in rows if r["implementation"] == name and median_of(r) is not None]
            if not own:
                continue
            us = [r["us_per_token_head"] for r in own]
            middle = [u["median"] for u in us]
            errors = [[u["median"] - u["low"] for u in us], [u["high"] - u["median"] for u in us]]
            style = "--" if name in PEERS else "-"
            tokens = [r["case"]["T"] for r in own]
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "capsize": 3}
            axis.errorbar(tokens, middle, errors, label=name.replace(":", " "), **look)
        axis.set(title=f"{direction}, float32", xlabel="tokens T", xscale="log", yscale="log")
        ticks = sorted({r["case"]["T"] for r in rows})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("µs per token-head")
    axes[0].legend()
    machine = record["machine"]
    figure.suptitle(f"Kimi Delta Attention, H = 8, K = V = 128, {machine['cpu']}, {machine['threads']} threads")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(folder: Path = RESULTS, target: Path = TABLES) -> None:
    """Write the plots and the tables of the newest record of every machine."""
    records = load_newest(folder)
    for record in records:
        plot(record, folder / f"{record['machine']['machine']}.png")
    target.write_text(render(records, os.path.relpath(folder, target.parent)), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"wrote {TABLES.relative_to(HERE.parent)}")
