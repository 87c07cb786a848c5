"""The benchmark of our own engine: operators, model, long contexts, memory, each beside the machine's ceilings."""

from kimi_linear.recipes.bench.run import PARTS, BenchConfig, bench

__all__ = ["PARTS", "BenchConfig", "bench"]
