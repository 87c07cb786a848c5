"""The demo's pictures, as PNG files: plain line and bar charts with units on every axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_linear.base.errors import ConfigError
from kimi_linear.base.files import atomic_file

COLOURS = ("#1f5fa8", "#d1603d", "#6b8f3c", "#7a6a9c")


def _figure(width: float = 7.0, height: float = 3.8) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib; install the package with its `train` extra.") from error
    # Draws to files only: no window system is asked for.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)


def loss_curve(
    path: Path, tokens: Sequence[float], loss: Sequence[float], evals: Sequence[tuple[float, float]]
) -> None:
    """Draw the training loss in nats a token, and the validation bits a byte on a second axis."""
    figure, axes = _figure()
    axes.plot(tokens, loss, color=COLOURS[0], alpha=0.35, linewidth=0.8)
    axes.plot(tokens, _smooth(loss), color=COLOURS[0], label="training loss, nats a token")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("nats a token", color=COLOURS[0])
    if evals:
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.plot([x for x, _ in evals], [y for _, y in evals], "o-", color=COLOURS[1], markersize=4)
        right.set_ylabel("validation, bits a byte", color=COLOURS[1])
        right.set_ylim(bottom=0)
    _save(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average over about a tenth of the values, started from the first."""
    weight = 1 - min(1.0, 20 / max(1, len(values)))
    smooth, last = [], values[0] if values else 0.0
    for value in values:
        last = weight * last + (1 - weight) * value
        smooth.append(last)
    return smooth


def bars(path: Path, values: dict[str, float], xlabel: str) -> None:
    """Draw one horizontal bar a name, the first highlighted, with its value beside it."""
    figure, axes = _figure(height=0.6 + 0.5 * len(values))
    names = list(values)
    colours = [COLOURS[0]] + ["#b8b8b8"] * (len(names) - 1)
    drawn = axes.barh(names, list(values.values()), color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.margins(x=0.12)
    _save(figure, path)


def lines(
    path: Path,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    log_y: bool = False,
) -> None:
    """Draw one line a name over a logarithmic context axis."""
    figure, axes = _figure()
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        axes.plot(x, values, "o-", color=colour, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(x), [f"{int(value) // 1024}k" for value in x])
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    _save(figure, path)
