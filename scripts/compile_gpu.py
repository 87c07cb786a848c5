"""Compile every configuration of the Triton kernels for sm_90 without a GPU; print registers, spills, shared memory.

python scripts/compile_gpu.py [WORD ...]    only the calls whose name holds every word; exits with 1 on a spill
"""

import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kimi_linear.ops.delta_rule.triton import decode, launch

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Many heads and few, long; and short.
SIZES = ((96, 8192), (4, 8192), (4, 32), (4, 16))
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Compile one launch; return what the assembler says it uses."""
    launch_options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options=launch_options)
    return {**resources(compiled.asm["ptx"]), "shared": compiled.metadata.shared}


def resources(ptx: str) -> dict[str, int]:
    """Return registers and spilled bytes of a program, from the assembler."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name", "sm_90a", "-o", "/dev/null", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    assert registers is not None, text
    return {"registers": int(registers[1]), "spilled": sum(map(int, spills))}


def launches(call: Callable[[], Any]) -> list[Launch]:
    """Return every kernel launch of a call on meta tensors, without making it."""
    seen: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((self, args, options))

    run, triton.runtime.JITFunction.run = triton.runtime.JITFunction.run, record
    try:
        call()
    finally:
        triton.runtime.JITFunction.run = run
    return seen


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def core_inputs(H: int, T: int, K: int, V: int, dtype: torch.dtype) -> launch.Inputs:
    """Return inputs of `kda_core` without memory."""
    q, k, v, gate, beta = (empty(T, H, *n, dtype=dtype) for n in ((K,), (K,), (V,), (K,), ()))
    return launch.Inputs(q, k, None, v, gate, beta, empty(H), empty(H * K), None, K**-0.5, raw=True)


def variants(H: int, T: int, K: int, V: int, dtype: torch.dtype) -> dict[str, launch.Inputs]:
    """Return inputs of `kda_core` and of every other kind of call, by name."""
    core = core_inputs(H, T, K, V, dtype)
    plain = dataclasses.replace(core, g=empty(T, H, K), A_log=None, dt_bias=None, raw=False)
    scalar = dataclasses.replace(plain, g=empty(T, H))
    free = dataclasses.replace(plain, beta=None, erase=empty(T, H, K, dtype=dtype), initial=empty(1, H, K, V))
    return {
        "core": core,
        "core bounded": dataclasses.replace(core, lower_bound=-5.0, beta_scale=2.0),
        "kda": plain,
        "scalar": scalar,
        "erase": free,
        "erase pre": dataclasses.replace(free, pre=True),
        "scalar erase pre": dataclasses.replace(free, g=empty(T, H), pre=True),
        "no erase": dataclasses.replace(free, erase=None),
    }


def both_ways(inputs: launch.Inputs, T: int) -> None:
    """Run forward and backward."""
    o, final = launch.forward(inputs, None, 1, T)
    launch.backward(inputs, None, 1, T, torch.empty_like(o), final)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return every call of the table by name. Kinds other than `kda_core` come at two sizes."""
    for D in (128, 64, 256):
        for dtype in DTYPES:
            for H, T in SIZES:
                name = f"D={D} {str(dtype)[6:]} H={H} T={T}"
                few = T == 8192 and dtype != torch.float16
                for kind, x in variants(H, T, D, D, dtype).items():
                    if kind == "core" or few:
                        yield f"{name} {kind}", lambda x=x, T=T: both_ways(x, T)
            for N in (1, 256):
                for kind, x in variants(8, N, D, D, dtype).items():
                    pool, slots = empty(N, 8, D, D), empty(N, dtype=torch.int32)
                    yield (
                        f"D={D} {str(dtype)[6:]} N={N} decode {kind}",
                        lambda x=x, p=pool, s=slots: decode.decode(x, p, s),
                    )


def describe(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a compilation depends on, more or less: types, and what is constant."""
    types = tuple(x.dtype if isinstance(x, torch.Tensor) else type(x) for x in args)
    return types, tuple(sorted(options.items()))


def main(words: list[str]) -> int:
    """Compile the table and print it, each compilation once, under the first call that needs it."""
    bad, done = 0, set()
    print(f"{'kernel':16} warps registers spilled shared  tiles", flush=True)
    for name, call in calls():
        if not all(word in name for word in words):
            continue
        fresh = [(k, a, o) for k, a, o in launches(call) if (k.__name__, *describe(a, o)) not in done]
        if fresh:
            print(f"-- {name}", flush=True)
        for kernel, args, options in fresh:
            if (key := (kernel.__name__, *describe(args, options))) in done:
                continue
            done.add(key)
            used = compile_launch(kernel, args, options)
            wrong = used["spilled"] > 0 or used["shared"] > SHARED_LIMIT
            bad += wrong
            sizes = " ".join(f"{n}={options[n]}" for n in ("C", "B", "BV") if n in options)
            numbers = f"{options['num_warps']:5} {used['registers']:9} {used['spilled']:7} {used['shared']:6}"
            print(f"{kernel.__name__:16} {numbers}  {sizes}{'  BAD' if wrong else ''}", flush=True)
    print(f"{len(done)} compilations, {bad} of them spill or do not fit", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
