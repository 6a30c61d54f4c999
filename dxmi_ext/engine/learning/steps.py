"""What a phase of a run repeats, and its metrics on the host. Imports torch and numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor


class Trainable(Protocol):
    """Trains on one batch per iteration, with a state that resumes exactly."""

    iteration: int

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One iteration; returns metrics, with ``NAME_failures``, the consecutive skipped steps of a loss."""

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        """Problems that a step's metrics show, by name."""

    def retry(self, attempt: int, lr_scale: float) -> None:
        """Continues with other noise and scaled learning rates; attempt 0 is the initial state."""

    def tallies(self) -> dict[str, Tensor]:
        """For each loss, the numbers of skipped steps and of all steps so far, [2]."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def to_host(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Metrics, scalars and vectors, as numbers and lists, with one transfer from the device."""
    packed = torch.cat([metric.float().flatten() for metric in metrics.values()]).cpu()
    parts = packed.split([metric.numel() for metric in metrics.values()])
    return {
        name: part.tolist() if metric.ndim else part.item()
        for (name, metric), part in zip(metrics.items(), parts, strict=True)
    }


def losses(numbers: dict[str, Any]) -> dict[str, float]:
    """The losses among the numbers, for the progress bar."""
    return {key: round(float(numpy.mean(value)), 4) for key, value in numbers.items() if key.endswith("loss")}
