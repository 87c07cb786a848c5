"""Imports go one way: base <- ops, text <- nn <- models <- checkpoint <- four siblings <- recipes and outwards."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from support.source_tree import PACKAGE, ROOT, Module, modules

# A layer may import layers of a smaller rank and itself, never another of its own rank.
RANKS = {
    "base": 0,
    "ops": 1,
    "text": 1,
    "nn": 2,
    "models": 3,
    "checkpoint": 4,
    "training": 5,
    "conversion": 5,
    "inference": 5,
    "evaluation": 5,
    "recipes": 6,
    "package": 7,  # kimi_linear/__init__.py: the public names, taken from any layer above
    "integrations": 8,
    "compat": 8,
    "cli": 9,
}
# Modules directly in the package, and the layer each belongs to.
SINGLE_MODULES = {"causal_lm": "recipes"}
# Layers that may import less than their rank allows.
ONLY = {"compat": {"ops", "base"}}
ENGINES = {
    "accelerate",
    "attn_gym",
    "cuequivariance",
    "datasets",
    "deepspeed",
    "fla",
    "flash_attn",
    "flashinfer",
    "liger_kernel",
    "lightning",
    "llama_cpp",
    "lm_eval",
    "mamba_ssm",
    "mlx",
    "mlx_lm",
    "peft",
    "sglang",
    "torchao",
    "torchtitan",
    "transformers",
    "trl",
    "vllm",
    "xllamacpp",
}
MODULES = modules()


def layer_of(name: str) -> str:
    """Return the layer of a dotted name of the package: of a module, or of something imported from one."""
    parts = name.split(".")
    if len(parts) == 1:
        return "package"
    if parts[1] in RANKS:
        return parts[1]
    return SINGLE_MODULES.get(parts[1], "package")


def violations(module: Module) -> list[str]:
    """Return one sentence for each import of a module that points the wrong way."""
    own = layer_of(module.name)
    found = []
    for imported in module.imports():
        if imported.name.split(".")[0] != PACKAGE:
            continue
        target = layer_of(imported.name)
        allowed = target == own or RANKS[target] < RANKS[own]
        if own in ONLY:
            allowed = target == own or target in ONLY[own]
        if not allowed:
            found.append(f"{module.path.name}:{imported.line}: {own} imports {imported.name} of {target}")
    return found


def parse(name: str, text: str) -> Module:
    return Module(name, Path(name.replace(".", "/") + ".py"), text)


def top_level(module: Module) -> set[str]:
    return {imported.name.split(".")[0] for imported in module.imports()}


def test_every_module_lies_in_a_declared_layer() -> None:
    first = {module.name.split(".")[1] for module in MODULES if "." in module.name}
    assert first <= RANKS.keys() | SINGLE_MODULES.keys()


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name)
def test_imports_point_left(module: Module) -> None:
    assert violations(module) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kimi_linear.base.env", "import kimi_linear.ops.registry"),
        ("kimi_linear.ops.conv.api", "from kimi_linear.nn import state"),
        ("kimi_linear.training.loop", "from kimi_linear.inference.sampler import sample"),
        ("kimi_linear.models.kimi_linear.model", "def f():\n    from kimi_linear.training import loop"),
        ("kimi_linear.models.kimi_linear.model", "from ...checkpoint import reader"),
        ("kimi_linear.nn.decoder", "from kimi_linear import models"),
        ("kimi_linear.nn.decoder", "from kimi_linear import KimiLinearForCausalLM"),
        ("kimi_linear.nn.decoder", "import importlib\nimportlib.import_module('kimi_linear.recipes')"),
        ("kimi_linear.inference.generate", "from kimi_linear.causal_lm import KimiLinearForCausalLM"),
        ("kimi_linear.compat.fla", "from kimi_linear.nn import state"),
        ("kimi_linear.integrations.x", "import kimi_linear.cli"),
        ("kimi_linear.text.chat", "from kimi_linear.checkpoint import hub"),
    ],
)
def test_the_import_check_sees_a_violation(name: str, text: str) -> None:
    assert len(violations(parse(name, text))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kimi_linear.recipes.demo", "from kimi_linear.causal_lm import KimiLinearForCausalLM"),
        ("kimi_linear.causal_lm", "from kimi_linear.inference import generate"),
        ("kimi_linear.compat.fla", "from kimi_linear.ops import kda"),
        ("kimi_linear.cli.train", "from kimi_linear import recipes"),
        ("kimi_linear.cli.compare", "from kimi_linear.integrations import x"),
        ("kimi_linear.nn.mixers.kda.layer", "from . import config\nfrom ...state import KDAState"),
    ],
)
def test_the_import_check_lets_pass_what_points_left(name: str, text: str) -> None:
    assert violations(parse(name, text)) == []


def test_third_party_engines_are_imported_only_by_integrations() -> None:
    inside = {m.name: top_level(m) & ENGINES for m in MODULES if layer_of(m.name) != "integrations"}
    assert {name: engines for name, engines in inside.items() if engines} == {}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += extra
    names = {requirement.split(">")[0].split("=")[0].split("[")[0].replace("-", "_") for requirement in declared}
    # Typer is built on click and hands its objects and exceptions out.
    names |= {"click"} if "typer" in names else set()
    allowed = set(sys.stdlib_module_names) | names | ENGINES | {PACKAGE, "triton"}
    undeclared = {m.name: sorted(top_level(m) - allowed) for m in MODULES}
    assert {name: packages for name, packages in undeclared.items() if packages} == {}


def guarded_packages(node: ast.Try) -> set[str]:
    """Return the top-level packages imported under a handler of ImportError."""
    if not any(handler.type is not None and "ImportError" in ast.dump(handler.type) for handler in node.handlers):
        return set()
    body = Module("guarded", Path("guarded.py"), "\n".join(ast.unparse(statement) for statement in node.body))
    return top_level(body)


def test_an_import_error_is_caught_around_one_package_only() -> None:
    """A handler around several packages would hide which one failed, and why."""
    guards = [(m.name, node) for m in MODULES for node in ast.walk(m.tree) if isinstance(node, ast.Try)]
    assert [f"{name}:{node.lineno}" for name, node in guards if len(guarded_packages(node)) > 1] == []
