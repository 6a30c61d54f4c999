"""Recipes, and the task that runs each.

A task is a package of ``dxmi_ext`` with a module ``recipe`` and a yaml of settings for each of its recipes.
The module ``recipe`` has

    Config, EvaluateSettings: settings of its runs, and of the command evaluate
    train(cfg, ranks)
    load(directory, device) -> cfg, networks
    sample(directory, rows, seed, batch_size, device, *, guidance, labels, steps) -> batches of samples
    evaluate(directory, settings, device) -> numbers, their table

and for some commands also

    pretrain(cfg, ranks), if there is a pretraining
    SAMPLES: what samples are, such as points, if they are not images
    read(cfg) -> an overview of the settings' data, if they are files, with details() as those of
        images.data.overview.Overview
    load_scorer(directory, device) -> an anomaly.scores.scoring.Scorer or VectorScorer, to detect anomalies

Row i of the samples depends on (seed, i) alone; guidance is the scale of value guidance, labels the text that
``dxmi_ext.method.generate`` reads, and steps T, or None for the run's own. Numbers are serializable as json.
Tasks are imported on demand. Instead of a task of this package, a yaml may name a module of the user's own,
with the same content as a module ``recipe``, by ``task: package.module``; it is looked up among the installed
modules and in the current folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dxmi_ext.engine.run_settings import PYTHON
from dxmi_ext.engine.runs import config

_ROOT = Path(__file__).parent
_REQUIRED = ("Config", "EvaluateSettings", "train", "load", "sample", "evaluate")
_OF_FIT = (
    "{folder} is a run of dxmi_ext.fit, whose networks only its script can build; in Python, "
    "dxmi_ext.load({quoted}, networks) loads their weights and "
    "networks.sampler.sample(1000, dxmi_ext.noise_key(0)) draws samples"
)


def tasks() -> list[str]:
    """The names of all tasks."""
    return sorted(path.parent.name for path in _ROOT.glob("*/recipe.py"))


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    paths = (path for task in tasks() for path in (_ROOT / task).glob("*.yaml"))
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def shipped() -> dict[str, Path]:
    """The trained runs that ship with the package, by name: folders with config.yaml and model/."""
    return {path.parent.name: path.parent for path in sorted(_ROOT.glob("*/weights/*/config.yaml"))}


def find(recipe: str) -> Path:
    """The yaml file of a recipe, given by name or path.

    Raises:
        config.ConfigError: it does not exist.
    """
    path = recipes().get(recipe) or Path(recipe)
    is_yaml = path.suffix in (".yaml", ".yml")
    if is_yaml and not path.exists():
        raise config.ConfigError(f"recipe must be an existing yaml file, got {recipe!r}")
    if not is_yaml or not path.is_file():
        hint = config.did_you_mean(recipe, recipes())
        raise config.ConfigError(
            f"recipe must be one of {', '.join(recipes())} or the path of a yaml file, got {recipe!r}{hint}"
        )
    return path


def task_of(path: Path) -> ModuleType:
    """The ``recipe`` module of the task that a recipe's or a run's yaml names, or the user's module.

    Raises:
        config.ConfigError: there is no such task or module, the module is not a task, or the run is one of
            ``dxmi_ext.fit``.
    """
    name = config.peek(path, "task")
    if name == PYTHON:
        raise config.ConfigError(_OF_FIT.format(folder=path.parent, quoted=repr(str(path.parent))))
    if name in tasks():
        return load(name)
    message = f"{path}: task must be one of {', '.join(tasks())} or a module of your own, got {name!r}"
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise config.ConfigError(message)
    try:
        with _current_folder_last():
            found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise config.ConfigError(f"{message}, which is neither installed nor in {Path.cwd()}") from error
    if missing := [part for part in _REQUIRED if not hasattr(found, part)]:
        raise config.ConfigError(f"{message}, a module without {', '.join(missing)}")
    return found


def settings_of(task: ModuleType, path: Path, overrides: Sequence[str] = ()) -> Any:
    """The settings of a recipe, whose name is that of its file if the yaml gives none.

    Args:
        task: the module of `task_of`.
        path: the yaml.
        overrides: see `config.load`.
    """
    cfg = config.load(task.Config, path, overrides)
    if not cfg.run.recipe:
        cfg.put("recipe", path.stem)
    return cfg


def load(task: str) -> ModuleType:
    """The ``recipe`` module of a task."""
    return importlib.import_module(f"dxmi_ext.{task}.recipe")


@contextmanager
def _current_folder_last() -> Iterator[None]:
    """Within, modules in the current folder are found unless installed ones have the same name."""
    folder = str(Path.cwd())
    importlib.invalidate_caches()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
