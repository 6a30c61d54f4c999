"""Identity of a run: its settings and its data, wherever these are, compared with a folder's.

Imports numpy and the engine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy

from dxmi_ext.engine.runs import config
from dxmi_ext.engine.settings import Config, ConfigError
from dxmi_ext.engine.storage import files, folders

C = TypeVar("C", bound=Config)

# Settings that may change when a run resumes.
_MAY_CHANGE = {"output", "iterations", "device", "threads", "shard", "resume", "tensorboard", "wandb"}
_MAY_CHANGE |= {"checkpoint_every", "keep_checkpoints", "log_every", "picture_every", "dry_run", "cache"}
# Settings that may be paths: absolute in config.yaml, so that a run can be read from any working directory.
_PATHS = ("start", "weights", "cache", "features")
_LISTS = ("features",)  # several, separated by commas
_KEYS_OF_A_SUMMARY = {"iterations": int, "device": str, "wall_seconds": float, "resumed_from": list}
_KEYS_OF_A_SUMMARY |= {"versions": dict}
_WAY_OUT = "choose another output, or resume=never to overwrite it"

Fingerprints = dict[str, str]
"""Fingerprint of each split of a run's data."""
Source = Fingerprints | Callable[[str], Fingerprints]
"""Fingerprints of data in memory, or path -> those of files."""


def fingerprint(*parts: Any) -> str:
    """A digest of arrays, texts and lists of texts, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, numpy.ndarray):
            digest.update(f"{part.dtype} {part.shape} ".encode())
            digest.update(numpy.ascontiguousarray(part).data)
        else:
            digest.update(f"{part!r} ".encode())
    return digest.hexdigest()


def changed(known: Fingerprints, found: Fingerprints) -> list[str]:
    """The splits in both whose data differ."""
    return [split for split in found if known.get(split, found[split]) != found[split]]


# --- reading a run's folder ---------------------------------------------------------------------------


def settings_of(cls: type[C], directory: Path) -> C:
    """The settings in a run's config.yaml.

    Raises:
        ConfigError: names the file and the error.
    """
    path = directory / "config.yaml"
    try:
        return config.load(cls, path)
    except ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error}") from error


def summary_of(directory: Path) -> dict[str, Any]:
    """A run's summary.json; empty if it is missing or not written by a run."""
    found = files.read_json(directory / "summary.json")
    whole = all(isinstance(found.get(key), kind) for key, kind in _KEYS_OF_A_SUMMARY.items())
    return found if whole else {}


def data_of(directory: Path) -> Fingerprints:
    """The fingerprints of the data that a run was trained on; empty if unknown."""
    found = folders.read(directory).get("data")
    return dict(found) if isinstance(found, dict) else {}


# --- whether a folder holds the same run -------------------------------------------------------------


def make_paths_absolute(cfg: Config, *more: str) -> None:
    """Makes settings that are existing paths, or lists with such paths, absolute, in place."""
    values = cfg.flat()
    for key in (*_PATHS, *more):
        value = values.get(key)
        if isinstance(value, str) and key in cfg.given:
            parts = value.split(",") if key in _LISTS else [value]
            if (absolute := ",".join(map(_absolute, parts))) != value:
                cfg.put(key, absolute)


def _absolute(value: str) -> str:
    """An existing path made absolute; other values unchanged."""
    path = os.path.expanduser(value.strip())
    return os.path.abspath(path) if path and os.path.exists(path) else value


class Earlier:
    """The run that a folder may already hold, compared with the one to start there.

    Args:
        directory: folder of the run.
        cfg: settings of the run to start.
        resume: whether it may resume the earlier one.
        data: fingerprints of the run's data, or path -> those of the data there if they are files.
    """

    def __init__(self, directory: Path, cfg: Config, resume: bool, data: Source | None) -> None:
        self._directory, self._cfg, self._resume, self._fingerprints = directory, cfg, resume, data

    def settings(self) -> dict[str, Any] | None:
        """Settings of the run in the folder; None if there is none to resume. A run without any results, for
        example because its data were not found, does not count."""
        directory = self._directory
        kept = (directory / "summary.json").is_file()
        kept |= files.holds(directory / "model", folders.MODEL)
        kept |= files.holds(directory / "checkpoints", folders.CHECKPOINTS)
        if not self._resume or not (directory / "config.yaml").is_file() or not kept:
            return None
        task, own = config.peek(directory / "config.yaml", "task"), self._cfg.flat().get("task")
        if None not in (task, own) and task != own:  # the settings of another task cannot be read
            raise self._other("task", task, own)
        return settings_of(type(self._cfg), directory).flat()

    def check_settings(self) -> None:
        """Checks that the folder is free or holds a run of the same settings.

        Raises:
            folders.FolderError, ConfigError: it does not.
        """
        folders.check(self._directory, "run", folders.is_unmarked_run)
        if (earlier := self.settings()) is None:
            return
        for key, wanted in self._cfg.flat().items():
            if key in _MAY_CHANGE or (key == "data" and self._fingerprints is not None):
                continue
            was = earlier[key]
            if was != wanted and not (key in _PATHS and same_place(was, wanted)):
                raise self._other(key, was, wanted)

    def _other(self, key: str, was: Any, wanted: Any) -> ConfigError:
        return ConfigError(
            f"{key} must be {was!r} as in the run that {self._directory} holds, got {wanted!r}; {_WAY_OUT}"
        )

    def can_compare_data(self) -> bool:
        """Whether the data of a finished run have to be compared: not if they were removed since."""
        path = self._cfg.flat().get("data")
        return not self.had_its_data_here() or (path is not None and os.path.exists(path))

    def had_its_data_here(self) -> bool:
        """Whether the earlier run, if any, had its data at the same path."""
        if isinstance(self._fingerprints, dict):
            return False
        earlier = self.settings()
        return earlier is None or same_place(earlier.get("data"), self._cfg.flat().get("data"))

    def data(self) -> Fingerprints:
        """The fingerprints of the data; empty if there are none."""
        if isinstance(self._fingerprints, dict):
            return self._fingerprints
        path = self._cfg.flat().get("data")
        return {} if self._fingerprints is None or path is None else self._fingerprints(path)

    def check_data(self, found: Fingerprints) -> None:
        """Checks that the folder does not hold a run of other data.

        Args:
            found: fingerprints of the data now.

        Raises:
            ConfigError: it does, or the data cannot be compared.
        """
        earlier = self.settings()
        if earlier is None or not found:
            return
        known = data_of(self._directory)
        if isinstance(self._fingerprints, dict):  # data in memory; older runs have no fingerprints
            if changed(known, found):
                raise ConfigError(
                    f"data must be what {self._directory} was trained on, got data with another fingerprint; "
                    f"{_WAY_OUT}"
                )
            return
        path, before = self._cfg.flat()["data"], earlier["data"]
        if not known and self.had_its_data_here():
            return
        if not known and before is not None and Path(before).exists():
            assert self._fingerprints is not None
            known = self._fingerprints(before)
        if not known:
            raise ConfigError(
                f"data must be those of the run that {self._directory} holds, got {path!r}: that run has no "
                f"fingerprint of its data, and {before!r} is gone; put the data, or a link to them, there, "
                f"{_WAY_OUT}"
            )
        if others := changed(known, found):
            raise ConfigError(
                f"data must be what {self._directory} was trained on ({before!r}), got {path!r}, whose "
                f"{others[0]} split has another fingerprint; {_WAY_OUT}"
            )


def same_place(path: str | None, other: str | None) -> bool:
    """Whether two paths, or None, are of the same file or folder."""
    if path is None or other is None:
        return path == other
    return os.path.realpath(os.path.expanduser(path)) == os.path.realpath(os.path.expanduser(other))
