"""Hooks of mkdocs.yml: pages from where they lie in the repository, links with anchors in the navigation, and formulas.

No page is copied: each is shown at its own path, so that relative links are the same on a code host and in the site.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from markdown import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.structure.nav import Link

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# In the navigation, a page that has an entry of its own, at one of its headings: `page:docs/faq.md#heading`.
AT_HEADING = "page:"


def on_config(config):
    init = ast.parse((ROOT / "core" / "src" / "jaxpruner" / "__init__.py").read_text())
    public = next(
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    config.markdown_extensions.append(Docstrings(public))
    return config


def on_files(files, config):
    """Adds the pages of the navigation, all that they link to or show, and so on."""
    waiting = _paths(config.nav)
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            waiting += _linked(path) if path.endswith(".md") else []
    return files


def on_nav(nav, files, **_):
    waiting = list(nav.items)
    while waiting:
        item = waiting.pop()
        waiting += item.children or []
        if isinstance(item, Link) and item.url.startswith(AT_HEADING):
            path, _, heading = item.url.removeprefix(AT_HEADING).partition("#")
            if (file := files.get_file_from_path(path)) is None:
                raise PluginError(f"mkdocs.yml: nav has {item.url}, and there is no such page.")
            item.url = f"{file.url}#{heading}"
    return nav


def on_page_markdown(markdown, **_):
    """Code that tests do not run looks like code that they do."""
    return re.sub(r"^```python no-run$", "```python", markdown, flags=re.MULTILINE)


def _paths(nav) -> list[str]:
    if isinstance(nav, str):
        return [] if nav.startswith(AT_HEADING) else [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [path for child in children for path in _paths(child)]


def _linked(page: str) -> list[str]:
    text = FENCE.sub("", (ROOT / page).read_text())
    targets = (unquote(target).partition("#")[0] for target in LINK.findall(text) if "://" not in target)
    return [os.path.normpath(Path(page).parent / target) for target in targets if target]


class Docstrings(Extension):
    """What docstrings have of reStructuredText: formulas, which become MathML, and names of other things."""

    def __init__(self, public: list[str]):
        super().__init__()
        self.public = public

    def extendMarkdown(self, md):  # noqa: N802 (a name of Markdown's)
        md.preprocessors.register(_Roles(md, self.public), "docstrings", 24)  # after code is out of the way


class _Roles(Preprocessor):
    DISPLAY = re.compile(r"^([ ]*)\.\. math::[ ]*(.*(?:\n\1[ ]+\S.*)*)", re.MULTILINE)
    INLINE = re.compile(r":math:`([^`]+)`([.,:;)]*)")
    NAME = re.compile(r":(?:func|class|meth):`(?:jaxpruner\.)?([^`]+)`")

    def __init__(self, md, public):
        super().__init__(md)
        self.public = frozenset(public)

    def run(self, lines):
        text = self.DISPLAY.sub(lambda match: match[1] + self._formula("div", match[2], "block"), "\n".join(lines))
        text = self.INLINE.sub(lambda match: self._formula("span", match[1], "inline", match[2]), text)
        return self.NAME.sub(self._reference, text).split("\n")

    def _formula(self, tag, latex, display, punctuation=""):
        formula = convert(" ".join(latex.split()), display=display)
        return self.md.htmlStash.store(f'<{tag} class="formula">{formula}{punctuation}</{tag}>')

    def _reference(self, match):
        name = match[1]
        return f"[`{name}`][jaxpruner.{name}]" if name in self.public else f"`{name}`"
