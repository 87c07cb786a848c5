"""Measure operators and the whole model beside other packages, and write the record, the page and the plots.

python benchmarks/run.py             what `make bench` runs; writes benchmarks/results and benchmarks/RESULTS.md
python benchmarks/run.py --quick     two minutes, a rough picture; writes runs/bench, as does a run of some parts
"""

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import engines
import gate
import operators
import peers
import report
from aims import verdicts
from kimi_linear.base.files import atomic_file
from kimi_linear.checkpoint.gguf.export import GGUFType
from kimi_linear.recipes.bench import ceilings, context, machine, memory, models
from kimi_linear.recipes.bench.engine import named_config
from kimi_linear.recipes.bench.operators import decode_rows, sweep
from kimi_linear.recipes.bench.record import Row, line, save
from kimi_linear.recipes.bench.run import LAYER_EFFORT, PARTS, finish
from kimi_linear.recipes.bench.timing import FULL, QUICK

ROOT = Path(__file__).resolve().parents[1]
# A rough or partial picture must not replace the published page.
QUICK_RESULTS = ROOT / "runs" / "bench"
MODEL = "300m"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small cases and few rounds, written to runs/bench")
    parser.add_argument("--threads", type=int, default=None, help="threads of every engine (default: all cores)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the record, the page and the plots")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    return arguments


def refuse(reason: str) -> int:
    print(f"nothing measured: {reason}", file=sys.stderr)
    return 1


def commit() -> str:
    """Return the short commit, with "-dirty" where tracked files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def operator_rows(found: peers.Peers, quick: bool) -> Iterator[Row]:
    """Yield the rows of the operators: beside the peers, then our own sweep and the cold states."""
    effort = QUICK if quick else FULL
    yield from operators.measure(found, operators.QUICK if quick else operators.FULL, quick)
    for rows in sweep(quick, effort, main=False):
        yield from rows
    yield from decode_rows(effort)


def model_rows(written: engines.Models, found: peers.Peers, quick: bool) -> Iterator[Row]:
    """Yield the rows of the model beside other engines, then of one layer over ever longer texts."""
    yield from engines.measure(written, found, engines.QUICK if quick else engines.FULL, quick)
    for weights in ("bfloat16", "float32"):
        yield from models.measure_layer(written.config, weights, models.layer_lengths(quick), LAYER_EFFORT)


def memory_rows(written: engines.Models, found: peers.Peers, quick: bool) -> Iterator[Row]:
    """Yield the rows of the memory of a training step, ours and transformers'."""
    yield from memory.rows(MODEL, quick)
    for tokens in (64,) if quick else (1024, 2048, 8192):
        yield engines.training_memory(written, found, tokens)


def sections(parts: list[str], written: engines.Models, found: peers.Peers, quick: bool) -> Iterator[Row]:
    """Yield the rows of every part that was asked for."""
    if "operators" in parts:
        yield from operator_rows(found, quick)
    if "model" in parts:
        yield from model_rows(written, found, quick)
    if "context" in parts:
        yield from context.measure(MODEL, context.contexts(quick))
    if "memory" in parts:
        yield from memory_rows(written, found, quick)


def gguf_kinds(found: peers.Peers, parts: list[str]) -> list[GGUFType]:
    """Return the kinds of GGUF files a run needs."""
    return list(engines.GGUF_KINDS.values()) if found.python and "model" in parts else []


def check(found: peers.Peers, written: engines.Models, arguments: argparse.Namespace) -> tuple[list[str], Any]:
    """Return where a peer disagrees with us, one sentence each, and how well they agree, for the record."""
    settings = operators.QUICK if arguments.quick else operators.FULL
    differences, agreement = operators.disagreements(found, settings)
    agreements: dict[str, Any] = {"operators": agreement}
    if "model" in arguments.parts:
        different_logits, agreements["logits"] = engines.disagreements(written, found)
        differences += different_logits
    return differences, agreements


def measure(
    arguments: argparse.Namespace, about: dict[str, Any], found: peers.Peers, folder: Path
) -> tuple[str, dict[str, Any]]:
    """Check and measure; return why nothing was measured, or "", and the record."""
    print("writing the model that every engine reads", flush=True)
    written = engines.write_models(MODEL, folder, gguf_kinds(found, arguments.parts))
    print("comparing the peers' results with ours", flush=True)
    differences, agreement = check(found, written, arguments)
    if differences:
        return "; ".join(differences) + ".", {}
    seconds = 0.2 if arguments.quick else 1.0
    before = ceilings.measure(seconds)
    rows = []
    for part in arguments.parts:
        try:
            for row in sections([part], written, found, arguments.quick):
                rows.append(row.as_dict())
                print(line(rows[-1], before), flush=True)
        except Exception:
            # Half an hour of other rows is not thrown away; the page shows what is missing as not measured.
            print(f"{part}: stopped by an error\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # So that an end of this process, for lack of memory say, does not take the rows with it.
        QUICK_RESULTS.mkdir(parents=True, exist_ok=True)
        with atomic_file(QUICK_RESULTS / "rows.json") as temporary:
            temporary.write_text(json.dumps(rows), encoding="utf-8")
    given = {"quick": arguments.quick, "model": MODEL, "agreement": agreement}
    parameters = named_config(MODEL).parameters()
    return "", finish(about, before, ceilings.measure(seconds), rows, parameters=parameters, **given)


def publish(record: dict[str, Any], folder: Path) -> None:
    """Write the record, the page and the plots of all records beside it, and print the aims."""
    page = report.PAGE if folder == report.RESULTS else folder / report.PAGE.name
    about = record["machine"]
    path = folder / f"{about['machine']}-{about['commit']}.json"
    save(record, path)
    report.write(folder, page)
    for verdict in verdicts(record):
        print(f"{verdict.what:62} {verdict.aim:36} {verdict.reached:48} {verdict.mark}")
    print(f"wrote {path} and {page}")


def main() -> int:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Before the tests, which are a load themselves.
    about = {**machine.describe(), "commit": commit()}
    if about["load"] > about["cores"] / 2:
        print(f"this machine is busy (load {about['load']:.1f}): do not publish what follows", file=sys.stderr)
    print("running the operators' tests first", flush=True)
    paths = gate.QUICK_TESTS if arguments.quick else gate.TESTS
    verdict = gate.run_tests("--numprocesses", "auto", paths=paths)
    if not verdict.green:
        return refuse(f"the operators' tests are not green.\n{verdict.output}")
    print("setting up the packages to measure beside (minutes, the first time)", flush=True)
    found = peers.ensure()
    for reason in (found.reason, found.native_reason):
        if reason:
            print(f"without them: {reason}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        reason, record = measure(arguments, about, found, Path(name))
    if reason:
        return refuse(reason)
    whole = not arguments.quick and set(arguments.parts) == set(PARTS)
    publish(record, arguments.output or (report.RESULTS if whole else QUICK_RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
