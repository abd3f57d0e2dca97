"""The documentation site: all pages are in it, the reference has the public names, it builds, and fetches nothing."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import jaxpruner

ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"
DIRECTIVE = re.compile(r"^::: (\w+)\.(\w+)$", re.MULTILINE)


def nav_entries(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [entry for child in children for entry in nav_entries(child)]


def nav() -> list[str]:
    return nav_entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_every_page_is_in_the_navigation():
    pages = [
        *(
            ROOT / name
            for name in ("README.md", "WORKSPACE.md", "CHANGELOG.md", "CONTRIBUTING.md", "baselines/README.md")
        ),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/api/*.md"),
        *ROOT.glob("integrations/*/README.md"),
        *ROOT.glob("baselines/docs/*.md"),
    ]
    entries = [entry for entry in nav() if not entry.startswith("page:")]
    assert sorted(entries) == sorted(str(page.relative_to(ROOT)) for page in pages)


def test_the_reference_has_every_public_name_once():
    documented = [match.groups() for page in sorted(API.glob("*.md")) for match in DIRECTIVE.finditer(page.read_text())]
    public = [("jaxpruner", name) for name in jaxpruner.__all__]
    for init in sorted(ROOT.glob("integrations/*/src/*/__init__.py")):  # read: their hosts may be missing
        tree = ast.parse(init.read_text())
        names = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
        public += [(init.parent.name, name) for name in names]
    assert sorted(documented) == sorted(public)


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_fetches_nothing(tmp_path):
    if not MKDOCS.exists():
        pytest.skip("the packages of the site are missing: `make docs` installs them")
    built = subprocess.run(
        [MKDOCS, "build", "--strict", "--quiet", "--site-dir", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    assert [found for text in pages.values() for found in fetched.findall(text)] == []
    for entry in nav():
        if entry.startswith("page:"):
            page, _, heading = entry.removeprefix("page:").partition("#")
            html = tmp_path / page.replace("README.md", "index.html").replace(".md", ".html")
            assert f'id="{heading}"' in pages[html], entry
