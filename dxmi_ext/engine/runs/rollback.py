"""Rollbacks of a run to its last good checkpoint, with other noise and lower learning rates.

Imports ``dxmi_ext.engine``.
"""

from __future__ import annotations

from typing import Any

from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning import health
from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.engine.output.runlog import write_json
from dxmi_ext.engine.run_settings import RunSettings
from dxmi_ext.engine.runs.run_folder import RunFolder
from dxmi_ext.engine.storage import checkpoint


class Rollbacks:
    """The rollbacks of a run so far, and the checkpoint of the next."""

    def __init__(self, folder: RunFolder, settings: RunSettings, ranks: Ranks) -> None:
        self._folder, self._settings, self._ranks = folder, settings, ranks
        self.done: list[dict[str, Any]] = []
        self.good = 0
        """Step of the checkpoint for the next rollback."""

    def resume(self, state: dict[str, Any], *, here: bool) -> None:
        """Takes over the rollbacks of a checkpoint that is in the run's folder, not those of another."""
        self.good = state["step"]
        if here:
            self.done, self.good = state["rollbacks"], state["good"]

    def retry(self, phase: str, stepper: Trainable) -> None:
        """Continues a phase as after its last rollback."""
        attempt = sum(rollback["phase"] == phase for rollback in self.done)
        stepper.retry(attempt, self._settings.rollback_lr**attempt)

    def roll_back(self, phase: str, stepper: Trainable, numbers: dict[str, Any]) -> None:
        """Goes back to the last good checkpoint, with other noise and lower learning rates.

        Raises:
            health.Diverged: the number of rollbacks is used up.
        """
        failures, at = health.failures(numbers), f"{phase} {stepper.iteration}"
        steps = ", ".join(f"{count} of the {name}" for name, count in failures.items())
        what = f"{at}: steps in a row that were not finite: {steps}"
        rollback = {"phase": phase, "iteration": stepper.iteration, "failures": failures}
        self.done = [*self.done, rollback | {"symptoms": stepper.symptoms(numbers)}]
        found = self._folder.load_latest(until=self.good)
        self._ranks.agree(None)  # before anyone writes
        if found is None or found[1]["phase"] != phase:  # deleted or damaged during the run
            raise checkpoint.CheckpointError(
                f"{what}, and {self._folder.checkpoints} has no checkpoint of {phase}"
            )
        source, state = found
        if len(self.done) > self._settings.rollbacks:
            if self._ranks.first:
                report = {"last_checkpoint": str(source), "rollbacks": self.done}
                write_json(self._folder.directory / "failure.json", report)
            raise health.Diverged(
                f"{what}, after {self._settings.rollbacks} rollbacks; see failure.json. {source} is good: "
                f"resume={source} with another output resumes from it, perhaps with lower learning rates "
                "or clipped gradients"
            )
        stepper.load_state_dict(state["stepper"])
        self.retry(phase, stepper)
        self._folder.log.note(
            f"{what}; going back to {source} with other noise and learning rates "
            f"x {self._settings.rollback_lr}"
        )
        if self._ranks.first:
            # Otherwise a resume would fail the same way.
            self._folder.adopt(source, state["step"], {"rollbacks": self.done}, self.good)
            self._folder.log.truncate(state["log_position"])
        self._ranks.agree(None)
