"""AUROC over the iterations of a run, of DxMI and of trained baselines. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dxmi_ext.anomaly import metrics
from dxmi_ext.anomaly.detectors.common import EnergyDetector, detect
from dxmi_ext.anomaly.features.collection import Examined
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.storage import files

Measure = Callable[[nn.Module], float | None]
"""energy -> AUROC on the test data; None if the energies cannot be ranked."""


class Curve:
    """Measures phases every few iterations and keeps the numbers in a file, which a run that resumes
    completes.

    Args:
        path: file of the numbers.
        every: number of iterations between measurements.
        measure: function of an energy.
    """

    def __init__(self, path: Path, every: int, measure: Measure) -> None:
        self.path, self.every, self.measure = path, every, measure

    def of(self, name: str, stepper: Trainable, energy: nn.Module, iterations: int) -> Trainable:
        """The stepper of a phase that measures an energy as it trains.

        Args:
            iterations: length of the phase; the last iteration is always measured.
        """
        return _Measured(self, name, stepper, energy, iterations)

    def numbers(self) -> dict[str, float]:
        """``curve/PHASE/ITERATION`` -> AUROC, in order."""
        return dict(files.read_json(self.path) or {})

    def add(self, phase: str, iteration: int, energy: nn.Module) -> None:
        if (auroc := self.measure(energy)) is not None:
            runlog.write_json(self.path, self.numbers() | {f"curve/{phase}/{iteration}": auroc})


class _Measured(Trainable):
    """A stepper that delegates to another and adds its energy's AUROC to a curve."""

    def __init__(
        self, curve: Curve, phase: str, stepper: Trainable, energy: nn.Module, iterations: int
    ) -> None:
        self._curve, self._phase, self._stepper = curve, phase, stepper
        self._energy, self._iterations = energy, iterations

    @property
    def iteration(self) -> int:  # type: ignore[override]
        return self._stepper.iteration

    def step(self, batch: Any) -> dict[str, Tensor]:
        if self.iteration == 0:
            self._curve.add(self._phase, 0, self._energy)
        found = self._stepper.step(batch)
        if self.iteration % self._curve.every == 0 or self.iteration == self._iterations:
            self._curve.add(self._phase, self.iteration, self._energy)
        return found

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return self._stepper.symptoms(numbers)

    def retry(self, attempt: int, lr_scale: float) -> None:
        self._stepper.retry(attempt, lr_scale)

    def tallies(self) -> dict[str, Tensor]:
        return self._stepper.tallies()

    def state_dict(self) -> dict[str, Any]:
        return self._stepper.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stepper.load_state_dict(state)


def measure_of(maps: FeatureMaps, tested: Examined, top_share: float) -> Measure | None:
    """The mean AUROC over classes, as in the table, of an energy on the positions of maps.

    Args:
        maps: prepared maps of the test data.

    Returns:
        None if no class has test data of both kinds.
    """
    kinds = {(int(i), bool(odd)) for i, odd in zip(tested.classes, tested.anomalous, strict=True)}
    if not any((i, True) in kinds and (i, False) in kinds for i, _ in kinds):
        return None

    def measure(energy: nn.Module) -> float | None:
        scores = EnergyDetector(energy, device=next(energy.parameters()).device).score(maps)
        pictures = detect(scores, top_share=top_share)
        means, _ = metrics.evaluate(
            pictures,
            tested.anomalous,
            classes=tested.classes,
            class_names=tested.class_names,
            say=lambda _: None,
        )
        return means.get("image_auroc")

    return measure
