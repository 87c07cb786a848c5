"""The library of native kernels: found, chosen by level, refused with a reason; no numbers here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kimi_linear.base.errors import BackendError, ConfigError
from kimi_linear.ops import native
from kimi_linear.ops.native import library
from kimi_linear.ops.registry import Call
from support import ops


def call(**changes: object) -> Call:
    return Call(**{"device": "cpu", "dtype": "float32", "needs_grad": False, **changes})  # type: ignore[arg-type]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Choose the library again under another environment, without touching the one in use."""

    def load(**variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return library._load()

    return load


@ops.NATIVE
@pytest.mark.parametrize("level", native.available_levels())
def test_every_level_loads_and_knows_its_width(fresh, level: str) -> None:
    found = fresh(KIMI_LINEAR_CPU_LEVEL=level)
    assert found.level == level
    lanes = found.handle.kl_vector_floats()
    assert lanes == {"generic": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[level]


@ops.NATIVE
def test_auto_takes_the_widest(fresh) -> None:
    assert fresh(KIMI_LINEAR_CPU_LEVEL="auto").level == native.available_levels()[-1]


def test_off_and_an_empty_directory_have_a_reason_each(fresh, tmp_path) -> None:
    assert "KIMI_LINEAR_CPU_LEVEL is off" in fresh(KIMI_LINEAR_CPU_LEVEL="off").reason
    built = fresh(KIMI_LINEAR_CPU_LEVEL="auto", KIMI_LINEAR_CPU_LIBRARIES=str(tmp_path))
    assert "install a C++ compiler" in built.reason


def test_a_level_that_is_not_there_is_an_error(fresh, tmp_path) -> None:
    with pytest.raises(ConfigError, match="can run none"):
        fresh(KIMI_LINEAR_CPU_LEVEL="avx2", KIMI_LINEAR_CPU_LIBRARIES=str(tmp_path))
    with pytest.raises(ConfigError, match="expected auto, off, generic"):
        fresh(KIMI_LINEAR_CPU_LEVEL="avx3")


def test_refusals_name_device_and_dtype() -> None:
    assert native.refuse(call(device="cuda"))[0] == "runs on the CPU, not on cuda"
    assert native.refuse(call(dtype="float64"))[0] == "computes float32 and bfloat16, not float64"


@ops.NATIVE
def test_a_fitting_call_is_not_refused() -> None:
    assert native.refuse(call()) == []


@ops.NATIVE
def test_without_kernels_the_operators_still_run() -> None:
    """A process of its own: the library is chosen once."""
    code = (
        "import torch; from kimi_linear.ops import kda, native; from kimi_linear.ops.registry import OPS\n"
        "q = torch.ones(1, 5, 2, 8); kda(q, q, q, -q, q[..., 0])\n"
        "assert native.active_level() is None"
    )
    environment = {**os.environ, "KIMI_LINEAR_CPU_LEVEL": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@ops.NATIVE
def test_kernels_run_on_as_many_threads_as_torch_has() -> None:
    """A process of its own, where torch has two threads."""
    code = (
        "import ctypes, torch; torch.set_num_threads(2)\n"
        "from kimi_linear.ops.native import library\n"
        "assert library._loaded().handle.kl_num_threads() == 2"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@ops.NATIVE
def test_a_failing_kernel_is_an_error() -> None:
    failing = native.kernel("test_code", "i")
    failing(0)
    with pytest.raises(RuntimeError, match="code 3"):
        failing(3)


@ops.NATIVE
def test_a_library_of_older_sources_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"lack kl_no_such_kernel.*csrc/build\.py"):
        native.kernel("no_such_kernel", "i")


@ops.NATIVE
def test_scratch_memory_nests() -> None:
    native.kernel("test_scratch", "ii")(4, 100)


@ops.NATIVE
def test_every_item_runs_once() -> None:
    total = torch.zeros(1, dtype=torch.int64)
    native.kernel("test_parallel_sum", "pi")(total, 1000)
    assert total.item() == 999 * 1000 // 2


@ops.NATIVE
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_large_blocks_go_back_to_the_system() -> None:
    """A process of its own, because what is resident must not depend on the tests before, and without sanitizers, which
    keep what is freed.
    """
    plain = {n: x for n, x in os.environ.items() if n not in ("LD_PRELOAD", "KIMI_LINEAR_CPU_LIBRARIES")}
    code = (
        "import torch; from kimi_linear.ops import native; native.active_level()\n"
        "def resident(): return int(next(x for x in open('/proc/self/status') if x.startswith('VmRSS')).split()[1])\n"
        "before = resident(); blocks = [torch.ones(2**25) for _ in range(3)]\n"
        "assert resident() - before > 380_000, 'the test sees memory in use'\n"
        "del blocks; assert resident() - before < 100_000"
    )
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="the system gives huge pages to nobody, or to everybody",
)
@pytest.mark.parametrize(("given", "expected"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_lie_on_huge_pages_unless_the_user_says_no(given: dict[str, str], expected: bool) -> None:
    code = (
        "import torch, kimi_linear; x = torch.ones(2**25)\n"
        "rollup = open('/proc/self/smaps_rollup').read()\n"
        "print(int(rollup.split('AnonHugePages:')[1].split()[0]) > 2**16)"
    )
    clean = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **given}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
