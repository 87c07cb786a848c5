"""Configuration is read without torch; importing the package is cheap, starts no device and changes no setting."""

import json
import os
import subprocess
import sys

from support.source_tree import PACKAGE, SOURCE, modules

HEAVY = ("torch", "numpy", "matplotlib", "pyarrow", "tensorboard", "tokenizers", "safetensors", "triton")
# Plain data about a network, by file name; and the whole base layer.
TORCH_FREE = [
    m.name for m in modules() if m.name.startswith(f"{PACKAGE}.base") or m.path.stem in {"config", "presets", "keys"}
]


def run(code: str) -> str:
    """Run code in a fresh interpreter that finds the package, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after_each(names: list[str]) -> dict[str, list[str]]:
    """Import modules one after the other; return those after which something heavy was loaded first."""
    code = f"""
import importlib, json, sys
found, seen = {{}}, set()
for name in {names!r}:
    importlib.import_module(name)
    new = [h for h in {HEAVY!r} if h in sys.modules and h not in seen]
    seen.update(new)
    if new:
        found[name] = new
print(json.dumps(found))
"""
    return json.loads(run(code))


def test_base_and_config_modules_import_no_torch() -> None:
    assert TORCH_FREE
    assert loaded_after_each(TORCH_FREE) == {}


def test_the_check_for_heavy_imports_sees_one() -> None:
    assert "torch" in loaded_after_each(["json", "torch.version"])["torch.version"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after_each([PACKAGE]) == {}


def test_importing_the_operators_starts_no_device_and_changes_no_setting() -> None:
    ops = [m.name for m in modules() if m.name.startswith(f"{PACKAGE}.ops") and "triton" not in m.name]
    code = f"""
import importlib, json, torch
def settings():
    return [
        torch.cuda.is_initialized(), torch.get_num_threads(), str(torch.get_default_dtype()), torch.initial_seed(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        torch.random.get_rng_state().sum().item(), str(torch.get_default_device()),
    ]
torch.manual_seed(7)
before = settings()
for name in {ops!r}:
    importlib.import_module(name)
print(json.dumps([before, settings()]))
"""
    before, after = json.loads(run(code))
    assert after == before
    assert before[0] is False


def test_importing_reads_no_environment_variable() -> None:
    """A bad value must be an error of the call that reads it, not of the import."""
    bad = {"KIMI_LINEAR_DEBUG": "nonsense", "KIMI_LINEAR_BACKEND": "nonsense"}
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **bad}
    code = f"import {PACKAGE}, {PACKAGE}.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
