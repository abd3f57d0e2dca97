"""Who may import whom, and the shape of the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "jaxpruner"
CORE_MODULES = sorted(CORE.rglob("*.py"))
INTEGRATIONS = sorted(path.parent for path in (ROOT / "integrations").glob("*/pyproject.toml"))

STDLIB = sys.stdlib_module_names
ARRAYS = {"jax", "numpy", "optax"}
# What trainers of every host are written with.
HOST_TOOLS = {
    "absl",
    "clu",
    "etils",
    "flax",
    "gin",
    "haiku",
    "jaxtyping",
    "ml_collections",
    "tensorboardX",
    "tensorflow",
}
# What hosts are made of; `requests` is what FedJAX downloads with, PIL comes with Dopamine.
HOST_PACKAGES = {
    "t5x": {"t5x", "t5", "seqio", "orbax", "sacrebleu", "sentencepiece"},  # and text
    "dopamine": {"dopamine", "gymnasium", "PIL"},
    "fedjax": {"fedjax", "requests"},
    "scenic": {"scenic", "sklearn", "skimage"},  # and images
}
MAX_LINES = 300


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, at_run_time: bool = True) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported at run time) for each import below a node, also in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, at_run_time) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield child.module, at_run_time
            yield from ((f"{child.module}.{alias.name}", at_run_time) for alias in child.names)
        elif is_type_checking(child):
            yield from (found for part in child.body for found in imports(ast.Module([part], []), False))
            yield from (found for part in child.orelse for found in imports(ast.Module([part], []), at_run_time))
        else:
            yield from imports(child, at_run_time)


def packages(path: Path) -> dict[str, bool]:
    """The packages that a file imports, and whether any of it happens at run time."""
    found: dict[str, bool] = {}
    for module, at_run_time in imports(ast.parse(path.read_text())):
        package = module.partition(".")[0]
        found[package] = found.get(package, False) or at_run_time
    return {package: at_run_time for package, at_run_time in found.items() if package not in STDLIB}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_walker_sees_imports_in_functions_and_blocks():
    source = """
import jax.numpy as jnp
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import jaxtyping
else:
    import optax
def f():
    try:
        from flax import linen
    except ImportError:
        pass
"""
    found = dict(imports(ast.parse(source)))
    assert found["jax.numpy"]
    assert found["optax"]
    assert found["flax.linen"]
    assert not found["jaxtyping"]


@pytest.mark.parametrize("path", CORE_MODULES, ids=module_name)
def test_the_core_imports_jax_optax_and_numpy_only(path):
    found = packages(path)
    at_run_time = {package for package, is_used in found.items() if is_used}
    assert at_run_time <= ARRAYS | {"jaxpruner", "tqdm"}
    assert set(found) <= ARRAYS | {"jaxpruner", "tqdm", "jaxtyping"}


def test_modules_of_the_core_stand_on_floors():
    """No module imports, even indirectly, one that imports it."""
    known = {module_name(path) for path in CORE_MODULES}
    graph = {
        module_name(path): {
            module for module, at_run_time in imports(ast.parse(path.read_text())) if at_run_time and module in known
        }
        for path in CORE_MODULES
    }
    # A package's __init__ gathers what stands below it: `from jaxpruner import trees` means the module.
    for name, below in graph.items():
        below.discard("jaxpruner")
        below -= {name, name.rpartition(".")[0]}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", CORE_MODULES, ids=module_name)
def test_modules_of_the_core_are_short(path):
    """Lines of code: without blank lines, comments and docstrings."""
    source = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [
        line
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in docstrings
    ]
    assert len(code) <= MAX_LINES


def outer_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods, but for those in functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        else:
            yield from outer_functions(getattr(node, "body", []) + getattr(node, "orelse", []))


def lacks_annotations(function: ast.FunctionDef) -> bool:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    bare = [arg.arg for arg in named if arg is not None and arg.annotation is None]
    # What an __init__ returns is known.
    return bool(set(bare[:1]) - {"self", "cls"} or bare[1:]) or (
        function.returns is None and function.name != "__init__"
    )


def test_what_lacks_annotations():
    source = """
class A:
    def __init__(self, x: int): ...
    def f(self, *args): ...
    def g(self, *, x: int = 0) -> int:
        def inner(y): ...
if True:
    def h(x: int): ...
def i(x: int, **kwargs: int) -> int: ...
"""
    assert [f.name for f in outer_functions(ast.parse(source).body) if lacks_annotations(f)] == ["f", "h"]


@pytest.mark.parametrize("member", [CORE.parents[1], *INTEGRATIONS], ids=lambda member: member.name)
def test_annotations_are_whole(member):
    """But for closures, which are checked by what they are made of."""
    lacking = [
        f"{relative(path)}:{function.lineno}: {function.name}"
        for path in sorted((member / "src").rglob("*.py"))
        for function in outer_functions(ast.parse(path.read_text()).body)
        if lacks_annotations(function)
    ]
    assert lacking == []


def test_importing_the_core_starts_no_device_and_imports_no_framework():
    program = """
import sys
import jaxpruner
heavy = {"flax", "tensorflow", "haiku", "equinox", "torch", "orbax", "ml_collections"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import jax
try:
    jax.devices()
except RuntimeError:
    print("no device before this line")
"""
    # A backend that does not exist: to start it is an error.
    environment = os.environ | {"JAX_PLATFORMS": "nonexistent"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no device before this line"


def test_integrations_import_the_core_and_their_host_only():
    for folder in INTEGRATIONS:
        host = folder.name
        allowed = ARRAYS | HOST_TOOLS | {"jaxpruner", f"jaxpruner_{host}"} | HOST_PACKAGES.get(host, {host})
        for path in sorted((folder / "src").rglob("*.py")):
            assert set(packages(path)) <= allowed, relative(path)


def test_roots_are_no_packages():
    roots = [
        ROOT,
        ROOT / "core",
        ROOT / "integrations",
        ROOT / "baselines",
        ROOT / "docs",
        ROOT / "tools",
        *INTEGRATIONS,
    ]
    found = [root / "__init__.py" for root in roots] + [root / "src" / "__init__.py" for root in roots]
    found += sorted((ROOT / "tests").rglob("__init__.py"))
    assert [relative(path) for path in found if path.exists()] == []


def test_constraints_hold_versions_only():
    path = ROOT / "constraints.txt"
    if not path.exists():
        pytest.skip("no constraints.txt")
    lines = path.read_text().splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.+!]*", line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
