"""Files stay under 500 lines and functions under 60, kernels under 800 and 150. A ratchet: the lists only shrink."""

from pathlib import Path

import pytest

from support.source_tree import Module, modules

FILE_LIMIT, KERNEL_FILE_LIMIT = 500, 800
FUNCTION_LIMIT, KERNEL_FUNCTION_LIMIT = 60, 150
# Name -> lines it had when it was let pass, with the reason beside it. A larger size fails, and so does an entry that
# has become unnecessary.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


def is_kernel(module: Module) -> bool:
    return "triton" in module.name.split(".")


def long_files(found: list[Module]) -> dict[str, int]:
    """Return the files over their limit, with their lines."""
    sizes = {m.name: (len(m.text.splitlines()), KERNEL_FILE_LIMIT if is_kernel(m) else FILE_LIMIT) for m in found}
    return {name: lines for name, (lines, limit) in sizes.items() if lines > limit}


def long_functions(found: list[Module]) -> dict[str, int]:
    """Return the functions over their limit, with their lines."""
    return {
        f"{m.name}:{function.name}": function.length
        for m in found
        for function in m.functions()
        if function.length > (KERNEL_FUNCTION_LIMIT if is_kernel(m) else FUNCTION_LIMIT)
    }


@pytest.mark.parametrize(
    ("sizes", "allowed"),
    [(long_files(modules()), LONG_FILES), (long_functions(modules()), LONG_FUNCTIONS)],
    ids=["files", "functions"],
)
def test_nothing_is_longer_than_its_limit_or_what_was_let_pass(sizes: dict[str, int], allowed: dict[str, int]) -> None:
    grown = {name: lines for name, lines in sizes.items() if lines > allowed.get(name, 0)}
    assert grown == {}, "split these"
    assert allowed.keys() <= sizes.keys(), "delete the entries that are no longer needed"


def test_the_size_check_counts_code_without_the_docstring(tmp_path: Path) -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(58))
    fits = f'def fits():\n    """One\n    two."""\n{body}\n    return x0\n'
    longer = f"def longer():\n{body}\n    y = 0\n    return y\n"
    (tmp_path / "a.py").write_text(f"{fits}\n\n{longer}")
    found = modules(tmp_path)
    assert {f.name: f.length for f in found[0].functions()} == {"fits": 60, "longer": 61}
    assert long_functions(found) == {"a:longer": 61}
