"""Compile the kernels: one shared library for each instruction level, from the same sources.

    python csrc/build.py                          every level this compiler can target, into the source tree
    python csrc/build.py --levels avx2 --output build/lib --only "norm*" --sanitize address,undefined

Installing the package runs this too (setup.py). The libraries know nothing of Python or torch, so any compiler with
C++17 will do and nothing needs to be installed first. Needs the standard library alone.
"""

import argparse
import fnmatch
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LIBRARIES = SOURCES.parent / "src" / "kimi_linear" / "_lib"
OBJECTS = SOURCES.parent / "build" / "native"

# GCC mistakes undefined operands inside its own AVX-512 header for uninitialised variables: that warning is off.
# Contraction to fused multiply-adds and no errno or traps; nothing that changes what an operation means.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-uninitialized",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# Flags of each level, narrowest first. Off x86 the compiler's own vectors are all there is.
LEVELS: dict[str, list[str]] = {
    "generic": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
}


class BuildError(Exception):
    """No compiler, or it failed; the message is what to tell a person."""


@dataclass(frozen=True)
class Compiler:
    """The command that compiles C++, and what it calls itself."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """Return the compiler of $CXX, else the first of c++, g++ and clang++ that runs."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if done.returncode == 0:
            return Compiler(tuple(command), done.stdout.splitlines()[0])
    raise BuildError(f"no C++ compiler: {wanted or 'c++, g++ and clang++'} cannot be run; install g++ or set CXX.")


def levels_here() -> list[str]:
    """Return the levels that can be built for this processor family."""
    return list(LEVELS) if platform.machine().lower() in {"x86_64", "amd64"} else ["generic"]


def library_name(level: str) -> str:
    """Return the file name of a level's library."""
    return f"libkimi_linear_{level}.so"


def build(
    output: Path = LIBRARIES,
    levels: Sequence[str] | None = None,
    only: Sequence[str] = ("*",),
    sanitize: str = "",
    objects: Path = OBJECTS,
) -> list[Path]:
    """Compile what has changed and link; return the libraries.

    Args:
        output: Where the libraries go.
        levels: Which levels; default: all of this processor family.
        only: File name patterns of the sources to take; runtime.cpp always is.
        sanitize: For -fsanitize, "address,undefined" for instance.
        objects: Where object files are kept between builds, under the hash of all that made them.
    """
    compiler = find_compiler()
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    if sanitize:
        extra += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    sources = [
        path
        for path in sorted(SOURCES.glob("*.cpp"))
        if path.name == "runtime.cpp" or any(fnmatch.fnmatch(path.name, pattern) for pattern in only)
    ]
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))
    objects.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    chosen = levels_here() if levels is None else list(levels)
    jobs = [(level, source) for level in chosen for source in sources]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        made = list(pool.map(lambda job: _compile(compiler, *job, extra, headers, objects), jobs))
    libraries = []
    for level in chosen:
        parts = [path for (of, _), path in zip(jobs, made, strict=True) if of == level]
        libraries.append(_link(compiler, parts, output / library_name(level), extra))
    return libraries


def _compile(compiler: Compiler, level: str, source: Path, extra: list[str], headers: bytes, objects: Path) -> Path:
    """Compile one source for one level, unless the same was compiled before."""
    command = [*compiler.command, *FLAGS, *LEVELS[level], *extra]
    made_of = "\0".join([*command, compiler.version]).encode() + headers + source.read_bytes()
    target = objects / f"{source.stem}-{level}-{hashlib.sha256(made_of).hexdigest()[:16]}.o"
    if not target.exists():
        _run([*command, "-c", str(source), "-o", str(target)], target)
    return target


def _link(compiler: Compiler, objects: list[Path], target: Path, extra: list[str]) -> Path:
    static = [] if "-fsanitize" in " ".join(extra) else ["-static-libstdc++", "-static-libgcc"]
    if "clang" in compiler.version:
        static = []
    _run([*compiler.command, "-shared", *extra, *static, *map(str, objects), "-o", str(target)], target)
    return target


def _run(command: list[str], target: Path) -> None:
    """Run a command whose last argument is its output; the output appears whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    done = subprocess.run([*command[:-1], str(temporary)], capture_output=True, text=True)
    if done.returncode != 0:
        temporary.unlink(missing_ok=True)
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)
    temporary.replace(target)


def main() -> int:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=LIBRARIES, help="where the libraries go")
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), help="which levels (default: all)")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the sources to take")
    parser.add_argument("--sanitize", default="", help="sanitizers, such as address,undefined")
    arguments = parser.parse_args()
    try:
        libraries = build(arguments.output, arguments.levels, arguments.only, arguments.sanitize)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for library in libraries:
        print(f"{library} ({library.stat().st_size / 1e3:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
