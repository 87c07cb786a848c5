"""Load the library of native kernels for this processor, and hand out its functions.

There is one library for each instruction level (csrc/README.md), plain C inside: tensors go in as addresses. They run
on torch's own threads, so `torch.set_num_threads` counts for them too.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimi_linear.base import env
from kimi_linear.base.errors import BackendError, ConfigError
from kimi_linear.ops.registry import Call

# Narrowest first; `kl_best_level` counts in this order.
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
_PACKAGED = Path(__file__).resolve().parents[2] / "_lib"
# What a letter of a signature stands for.
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class Library:
    """A loaded library and the level it was built for."""

    level: str
    handle: ctypes.CDLL


@dataclass(frozen=True)
class _Missing:
    """Why there is no library."""

    reason: str


def _directory() -> Path:
    given = env.read("KIMI_LINEAR_CPU_LIBRARIES")
    return Path(given) if given else _PACKAGED


def _path(level: str) -> Path:
    return _directory() / f"libkimi_linear_{level}.so"


def available_levels() -> list[str]:
    """Return the levels whose library is there and which this processor runs, narrowest first."""
    built = [level for level in LEVELS if _path(level).exists()]
    if not built:
        return []
    probe = ctypes.CDLL(str(_path(built[0])))
    probe.kl_best_level.restype = ctypes.c_int64
    return [level for level in built if LEVELS.index(level) <= probe.kl_best_level()]


def _load() -> Library | _Missing:
    wanted = env.read("KIMI_LINEAR_CPU_LEVEL")
    if wanted == "off":
        return _Missing("KIMI_LINEAR_CPU_LEVEL is off")
    available = available_levels()
    if wanted != "auto" and wanted not in available:
        raise ConfigError(
            f"KIMI_LINEAR_CPU_LEVEL is {wanted!r}, but this machine can run {', '.join(available) or 'none'}; "
            "choose one of these, auto or off."
        )
    if not available:
        return _Missing("the native kernels are not built; install a C++ compiler and then the package again")
    level = available[-1] if wanted == "auto" else wanted
    handle = ctypes.CDLL(str(_path(level)))
    pool = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        threads = [ctypes.cast(getattr(pool, name), ctypes.c_void_p) for name in _THREAD_FUNCTIONS]
    except AttributeError:
        return _Missing(f"torch {torch.__version__} has no {_THREAD_FUNCTIONS[0]}; use torch 2.10 or later")
    handle.kl_set_threads(*threads)
    if env.read("KIMI_LINEAR_KEEP_MEMORY"):
        handle.kl_keep_memory()
    return Library(level, handle)


_THREAD_FUNCTIONS = ("torch_parallel_for", "torch_get_num_threads")


@functools.cache
def _loaded() -> Library | _Missing:
    return _load()


def active_level() -> str | None:
    """Return the instruction level in use, or None without native kernels."""
    library = _loaded()
    return library.level if isinstance(library, Library) else None


def why_unavailable() -> str | None:
    """Return why there are no native kernels here, or None if there are."""
    library = _loaded()
    return library.reason if isinstance(library, _Missing) else None


# torch.compile takes the answers for constants instead of tracing how a library is loaded. This is what
# torch.compiler.assume_constant_result does, without importing the whole compiler.
for _function in (active_level, why_unavailable):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def kernel(name: str, signature: str) -> Callable[..., None]:
    """Return a function of the library, callable on tensors, numbers and None.

    Args:
        name: The function, without its prefix `kl_`.
        signature: A letter an argument: p for a tensor or None (its address goes in), i for a whole number, bool or
            dtype code, f for a float.

    Raises:
        BackendError: The library was built from older sources.
        RuntimeError: When called: the kernel reports a failure, which is a bug of ours.
    """
    library = _loaded()
    assert isinstance(library, Library), library
    try:
        function = getattr(library.handle, f"kl_{name}")
    except AttributeError as error:
        raise BackendError(
            f"the native kernels lack kl_{name}: they are older than this package's Python code. Install the package "
            "again, or run `python csrc/build.py` in a checkout."
        ) from error
    function.argtypes = [_TYPES[letter] for letter in signature]
    function.restype = ctypes.c_int64
    pointers = [index for index, letter in enumerate(signature) if letter == "p"]

    def call(*arguments: Any) -> None:
        given = list(arguments)
        for index in pointers:
            tensor = given[index]
            if isinstance(tensor, Tensor):
                given[index] = tensor.data_ptr()
        code = function(*given)
        if code != 0:
            raise RuntimeError(f"native kernel {name} failed with code {code} on {arguments}.")

    return call


def refuse(call: Call, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> list[str]:
    """Return why the native kernels cannot run a call: the device, the dtype, or that there are none."""
    reasons = []
    if call.device != "cpu":
        reasons.append(f"runs on the CPU, not on {call.device}")
    if call.dtype not in dtypes:
        reasons.append(f"computes {' and '.join(dtypes)}, not {call.dtype}")
    if not reasons and (reason := why_unavailable()):
        reasons.append(reason)
    return reasons
