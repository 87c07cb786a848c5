"""The documents of the offline tasks, for lm-eval's `custom_dataset`: files beside this one, and the held-out text."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from kimi_linear.training.data import load_addresses


def load(file: str, **metadata: Any) -> dict[str, Dataset]:
    """Return the documents of a file beside this one, as the split "test"."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def held_out(**metadata: Any) -> dict[str, Dataset]:
    """Return the addresses of the validation split, as the split "test"."""
    return {"test": Dataset.from_list([{"text": address.text} for address in load_addresses("validation")])}
