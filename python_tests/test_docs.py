"""The documentation covers every public name, tutorial and experiment."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import dxmi_ext
from dxmi_ext.reproduce.command import EXPERIMENTS

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_in_the_reference() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    listed = set(re.findall(r"^::: (\S+)", "\n".join(pages), re.MULTILINE))
    for name in dxmi_ext.__all__:
        found = getattr(dxmi_ext, name)
        home = found.__name__ if inspect.ismodule(found) else f"{found.__module__}.{name}"
        assert {home, home.rpartition(".")[0]} & listed, f"{name} is not in docs/reference"


def test_every_tutorial_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "tutorials").glob("*.py"):
        assert f"tutorials/{path.stem}.md" in nav


def test_the_overview_of_experiments_counts_their_rows() -> None:
    text = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    counted = re.findall(r"^\| \[`(.+?)`\].*?\| (\d+), .*?(\d+) \|", text, re.MULTILINE)
    assert counted == [
        (name, str(sum(row.of is None for row in experiment.rows)), str(experiment.seeds))
        for name, experiment in sorted(EXPERIMENTS.items(), key=lambda item: text.index(f"[`{item[0]}`]"))
    ]


def test_type_checkers_see_every_public_name() -> None:
    text = Path(dxmi_ext.__path__[0], "__init__.py").read_text(encoding="utf-8")
    block = text[text.index("if TYPE_CHECKING") : text.index("__path__ =")]
    assert sorted(re.findall(r" as (\w+)$", block, re.MULTILINE)) == sorted(dxmi_ext.__all__)
