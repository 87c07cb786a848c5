"""Compile every configuration of the Triton kernels for sm_90 without a GPU; print registers, spills, shared memory.

python scripts/compile_gpu.py [WORD ...]    only the calls whose name holds every word; exits with 1 on a spill
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_table import calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Compile one launch; return what the assembler says it uses."""
    launch_options = {name: options[name] for name in ("num_warps", "num_stages", "maxnreg") if name in options}
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
