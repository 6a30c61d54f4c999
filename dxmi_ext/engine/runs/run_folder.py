"""The folder of a run: its name, its lock, its log, its checkpoints, and the run that it may already hold.

Imports ``dxmi_ext.engine``.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output.runlog import RunLog
from dxmi_ext.engine.run_settings import RunnableConfig
from dxmi_ext.engine.runs import config, identity
from dxmi_ext.engine.runs.identity import Earlier, Fingerprints, Source
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint, files, folders

Found = tuple[Path, Any]
"""The path of a checkpoint, and its state."""


class RunFolder:
    """The folder ``cfg.output``, in which the run's first rank is the only writer.

    Args:
        cfg: settings of the run; a missing output is filled in.
        ranks: ranks of the run.
        data: fingerprints of the data, or path -> those of the data there if ``data`` is a path.

    Raises:
        folders.FolderError, ConfigError: the folder holds something else, or a run of other settings.
        CheckpointError: ``resume`` names no checkpoint.
    """

    def __init__(self, cfg: RunnableConfig, ranks: Ranks, data: Source | None) -> None:
        self._cfg, self._settings, self._ranks, self._data = cfg, cfg.run, ranks, data
        if data is None:
            identity.make_paths_absolute(cfg)
        else:
            identity.make_paths_absolute(cfg, "data")
        # Unused names of folders, if no output is given.
        self._names = None if cfg.run.output else _new_names(f"runs/{cfg.run.recipe}")
        self._place(cfg.run.output or next(self._names or iter(())))
        self._on_first(self._earlier.check_settings)
        if self._settings.resume not in ("auto", "never"):
            self._on_first(lambda: checkpoint.check_path("resume", Path(self._settings.resume)))

    def _place(self, output: str) -> None:
        """Sets the folder of the run."""
        self._settings.output = str(self._ranks.agree(output))
        self.directory = Path(self._settings.output)
        self._earlier = Earlier(self.directory, self._cfg, self._settings.resume != "never", self._data)
        self.log = RunLog(
            self.directory,
            enabled=self._ranks.first and not self._settings.dry_run,
            tensorboard=self._settings.tensorboard,
            wandb=self._settings.wandb,
            config=self._cfg.flat(),
        )

    def _on_first(self, action: Callable[[], None]) -> None:
        """Runs an action on the first rank; all ranks wait, and raise its error."""
        failure: BaseException | None = None
        if self._ranks.first:
            try:
                action()
            except (UserError, OSError) as error:
                failure = error
        told = self._ranks.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise ConfigError(told)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def finished(self) -> bool:
        """Whether the folder holds this run, finished; prints a message if so."""
        done = False
        if not self._settings.dry_run and self._settings.resume == "auto":
            done = identity.summary_of(self.directory).get("iterations", -1) >= self._settings.iterations
        done = self._ranks.agree(done)
        if done and self._ranks.agree(self._data is not None and self._earlier.can_compare_data()):
            self._check_data()
        if done and self._ranks.first:
            print(f"{self.directory} already holds this run, finished; nothing to do")
        return bool(done)

    def open(self, stack: ExitStack) -> Found | None:
        """Locks and prepares the folder, and returns the checkpoint to resume from, if any. If the process
        dies in here, the next start does the same again."""
        self._on_first(self._make)
        if self._names is not None:
            self._place(str(self.directory))
        self._on_first(lambda: self._lock(stack))
        about = {} if self._data is None else {"data": self._check_data()}
        self._on_first(lambda: self._prepare(about))  # before anyone reads
        found = self._load()
        self._ranks.agree(None)  # before anyone writes
        stack.enter_context(self.log)
        return found

    def _make(self) -> None:
        """Creates the folder; a default name is changed if another run has taken it."""
        while self._names is not None:
            try:
                folders.create(self.directory, new=True)
                return
            except FileExistsError:
                self.directory = Path(next(self._names))
        folders.create(self.directory)

    def _lock(self, stack: ExitStack) -> None:
        """Locks the folder; if it stays empty, it is removed at the end."""

        def leave() -> None:
            with suppress(OSError):
                self.directory.rmdir()

        stack.callback(leave)
        stack.enter_context(files.lock(self.directory / ".lock"))
        self._earlier.check_settings()  # again, since another process may have written here

    def _prepare(self, about: dict[str, Any]) -> None:
        folders.mark(self.directory, "run", **about)
        if self._settings.resume == "never":
            folders.clear(self.directory)
        for folder, ours in (
            (self.directory, folders.RUN),
            (self.checkpoints, folders.CHECKPOINTS),
            (self.log.pictures, folders.PICTURES),
        ):
            files.tidy(folder, ours)

    def _check_data(self) -> Fingerprints:
        """The fingerprints of the data.

        Raises:
            ConfigError: the folder holds a run of other data.
        """
        found = self._earlier.data()
        self._on_first(lambda: self._earlier.check_data(found))
        return found

    def take_over(self, found: Found | None, rollbacks: list[dict[str, Any]], good: int) -> None:
        """Makes the folder consistent with the checkpoint that the run resumes from.

        Args:
            found: what `open` returned.
            rollbacks: rollbacks before that checkpoint.
            good: step of the checkpoint for the next rollback.
        """
        config.save(self._cfg, self.directory / "config.yaml")
        for name in ("summary.json", "failure.json"):  # a resumed run is not finished
            (self.directory / name).unlink(missing_ok=True)
        if found is None:
            self.log.truncate(0)
            return
        source, state = found
        self.log.note(f"resuming from {source}")
        # Later checkpoints are removed before the log lines that they refer to.
        wanted = state["log_position"] if self.holds(source) else 0  # the log of another folder is not here
        position = min(wanted, self.log.position())
        if self.holds(source) and position == wanted:
            keep = self._settings.keep_checkpoints
            checkpoint.prune(self.checkpoints, state["step"], keep=keep, spare=good)
        else:  # from another folder, or the log has lost lines
            changes = {"rollbacks": rollbacks, "good": good, "log_position": position}
            self.adopt(source, state["step"], changes, good)
        self.log.truncate(wanted)

    def holds(self, source: Path) -> bool:
        """Whether a checkpoint is in this run's folder."""
        return source.resolve().parent == self.checkpoints.resolve()

    def _load(self) -> Found | None:
        """The checkpoint to resume from."""
        if self._settings.resume == "never":
            return None
        if self._settings.resume == "auto":
            return self.load_latest()
        path = Path(self._settings.resume)
        return path, checkpoint.load(path, ranks=self._ranks, lazy=self._ranks.shard)

    def load_latest(self, until: int | None = None) -> Found | None:
        """The last intact checkpoint, up to a step if one is given."""
        # With sharded weights, no rank requires the whole.
        return checkpoint.load_latest(
            self.checkpoints, self.log.note, until=until, ranks=self._ranks, lazy=self._ranks.shard
        )

    def adopt(self, source: Path, step: int, changes: dict[str, Any], good: int) -> None:
        """Copies a checkpoint into the folder as the one of a step, and removes later ones; see
        `checkpoint.adopt`."""
        keep = self._settings.keep_checkpoints
        checkpoint.adopt(source, self.checkpoints, step, changes, keep=keep, spare=good)


def _new_names(start: str) -> Iterator[str]:
    """Names of folders that do not exist yet."""
    start = f"{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in itertools.chain([start], (f"{start}-{i}" for i in itertools.count(2))):
        if not os.path.lexists(name):
            yield name
