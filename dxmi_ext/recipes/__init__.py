"""Recipes by name: a yaml of settings each, and the task that runs it.

A task is a module of this package with

    Config, EvaluateSettings                       settings of its runs, of the command ``evaluate``
    train(cfg, ranks), pretrain(cfg, ranks)
    load(directory, device) -> cfg, networks
    sample(directory, rows, seed, batch_size, device, *, guidance, labels) -> batches of samples
    evaluate(directory, settings, device) -> numbers, their table
    read(cfg) -> a data.overview.Overview of the settings' data, where they lie in files
    load_scorer(directory, device) -> an anomaly.scoring.Scorer or VectorScorer, where it detects anomalies

Row i of the samples depends on (seed, i) alone; guidance is the lambda of value guidance, labels the text
that ``dxmi_ext.generate`` reads. Imports tasks where they are wanted.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from dxmi_ext import config, folders

TASKS = folders.TASKS
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(recipe: str) -> Path:
    """The yaml of a recipe, by name or path.

    Raises:
        config.ConfigError: there is none.
    """
    path = _FOLDER / f"{recipe}.yaml" if recipe in names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise config.ConfigError(
            f"recipe: got {recipe!r}, wants one of {', '.join(names())} or the path of a yaml file"
        )
    return path


def task_of(path: Path) -> ModuleType:
    """The task that a recipe's or a run's yaml names."""
    name = config.peek(path, "task", default=TASKS[0])
    if name not in TASKS:
        raise config.ConfigError(f"{path}: task: got {name!r}, wants one of {', '.join(TASKS)}")
    return importlib.import_module(f"{__name__}.{name}")


def tasks() -> list[tuple[str, ModuleType]]:
    """All of them, by name."""
    return [(name, importlib.import_module(f"{__name__}.{name}")) for name in TASKS]
