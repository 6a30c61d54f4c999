"""A run in its folder: phases of iterations with logging, checkpoints, stopping and exact resuming.

Imports torch and ``dxmi_ext``; independent of what the phases train.
"""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.compute.device import Clock, choose, peak_memory, versions
from dxmi_ext.engine.compute.ranks import Ranks, Votes
from dxmi_ext.engine.learning import health, steps
from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.engine.output.runlog import RunLog, write_json
from dxmi_ext.engine.run_settings import RunnableConfig
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.runs.identity import Source
from dxmi_ext.engine.runs.rollback import Rollbacks
from dxmi_ext.engine.runs.run_folder import Found, RunFolder
from dxmi_ext.engine.runs.signals import StopSignals
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint

_MANY_SKIPPED = 0.01  # share of the steps of a loss above which a note says so


class Run:
    """A run in ``cfg.output``; a context manager and the only writer of that folder. Of several ranks, only
    the first writes.

    Args:
        cfg: settings with a group ``run``; a missing output is filled in. ``resume``: ``auto`` resumes from
            the folder's last intact checkpoint if there is one, ``never`` removes an earlier run from the
            folder first, a path resumes from that checkpoint. ``dry_run``: one iteration of each phase,
            nothing written.
        ranks: ranks of the run, whose process group exists.
        data: fingerprints of the data, or path -> those of the data there if ``data`` is a path; identify
            the data wherever they are.
        device: device of this rank; None: the one that ``cfg`` names.

    Raises:
        folders.FolderError: the folder does not belong to a run.
        ConfigError: it holds a run of other settings or data, or one of more iterations; or the batch size is
            not a multiple of the number of ranks.
        files.Locked: another process runs in the folder.
        checkpoint.CheckpointError: the checkpoint to resume from is missing or damaged.
        health.Diverged: steps are still not finite after all rollbacks.
        signals.Stopped: on SIGTERM or Ctrl-C; in a phase, after the current iteration is done and saved.
    """

    def __init__(
        self,
        cfg: RunnableConfig,
        ranks: Ranks | None = None,
        data: Source | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.cfg, self.settings = cfg, cfg.run
        self.ranks = dataclasses.replace(ranks or Ranks(), shard=cfg.run.shard)
        try:
            # Number of this rank's rows of a batch, and the first of them.
            self.rows = self.ranks.rows(cfg.run.batch_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.device = device or choose(cfg.run.device, self.ranks)
        self._folder = RunFolder(cfg, self.ranks, data)
        self.signals, self._votes = StopSignals(), Votes(self.ranks)
        self.resumed_from: list[int] = []
        self.past: list[str] = []  # finished phases
        self._skipped: dict[str, int] = {}  # number of their skipped steps, by PHASE/LOSS
        self._steps_past = 0  # number of their iterations
        self._rollbacks = Rollbacks(self._folder, self.settings, self.ranks)
        self._symptoms: set[str] = set()  # at the last log
        self._found: Found | None = None  # checkpoint to resume from, until its phase has loaded it
        self._earlier_seconds = 0.0
        self._started = time.monotonic()

    @property
    def directory(self) -> Path:
        """The folder of the run; a default name may change when the run is opened."""
        return self._folder.directory

    @property
    def checkpoints(self) -> Path:
        return self._folder.checkpoints

    @property
    def log(self) -> RunLog:
        return self._folder.log

    @property
    def wall_seconds(self) -> float:
        """Time spent on this run in all sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def finished(self) -> bool:
        """Whether the folder holds this run, finished; prints a message if so."""
        return self._folder.finished()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if self.settings.threads:
                torch.set_num_threads(self.settings.threads)
            if self.settings.dry_run and self.ranks.first:
                print(config.to_yaml(self.cfg.replace(dry_run=False)))
            if not self.settings.dry_run:
                stack.enter_context(self.signals)
                self._resume(self._folder.open(stack))
            self._exit = stack.pop_all().__exit__
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit(*exception)

    def _resume(self, found: Found | None) -> None:
        """Continues from a checkpoint, or starts the run if there is none. The folder is kept until the
        checkpoint has been loaded, which may not fit."""
        self._found = found
        if found is None:
            self._take_over(None)
            return
        source, state = found
        self._earlier_seconds = state["wall_seconds"]
        self.resumed_from = [*state["resumed_from"], state["step"]]
        self.past, self._steps_past = state["past"], state["steps_past"]
        self._skipped = state.get("skipped", {})  # older runs have none
        self._rollbacks.resume(state, here=self._folder.holds(source))

    def _take_over(self, found: Found | None) -> None:
        if self.ranks.first:
            self._folder.take_over(found, self._rollbacks.done, self._rollbacks.good)

    def describe(self, networks: nn.Module) -> None:
        """Prints the size of each network in a dry run."""
        if self.settings.dry_run and self.ranks.first:
            for name, network in networks.named_children():
                if count := sum(p.numel() for p in network.parameters()):
                    print(f"{name}: {count:,} parameters")

    def phase(
        self,
        name: str,
        stepper: Trainable,
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
        resumed = self._restore(name, stepper, iterations)
        with self.log.progress(name, iterations, stepper.iteration) as bar, self.signals.held():
            if not resumed:
                self._save(name, stepper)  # for a rollback
            clock = Clock(self.device, self.settings.batch_size, stepper.iteration)
            while stepper.iteration < iterations:
                metrics = stepper.step(batch(stepper.iteration))
                now, last = stepper.iteration, stepper.iteration == iterations
                losses, saved = {}, False
                draws = _due(self.settings.picture_every, now)  # on all ranks, though one has the function
                logs = last or _due(self.settings.log_every, now) or draws
                saves = last or _due(self.settings.checkpoint_every, now)
                stops = self._stops(now)
                if logs or saves or stops:
                    numbers = steps.to_host(metrics)
                    failures = max(health.failures(numbers).values(), default=0)
                    # Not because of a signal, so that the run equals an uninterrupted one.
                    if (logs or saves) and 0 < self.settings.rollback_after <= failures:
                        self._rollbacks.roll_back(name, stepper, numbers)
                        bar.back_to(stepper.iteration)
                        clock = Clock(self.device, self.settings.batch_size, stepper.iteration)
                        continue
                    if logs:
                        self._log(name, stepper, numbers | clock.lap(now))
                        losses = steps.losses(numbers)
                    if draws and picture is not None:
                        self.log.picture(name, now, picture)
                    saved = last or ((saves or stops) and not failures)
                    if saved:
                        self._save(name, stepper, good=saves)
                bar.update(1, **losses)
                if stops or (saved and self._stops(now)):  # a signal may come during the save
                    break
        self._tally(name, stepper)
        self.past.append(name)
        self._steps_past += iterations

    def _tally(self, phase: str, stepper: Trainable) -> None:
        """Keeps the numbers of skipped steps of a finished phase, and notes those above a small share."""
        tallies = {loss: tally.tolist() for loss, tally in stepper.tallies().items()}
        self._skipped |= {f"{phase}/{loss}": int(skipped) for loss, (skipped, _) in tallies.items()}
        many = [
            f"{skipped:.0f} of {steps:.0f} of the {loss}"
            for loss, (skipped, steps) in tallies.items()
            if skipped > _MANY_SKIPPED * steps
        ]
        if many:
            self.log.note(f"{phase}: skipped steps, which were not finite: {', '.join(many)}")

    def _restore(self, phase: str, stepper: Trainable, iterations: int) -> bool:
        """Loads the state to resume from, if there is one."""
        if self._found is None:
            return False
        state = self._found[1]
        if (saved := state["phase"]) != phase:  # phases before it are in `past`
            raise checkpoint.CheckpointError(
                f"the checkpoint to resume from must be of the phase {phase!r}, got one of {saved!r}; "
                "resume=never starts afresh"
            )
        try:
            stepper.load_state_dict(state["stepper"])
        except (KeyError, RuntimeError, ValueError) as error:
            why = textwrap.shorten(str(error), 300)  # torch's errors have several lines
            raise checkpoint.CheckpointError(f"the checkpoint does not fit the networks: {why}") from error
        if stepper.iteration > iterations:
            raise ConfigError(
                f"iterations must be >= {stepper.iteration}, the iteration of the checkpoint to resume from, "
                f"got {iterations}; resume=never starts afresh"
            )
        self._take_over(self._found)
        self._found = None
        self._rollbacks.retry(phase, stepper)
        return True

    def _log(self, phase: str, stepper: Trainable, numbers: dict[str, Any]) -> None:
        """Logs an iteration; a symptom is noted when it appears and when it disappears."""
        symptoms = stepper.symptoms(numbers)
        for name in symptoms.keys() - self._symptoms:
            self.log.note(f"{phase} {stepper.iteration}: {name}: {symptoms[name]}")
        for name in self._symptoms - symptoms.keys():
            self.log.note(f"{phase} {stepper.iteration}: no more {name}")
        self._symptoms = set(symptoms)
        self.log.log(phase, stepper.iteration, numbers, symptoms=sorted(symptoms))

    def _stops(self, iteration: int, *, wait: bool = False) -> bool:
        """Whether any rank has received a signal. All ranks learn of it after the same iteration: the next
        one unless they wait."""
        if self._votes.ask(iteration, self.signals.pending, wait=wait):
            self.signals.ask()
            return True
        return False

    def _try(self, name: str, stepper: Trainable, iterations: int, batch: Callable[[int], Tensor]) -> None:
        if iterations == 0:
            print(f"{name}: no iterations")
            return
        losses = steps.losses(steps.to_host(stepper.step(batch(0))))
        if not self.ranks.first:
            return
        shown = ", ".join(f"{key} {value}" for key, value in losses.items())
        print(
            f"{name}: one iteration, {shown}; checkpoint (weights, optimizer, averages) "
            f"{checkpoint.nbytes(stepper.state_dict()) / 2**20:.1f} MiB, {peak_memory(self.device)}"
        )

    def _save(self, phase: str, stepper: Trainable, *, good: bool = True) -> None:
        """Saves a checkpoint, ``good`` if a rollback may use it. One saved on a signal is not, so that the
        run equals an uninterrupted one."""
        if good:
            self._rollbacks.good = self._steps_past + stepper.iteration
        state: dict[str, Any] = {
            "phase": phase,
            "past": self.past,
            "steps_past": self._steps_past,
            "skipped": self._skipped,
            "step": self._steps_past + stepper.iteration,
            "stepper": stepper.state_dict(),
            "log_position": self.log.position(),
            "resumed_from": self.resumed_from,
            "rollbacks": self._rollbacks.done,
            "good": self._rollbacks.good,
            "wall_seconds": self.wall_seconds,
        }
        keep, spare = self.settings.keep_checkpoints, self._rollbacks.good
        checkpoint.save(self.checkpoints, state["step"], state, keep=keep, spare=spare, ranks=self.ranks)
        # Waits for the writing ranks, without a timeout.
        self._stops(stepper.iteration, wait=True)

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
            "rollbacks": self._rollbacks.done,
            "skipped_steps": self._skipped,
            "wall_seconds": round(self.wall_seconds, 1),
            **numbers,
            "versions": versions(),
        }
        write_json(self.directory / "summary.json", summary)
        return summary


def _due(every: int, iteration: int) -> bool:
    return every > 0 and iteration % every == 0
