"""Runs that diverge: notes, rollbacks, and a report when they stop."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from dxmi_ext import cli
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.method import symptoms
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import densities
from runs import DXMI, PRETRAIN, assert_same_run, read, train

for library in ("yaml", "sklearn"):
    pytest.importorskip(library)

STEPS = ("rollback_after=2", "rollbacks=2")
ITERATION = DxMITrainer._run


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with runs.quick():
        yield


def bad_while(is_bad: Callable[[DxMITrainer], bool], factor: float = math.nan) -> Callable[..., Any]:
    """An iteration that multiplies the data, and so the energy's loss, by a factor if `is_bad(trainer)`."""

    def iteration(self: DxMITrainer, keys: torch.Tensor, data: torch.Tensor, *args: Any) -> Any:
        return ITERATION(self, keys, data * factor if is_bad(self) else data, *args)

    return iteration


def first_attempt_after(iteration: int) -> Callable[[DxMITrainer], bool]:
    return lambda trainer: trainer.iteration >= iteration and trainer.learners[0].rates.scale == 1


def test_a_rollback_has_other_noise_and_lower_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "sound", *STEPS) == 0
    monkeypatch.setattr(DxMITrainer, "_run", bad_while(first_attempt_after(3)))
    run = tmp_path / "run"
    assert train(run, *STEPS) == 0
    # Steps 4 and 5 fail; the checkpoint due at 4 is not saved, so the run goes back to 2.
    note = "dxmi 5: steps in a row that were not finite: 2 of the energy; going back to "
    note += f"{run}/checkpoints/step_{PRETRAIN + 2:08d} with other noise and learning rates x 0.5"
    assert note in capsys.readouterr().err
    (rollback,) = read(run / "summary.json")["rollbacks"]
    assert rollback == {"phase": "dxmi", "iteration": 5, "failures": {"energy": 2}, "symptoms": {}}
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [*range(1, PRETRAIN + 1), *range(1, DXMI + 1)]
    sound = read_metrics(tmp_path / "sound" / "metrics.jsonl")
    same = [a["log_prob"] == b["log_prob"] for a, b in zip(rows[PRETRAIN:], sound[PRETRAIN:], strict=True)]
    assert same == [True, True, False, False, False, False]
    assert all(row["energy_failures"] == 0 for row in rows[PRETRAIN:])


@pytest.mark.parametrize("stop", [PRETRAIN + 2, PRETRAIN + 3, PRETRAIN + 4])
def test_a_run_stopped_around_a_rollback_resumes_as_if_it_was_not(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DxMITrainer, "_run", bad_while(first_attempt_after(3)))
    assert train(tmp_path / "whole", *STEPS) == 0
    with monkeypatch.context() as patch:
        sample = densities.sample
        calls = iter(range(10**9))

        def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
            if next(calls) == stop:
                signal.raise_signal(signal.SIGTERM)
            return sample(*args, **kwargs)

        patch.setattr(densities, "sample", spy)
        assert train(tmp_path / "run", *STEPS) == 143
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(tmp_path / "run", *STEPS) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rollbacks = [read(tmp_path / name / "summary.json")["rollbacks"] for name in ("run", "whole")]
    assert rollbacks[0] == rollbacks[1] != []


def test_a_run_that_cannot_recover_stops_with_a_report_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(DxMITrainer, "_run", bad_while(lambda trainer: trainer.iteration >= 3))
        for _ in range(2):  # the second run fails in the same way
            assert train(run, *STEPS) == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("dxmi train: dxmi 5: steps in a row that were not finite: 2 of the energy")
            report = read(run / "failure.json")
            assert len(report["rollbacks"]) == 3 and not (run / "summary.json").exists()
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert (
        "Stopped at iteration 5 of dxmi: steps were still not finite after all rollbacks." in page
        and "rollbacks" in page
    )
    good = report["last_checkpoint"]
    assert good.endswith(f"step_{PRETRAIN + 2:08d}")
    assert train(tmp_path / "next", f"resume={good}", "value_lr=1e-4") == 0
    assert read(tmp_path / "next" / "summary.json")["rollbacks"] == []


def test_without_rollbacks_a_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DxMITrainer, "_run", bad_while(first_attempt_after(3)))
    assert train(tmp_path, "rollback_after=0") == 0
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["energy_failures"] == 3


def test_skipped_steps_are_counted_over_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if the run was resumed, and if the last step is finite."""
    monkeypatch.setattr(DxMITrainer, "_run", bad_while(lambda trainer: trainer.iteration in (1, 4)))
    runs.interrupt(monkeypatch, PRETRAIN + 3)
    assert train(tmp_path) == 130
    monkeypatch.setattr(densities, "sample", runs.SAMPLE_DATA)
    assert train(tmp_path) == 0
    summary = read(tmp_path / "summary.json")
    assert summary["resumed_from"] and read_metrics(tmp_path / "metrics.jsonl")[-1]["energy_failures"] == 0
    names = ("pretrain/network", "dxmi/energy", "dxmi/value", "dxmi/sampler")
    assert summary["skipped_steps"] == dict.fromkeys(names, 0) | {"dxmi/energy": 2}
    said = capsys.readouterr().err
    assert f"dxmi: skipped steps, which were not finite: 2 of {DXMI} of the energy\n" in said
    assert "pretrain: skipped" not in said


SOUND = {
    **{"energy_data": -0.1, "energy_sample": 0.1, "energy_spread": 0.3},
    **{"data_spread": 2.0, "sample_spread": 1.9, "std": [0.5, 0.2]},
}


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        ("energy blow-up", {"energy_sample": -2e4}, "data -0.1, samples -2e+04"),
        ("energy collapse", {"energy_spread": 1e-9}, "equal for all rows: data -0.1, samples 0.1"),
        ("sample blow-up", {"sample_spread": 50.0}, "25 of the data's spread"),
        ("sample collapse", {"sample_spread": 0.1}, "0.05 of the data's spread"),
        ("sigma blow-up", {"std": [0.5, 30.0]}, "1 to 150 times its initial value"),
        ("sigma collapse", {"std": [1e-3, 0.2]}, "0.002 to 1 times its initial value"),
    ],
)
def test_symptoms(name: str, changed: dict[str, Any], why: str) -> None:
    assert symptoms.of(SOUND, [0.5, 0.2]) == {}
    assert symptoms.of(SOUND | changed, [0.5, 0.2]) == {name: why}


def test_symptoms_are_logged_and_noted_when_they_appear_and_disappear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil = bad_while(lambda trainer: trainer.iteration in (2, 3), factor=1e4)
    monkeypatch.setattr(DxMITrainer, "_run", spoil)
    assert train(tmp_path, "value_lr=0") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "energy blow-up" in line]
    assert notes[0].startswith("dxmi 3: energy blow-up: data ") and notes[1:] == [
        "dxmi 5: no more energy blow-up"
    ]
    symptoms = [row.get("symptoms") for row in read_metrics(tmp_path / "metrics.jsonl")[PRETRAIN:]]
    both = ["energy blow-up", "sample collapse"]  # relative to such data
    assert symptoms == [None, None, both, both, None, None]
