"""Time transformers' own kimi_linear before and after `accelerate()`: prompt, generation, training; in turns.

python benchmarks/accelerated.py            the 300m preset in float32, some minutes
python benchmarks/accelerated.py --quick    the demo preset, half a minute
python benchmarks/accelerated.py --record   also write benchmarks/results/accelerated/MACHINE.json
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from engine_worker import Transformers
from kimi_linear.integrations.transformers import accelerate
from kimi_linear.recipes.bench import machine
from kimi_linear.recipes.bench.engine import build, named_config
from kimi_linear.recipes.bench.models import Work, bound_work
from kimi_linear.recipes.bench.record import Row, save
from kimi_linear.recipes.bench.run import finish
from kimi_linear.recipes.bench.timing import spread

RESULTS = Path(__file__).parent / "results" / "accelerated"
PLAIN, ACCELERATED = "transformers", "transformers, accelerated"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and short texts")
    parser.add_argument("--model", help="a preset (default: 300m, quick: demo)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="threads (default: all cores)")
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results")
    return parser.parse_args()


def works(quick: bool) -> list[Work]:
    """Return what is timed; the arithmetic is float32 throughout."""
    if quick:
        return [
            Work("prefill", "float32", 256),
            Work("decode", "float32", 64, steps=16),
            Work("training", "float32", 128),
        ]
    return [
        Work("prefill", "float32", 1024),
        Work("decode", "float32", 512, steps=32),
        Work("training", "float32", 256),
    ]


def measure(run: Callable[[], float], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each, turn about; the first turn of each finds cold caches and is not counted."""
    seconds: dict[str, list[float]] = {PLAIN: [], ACCELERATED: []}
    for _ in range(rounds + 1):
        seconds[PLAIN].append(run())
        with accelerate():
            seconds[ACCELERATED].append(run())
    return {name: times[1:] for name, times in seconds.items()}


def load(name: str, threads: int) -> Transformers:
    """Return transformers' model of a preset with fresh weights."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        build(named_config(name)).save_pretrained(folder)
        return Transformers({"checkpoint": folder, "threads": threads, "weights": "float32"})


def main() -> int:
    arguments = parse_arguments()
    name = arguments.model or ("demo" if arguments.quick else "300m")
    model = load(name, arguments.threads or torch.get_num_threads())
    parameters = sum(p.numel() for p in model.model.parameters())
    print(f"{name}: {parameters / 1e6:.1f}M parameters, float32, {torch.get_num_threads()} threads; tokens/s, medians")
    rows = []
    for work in works(arguments.quick):
        seconds = measure(bound_work(model, work), arguments.rounds)
        made = [
            Row(work.section, who, work.case(), "tokens/s", [work.counted / s for s in times])
            for who, times in seconds.items()
        ]
        before, after = (spread(row.values).median for row in made)
        what = f"{work.section}, {work.tokens} tokens" + (f" + {work.steps}" if work.steps else "")
        print(f"{what:24} {before:10.2f} -> {after:10.2f}   x {after / before:.2f}")
        rows += [row.as_dict() | {"version": model.version} for row in made]
    if arguments.record:
        about = machine.describe()
        save(
            finish(about, {}, {}, rows, quick=arguments.quick, model=name),
            RESULTS / f"{about['machine']}.json",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
