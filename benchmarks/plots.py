"""The pictures of the page, one function each; a picture without anything to show is not drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aims

Record = Mapping[str, Any]
COLOURS = {
    "kimi-linear": "#1f5fa8",
    "llama.cpp": "#d1603d",
    "xllamacpp": "#e8a88f",
    "transformers": "#6b8f3c",
    "fla": "#7a6a9c",
    "attn-gym": "#b0a5c8",
}
GREY = "#9aa4b1"
REACHED, MISSED = "#2f8f5b", "#c8553d"
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
LABELS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "8 bits", "int4": "4 bits"}


def colour(engine: str) -> str:
    """Return the colour an engine has in every picture."""
    return COLOURS.get(engine.partition(":")[0], GREY)


def length_label(tokens: int) -> str:
    """Return a number of tokens as 512, 4k or 1M."""
    if tokens < 1024:
        return str(tokens)
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}k"


def subplots(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes."""
    import matplotlib

    # Draws to files only: no window system is asked for.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes[0]


def log_axis(axis: Any, which: str, steps: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks: 0.5, 1, 2, 5, 10."""
    from matplotlib import ticker

    getattr(axis, f"set_{which}scale")("log")
    own = getattr(axis, f"{which}axis")
    own.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
    own.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    own.set_minor_locator(ticker.NullLocator())


def draw_aims(record: Record) -> Any:
    """Draw how far each aim was reached; 1 is the aim."""
    found = [verdict for verdict in aims.verdicts(record) if verdict.ratio is not None]
    figure, (axis,) = subplots(1, 10, 0.36 * len(found) + 1.2)
    names = [f"{v.what}\n{v.aim}" for v in found]
    ratios = [v.ratio or 0.0 for v in found]
    colours = [REACHED if v.met else GREY if v.bound else MISSED for v in found]
    axis.barh(names, ratios, color=colours, height=0.6)
    axis.axvline(1.0, color="#1d2733", linewidth=1)
    log_axis(axis, "x")
    axis.set_xlim(min([0.05, *[r / 1.5 for r in ratios]]), max([2.0, *[r * 2 for r in ratios]]))
    for place, verdict in enumerate(found):
        ratio = verdict.ratio or 0.0
        text = f" {'at least ' if verdict.bound else ''}{ratio:.2f}"
        # Beside the bar, and clear of the line at 1.
        axis.text(max(ratio, 1.0) if ratio > 0.6 else ratio, place, text, va="center", fontsize=8)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.invert_yaxis()
    axis.set_xlabel("reached / aim (1: the aim; a bar to the right of it: reached)")
    return figure


def draw_operators(record: Record) -> Any:
    """Draw microseconds per token-head of every implementation at the longest common length."""
    rows = [r for r in aims.find(record, "operators", B=1, H=8) if r["engine"] != "kimi-linear:reference"]
    peers = [r for r in rows if not r["engine"].startswith("kimi-linear")]
    longest = max(r["case"]["T"] for r in peers or rows)
    figure, axes = subplots(4, 13, 3.6)
    cases = [(dtype, backward) for dtype in ("float32", "bfloat16") for backward in (False, True)]
    for axis, (dtype, backward) in zip(axes, cases, strict=True):
        own = [r for r in rows if r["case"]["T"] == longest and r["case"]["dtype"] == dtype]
        own = sorted((r for r in own if r["case"]["backward"] == backward), key=lambda r: r["median"])
        names = [r["engine"].replace("kimi-linear:", "ours: ") for r in own]
        bars = axis.barh(names, [r["median"] for r in own], color=[colour(r["engine"]) for r in own], height=0.6)
        axis.bar_label(bars, [f" {r['median']:.3g}" for r in own], fontsize=8)
        log_axis(axis, "x", steps=(1.0,))
        axis.set_xlim(0.2, max([r["median"] for r in own], default=1.0) * 6)
        axis.invert_yaxis()
        axis.set_title(f"{'forward + backward' if backward else 'forward'}, {dtype}", fontsize=10)
        axis.set_xlabel("µs per token-head per core")
    figure.suptitle(f"Kimi Delta Attention, T = {longest}, H = 8, K = V = 128 (less is better)", fontsize=11)
    return figure


def grouped(axis: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw tokens a second of every engine, grouped by the kind of weights."""
    engines = list(dict.fromkeys(r["engine"] for r in rows))
    kinds = [kind for kind in WEIGHTS if any(r["case"]["weights"] == kind for r in rows)]
    width = 0.8 / max(1, len(engines))
    for number, engine in enumerate(engines):
        found = {r["case"]["weights"]: r["median"] for r in rows if r["engine"] == engine}
        places = [kinds.index(kind) + (number - (len(engines) - 1) / 2) * width for kind in found]
        bars = axis.bar(places, list(found.values()), width=0.92 * width, color=colour(engine), label=engine)
        axis.bar_label(
            bars, [f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in found.values()], fontsize=7
        )
    axis.margins(y=0.1)
    axis.set_xticks(range(len(kinds)), [LABELS[kind] for kind in kinds])
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("tokens a second")


def draw_model(record: Record) -> Any:
    """Draw prefill, decode and training of every engine."""
    prefill, decode = aims.find(record, "prefill"), aims.find(record, "decode")
    training = aims.find(record, "training")
    longest = max((r["case"]["tokens"] for r in prefill), default=0)
    training = [{**r, "case": {**r["case"], "weights": r["case"]["arithmetic"]}} for r in best_training(training)]
    figure, axes = subplots(3, 13, 4.2)
    grouped(axes[0], [r for r in prefill if r["case"]["tokens"] == longest], f"prefill of {longest} tokens")
    grouped(axes[1], decode, "decode, one sequence")
    grouped(axes[2], training, "training, forward + backward")
    shown = {handle.get_label(): handle for axis in axes for handle in axis.containers if hasattr(handle, "patches")}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False)
    return figure


def best_training(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the fastest row of each engine and arithmetic."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["engine"], row["case"]["arithmetic"])
        if key not in best or row["median"] > best[key]["median"]:
            best[key] = row
    return list(best.values())


def curve(axis: Any, points: Mapping[int, float], **look: Any) -> None:
    """Draw a line over lengths."""
    axis.plot(list(points), list(points.values()), marker="o", markersize=4, **look)


def length_axis(axis: Any, lengths: Sequence[int], label: str) -> None:
    """Make the horizontal axis one of lengths."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_label(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.set_xlabel(label)


def draw_context(record: Record) -> Any:
    """Draw milliseconds a token and bytes of cache against the context."""
    rows = aims.find(record, "context")
    size = record["model"]
    names = {size: "hybrid, 3 KDA : 1 MLA", f"{size}-mla": "full MLA", f"{size}-gqa": "full GQA, 8 heads on 2"}
    looks = {size: COLOURS["kimi-linear"], f"{size}-mla": COLOURS["llama.cpp"], f"{size}-gqa": COLOURS["fla"]}
    figure, axes = subplots(2, 11, 4.2)
    lengths = sorted({r["case"]["context"] for r in rows})
    for engine, label in names.items():
        own = [r for r in rows if r["engine"] == engine]
        look = {"label": label, "color": looks[engine]}
        curve(axes[0], {r["case"]["context"]: r["median"] for r in own}, **look)
        curve(axes[1], {r["case"]["context"]: r["cache_bytes"] / 2**20 for r in own}, **look)
    for axis, what in zip(axes, ("ms a token", "cache, MiB"), strict=True):
        length_axis(axis, lengths, "context, tokens")
        log_axis(axis, "y")
        axis.set_ylabel(what)
    axes[0].legend(frameon=False)
    return figure


def draw_layer(record: Record) -> Any:
    """Draw what a token costs in one layer against the length, and the sweep of the operator over lengths."""
    rows = aims.find(record, "layer")
    sweep = [r for r in aims.find(record, "operators", "kimi-linear:", B=1, H=8) if "reference" not in r["engine"]]
    figure, axes = subplots(2, 11, 4.2)
    for weights in ("bfloat16", "float32"):
        own = {r["case"]["tokens"]: r["median"] for r in rows if r["case"]["weights"] == weights}
        shade = COLOURS["kimi-linear"] if weights == "bfloat16" else COLOURS["llama.cpp"]
        curve(axes[0], own, label=weights, color=shade)
    length_axis(axes[0], sorted({r["case"]["tokens"] for r in rows}), "tokens of the text")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("µs a token")
    axes[0].set_title("one KDA layer, read in pieces of 4096 tokens", fontsize=10)
    for place, (dtype, backward) in enumerate([(d, b) for d in ("float32", "bfloat16") for b in (False, True)]):
        best: dict[int, float] = {}
        for row in sorted(sweep, key=lambda r: (r["case"]["T"], r["median"])):
            if row["case"]["dtype"] == dtype and row["case"]["backward"] == backward:
                best.setdefault(row["case"]["T"], row["median"])
        label = f"{'forward + backward' if backward else 'forward'}, {dtype}"
        shade = COLOURS["llama.cpp"] if dtype == "float32" else COLOURS["kimi-linear"]
        curve(axes[1], best, label=label, color=shade, linestyle=("-", "--")[place % 2])
    length_axis(axes[1], sorted({r["case"]["T"] for r in sweep}), "tokens T")
    log_axis(axes[1], "y")
    axes[1].set_ylabel("µs per token-head per core")
    axes[1].set_title("the operator, H = 8, K = V = 128, fastest backend", fontsize=10)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return figure


def shows(record: Record, picture: str) -> bool:
    """Return whether a record has something for a picture."""
    sections = {
        "operators": ("operators",),
        "model": ("prefill", "decode", "training"),
        "context": ("context",),
        "layer": ("layer", "operators"),
    }
    if picture == "aims":
        return any(verdict.ratio is not None for verdict in aims.verdicts(record))
    return all(aims.find(record, section) for section in sections[picture])


PICTURES: dict[str, Callable[[Record], Any]] = {
    "aims": draw_aims,
    "operators": draw_operators,
    "model": draw_model,
    "context": draw_context,
    "layer": draw_layer,
}


def file_name(record: Record, picture: str) -> str:
    """Return the name of a picture's file."""
    return f"{record['machine']['machine']}-{picture}.png"


def write(record: Record, folder: Path) -> None:
    """Draw every picture a record has something for."""
    from matplotlib import pyplot

    for picture, draw in PICTURES.items():
        if shows(record, picture):
            figure = draw(record)
            figure.savefig(folder / file_name(record, picture), dpi=110)
            pyplot.close(figure)
