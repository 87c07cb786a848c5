"""Run everything on a GPU: contracts, ceilings, times beside peers; write the record, the page and the plots.

python benchmarks/gpu_check.py                     what `make gpu-check` runs; nine minutes; says so without a GPU
python benchmarks/gpu_check.py --only forward      some steps; a record of the same GPU and commit keeps its others
python benchmarks/gpu_check.py --dry-run           show every step and case, and that each can be built; run nothing
python benchmarks/gpu_check.py --rehearse          every benchmark's code on tiny shapes on the CPU; no figure counts
python benchmarks/gpu_check.py --profile "fwd 1x8192x96"     every kernel of a case, its time and its bandwidth
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gpu import aims, contracts, measure, plan, profiling, record, report, timing
from gpu.session import Session, results_folder
from gpu.setting import BUILD, GPU, REHEARSAL, Setting
from gpu.shapes import GROUPS, case_of, find

NO_GPU = "no GPU: torch.cuda is not available here, so nothing was checked."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--dry-run", action="store_true", help="show the plan and build every call; run nothing")
    modes.add_argument("--rehearse", action="store_true", help="run every benchmark's code on tiny shapes on the CPU")
    modes.add_argument("--profile", metavar="CASE", help="show every kernel of a case, as --dry-run names it")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", help=f"some of {', '.join(plan.STEPS)}")
    parser.add_argument("--budget", type=float, default=plan.BUDGET, help=f"seconds (default: {plan.BUDGET:.0f})")
    parser.add_argument(
        "--commit", default=os.environ.get("GPU_CHECK_COMMIT", ""), help="of the code, where there is no git"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder of the record, the page and the plots")
    given = parser.parse_args(arguments)
    try:
        given.steps = plan.chosen(tuple(given.only))
        given.case = find(given.profile) if given.profile else None
    except KeyError as error:
        parser.error(error.args[0])
    return given


def line(row: dict[str, Any], ceilings: dict[str, Any]) -> str:
    """Return a row for the terminal."""
    label = case_of(row["section"], row["case"]).key
    head = f"{label:52} {row['engine']:16}"
    if "median" not in row:
        return f"{head} {row.get('reason') or 'not measured'}"
    known = {"ceilings": ceilings}
    heads = row.get("token_heads")
    each = f"{1e6 * row['median'] / heads:9.3f} ns" if heads else f"{'':12}"
    parts = (
        f"{report.percent(aims.bandwidth(row, known)):>6} bytes {report.percent(aims.arithmetic(row, known)):>6} flop"
    )
    return f"{head} {row['median']:10.4f} ms {each}  {parts}  host {row.get('host_us') or 0:8.1f} us"


def show_plan(given: argparse.Namespace) -> int:
    """Print every step and case; return 1 if a suite is missing or a call cannot be built."""
    problems = contracts.missing() if "contracts" in given.steps else []
    print(f"facts     GPU, clocks, driver, torch, Triton, assembler, commit; budget {given.budget:.0f} s")
    if "contracts" in given.steps:
        for name in contracts.suites():
            print(f"contract  {name}")
    if "ceilings" in given.steps:
        print("ceiling   copy, read, bfloat16 and tf32 products")
    for step in given.steps:
        for case in GROUPS.get(step, ()):
            work = case.work()
            print(f"{step:9} {case.key:60} {work.bytes / 1e6:12,.1f} MB {work.flop / 1e9:12,.1f} GFLOP")
            state = timing.Timing()
            timing.attempt(state, lambda case=case: measure.build(case, BUILD))
            if state.reason:
                problems.append(f"{case.key} cannot be built: {state.reason}")
    print(f"about {plan.estimate(given.steps, given.budget):.0f} s")
    for problem in problems:
        print(f"PROBLEM   {problem}")
    return 1 if problems else 0


def run(given: argparse.Namespace, setting: Setting, output: Path | None) -> int:
    """Take the steps; write the record, the page and the plots unless there is nowhere to."""
    budget = plan.Budget(given.budget)
    session = Session(setting, budget, lambda text: print(text, flush=True), given.commit)
    found = session.run(given.steps, line)
    made = record.make(found, rehearsal=not setting.on_gpu, seconds=budget.used)
    for verdict in aims.verdicts(made):
        print(f"{verdict.what:64} {verdict.aim:24} {verdict.reached:48} {verdict.mark}")
    if output is not None:
        path = record.store(made, output)
        page = report.PAGE if output == results_folder() else output / report.PAGE.name
        report.write(output, page)
        print(f"wrote {path} and {page}")
    failed = any(outcome["failed"] for outcome in found.contracts.values())
    return 1 if failed or found.problems else 0


def main() -> int:
    given = parse_arguments()
    if given.dry_run:
        return show_plan(given)
    if given.rehearse:
        return run(given, REHEARSAL, given.output)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    if given.case is not None:
        print("\n".join(profiling.table(given.case, GPU)))
        return 0
    return run(given, GPU, given.output or results_folder())


if __name__ == "__main__":
    sys.exit(main())
