"""When Triton kernels can run. Imports no triton."""

import importlib.util

from kimi_linear.base import env
from kimi_linear.ops.registry import Call

_DTYPES = ("float32", "bfloat16", "float16")
# Looked for, not imported.
INSTALLED = importlib.util.find_spec("triton") is not None


def untried(call: Call) -> bool:
    """Return whether a call must ask for the kernels by name: every call, as long as they have run on no GPU."""
    return True


def refuse_device(call: Call) -> list[str]:
    """Refuse what no kernel runs: a device without Triton, a dtype."""
    reasons = []
    if call.device != "cuda" and not (call.device == "cpu" and env.triton_interprets()):
        reasons.append(f"tensors are on {call.device}, not on a GPU")
    if call.dtype not in _DTYPES:
        reasons.append(f"{call.dtype} is not one of {', '.join(_DTYPES)}")
    if not INSTALLED:
        reasons.append("triton is not installed: pip install 'kimi-linear[triton]'")
    return reasons
