"""Measure Kimi Delta Attention beside other packages, and write the record, the tables and the plot.

python benchmarks/run.py             what `make bench` runs; writes benchmarks/results and benchmarks/RESULTS.md
python benchmarks/run.py --quick     a minute, a rough picture; writes runs/bench
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import gate
import machine
import operators
import peers
import report
from cases import Case, cases

ROOT = Path(__file__).resolve().parents[1]
# A rough picture must not replace the published tables.
QUICK_RESULTS = ROOT / "runs" / "bench"
FULL = operators.Settings(rounds=5, turn_seconds=0.5, call_seconds=60.0, budget_seconds=30.0)
QUICK = operators.Settings(rounds=3, turn_seconds=0.2, call_seconds=30.0, budget_seconds=5.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="T = 512 alone and few rounds, written to runs/bench")
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of every implementation (default: all cores)"
    )
    return parser.parse_args()


def refuse(reason: str) -> int:
    print(f"nothing measured: {reason}", file=sys.stderr)
    return 1


def measure_all(chosen: list[Case], found: peers.Peers, settings: operators.Settings) -> list[dict[str, Any]]:
    """Measure every case under one progress bar."""
    rows = []
    total = len(chosen) * operators.count_implementations() * operators.steps(settings)
    with tqdm(total=total, unit="step", disable=not sys.stderr.isatty(), smoothing=0.05) as bar:
        for case in chosen:
            bar.set_description(case.label)
            rows += [row.as_dict() for row in operators.measure(case, found, settings, bar.update)]
    return rows


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print one line a row."""
    for row in rows:
        case = Case(**row["case"])
        us = report.median_of(row)
        same = [other for other in rows if other["case"] == row["case"]]
        if us is None:
            text = row["reason"]
        else:
            fla, gym = report.ratio(row, same)
            text = f"{us:8.2f} µs per token-head {row['gflops']:7.1f} GFLOP/s   fla {fla:>7}   attn-gym {gym:>7}"
            if row["memory"] and "allocated_per_channel" in row["memory"]:
                text += f"   {row['memory']['allocated_per_channel']:6.1f} B extra per channel"
        print(f"{case.label:34} {row['implementation']:24} {text}")


def to_json(record: dict[str, Any]) -> str:
    """Return a record as JSON with one row a line, which is what a diff should show."""
    head = json.dumps({**record, "rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n  " + ",\n  ".join(json.dumps(row) for row in record["rows"]) + "\n ]\n}\n"


def save(record: dict[str, Any], folder: Path) -> None:
    """Write the record, and the tables and plots of all records beside it."""
    tables = report.TABLES if folder == report.RESULTS else folder / report.TABLES.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['machine']['machine']}-{record['machine']['commit']}.json"
    path.write_text(to_json(record), encoding="utf-8")
    report.write(folder, tables)
    summarise(record["rows"])
    print(f"wrote {path.relative_to(ROOT)} and {tables.relative_to(ROOT)}")


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Before the tests, which are a load themselves.
    about = machine.describe()
    if about["load"] > about["cores"] / 2:
        print(f"this machine is busy (load {about['load']:.1f}): do not publish what follows", file=sys.stderr)
    print("running the operator's tests first", flush=True)
    verdict = gate.run_tests()
    if not verdict.green:
        return refuse(f"the operator's tests are not green.\n{verdict.output}")
    print("setting up the packages to measure beside", flush=True)
    found = peers.ensure()
    if found.reason:
        print(f"without them: {found.reason}", file=sys.stderr)
    settings = QUICK if arguments.quick else FULL
    if differences := operators.disagreements(found, settings):
        return refuse("; ".join(differences) + ".")
    seconds = 0.3 if arguments.quick else 1.0
    before = machine.ceilings(seconds)
    rows = measure_all(cases(arguments.quick), found, settings)
    after = machine.ceilings(seconds)
    record = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": arguments.quick,
        "machine": about,
        # What the machine can do is the better of two readings.
        "ceilings": {name: max(rate, after[name]) for name, rate in before.items()},
        "rows": rows,
    }
    save(record, QUICK_RESULTS if arguments.quick else report.RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
