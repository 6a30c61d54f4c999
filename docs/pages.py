"""MkDocs hook: pages made from files outside docs/ and from the code.

The README is the home page; the tutorials' scripts become Markdown; recipes, settings and the list of public
names are read from the package, so that they cannot differ from it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import dxmi_ext
from dxmi_ext import tasks
from dxmi_ext.engine.settings import Config, Key

ROOT = Path(__file__).parents[1]
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_PAGES |= {"SECURITY.md": "security.md"}

_RECIPES = """\
# Recipes

`dxmi train RECIPE` runs a recipe; settings follow as `key=value`. A copy of a yaml below, changed, is a
recipe of your own: `dxmi train my.yaml`. Trained networks ship with the package for {shipped}:
`dxmi sample NAME output=grid.png`.
"""
_SETTINGS = """\
# Settings

Settings of each task, with the defaults of the task; a recipe may have others, which
`dxmi train RECIPE --help` shows.
"""
_NAMES = """\
# API reference

The public interface is what `dxmi_ext` exports and the modules of this reference. Everything else is internal
and may change without notice. Names are imported on first use: `import dxmi_ext.ops` requires torch and
numpy only, training also safetensors and tqdm, and `fit` PyYAML (`pip install 'dxmi_ext[train]'`). The
package has type information (PEP 561).

| Name | |
|---|---|
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {target: _moved(ROOT / source) for source, target in _PAGES.items()}
    for script in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        pages[f"tutorials/{script.stem}.md"] = tutorial(script.read_text(encoding="utf-8"), script.name)
    pages |= {"recipes.md": recipes(), "settings.md": settings(), "reference/index.md": public_names()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links with a file's path as text get the title of its page; results have room for wide tables; a line
    ``[settings: module.Class]`` becomes a table."""
    if page.file.src_uri.startswith("results/"):
        page.meta["hide"] = ["toc"]
    titles = dict(_titles(config.nav or []))
    folder = PurePosixPath(page.file.src_uri).parent

    def titled(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match[2].partition("#")[0])
        return f"[{titles.get(target, match[1])}]({match[2]})"

    markdown = re.sub(r"\]\(tutorials/(\w+)\.py\)", r"](tutorials/\1.md)", markdown)
    markdown = re.sub(r"^\[settings: ([\w.]+)\.(\w+)\]$", _table_of, markdown, flags=re.MULTILINE)
    return re.sub(r"\[((?:docs/)?[\w/.-]+(?:\.md|\.py)|docs/[\w/-]+)\]\(([^):]+)\)", titled, markdown)


def _table_of(match: re.Match[str]) -> str:
    """The keys of a `Settings` class."""
    return "\n".join(_rows(getattr(importlib.import_module(match[1]), match[2]).keys()))


def _titles(nav: list[Any]) -> Iterator[tuple[str, str]]:
    """The titles of pages in the navigation, by path."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, list):
                yield from _titles(target)
            else:
                yield target, title


def _moved(path: Path) -> str:
    """A page of the repository's root, with its links as they are from docs/."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/tutorials/(\w+)\.py\)", r"](tutorials/\1.md)", text)
    text = text.replace("](docs/", "](")
    for source, target in _PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text


def tutorial(script: str, name: str) -> str:
    """A script in jupytext's percent format as Markdown."""
    cells = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    shown = []
    for kind, cell in zip(cells[1::2], cells[2::2], strict=True):
        if "[markdown]" in kind:
            shown.append(re.sub(r"^# ?", "", cell.strip(), flags=re.MULTILINE))
        else:
            shown.append(f"```python\n{cell.strip()}\n```")
    title, _, text = shown[0].partition("\n")
    source = f"*This page is a script, which the tests run: `python docs/tutorials/{name}`.*"
    return "\n\n".join([title, source, text.strip(), *shown[1:]]) + "\n"


def recipes() -> str:
    """All recipes that ship with the package, and their settings."""
    lines = [_RECIPES.format(shipped=", ".join(f"`{name}`" for name in tasks.shipped()))]
    for name, path in tasks.recipes().items():
        lines += ["", f"## {name}", "", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Every setting of every task, as tables."""
    lines = [_SETTINGS]
    for name in tasks.tasks():
        task = tasks.load(name)
        named = [recipe for recipe, path in tasks.recipes().items() if path.parent.name == name]
        lines += ["", f"## Task {name}", "", f"Recipes: {', '.join(f'`{recipe}`' for recipe in named)}."]
        lines += [*_tables(task.Config), "", f"### `dxmi evaluate` of {name}", ""]
        lines += _rows(task.EvaluateSettings.keys())
    return "\n".join(lines) + "\n"


def _tables(cls: type[Config]) -> Iterator[str]:
    groups: dict[str, dict[str, Key]] = {}
    for name, key in cls.keys().items():
        groups.setdefault(key.heading, {})[name] = key
    for heading, keys in groups.items():
        yield from ("", f"### {cls().run.task}: {heading}", "", *_rows(keys))


def _rows(keys: dict[str, Key]) -> list[str]:
    rows = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    return rows + [_row(name, key) for name, key in keys.items()]


def _row(name: str, key: Key) -> str:
    kinds = typing.get_args(key.type) or (key.type,)
    kind = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
    default = key.default if isinstance(key.default, str) else json.dumps(key.default)
    choices = key.metadata["choices"]
    bounds = ((">=", "minimum"), ("<=", "maximum"), ("<", "below"))
    limits = [f"{sign} {key.metadata[b]}" for sign, b in bounds if key.metadata[b] is not None]
    meaning = key.metadata["help"]
    if choices:
        meaning += f" ({', '.join(f'`{choice}`' for choice in choices)})"
    if limits:
        meaning += f" ({', '.join(limits)})"
    cells = [f"`{name}`", kind, f"`{default}`" if default else "", meaning.replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def public_names() -> str:
    """The names in ``dxmi_ext.__all__``, with links to their reference."""
    lines = []
    for name in sorted(dxmi_ext.__all__, key=str.lower):
        found: Any = getattr(dxmi_ext, name)
        module = inspect.ismodule(found)
        home = found.__name__ if module else f"{found.__module__}.{name}"
        summary = (inspect.getdoc(found) or "").split("\n\n")[0]
        summary = " ".join(summary.replace("|", "\\|").split())
        lines.append(f"| [`{name}`][{home}] | {summary} |\n")
    return _NAMES + "".join(lines)
