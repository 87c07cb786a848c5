"""The demo's report: one HTML page beside its pictures, with every number in it read from the results."""

import html
from pathlib import Path
from typing import Any

from kimi_linear.base.files import atomic_file
from kimi_linear.recipes.demo.speed import ratio

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 860px;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
.lead { color: #55606e; margin-top: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid #e1e6ec; border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: #55606e; font-size: .86rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e8ecf1; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #55606e; }
img { max-width: 100%; height: auto; }
blockquote { margin: .8rem 0; padding: .7rem 1rem; background: #f5f7fa; border-left: 3px solid #1f5fa8;
             white-space: pre-wrap; }
blockquote b { color: #1f5fa8; } footer { margin-top: 3rem; color: #55606e; font-size: .86rem; }
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table; cells are escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def size(count: float, unit: str = "B") -> str:
    """Return a count with a binary prefix, three digits: 1536 -> "1.50 KiB"."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if count < 1024 or prefix == "Gi":
            return f"{count:.3g} {unit}" if not prefix else f"{count:.3g} {prefix}{unit}"
        count /= 1024
    raise AssertionError("unreachable")


def cards(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the headline figures as (value, meaning)."""
    model, train, quality = results["model"], results["train"], results["quality"]
    decode = results["decode"]
    last = -1
    cache_ratio = decode["full_attention"][last]["cache_bytes"] / decode["hybrid"][last]["cache_bytes"]
    time_ratio = decode["full_attention"][last]["seconds"] / decode["hybrid"][last]["seconds"]
    context = f"{decode['hybrid'][last]['context'] // 1024}k"
    speed = results["speed"]
    compared = [] if "reason" in speed else [(f"{ratio(speed):.1f}x", "tokens trained, against no native kernels")]
    return [
        (f"{model['parameters'] / 1e6:.1f} M", f"parameters, {model['active_parameters'] / 1e6:.1f} M active a token"),
        (f"{train['tokens'] / 1e6:.2f} M", f"tokens trained on, {train['tokens_per_second']:,.0f} a second"),
        *compared,
        (f"{quality['bits_per_byte']:.2f}", "validation bits a byte"),
        (f"{quality['compressors']['gzip -9']:.2f}", "gzip -9 on the same text"),
        (f"{cache_ratio:.1f}x", f"smaller cache than full attention at {context}"),
        (f"{time_ratio:.1f}x", f"faster decoding than full attention at {context}"),
    ]


def speed_sentence(speed: dict[str, Any]) -> str:
    """Say how much more was trained with the native kernels than without, or why that was not measured."""
    if "reason" in speed:
        return f"not compared: {speed['reason']}"
    native, plain = (
        f"{side['tokens'] / side['seconds']:,.0f} a second in {side['precision']}"
        for side in (speed["native"], speed["plain"])
    )
    times = f"{ratio(speed):.1f} times as many tokens in the same time"
    return f"{times} as without native kernels ({native} against {plain})"


def decode_rows(decode: dict[str, Any]) -> list[list[str]]:
    """Return one row a context: cache and time of the hybrid and of full attention, and their ratios."""
    rows = []
    for ours, full in zip(decode["hybrid"], decode["full_attention"], strict=True):
        rows.append(
            [
                f"{ours['context']:,}",
                size(ours["cache_bytes"]),
                size(full["cache_bytes"]),
                f"{full['cache_bytes'] / ours['cache_bytes']:.2f}",
                f"{1e3 * ours['seconds']:.2f}",
                f"{1e3 * full['seconds']:.2f}",
                f"{full['seconds'] / ours['seconds']:.2f}",
            ]
        )
    return rows


def _samples(samples: list[dict[str, str]]) -> str:
    return "".join(
        f"<blockquote><b>{html.escape(s['prompt'])}</b>{html.escape(s['continuation'])}</blockquote>" for s in samples
    )


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write the page; the pictures are expected beside it."""
    model, train, quality, machine = (results[key] for key in ("model", "train", "quality", "machine"))
    quality_rows = [["this model", f"{quality['bits_per_byte']:.3f}"]]
    quality_rows += [[name, f"{value:.3f}"] for name, value in quality["compressors"].items()]
    headline = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(meaning)}</span></div>'
        for value, meaning in cards(results)
    )
    decode_header = [
        "context, tokens", "cache, hybrid", "cache, full", "ratio", "ms a token, hybrid", "ms a token, full", "ratio",
    ]  # fmt: skip
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Kimi Linear demo</title><style>{_STYLE}</style></head><body>
<h1>A small Kimi Linear hybrid, trained here</h1>
<p class="lead">{html.escape(model["description"])}</p>
<div class="cards">{headline}</div>
<h2>Training</h2>
<p>{train["steps"]:,} steps over {train["tokens"]:,} tokens of presidential addresses in {train["seconds"] / 60:.1f}
minutes ({html.escape(train["precision"])}). Measured apart, on fresh models, one after the other:
{html.escape(speed_sentence(results["speed"]))}.</p>
<img src="loss.png" alt="training loss and validation bits a byte against tokens">
<h2>Held-out text</h2>
<p>{quality["bytes"]:,} bytes of addresses the model never saw, every byte predicted once. The compressors see only this
text; the model has read the training text too.</p>
{table(["", "bits a byte"], quality_rows)}
<img src="bits_per_byte.png" alt="bits a byte of the model and of general compressors">
<h2>Samples</h2>
{_samples(results["samples"])}
<h2>What a longer context costs</h2>
<p>One sequence, one token at a time, on caches filled to each length: this hybrid against a model of the same shape
whose layers are all latent attention ({results["full_attention"]["parameters"] / 1e6:.1f} M parameters).</p>
{table(decode_header, decode_rows(results["decode"]))}
<img src="cache.png" alt="cache bytes against context">
<img src="decode.png" alt="decode time against context">
<footer>{html.escape(machine["cpu"])}, {machine["threads"]} threads, torch {html.escape(machine["torch"])}.
Every figure on this page was measured by this run.</footer>
</body></html>
"""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
