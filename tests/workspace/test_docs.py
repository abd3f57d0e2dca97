"""Docstrings of everything public, and the code of the documentation, run as a reader would."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import inspect
import pkgutil
import re
import shlex
import warnings
from pathlib import Path

import pytest
import typer

import jaxpruner
from jaxpruner_baselines import cli, registry, suite

ROOT = Path(__file__).parents[2]
MODULES = ["jaxpruner", *(found.name for found in pkgutil.walk_packages(jaxpruner.__path__, "jaxpruner."))]
# Those of integrations that have examples, and their hosts.
HOSTED = [
    (path.relative_to(ROOT).parts[1], ".".join(path.relative_to(ROOT).with_suffix("").parts[3:]))
    for path in sorted((ROOT / "integrations").glob("*/src/**/*.py"))
    if ">>> " in path.read_text()
]
# Integrations all of whose public functions and classes have an example.
EXEMPLIFIED = ["dopamine", "fedjax", "keras", "scenic", "t5x"]
# What the tests of an integration ask for beside its host.
BESIDE = {"scenic": ("clu",), "t5x": ("airio", "jestimator", "seqio")}
PAGES = [
    *[path for path in (ROOT / "README.md", ROOT / "core" / "README.md") if path.exists()],
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "integrations").glob("*/README.md")),
    ROOT / "baselines" / "README.md",
    *sorted((ROOT / "baselines" / "docs").glob("*.md")),
]
PAGES_WITHOUT_CODE = [
    *[ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "WORKSPACE.md")],
    *sorted((ROOT / ".github").rglob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, code) of the python blocks that are to be run: not those marked `python no-run`."""
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in FENCE.finditer(text)
        if match[1].split() == ["python"]
    ]


def own_docstring(thing) -> str:
    doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    # Dataclasses and named tuples without one show their signature.
    return "" if not doc or doc.startswith(f"{getattr(thing, '__name__', '')}(") else doc.strip()


def public_things():
    for name in jaxpruner.__all__:
        yield f"jaxpruner.{name}", getattr(jaxpruner, name)
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield module_name, module
        for name, thing in vars(module).items():
            is_own = getattr(thing, "__module__", None) == module_name
            if not name.startswith("_") and is_own and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{module_name}.{name}", thing


def documented(thing) -> bool:
    return inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isfunction(thing)


def test_everything_public_has_a_docstring():
    assert [name for name, thing in public_things() if documented(thing) and not own_docstring(thing)] == []


def test_methods_of_public_classes_have_docstrings():
    classes = {name: thing for name in jaxpruner.__all__ if inspect.isclass(thing := getattr(jaxpruner, name))}
    missing = [
        f"{class_name}.{name}"
        for class_name, thing in classes.items()
        for name, member in vars(thing).items()
        # An override may inherit the docstring of what it overrides.
        if inspect.isfunction(member) and not name.startswith("_") and not inspect.getdoc(getattr(thing, name))
    ]
    assert missing == []


def test_all_names_exist_and_are_listed_once():
    assert len(set(jaxpruner.__all__)) == len(jaxpruner.__all__)
    assert all(hasattr(jaxpruner, name) for name in jaxpruner.__all__)


def number_of_examples(docstring: str | None) -> int:
    return len(doctest.DocTestParser().get_examples(docstring or ""))


def test_exported_functions_have_an_example():
    functions = {name: thing for name in jaxpruner.__all__ if inspect.isfunction(thing := getattr(jaxpruner, name))}
    assert functions
    assert [name for name, function in functions.items() if not number_of_examples(function.__doc__)] == []


def definition(package: Path, module: str, name: str) -> ast.AST | None:
    """Where a name of an integration is from, read, since its host may be missing; None if from elsewhere."""
    for node in ast.parse((package / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any(name in (alias.name, alias.asname) for alias in node.names):
            origin = (node.module or "").partition(f"{package.name}.")[2]
            return definition(package, origin, name) if origin else None
    return None


@pytest.mark.parametrize("host", EXEMPLIFIED)
def test_what_an_integration_exports_has_an_example(host):
    package = ROOT / "integrations" / host / "src" / f"jaxpruner_{host}"
    init = ast.parse((package / "__init__.py").read_text())
    names = next(ast.literal_eval(node.value) for node in init.body if isinstance(node, ast.Assign))
    # What it passes on from the core has its example there.
    own = {name: node for name in names if (node := definition(package, "__init__", name))}
    assert own
    assert [name for name, node in own.items() if not number_of_examples(ast.get_docstring(node))] == []


def skip_without(host: str) -> None:
    """Skips where the tests of an integration do."""
    if missing := [name for name in (host, *BESIDE.get(host, ())) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")


@pytest.fixture
def registry_is_restored():
    """Algorithms that examples register are not known to what runs after them."""
    before = dict(jaxpruner.ALGORITHM_REGISTRY)
    yield
    jaxpruner.ALGORITHM_REGISTRY.clear()
    jaxpruner.ALGORITHM_REGISTRY.update(before)


def run_examples(module) -> int:
    """Runs the examples of a module, all that are written in it, and returns how many they are."""
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, documented)]
    assert attempted == sum(number_of_examples(ast.get_docstring(node)) for node in nodes)
    return attempted


@pytest.mark.slow
@pytest.mark.parametrize("module_name", MODULES)
def test_doctests(module_name, registry_is_restored):
    run_examples(importlib.import_module(module_name))


@pytest.mark.slow
@pytest.mark.parametrize(("host", "module_name"), HOSTED)
def test_doctests_of_integrations(host, module_name):
    skip_without(host)
    warnings.simplefilter("ignore")  # hosts warn of one another's old ways; pytest puts its filters back
    assert run_examples(importlib.import_module(module_name)) > 0


def test_blocks_to_run():
    text = "a\n```python\nx = 1\n```\n```python no-run\nnever\n```\n```sh\nls\n```\n```python\ny = 2\n```\n"
    assert blocks(text) == [(3, "x = 1\n"), (12, "y = 2\n")]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_of_a_page(page, tmp_path, monkeypatch, registry_is_restored):
    """The blocks of a page share one namespace, in order. A page of an integration needs its host."""
    if "integrations" in page.parts:
        skip_without(page.parent.name)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem.replace("-", "_")}
    if "integrations" in page.parts or "from tunix" in page.read_text():
        warnings.simplefilter("ignore")  # hosts warn of one another's old ways; pytest puts its filters back
    for line, code in blocks(page.read_text()):
        # Line numbers of tracebacks are those of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", [*PAGES, *PAGES_WITHOUT_CODE], ids=page_name)
def test_links_of_a_page_lead_somewhere(page):
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text()) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


COMMAND = re.compile(r"^(?:\.venv/bin/)?jaxpruner-baselines ([^#\n`]*)|`jaxpruner-baselines ([^`]*)`", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_of_a_page_are_what_the_command_line_takes(page):
    """Commands, options, baselines, presets and tasks exist; nothing is run."""
    group = typer.main.get_command(cli.app)
    for match in COMMAND.finditer(page.read_text()):
        name, *arguments = shlex.split(match[1] or match[2])
        if not arguments or "NAME" in arguments or "--help" in arguments:
            continue
        given = group.commands[name].make_context(name, list(arguments)).params
        if given.get("name", "suite") != "suite":
            assert given["name"] in registry.MODULES
            with contextlib.suppress(ImportError):  # its host is missing
                presets = registry.get(given["name"]).presets
                assert given.get("preset") in (None, "PRESET", *presets), arguments
        if given.get("tasks", "all") != "all":
            assert set(given["tasks"].split(",")) <= set(suite.TASKS)
