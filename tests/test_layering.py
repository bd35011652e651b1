"""Holds the one direction of imports: which part of the package may know of which other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "rewriter").rglob("*.py"))
NAMES = [file.relative_to(ROOT).as_posix() for file in FILES]
GUEST_PACKAGES = {"transformers", "peft", "bitsandbytes", "accelerate", "datasets"}


def imports(file: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, ``from a import b`` as both ``a`` and ``a.b``.

    With ``at_import_only``, those inside functions and ``if TYPE_CHECKING:`` are left out.
    """
    package = ".".join(file.relative_to(ROOT).with_suffix("").parts[:-1])
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if at_import_only and _runs_later(node):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, origin]).rstrip(".")
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return True
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_no_file_imports_the_libraries_whose_models_it_rewrites(file):
    assert not [name for name in imports(file) if name.partition(".")[0] in GUEST_PACKAGES]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_triton_is_imported_only_where_a_kernel_is_defined_or_launched(file):
    if file.stem.endswith("_triton"):
        return
    early = [n for n in imports(file, at_import_only=True) if within(n, "triton") or n.endswith("_triton")]
    assert not early


@pytest.mark.parametrize(
    "file", sorted((ROOT / "rewriter/kernels").rglob("*.py")), ids=lambda file: file.name
)
def test_kernels_import_nothing_of_the_rest(file):
    assert not [n for n in imports(file) if n.startswith("rewriter.") and not within(n, "rewriter.kernels")]


@pytest.mark.parametrize("name", ["signatures", "quantised", "canonical", "pattern", "match", "search"])
def test_the_matcher_knows_neither_passes_nor_kernels(name):
    found = imports(ROOT / f"rewriter/{name}.py")
    assert not [n for n in found if within(n, "rewriter.passes", "rewriter.kernels")]


@pytest.mark.parametrize(
    "file",
    [file for file in sorted((ROOT / "rewriter/passes").glob("*.py")) if file.name != "__init__.py"],
    ids=lambda file: file.name,
)
def test_passes_do_not_import_each_other(file):
    others = [
        n for n in imports(file) if within(n, "rewriter.passes") and n != f"rewriter.passes.{file.stem}"
    ]
    assert not others


@pytest.mark.parametrize("file", sorted((ROOT / "rewriter/memory").rglob("*.py")), ids=lambda file: file.name)
def test_the_memory_planner_knows_no_pass(file):
    assert not [n for n in imports(file) if within(n, "rewriter.passes")]


def test_import_needs_no_triton_and_loads_no_heavy_module():
    program = """
import sys
sys.modules["triton"] = None
import torch
before = set(sys.modules)
import rewriter
print(*sorted(set(sys.modules) - before))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    heavy = {"transformers", "peft", "bitsandbytes", "datasets", "pandas", "scipy", "matplotlib"}
    slow_parts_of_torch = ("torch._inductor", "torch._dynamo", "torch._functorch")
    loaded = run.stdout.split()
    assert not [n for n in loaded if n.partition(".")[0] in heavy or within(n, *slow_parts_of_torch)]
