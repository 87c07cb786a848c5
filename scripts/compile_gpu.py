"""Compile every configuration of the Triton kernels for sm_90 without a GPU: registers, spills, shared memory.

python scripts/compile_gpu.py [--jobs N] [--write FILE] [WORD ...]

Only the calls whose name holds every word. Exits with 1 where a kernel spills or its shared memory does not fit.
"""

import argparse
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_table import calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A compiled kernel: the first call that needs it, what it is compiled for, and what it uses."""

    call: str
    kernel: str
    dtype: str
    sizes: str
    warps: int
    stages: int
    used: dict[str, int]

    @property
    def bad(self) -> bool:
        """Whether registers are spilled or shared memory does not fit."""
        return self.used["spilled"] > 0 or self.used["shared"] > SHARED_LIMIT

    def line(self) -> str:
        """Return the row as printed."""
        numbers = f"{self.warps:5} {self.used['registers']:9} {self.used['spilled']:7} {self.used['shared']:6}"
        return f"{self.kernel:16} {numbers}  {self.sizes}{'  BAD' if self.bad else ''}"


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options, signature, constants and hints that a launch of these arguments is compiled for.

    By triton's own binder, so they are a real launch's: what is constant, and what is known to be a multiple of 16.
    """
    backend, bind = binder(kernel)
    bound, specialisation, left = bind(*args, **options)
    return kernel._pack_args(backend, options, bound, specialisation, left)


@functools.cache
def binder(kernel: Any) -> tuple[Any, Any]:
    """Return the backend, and triton's function from arguments to what they are specialised on."""
    backend = make_backend(TARGET)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compile_launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, int]:
    """Compile one launch; return what the assembler says it uses."""
    chosen, signature, constants, hints = specialise(kernel, args, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=TARGET, options=chosen.__dict__)
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


def distinct(words: list[str]) -> list[tuple[str, Launch]]:
    """Return one launch of every distinct compilation, under the first call that needs it."""
    found: dict[str, tuple[str, Launch]] = {}
    for name, call in calls():
        if all(word in name for word in words):
            for launch in launches(call):
                chosen, *rest = specialise(*launch)
                key = f"{launch[0].__module__}.{launch[0].__name__} {chosen.num_warps} {chosen.num_stages} {rest}"
                found.setdefault(key, (name, launch))
    return list(found.values())


def compiled_row(name: str, launch: Launch) -> Row:
    """Compile one launch into its row."""
    kernel, args, options = launch
    chosen = specialise(*launch)[0]
    dtype = next((str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor)), "")
    # Sizes are 8 and more, flags less.
    plain = {n: v for n, v in options.items() if type(v) is int and v >= 8 and n not in ("num_warps", "num_stages")}
    sizes = " ".join(f"{n}={v}" for n, v in plain.items())
    used = compile_launch(*launch)
    return Row(name, kernel.__name__, dtype, sizes, chosen.num_warps, chosen.num_stages, used)


def markdown(rows: list[Row], words: list[str]) -> str:
    """Return the table; kernels that differ in flags alone share a line, with the most that any of them uses."""
    version = subprocess.run([str(PTXAS), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d[\d.]+)", version)
    bad = sum(row.bad for row in rows)
    lines = [
        "# Kernels compiled for sm_90",
        "",
        f"`python scripts/compile_gpu.py {' '.join(['--write FILE', *words])}`: triton {triton.__version__}, its "
        f"ptxas {release[1] if release else 'unknown'}. Compiled, not run: nothing here is a speed.",
        "",
        f"{len(rows)} compilations; {bad} spill registers or do not fit {SHARED_LIMIT:,} bytes of shared memory. "
        "A line holds the kernels that differ in flags alone (gates, erase keys, what is kept), and the most any uses.",
        "",
        "| kernel | dtype | sizes | kernels | warps | stages | registers | spilled | shared |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, int]]] = {}
    for row in rows:
        key = (row.call.split()[0], row.kernel, row.dtype, row.sizes, row.warps, row.stages)
        groups.setdefault(key, []).append(row.used)
    for (table, kernel, dtype, sizes, warps, stages), used in sorted(groups.items()):
        most = " | ".join(f"{max(x[n] for x in used):,}" for n in ("registers", "spilled", "shared"))
        lines.append(f"| {table} {kernel} | {dtype} | {sizes} | {len(used)} | {warps} | {stages} | {most} |")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(arguments: list[str]) -> int:
    """Compile the table, each compilation once; print it and, where asked to, write it."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for sm_90 without a GPU.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="take only the calls whose name holds every word")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    options = parser.parse_args(arguments)
    work = distinct(options.words)
    print(f"{'kernel':16} warps registers spilled shared  sizes", flush=True)
    rows: list[Row] = []
    # Processes are forked, and find their work in what they were forked from.
    global todo
    todo = work
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for row in pool.imap(row_of, range(len(work))):
            if not rows or rows[-1].call != row.call:
                print(f"-- {row.call}", flush=True)
            print(row.line(), flush=True)
            rows.append(row)
    bad = sum(row.bad for row in rows)
    print(f"{len(rows)} compilations, {bad} of them spill or do not fit", flush=True)
    if options.write:
        write(options.write, markdown(rows, options.words))
    return 1 if bad else 0


todo: list[tuple[str, Launch]] = []


def row_of(index: int) -> Row:
    """Compile the launch of that index."""
    return compiled_row(*todo[index])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
