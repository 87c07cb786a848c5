"""One thing found in a checkpoint, and the engines it is for."""

from dataclasses import dataclass
from typing import Literal

TRANSFORMERS, VLLM, SGLANG, LLAMA, MLX, OURS = "transformers", "vLLM", "SGLang", "llama.cpp", "mlx-lm", "kimi-linear"
OTHERS = (TRANSFORMERS, VLLM, SGLANG, LLAMA, MLX)
ALL = (OURS, *OTHERS)

Severity = Literal["error", "warning", "ok"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Fields: `check`, its name; `severity`, "error" for a defect with which some engine refuses the checkpoint or
    computes something else, "warning" for what is untidy, or by design and not for every engine, "ok" where nothing
    was found; `text`, a sentence; `affects`, the engines that
    trip over it; `fix`, what to do; `fixable`, whether a repaired copy has it no more.
    """

    check: str
    severity: Severity
    text: str
    affects: tuple[str, ...] = ()
    fix: str = ""
    fixable: bool = False
