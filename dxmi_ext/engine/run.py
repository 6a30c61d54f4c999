"""A run in its folder: phases of iterations with logging, checkpoints, stopping and exact resuming.

Imports torch and ``dxmi_ext``; independent of what the phases train.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from dxmi_ext.engine import checkpoint, config, device, files, folders, health, identity
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.identity import Earlier, Fingerprints
from dxmi_ext.engine.ranks import Ranks, Votes
from dxmi_ext.engine.run_settings import RunnableConfig
from dxmi_ext.engine.runlog import RunLog, write_json
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.signals import StopSignals


class Stepper(Protocol):
    """Trains on one batch per iteration, with a state that resumes exactly."""

    iteration: int

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One iteration; returns metrics, with ``NAME_failures``, the consecutive skipped steps of a loss."""

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Problems that a step's metrics show, by name."""

    def retry(self, attempt: int, lr_scale: float) -> None:
        """Continues with other noise and scaled learning rates; attempt 0 is the initial state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """A run in ``cfg.output``; a context manager and the only writer of that folder. Of several ranks, only
    the first writes.

    Args:
        cfg: settings with a group ``run``; a missing output is filled in. ``resume``: ``auto`` resumes from
            the folder's last intact checkpoint if there is one, ``never`` removes an earlier run from the
            folder first, a path resumes from that checkpoint. ``dry_run``: one iteration of each phase,
            nothing written.
        ranks: ranks of the run, whose process group exists.
        data: path -> fingerprints of the data there, if ``data`` is a path; identifies the data wherever
            they are.

    Raises:
        folders.FolderError: the folder does not belong to a run.
        ConfigError: it holds a run of other settings or data, or the batch size is not a multiple of the
            number of ranks.
        files.Locked: another process runs in the folder.
        checkpoint.CheckpointError: the checkpoint to resume from is missing or damaged.
        health.Diverged: steps are still not finite after all rollbacks.
        signals.Stopped: on SIGTERM or Ctrl-C; in a phase, after the current iteration is done and saved.
    """

    def __init__(
        self,
        cfg: RunnableConfig,
        ranks: Ranks | None = None,
        data: Callable[[str], Fingerprints] | None = None,
    ) -> None:
        self.cfg, self.settings = cfg, cfg.run
        self.ranks = dataclasses.replace(ranks or Ranks(), shard=cfg.run.shard)
        try:
            # Number of this rank's rows of a batch, and the first of them.
            self.rows = self.ranks.rows(cfg.run.batch_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._data = data
        identity.make_paths_absolute(cfg, *["data"] * (data is not None))
        # Unused names of folders, if no output is given.
        self._names = None if cfg.run.output else _new_names(f"runs/{cfg.run.recipe}")
        self.device = device.choose(cfg.run.device, self.ranks.local_rank)
        self._place(cfg.run.output or next(self._names or iter(())))
        self.signals, self._votes = StopSignals(), Votes(self.ranks)
        self.resumed_from: list[int] = []
        self.past: list[str] = []  # finished phases
        self._steps_past = 0  # number of their iterations
        self.rollbacks: list[dict[str, Any]] = []
        self._good = 0  # step of the checkpoint for a rollback
        self._symptoms: set[str] = set()  # at the last log
        self._state: dict[str, Any] | None = None  # to resume from, until its phase has loaded it
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self._on_first(self._earlier.check_settings)

    def _place(self, output: str) -> None:
        """Sets the folder of the run."""
        self.settings.output = str(self.ranks.agree(output))
        self.directory = Path(self.settings.output)
        self._earlier = Earlier(self.directory, self.cfg, self.settings.resume != "never", self._data)
        self.log = RunLog(
            self.directory,
            enabled=self.ranks.first and not self.settings.dry_run,
            tensorboard=self.settings.tensorboard,
            wandb=self.settings.wandb,
            config=self.cfg.flat(),
        )

    def _on_first(self, action: Callable[[], None]) -> None:
        """Runs an action on the first rank; all ranks wait, and raise its error."""
        failure: BaseException | None = None
        if self.ranks.first:
            try:
                action()
            except (UserError, OSError) as error:
                failure = error
        told = self.ranks.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise ConfigError(told)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def wall_seconds(self) -> float:
        """Time spent on this run in all sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def finished(self) -> bool:
        """Whether the folder holds this run, finished; prints a message if so."""
        done = False
        if not self.settings.dry_run and self.settings.resume == "auto":
            done = identity.summary_of(self.directory).get("iterations", -1) >= self.settings.iterations
        done = self.ranks.agree(done)
        if done and not self.ranks.agree(self._data is None or self._earlier.had_its_data_here()):
            self._check_data()
        if done and self.ranks.first:
            print(f"{self.directory} already holds this run, finished; nothing to do")
        return bool(done)

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if self.settings.threads:
                torch.set_num_threads(self.settings.threads)
            if self.settings.dry_run and self.ranks.first:
                print(config.to_yaml(self.cfg.replace(dry_run=False)))
            if not self.settings.dry_run:
                stack.enter_context(self.signals)
                self._open(stack)
            self._exit = stack.pop_all().__exit__
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit(*exception)

    def _open(self, stack: ExitStack) -> None:
        """Prepares the folder for the iteration that the run starts from. If the process dies in here, the
        next start does the same again."""
        self._on_first(self._make_folder)
        if self._names is not None:
            self._place(str(self.directory))
        self._on_first(lambda: self._lock(stack))
        about = {} if self._data is None else {"data": self._check_data()}
        self._on_first(lambda: self._prepare(about))  # before anyone reads
        found = self._load()
        self.ranks.agree(None)  # before anyone writes
        stack.enter_context(self.log)
        if found is not None:
            self._state = found[1]
            self._earlier_seconds = self._state["wall_seconds"]
            self.resumed_from = [*self._state["resumed_from"], self._state["step"]]
            self.past, self._steps_past = self._state["past"], self._state["steps_past"]
            self._good = self._state["step"]
            if self._mine(found[0]):
                self.rollbacks, self._good = self._state["rollbacks"], self._state["good"]
        if self.ranks.first:
            self._take_over(found)

    def _make_folder(self) -> None:
        """Creates the folder; a default name is changed if another run has taken it."""
        while self._names is not None:
            try:
                self.directory.mkdir(parents=True)
                return
            except FileExistsError:
                self.directory = Path(next(self._names))
        self.directory.mkdir(parents=True, exist_ok=True)

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
        if self.settings.resume == "never":
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

    def _take_over(self, found: tuple[Path, Any] | None) -> None:
        """Makes the folder consistent with the checkpoint that the run resumes from."""
        config.save(self.cfg, self.directory / "config.yaml")
        for name in ("summary.json", "failure.json"):  # a resumed run is not finished
            (self.directory / name).unlink(missing_ok=True)
        if found is None:
            self.log.truncate(0)
            return
        source, state = found
        self.log.note(f"resuming from {source}")
        # Later checkpoints are removed before the log lines that they refer to.
        wanted = state["log_position"] if self._mine(source) else 0  # the log of another folder is not here
        position = min(wanted, self.log.position())
        if self._mine(source) and position == wanted:
            keep = self.settings.keep_checkpoints
            checkpoint.prune(self.checkpoints, state["step"], keep=keep, spare=self._good)
        else:  # from another folder, or the log has lost lines
            changes = {"rollbacks": self.rollbacks, "good": self._good, "log_position": position}
            self._adopt(source, state["step"], changes)
        self.log.truncate(wanted)

    def _mine(self, source: Path) -> bool:
        """Whether a checkpoint is in this run's folder."""
        return source.resolve().parent == self.checkpoints.resolve()

    def _load(self) -> tuple[Path, Any] | None:
        """The checkpoint to resume from, and its path."""
        if self.settings.resume == "never":
            return None
        if self.settings.resume == "auto":
            return self._load_latest()
        path = Path(self.settings.resume)
        return path, checkpoint.load(path, ranks=self.ranks, lazy=self.ranks.shard)

    def _load_latest(self, until: int | None = None) -> tuple[Path, Any] | None:
        # With sharded weights, no rank requires the whole.
        return checkpoint.load_latest(
            self.checkpoints, self.log.note, until=until, ranks=self.ranks, lazy=self.ranks.shard
        )

    def describe(self, networks: nn.Module) -> None:
        """Prints the size of each network in a dry run."""
        if self.settings.dry_run and self.ranks.first:
            for name, network in networks.named_children():
                print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")

    def phase(
        self,
        name: str,
        stepper: Stepper,
        iterations: int,
        batch: Callable[[int], Tensor],
        picture: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        """Runs a phase to its last iteration, from where a resumed run stopped; a finished phase is skipped.
        A dry run only runs the first iteration.

        Args:
            name: name of the phase.
            stepper: trainer of the phase.
            iterations: length of the phase.
            batch: iteration -> this rank's rows of the data.
            picture: writes a png of samples from fixed noise, every `picture_every` iterations and on the
                first rank only; it changes no state.
        """
        if self.settings.dry_run:
            self._try(name, stepper, iterations, batch)
            return
        if name in self.past:
            return
        resumed = self._resume(name, stepper)
        with self.log.progress(name, iterations, stepper.iteration) as bar, self.signals.held():
            if not resumed:
                self._save(name, stepper)  # for a rollback
            clock = device.Clock(self.device, self.settings.batch_size, stepper.iteration)
            while stepper.iteration < iterations:
                metrics = stepper.step(batch(stepper.iteration))
                now, last = stepper.iteration, stepper.iteration == iterations
                losses, saved = {}, False
                draws = picture if _due(self.settings.picture_every, now) else None
                logs = last or _due(self.settings.log_every, now) or draws is not None
                saves = last or _due(self.settings.checkpoint_every, now)
                stops = self._stops(now)
                if logs or saves or stops:
                    numbers = _to_host(metrics)
                    failures = max(health.failures(numbers).values(), default=0)
                    # Not because of a signal, so that the run equals an uninterrupted one.
                    if (logs or saves) and 0 < self.settings.rollback_after <= failures:
                        self._roll_back(name, stepper, numbers)
                        bar.back_to(stepper.iteration)
                        clock = device.Clock(self.device, self.settings.batch_size, stepper.iteration)
                        continue
                    if logs:
                        self._log(name, stepper, numbers | clock.lap(now))
                        losses = _losses(numbers)
                    if draws is not None:
                        self.log.picture(name, now, draws)
                    saved = last or ((saves or stops) and not failures)
                    if saved:
                        self._save(name, stepper, good=saves)
                bar.update(1, **losses)
                if stops or (saved and self._stops(now)):  # a signal may come during the save
                    break
        self.past.append(name)
        self._steps_past += iterations

    def _resume(self, phase: str, stepper: Stepper) -> bool:
        """Loads the state to resume from, if it belongs to this phase."""
        if self._state is None or self._state["phase"] != phase:
            return False
        try:
            stepper.load_state_dict(self._state["stepper"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"the checkpoint has other settings: {error}") from error
        self._state = None
        self._retry(phase, stepper)
        return True

    def _retry(self, phase: str, stepper: Stepper) -> None:
        attempt = sum(rollback["phase"] == phase for rollback in self.rollbacks)
        stepper.retry(attempt, self.settings.rollback_lr**attempt)

    def _log(self, phase: str, stepper: Stepper, numbers: dict[str, Any]) -> None:
        """Logs an iteration; a symptom is noted when it appears and when it disappears."""
        symptoms = stepper.symptoms(numbers)
        for name in symptoms.keys() - self._symptoms:
            self.log.note(f"{phase} {stepper.iteration}: {name}: {symptoms[name]}")
        for name in self._symptoms - symptoms.keys():
            self.log.note(f"{phase} {stepper.iteration}: no more {name}")
        self._symptoms = set(symptoms)
        self.log.log(phase, stepper.iteration, numbers, symptoms=sorted(symptoms))

    def _roll_back(self, phase: str, stepper: Stepper, numbers: dict[str, Any]) -> None:
        """Goes back to the last good checkpoint, with other noise and lower learning rates.

        Raises:
            health.Diverged: the number of rollbacks is used up.
        """
        failures, at = health.failures(numbers), f"{phase} {stepper.iteration}"
        steps = ", ".join(f"{count} of the {name}" for name, count in failures.items())
        what = f"{at}: steps in a row that were not finite: {steps}"
        rollback = {"phase": phase, "iteration": stepper.iteration, "failures": failures}
        self.rollbacks = [*self.rollbacks, rollback | {"symptoms": stepper.symptoms(numbers)}]
        found = self._load_latest(until=self._good)
        self.ranks.agree(None)  # before anyone writes
        if found is None or found[1]["phase"] != phase:  # deleted or damaged during the run
            raise checkpoint.CheckpointError(f"{what}, and {self.checkpoints} has no checkpoint of {phase}")
        source, state = found
        if len(self.rollbacks) > self.settings.rollbacks:
            if self.ranks.first:
                report = {"last_checkpoint": str(source), "rollbacks": self.rollbacks}
                write_json(self.directory / "failure.json", report)
            raise health.Diverged(
                f"{what}, after {self.settings.rollbacks} rollbacks; see failure.json. {source} is good: "
                f"resume={source} with another output resumes from it, perhaps with lower learning rates, "
                "clipped gradients or a larger gamma"
            )
        stepper.load_state_dict(state["stepper"])
        self._retry(phase, stepper)
        self.log.note(
            f"{what}; going back to {source} with other noise and learning rates "
            f"x {self.settings.rollback_lr}"
        )
        if self.ranks.first:
            # Otherwise a resume would fail the same way.
            self._adopt(source, state["step"], {"rollbacks": self.rollbacks})
            self.log.truncate(state["log_position"])
        self.ranks.agree(None)

    def _stops(self, iteration: int, *, wait: bool = False) -> bool:
        """Whether any rank has received a signal. All ranks learn of it after the same iteration: the next
        one unless they wait."""
        if self._votes.ask(iteration, self.signals.pending, wait=wait):
            self.signals.ask()
            return True
        return False

    def _try(self, name: str, stepper: Stepper, iterations: int, batch: Callable[[int], Tensor]) -> None:
        if iterations == 0:
            print(f"{name}: no iterations")
            return
        losses = _losses(_to_host(stepper.step(batch(0))))
        if not self.ranks.first:
            return
        shown = ", ".join(f"{key} {value}" for key, value in losses.items())
        print(
            f"{name}: one iteration, {shown}; checkpoint (weights, optimizer, averages) "
            f"{checkpoint.nbytes(stepper.state_dict()) / 2**20:.1f} MiB, {device.peak_memory(self.device)}"
        )

    def _save(self, phase: str, stepper: Stepper, *, good: bool = True) -> None:
        """Saves a checkpoint, ``good`` if a rollback may use it. One saved on a signal is not, so that the
        run equals an uninterrupted one."""
        if good:
            self._good = self._steps_past + stepper.iteration
        state: dict[str, Any] = {
            "phase": phase,
            "past": self.past,
            "steps_past": self._steps_past,
            "step": self._steps_past + stepper.iteration,
            "stepper": stepper.state_dict(),
            "log_position": self.log.position(),
            "resumed_from": self.resumed_from,
            "rollbacks": self.rollbacks,
            "good": self._good,
            "wall_seconds": self.wall_seconds,
        }
        keep = self.settings.keep_checkpoints
        checkpoint.save(self.checkpoints, state["step"], state, keep=keep, spare=self._good, ranks=self.ranks)
        # Waits for the writing ranks, without a timeout.
        self._stops(stepper.iteration, wait=True)

    def _adopt(self, source: Path, step: int, changes: dict[str, Any]) -> None:
        keep = self.settings.keep_checkpoints
        checkpoint.adopt(source, self.checkpoints, step, changes, keep=keep, spare=self._good)

    def summarize(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes summary.json, which marks the run as finished."""
        summary = {
            "recipe": self.settings.recipe,
            "seed": self.settings.seed,
            "device": str(self.device),
            "world_size": self.ranks.world_size,
            "batch_size_per_rank": self.rows[0],
            "iterations": self.settings.iterations,
            "resumed_from": self.resumed_from,
            "rollbacks": self.rollbacks,
            "wall_seconds": round(self.wall_seconds, 1),
            **numbers,
            "versions": device.versions(),
        }
        write_json(self.directory / "summary.json", summary)
        return summary


def _new_names(start: str) -> Iterator[str]:
    """Names of folders that do not exist yet."""
    start = f"{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in itertools.chain([start], (f"{start}-{i}" for i in itertools.count(2))):
        if not os.path.lexists(name):
            yield name


def _due(every: int, iteration: int) -> bool:
    return every > 0 and iteration % every == 0


def _to_host(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Metrics, scalars and vectors, as numbers and lists, with one transfer from the device."""
    packed = torch.cat([metric.float().flatten() for metric in metrics.values()]).cpu()
    parts = packed.split([metric.numel() for metric in metrics.values()])
    return {
        name: part.tolist() if metric.ndim else part.item()
        for (name, metric), part in zip(metrics.items(), parts, strict=True)
    }


def _losses(numbers: dict[str, Any]) -> dict[str, float]:
    """The losses among the numbers, for the progress bar."""
    return {key: round(float(numpy.mean(value)), 4) for key, value in numbers.items() if key.endswith("loss")}
