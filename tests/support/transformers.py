"""transformers' own network, loaded from a saved checkpoint of ours, for tests."""

import pathlib
from typing import Any

import pytest
import torch

ABSENT = "transformers is not installed: pip install 'kimi-linear[peers]'"
# The released configuration holds rope_scaling, and so does ours.
ROPE_WARNING = "ignore:`rope_scaling` is deprecated:FutureWarning"


def load_in_transformers(path: pathlib.Path, dtype: Any = torch.float32) -> tuple[Any, dict[str, Any]]:
    """Return transformers' model of a directory, in evaluation mode, and what it says of the keys."""
    transformers = pytest.importorskip("transformers", reason=ABSENT)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    return model.eval(), info


def relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest magnitude of b."""
    return float((a - b).abs().max() / b.abs().max())
