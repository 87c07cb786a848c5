"""What a run leaves behind: rows of measurements, each with the rate it reached and the ceiling it is held to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_linear.base.files import atomic_file
from kimi_linear.recipes.bench.timing import spread

SCHEMA = 2
Record = dict[str, Any]


@dataclass
class Row:
    """One engine on one case.

    Args:
        section: What it is part of: "operators", "decode update", "prefill", "decode", "training", "layer", "context",
            "memory".
        engine: Who ran it: "kimi-linear", "kimi-linear:chunk", "llama.cpp", ...
        case: What was run, as plain values.
        unit: Of the values: "us per token-head per core", "tokens/s", "ms per token", "GB/s", "bytes".
        values: One reading a turn.
        achieved: The rate at the median in the ceiling's unit (GFLOP/s or GB/s), if one can be said.
        ceiling: Name of the ceiling, or None.
        ceiling_rate: Its rate where it was measured in turns with the values, because memory's changes by the minute.
        version: Of the engine.
        reason: Empty where there are values, else why there are none.
        extra: Whatever else belongs to it.
    """

    section: str
    engine: str
    case: dict[str, Any]
    unit: str
    values: list[float] = field(default_factory=list)
    achieved: float | None = None
    ceiling: str | None = None
    ceiling_rate: float | None = None
    version: str = ""
    reason: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """The median reading, or None without any."""
        return spread(self.values).median if self.values else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the record."""
        made: dict[str, Any] = {"section": self.section, "engine": self.engine, "case": self.case, "unit": self.unit}
        if self.version:
            made["version"] = self.version
        if self.values:
            found = spread(self.values)
            made |= {"median": found.median, "low": found.low, "high": found.high, "turns": len(self.values)}
        if self.ceiling and self.achieved is not None:
            made |= {"achieved": self.achieved, "ceiling": self.ceiling}
            if self.ceiling_rate is not None:
                made["ceiling_rate"] = self.ceiling_rate
        if self.reason:
            made["reason"] = self.reason
        return {**made, **self.extra}


def fraction(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    """Return which part of its ceiling a recorded row reached, or None where nothing can be said.

    Example:
        >>> fraction({"achieved": 30.0, "ceiling": "copy_gigabytes"}, {"copy_gigabytes": 60.0})
        0.5
    """
    ceiling = row.get("ceiling_rate") or ceilings.get(row.get("ceiling", ""))
    return row["achieved"] / ceiling if ceiling else None


def describe_case(row: Mapping[str, Any]) -> str:
    """Return a recorded row's case in words."""
    case = dict(row["case"])
    if "T" in case and "H" in case:
        direction = "forward + backward" if case["backward"] else "forward"
        return f"{direction} {case['dtype']} B={case['B']} T={case['T']} H={case['H']}"
    return " ".join(f"{key}={value}" for key, value in case.items())


def line(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """Return one line for a terminal."""
    head = f"{row['section']:14} {row['engine']:24} {describe_case(row):48}"
    if "median" not in row:
        return f"{head} {row.get('reason') or 'not measured'}"
    part = fraction(row, ceilings)
    of = "" if part is None else f"  {100 * part:3.0f} % of {row['ceiling']}"
    return f"{head} {row['median']:12,.3f} {row['unit']}{of}"


def to_json(record: Record) -> str:
    """Return a record as JSON with one row a line, which is what a diff should show."""
    head = json.dumps({**record, "rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n  " + ",\n  ".join(json.dumps(row) for row in record["rows"]) + "\n ]\n}\n"


def save(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(record), encoding="utf-8")
