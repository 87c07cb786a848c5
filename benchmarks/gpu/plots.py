"""The pictures of the GPU's page; one without anything to show is not drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import aims
from gpu.delta import FLA, KEPT, OURS, PLAIN
from gpu.layers import KDA, KDA_CORE, KDA_PLAIN, MLA, MLA_PADDED
from gpu.shapes import case_of
from plots import COLOURS, GREY, MISSED, REACHED, curve, length_axis, log_axis, subplots

Record = dict[str, Any]
LOOKS = {
    OURS: COLOURS["kimi-linear"],
    FLA: COLOURS["llama.cpp"],
    PLAIN: GREY,
    KEPT: COLOURS["transformers"],
    KDA: COLOURS["kimi-linear"],
    KDA_CORE: COLOURS["transformers"],
    KDA_PLAIN: GREY,
    MLA: COLOURS["llama.cpp"],
    MLA_PADDED: COLOURS["fla"],
}


def timed(record: Record, section: str) -> list[dict[str, Any]]:
    """Return a section's rows with a time."""
    return [row for row in record["rows"] if row["section"] == section and "median" in row]


def is_short(row: dict[str, Any]) -> bool:
    """Whether a row is a forward of one short prompt, whose time is mostly not the kernels'."""
    case = row["case"]
    return case["T"] <= 1024 and case["B"] == 1 and not case["backward"]


def draw_aims(record: Record) -> Any:
    """Draw how far each aim was reached; 100 % is the aim."""
    found = [verdict for verdict in aims.verdicts(record) if verdict.ratio is not None]
    figure, (axis,) = subplots(1, 9, 0.42 * len(found) + 1.0)
    ratios = [100 * (verdict.ratio or 0.0) for verdict in found]
    names = [f"{verdict.what}\n{verdict.aim}" for verdict in found]
    axis.barh(names, ratios, color=[REACHED if v.met else MISSED for v in found], height=0.6)
    for place, (ratio, verdict) in enumerate(zip(ratios, found, strict=True)):
        # Beside the bar, and clear of the line.
        axis.text(max(ratio, 100.0) + 1, place, verdict.reached, va="center", fontsize=7)
    axis.axvline(100, color="#1d2733", linewidth=1)
    axis.set_xlim(0, 1.6 * max([100.0, *ratios]))
    axis.tick_params(axis="y", labelsize=7.5)
    axis.invert_yaxis()
    axis.set_xlabel("% of the aim")
    return figure


def draw_kda(record: Record) -> Any:
    """Draw nanoseconds a token-head of every launched case, forward, and forward and backward."""
    rows = [row for row in timed(record, "kda") if not row["case"]["graph"] and not is_short(row)]
    figure, axes = subplots(2, 13, 7)
    for axis, backward in zip(axes, (False, True), strict=True):
        own = [row for row in rows if row["case"]["backward"] == backward and row["engine"] != PLAIN]
        labels = list(dict.fromkeys(case_of("kda", row["case"]).label.split(" ", 1)[1] for row in own))
        engines = [name for name in (OURS, KEPT, FLA) if any(row["engine"] == name for row in own)]
        height = 0.8 / max(1, len(engines))
        for number, engine in enumerate(engines):
            found = {
                case_of("kda", row["case"]).label.split(" ", 1)[1]: 1e6 * row["median"] / row["token_heads"]
                for row in own
                if row["engine"] == engine
            }
            places = [labels.index(label) + (number - (len(engines) - 1) / 2) * height for label in found]
            bars = axis.barh(places, list(found.values()), height=0.9 * height, color=LOOKS[engine], label=engine)
            axis.bar_label(bars, [f" {value:.2f}" for value in found.values()], fontsize=7)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("ns per token-head (less is better)")
        axis.set_title("forward + backward" if backward else "forward", fontsize=10)
        axis.margins(x=0.12)
        if engines:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Kimi Delta Attention, B x T x H, {record['machine']['gpu']}", fontsize=11)
    return figure


def draw_short(record: Record) -> Any:
    """Draw milliseconds of short prompts, launched and from a graph."""
    rows = [row for row in timed(record, "kda") if is_short(row) and row["engine"] != PLAIN]
    heads = sorted({row["case"]["H"] for row in rows})
    figure, axes = subplots(len(heads), 5.5 * len(heads), 4)
    for axis, H in zip(axes, heads, strict=True):
        own = [row for row in rows if row["case"]["H"] == H]
        for engine in (OURS, FLA):
            for graph, style in ((False, "-"), (True, "--")):
                chosen = [row for row in own if row["engine"] == engine and row["case"]["graph"] == graph]
                points = {row["case"]["T"]: row["median"] for row in sorted(chosen, key=lambda r: r["case"]["T"])}
                if points:
                    label = f"{engine}{', CUDA graph' if graph else ''}"
                    curve(axis, points, label=label, color=LOOKS[engine], linestyle=style)
        length_axis(axis, sorted({row["case"]["T"] for row in own}), "tokens T")
        log_axis(axis, "y")
        axis.set_ylabel("ms a call")
        axis.set_title(f"forward of short prompts, H = {H}", fontsize=10)
    names = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_decode(record: Record) -> Any:
    """Draw the part of the copy bandwidth a decoded token reaches, against the number of states."""
    figure, (axis,) = subplots(1, 8, 4.2)
    low, high = aims.DECODE_STATES
    axis.axvspan(low, high, color=GREY, alpha=0.15, label="where the aim holds")
    axis.axhline(100 * aims.DECODE_SHARE, color="#1d2733", linewidth=0.8, linestyle=":")
    rows = [row for row in timed(record, "decode") if not row["case"]["graph"]]
    for pool, style in (("float32", "-"), ("bfloat16", "--")):
        for engine in (OURS, FLA, PLAIN):
            best: dict[int, float] = {}
            for row in sorted(rows, key=lambda r: r["token_heads"]):
                share = aims.bandwidth(row, record)
                if row["engine"] == engine and row["case"]["pool"] == pool and share is not None:
                    best[row["token_heads"]] = max(100 * share, best.get(row["token_heads"], 0.0))
            if best:
                curve(axis, best, label=f"{engine}, {pool} states", color=LOOKS[engine], linestyle=style)
    length_axis(axis, sorted({row["token_heads"] for row in rows}), "state-heads")
    axis.tick_params(axis="x", labelsize=7, rotation=45)
    axis.set_ylim(0, 110)
    axis.set_ylabel("% of the copy bandwidth")
    axis.set_title(f"decoding one token, {record['machine']['gpu']}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_layer(record: Record) -> Any:
    """Draw milliseconds of a layer, forward and backward, against the length."""
    rows = sorted(timed(record, "layer"), key=lambda row: row["case"]["T"])
    figure, (axis,) = subplots(1, 7, 4.2)
    labels = {
        KDA: "KDA",
        KDA_CORE: "KDA, kernels of the delta rule alone",
        KDA_PLAIN: "KDA, plain PyTorch",
        MLA: "MLA, SDPA",
        MLA_PADDED: "MLA, SDPA, values padded",
    }
    for engine, label in labels.items():
        points = {row["case"]["T"]: row["median"] for row in rows if row["engine"] == engine}
        if points:
            curve(axis, points, label=label, color=LOOKS[engine])
    length_axis(axis, sorted({row["case"]["T"] for row in rows}), "tokens T")
    log_axis(axis, "y")
    axis.set_ylabel("ms, forward + backward")
    axis.set_title("one layer of width 2304, 32 heads of 128", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return figure


# Name -> what it shows, how it is drawn.
PICTURES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "aims": ("aims and what was reached", draw_aims),
    "kda": ("time per token-head", draw_kda),
    "short": ("short prompts", draw_short),
    "decode": ("decoding against the bandwidth", draw_decode),
    "layer": ("a layer beside latent attention", draw_layer),
}


def shows(record: Record, picture: str) -> bool:
    """Return whether a record has something for a picture."""
    if picture == "aims":
        return any(verdict.ratio is not None for verdict in aims.verdicts(record))
    if picture in ("kda", "short"):
        short = picture == "short"
        return any(row["engine"] != PLAIN and is_short(row) == short for row in timed(record, "kda"))
    if picture == "decode":
        return any(
            aims.bandwidth(row, record) is not None and not row["case"]["graph"] for row in timed(record, picture)
        )
    return bool(timed(record, picture))


def file_name(record: Record, picture: str) -> str:
    """Return the name of a picture's file."""
    return f"{record['machine'].get('machine', 'unknown')}-{picture}.png"


def write(record: Record, folder: Path) -> None:
    """Draw every picture a record has something for."""
    from matplotlib import pyplot

    for picture, (_, draw) in PICTURES.items():
        if shows(record, picture):
            figure = draw(record)
            figure.savefig(folder / file_name(record, picture), dpi=110)
            pyplot.close(figure)
