"""A unit of an experiment: a row with a seed, its run in a separate folder, and a small json of its numbers.

Imports torch and ``dxmi_ext`` up to the tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any

from dxmi_ext import tasks
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output.runlog import write_json
from dxmi_ext.engine.run_settings import RunnableConfig
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.storage import files, folders
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.reproduce.experiments import Row

_KINDS: dict[str, Any] = {"row": str, "seed": int, "quick": bool, "settings": dict, "numbers": dict}
_KINDS |= {"versions": dict, "machine": dict, "seconds": float, "resumed_from": list}


# Settings that do not affect the outcome of a run.
_ELSEWHERE = {"output", "resume", "dry_run", "keep_checkpoints", "checkpoint_every", "log_every"}
_ELSEWHERE |= {"picture_every", "tensorboard", "wandb", "threads", "device", "cache"}
# Settings that are unused in runs that train neither a sampler nor an energy.
_OF_DXMI = {*DxMISettings.keys(), *LangevinSettings.keys(), "cuda_graph"}
_OF_DXMI |= {"value_kind", "value_width", "value_depth", "energy_width", "energy_network", "energy_level"}
# Settings that are unused if another chain samples from a network that is trained already.
_OF_A_TRAINED_CHAIN = {"iterations", "min_std", "denoised"}
_QUICK = 10  # divides the number of iterations
IDENTITY = "unit.json"  # the unit's identity, in its run's folder


class UnusableUnit(UserError):
    """A json that is damaged, of another unit, or made with other settings."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """A row with a seed, and its paths.

    Args:
        quick: whether it has a tenth of the iterations.
        output: folder of the json.
        work: parent of the run's folder.
        device: device of the run.
        data: path of the data; None: the recipe's.
        source: digest of what the setting ``data`` of the command names; None: unknown.
    """

    row: Row
    seed: int
    quick: bool
    output: Path
    work: Path
    device: str = "cpu"
    data: str | None = None
    source: str | None = None

    @property
    def name(self) -> str:
        return f"{self.row.name}-seed{self.seed}"

    @property
    def path(self) -> Path:
        return self.output / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return self.work / (f"{self.name}-quick" if self.quick else self.name)

    @property
    def start(self) -> Unit | None:
        """The unit whose network it starts from."""
        return None if self.row.start is None else dataclasses.replace(self, row=self.row.start)

    @property
    def evaluated(self) -> Path:
        """The run whose network a row with a chain evaluates: its start, or the recipe's start."""
        if self.start is not None:
            return self.start.folder
        start = self.config().flat()["start"]
        return tasks.shipped().get(start) or Path(start)

    @property
    def task(self) -> Any:
        """The module of its recipe's task."""
        return tasks.task_of(tasks.find(self.row.recipe))

    def config(self) -> Any:
        """The settings of its run.

        Raises:
            config.ConfigError: a setting of the row is invalid for its recipe.
        """
        path = tasks.find(self.row.recipe)
        settings: dict[str, Any] = {"seed": self.seed, "output": str(self.folder), "device": self.device}
        settings |= {"threads": 1, "tensorboard": False, "picture_every": 0, **self.row.settings}
        settings |= {} if self.start is None else {"start": str(self.start.folder)}
        settings |= {} if self.data is None else {"data": self.data}
        cfg = config.load(self.task.Config, path, [_override(*item) for item in settings.items()])
        if not self.quick:
            return cfg
        lengths = {key: getattr(cfg.run, key) // _QUICK for key in ("iterations", "pretrain_iterations")}
        return cfg.replace(**lengths)

    def identity(self) -> dict[str, Any]:
        """The settings that determine its outcome, on any machine; ``start.KEY`` are those of its start."""
        anywhere = dataclasses.replace(self, data=None, device="cpu").config()
        settings = _settings(anywhere, trains=self.row.chain is None)
        if self.start is None:
            ships = tasks.shipped().get(settings.get("start") or "")
            given = {} if ships is None else {"start.weights": _digest(ships / "model/model.safetensors")}
            return settings | given | ({} if self.row.chain is None else {"chain": self.row.chain})
        given = {f"start.{key}": value for key, value in self.start.identity().items()}
        return settings | {"start": self.start.row.name, "chain": self.row.chain} | given

    def is_here(self) -> bool:
        """Whether its folder has a finished run with the current settings."""
        return (self.folder / "model").is_dir() and not holds_another(self)


def read(unit: Unit) -> dict[str, Any] | None:
    """The json of a unit; None if it has not been run.

    Raises:
        UnusableUnit: the json does not match the unit as it would be run now.
        UserError: the folder holds quick units and this one is not, or the reverse; or units of other data.
    """
    try:
        found = _load(unit.path)
    except FileNotFoundError:
        return None
    if (found["row"], found["seed"]) != (unit.row.name, unit.seed):
        raise UnusableUnit(f"{unit.path}: holds {found['row']}, seed {found['seed']}")
    if found["quick"] != unit.quick:
        raise UserError(
            f"output must be another folder, got {str(unit.output)!r}, which holds units with "
            f"quick={json.dumps(found['quick'])}"
        )
    if _differ(source_of(found), unit.source):
        raise UserError(
            f"output must be another folder, got {str(unit.output)!r}, whose {unit.path.name} was made from "
            "other data"
        )
    if changed := _changes(found["settings"], unit):
        raise UnusableUnit(f"{unit.path}: made with {'; '.join(changed)}")
    return found


def adopt(unit: Unit, numbers: Collection[str]) -> Path | None:
    """Copies the json of the same run in another experiment, from a folder beside the unit's own.

    Args:
        numbers: names of the numbers that it must have.

    Returns:
        The path of the copied json; None if there is none.
    """
    for path in sorted(unit.output.parent.glob(f"*/*-seed{unit.seed}.json")):
        try:
            found = _load(path)
        except (UnusableUnit, FileNotFoundError):
            continue
        same = (found["seed"], found["quick"]) == (unit.seed, unit.quick)
        if same and not _changes(found["settings"], unit) and found["numbers"].keys() >= set(numbers):
            write_json(
                unit.path, found | {"row": unit.row.name, "taken_from": f"{path.parent.name}/{path.name}"}
            )
            return path
    return None


def source_of(found: Mapping[str, Any]) -> str | None:
    """The digest of the data that a unit's json was made from; None if unknown."""
    source = found.get("data", {}).get("source")
    return source if isinstance(source, str) else None


def _differ(source: str | None, other: str | None) -> bool:
    return None not in (source, other) and source != other


def _load(path: Path) -> dict[str, Any]:
    """The json of a unit, with any settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UnusableUnit(f"{path}: cannot be read: {error}") from error
    if not _is_whole(found):
        raise UnusableUnit(f"{path}: is damaged: it must have {', '.join(_KINDS)}")
    return dict(found)


def _changes(settings: dict[str, Any], unit: Unit) -> list[str]:
    """The settings in a unit's json that differ from the current ones."""
    # A setting that is newer than the json had its default then.
    defaults, now = _named(unit.task.Config.of().flat()), unit.identity()
    was = defaults | {f"start.{key}": value for key, value in defaults.items()} | _named(settings)
    return [f"{key}={was.get(key)}, now {value}" for key, value in now.items() if was.get(key) != value]


def _is_whole(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    if not all(isinstance(found.get(key), kind) for key, kind in _KINDS.items()):
        return False
    numbers = found["numbers"].values()
    finite = all(isinstance(number, float) and math.isfinite(number) for number in numbers)
    return bool(numbers) and finite and found["machine"].keys() >= {"processor", "threads"}


def _settings(cfg: RunnableConfig, *, trains: bool = True) -> dict[str, Any]:
    """The settings that determine a run's outcome."""
    settings = cfg.flat()
    unused = _ELSEWHERE | {"seed"}
    if not (trains and cfg.run.iterations):
        unused |= _OF_DXMI
    if not trains:
        unused |= _OF_A_TRAINED_CHAIN
    if not settings.get("tau_rate"):
        unused |= {"tau_margin"} | ({"tau_hold"} if settings.get("tau_cooling") == 1 else set())
    if settings.get("energy_loss") == "contrast":
        unused.add("noise_magnitude")
    return _named({key: value for key, value in settings.items() if key not in unused})


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with names instead of paths of data, whose location does not affect the outcome."""
    return {
        key: PurePath(value).name if key.rpartition(".")[2] == "data" and isinstance(value, str) else value
        for key, value in settings.items()
    }


def is_folder_of_unit(folder: Path) -> bool:
    """Whether a folder holds the run of a unit, possibly of a version that did not mark folders."""
    return "recipe" in files.read_json(folder / IDENTITY) or folders.is_unmarked_run(folder)


def is_work(folder: Path) -> bool:
    """Whether a folder holds runs of units, possibly of a version that did not mark folders."""
    logs = any(re.fullmatch(r".+-seed\d+\.log", path.name) for path in folder.iterdir())
    return logs or any(is_folder_of_unit(path.parent) for path in folder.glob(f"*/{IDENTITY}"))


def are_results(folder: Path) -> bool:
    """Whether a folder has the json of a unit."""
    found = (path for path in folder.iterdir() if re.fullmatch(r".+-seed\d+\.json", path.name))
    return any(_is_whole(files.read_json(path)) for path in found)


def holds_another(unit: Unit) -> bool:
    """Whether the unit's folder holds a run with other or unknown settings, or of other data."""
    found = files.read_json(unit.folder / IDENTITY)
    others = _differ(found.get("source"), unit.source)
    return unit.folder.is_dir() and (not found or others or bool(_changes(found, unit)))


def write_identity(unit: Unit) -> None:
    """Writes what `holds_another` compares to the unit's folder."""
    source = {} if unit.source is None else {"source": unit.source}
    write_json(unit.folder / IDENTITY, unit.identity() | source)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _override(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
