"""A training run of the real pieces, as small as they allow."""

import random
from pathlib import Path
from typing import Any

from kimi_linear.recipes.train import RunConfig

WORDS = [
    "the",
    "people",
    "of",
    "these",
    "states",
    "have",
    "great",
    "common",
    "interest",
    "in",
    "peace",
    "and",
    "liberty",
]


def write_text(directory: Path, documents: int = 60) -> Path:
    """Write documents of random words, one a line of a .jsonl file."""
    generator = random.Random(0)
    path = directory / "text.jsonl"
    lines = (" ".join(generator.choice(WORDS) for _ in range(generator.randint(5, 60))) for _ in range(documents))
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return path


def plain_config(directory: Path, text: Path, **train: Any) -> dict[str, Any]:
    """Return the plain configuration of a run in `directory / "run"`: two KDA layers and an MLA layer, with experts."""
    return {
        "run_dir": str(directory / "run"),
        "model": "tiny",
        "overrides": {"vocab_size": 290, "hidden_size": 32, "layers": ["kda_dense", "kda", "mla"]},
        "data": {"location": str(text), "seq_len": 24, "batch_size": 2},
        "evaluation": {"batches": 2, "batch_size": 4},
        "train": {"max_steps": 6, "precision": "fp32", **train},
        "num_threads": 1,
        "tensorboard": False,
    }


def config(directory: Path, text: Path, **train: Any) -> RunConfig:
    return RunConfig.from_dict(plain_config(directory, text, **train))
