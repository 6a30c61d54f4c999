"""Tiny runs, and comparisons of two of them; shared by the tests of run folders."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dxmi_ext import cli, tasks
from dxmi_ext.engine.output.runlog import TIMING_FIELDS, read_metrics
from dxmi_ext.engine.runs import config
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import metrics
from dxmi_ext.two_d import recipe as two_d

PRETRAIN, DXMI = 4, 6  # iterations; a checkpoint every 2
SETTINGS = [
    *(f"pretrain_iterations={PRETRAIN}", f"iterations={DXMI}", "batch_size=16", "device=cpu"),
    *("checkpoint_every=2", "log_every=1", "tensorboard=false"),
]
SCORES = ("sliced_wasserstein", "sliced_wasserstein_std", "sliced_wasserstein_floor")
SCORES += ("sliced_wasserstein_floor_std", "auroc", "auroc_std", "entropy_excess", "coverage", "energy_kl")
SAMPLE_DATA = data.sample
FEW_POINTS = functools.partial(metrics.evaluate, n=100, projections=10)


@contextmanager
def quick() -> Iterator[None]:
    """Within, runs are evaluated on few points, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "evaluate", FEW_POINTS)
        patch.setattr(two_d, "draw_pictures", lambda *_: None)
        yield


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the next run stop, as by Ctrl-C, when it asks for the data of a step, counted over all phases."""

    def sample(name: str, n: int, key: Any, **rest: Any) -> Any:
        nonlocal step
        step -= 1
        if step < 0:
            raise KeyboardInterrupt
        return SAMPLE_DATA(name, n, key, **rest)

    patch.setattr(data, "sample", sample)


def train(folder: Path, *settings: str, recipe: str = "8gaussians", command: str = "train") -> int:
    return cli.main([command, recipe, f"output={folder}", *SETTINGS, *settings])


def config_of(folder: Path, *settings: str) -> two_d.Config:
    """The settings of a run of `train`."""
    return config.load(two_d.Config, tasks.find("8gaussians"), [f"output={folder}", *SETTINGS, *settings])


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def model(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


def untimed(folder: Path) -> list[str]:
    """The lines of metrics.jsonl without the fields that depend on the machine."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [json.dumps({k: v for k, v in row.items() if k not in TIMING_FIELDS}) for row in rows]


def assert_same_run(folder: Path, other: Path) -> None:
    assert model(folder) == model(other)
    assert untimed(folder) == untimed(other)
    assert [read(folder / "summary.json")[key] for key in SCORES] == [
        read(other / "summary.json")[key] for key in SCORES
    ]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def draw(folder: Path, output: Path, *settings: str) -> np.ndarray:
    assert cli.main(["sample", str(folder), f"output={output}", "device=cpu", *settings]) == 0
    with np.load(output) as file:
        assert file.files == ["samples"]
        samples: np.ndarray = file["samples"]
    return samples
