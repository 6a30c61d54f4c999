"""Tasks by name, and tasks in a user's own module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dxmi_ext import cli, tasks
from dxmi_ext.engine.runs.config import ConfigError

pytest.importorskip("yaml")

TASK = """
Config = EvaluateSettings = train = load = sample = evaluate = None
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(folder: Path, task: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"task: {task}\n")
    return path


def test_a_module_in_the_current_folder_is_a_task(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "points_task.py").write_text(TASK)
    before = list(sys.path)
    try:
        assert tasks.task_of(named(folder, "mine.points_task")).__name__ == "mine.points_task"
    finally:
        for name in ("mine", "mine.points_task"):
            sys.modules.pop(name, None)
    assert sys.path == before


def test_the_current_folder_keeps_its_place_on_the_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [str(Path.cwd()), *sys.path]
    monkeypatch.setattr(sys, "path", list(before))
    (folder / "first_task.py").write_text(TASK)
    try:
        tasks.task_of(named(folder, "first_task"))
    finally:
        sys.modules.pop("first_task", None)
    assert sys.path == before


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("two_dd", "two_d or a module of your own, got 'two_dd', which is neither installed nor in"),
        ("two_d.recipes", "got 'two_d.recipes', which is neither"),
        ("../two_d", r"got '../two_d'$"),
        ("", "task must be one of anomaly, energies, images, two_d or a module of your own, got None"),
        ("string", "got 'string', a module without Config, EvaluateSettings, train, load, sample, evaluate"),
    ],
)
def test_modules_that_are_not_tasks_are_rejected(folder: Path, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.task_of(named(folder, task))


def test_a_task_may_have_no_pretraining(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plain_task.py").write_text(TASK)
    recipe = str(named(folder, "plain_task"))
    try:
        assert cli.main(["pretrain", recipe]) == 2
    finally:
        sys.modules.pop("plain_task", None)
    says = f"RECIPE must be one with a pretraining, got '{recipe}'; use dxmi train"
    assert says in capsys.readouterr().err


def test_a_missing_library_of_the_module_is_not_hidden(folder: Path) -> None:
    (folder / "broken_task.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        tasks.task_of(named(folder, "broken_task"))
