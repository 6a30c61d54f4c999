"""One run in its folder: phases of iterations, logged, checkpointed and resumed exactly.

Imports torch and ``dxmi_ext``; knows nothing of what the phases train.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from dxmi_ext import __version__, checkpoint, config
from dxmi_ext.runlog import RunLog, write_json
from dxmi_ext.trainer import Stepper

# Settings that may change when a run goes on; all others belong to what it is.
_MAY_CHANGE = {"output", "iterations", "device", "threads", "resume", "tensorboard"}
_MAY_CHANGE |= {"checkpoint_every", "keep_checkpoints", "log_every"}


def choose_device(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        config.ConfigError: a CUDA device is wanted and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise config.ConfigError(f"device: got {name!r}, but torch sees no CUDA device; use device=cpu")
    return torch.device(name)


class Run:
    """A run in ``cfg.output``; a context manager, and the only writer of that folder.

    Args:
        cfg: its settings. ``cfg.resume``: ``auto`` goes on from the folder's last checkpoint if there is one,
            ``never`` empties the folder of an earlier run first, a path goes on from that checkpoint.

    Raises:
        config.ConfigError: the folder holds a run of other settings.
        checkpoint.CheckpointError: the checkpoint to resume from is missing or damaged.
    """

    def __init__(self, cfg: config.RunConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # rather than as many unsynchronised runs
            raise config.ConfigError("this version trains on one rank; start it without torchrun")
        self.cfg = cfg
        self.directory = Path(cfg.output or f"runs/{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.device = choose_device(cfg.device)
        self.log = RunLog(self.directory, tensorboard=cfg.tensorboard)
        self.resumed_from: list[int] = []
        self.past: list[str] = []  # phases that are over
        self._steps_past = 0  # their iterations
        self._state: dict[str, Any] | None = None  # to resume from, until its phase has taken it
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self._threads = torch.get_num_threads()  # to be restored
        if cfg.resume == "never":
            self._clear()
        self._check_settings()

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def wall_seconds(self) -> float:
        """Spent on this run, in all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def finished(self) -> bool:
        """Whether the folder holds this run already, finished."""
        summary = self.directory / "summary.json"
        if self.cfg.resume != "auto" or not summary.is_file():
            return False
        return json.loads(summary.read_text(encoding="utf-8"))["iterations"] >= self.cfg.iterations

    def __enter__(self) -> Run:
        source = self._source()
        if source:
            self._state = checkpoint.load(source)
            self._earlier_seconds = self._state["wall_seconds"]
            self.resumed_from = [*self._state["resumed_from"], self._state["step"]]
            self.past, self._steps_past = self._state["past"], self._state["steps_past"]
        if self.cfg.threads:
            torch.set_num_threads(self.cfg.threads)
        self.log.__enter__()
        config.save(self.cfg, self.directory / "config.yaml")
        (self.directory / "summary.json").unlink(missing_ok=True)  # a run that goes on is not finished
        self.log.truncate(self._state["log_position"] if self._state else 0)
        if self._state and source:
            self.log.note(f"resuming from {source}")
            # Of a run taken back, the later checkpoints go: no resume may find them.
            self._keep(self._state | {"log_position": self.log.position()})
        return self

    def __exit__(self, *exception: Any) -> None:
        self.log.__exit__(*exception)
        torch.set_num_threads(self._threads)

    def phase(self, name: str, stepper: Stepper, iterations: int, batch: Callable[[int], Tensor]) -> None:
        """Runs a phase to its last iteration, from where a resumed run stood; not at all if it was past.

        Args:
            name: of the phase.
            stepper: what it repeats.
            iterations: its length.
            batch: iteration -> data [B, *].
        """
        if name in self.past:
            return
        if self._state is not None and self._state["phase"] == name:
            try:
                stepper.load_state_dict(self._state["stepper"])
            except (KeyError, RuntimeError, ValueError) as error:
                raise checkpoint.CheckpointError(f"the checkpoint is of other settings: {error}") from error
            self._state = None
        with self.log.progress(name, iterations, stepper.iteration) as bar:
            while stepper.iteration < iterations:
                metrics = stepper.step(batch(stepper.iteration))
                losses = {}
                if stepper.iteration % self.cfg.log_every == 0 or stepper.iteration == iterations:
                    numbers = {key: value.float().mean().item() for key, value in metrics.items()}
                    self.log.log(name, stepper.iteration, numbers)
                    losses = {key: round(value, 4) for key, value in numbers.items() if key.endswith("loss")}
                bar.update(1, **losses)
                if stepper.iteration % self.cfg.checkpoint_every == 0 or stepper.iteration == iterations:
                    self._save(name, stepper)
        self.past.append(name)
        self._steps_past += iterations

    def _save(self, phase: str, stepper: Stepper) -> None:
        state = {
            "phase": phase,
            "past": self.past,
            "steps_past": self._steps_past,
            "step": self._steps_past + stepper.iteration,
            "stepper": stepper.state_dict(),
            "log_position": self.log.position(),
            "resumed_from": self.resumed_from,
            "wall_seconds": self.wall_seconds,
        }
        self._keep(state)

    def _keep(self, state: dict[str, Any]) -> None:
        checkpoint.save(self.checkpoints, state["step"], state, keep=self.cfg.keep_checkpoints)

    def _source(self) -> Path | None:
        """The checkpoint to resume from."""
        if self.cfg.resume == "auto":
            return checkpoint.latest(self.checkpoints)
        return None if self.cfg.resume == "never" else Path(self.cfg.resume)

    def summarize(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes summary.json, which makes the run a finished one."""
        summary = {
            "recipe": self.cfg.recipe,
            "seed": self.cfg.seed,
            "device": str(self.device),
            "world_size": 1,
            "batch_size_per_rank": self.cfg.batch_size,
            "iterations": self.cfg.iterations,
            "resumed_from": self.resumed_from,
            "wall_seconds": round(self.wall_seconds, 1),
            **numbers,
            "versions": {
                "dxmi_ext": __version__,
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "python": platform.python_version(),
            },
        }
        write_json(self.directory / "summary.json", summary)
        return summary

    def _check_settings(self) -> None:
        """A folder's checkpoints and metrics belong to the settings in its config.yaml."""
        path = self.directory / "config.yaml"
        if not path.is_file():
            return
        earlier = config.load(type(self.cfg), path)
        for field in dataclasses.fields(self.cfg):
            was, wanted = getattr(earlier, field.name), getattr(self.cfg, field.name)
            if field.name not in _MAY_CHANGE and was != wanted:
                raise config.ConfigError(
                    f"{field.name}: got {wanted!r}, but {self.directory} holds a run with {was!r}; choose "
                    "another output, or resume=never to overwrite it"
                )

    def _clear(self) -> None:
        for name in ("checkpoints", "model", "tb"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in ("config.yaml", "metrics.jsonl", "summary.json"):
            (self.directory / name).unlink(missing_ok=True)
