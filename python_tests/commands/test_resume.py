"""`dxmi train` and `dxmi pretrain` in the folder of an earlier run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dxmi_ext import cli
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.engine.storage import files
from dxmi_ext.two_d import densities as data
from runs import DXMI, PRETRAIN, SAMPLE_DATA, assert_same_run, contents, interrupt, model, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


@pytest.mark.parametrize(
    ("interruptions", "resumed_from"),
    [
        ([1], [0]),  # before the first periodic checkpoint
        ([3], [2]),  # in pretraining
        ([4], [4]),  # between the phases
        ([9], [8]),  # in DxMI
        ([10], [10]),  # in the evaluation
        ([3, 4], [2, 6]),  # twice: the second run starts at 2 and fails at 6
    ],
)
def test_interrupted_run_ends_as_an_uninterrupted_one(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interruptions: list[int],
    resumed_from: list[int],
) -> None:
    for step in interruptions:
        interrupt(monkeypatch, step)
        assert train(tmp_path) == 130
        assert "interrupted" in capsys.readouterr().err
        assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)
    assert read(tmp_path / "summary.json")["resumed_from"] == resumed_from


def test_train_resumes_from_the_command_pretrain(finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path, command="pretrain") == 0
    assert not (tmp_path / "summary.json").exists() and model(tmp_path) != model(finished)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_finished_run_says_so_and_changes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert train(copy) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert contents(copy) == before


def test_pretrain_changes_nothing_in_a_finished_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert train(copy, command="pretrain") == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert contents(copy) == before


def test_finished_run_resumes_to_more_iterations(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 1)
    assert train(copy, "iterations=8") == 130
    assert not (copy / "summary.json").exists()  # no longer finished
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(copy, "iterations=8") == 0
    summary = read(copy / "summary.json")
    assert (summary["iterations"], summary["resumed_from"]) == (8, [PRETRAIN + DXMI])
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == PRETRAIN + 8


def test_fewer_iterations_than_are_done_are_rejected(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, PRETRAIN + 5)
    assert train(tmp_path) == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(tmp_path, "iterations=3") == 2
    says = "iterations must be >= 4, the iteration of the checkpoint to resume from, got 3"
    assert says in capsys.readouterr().err
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_run_resumes_from_a_checkpoint_by_path(finished: Path, copy: Path) -> None:
    assert train(copy, f"resume={copy}/checkpoints/step_00000008") == 0
    assert_same_run(copy, finished)
    assert read(copy / "summary.json")["resumed_from"] == [8]


def test_a_run_that_went_back_resumes_from_there(
    finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 1)
    assert train(copy, f"resume={copy}/checkpoints/step_00000008") == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(copy) == 0
    assert_same_run(copy, finished)
    assert set(read(copy / "summary.json")["resumed_from"]) == {8}


def test_a_run_that_resumes_from_another_folder_logs_its_own_lines(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a new folder, and in the folder of another run, whose log lines differ in length."""
    for _ in range(2):
        assert train(tmp_path, "seed=1", f"resume={finished}/checkpoints/step_00000008") == 0
        rows = read_metrics(tmp_path / "metrics.jsonl")
        assert [(row["phase"], row["iteration"]) for row in rows] == [("dxmi", 5), ("dxmi", 6)]
        assert "lost lines" not in capsys.readouterr().err
        assert train(tmp_path, "seed=1", "resume=never") == 0


def test_resume_never_starts_from_scratch(finished: Path, copy: Path) -> None:
    assert train(copy, "resume=never", "tau=0.2") == 0
    assert read(copy / "summary.json")["resumed_from"] == []
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == PRETRAIN + DXMI
    assert model(copy) != model(finished)
    assert train(copy, "resume=never") == 0
    assert_same_run(copy, finished)


def test_a_second_process_in_a_folder_is_rejected(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.lock(copy / ".lock"):
        before = contents(copy)
        assert train(copy, "resume=never") == 2
        assert "another process is at work in this folder" in capsys.readouterr().err
        assert contents(copy) == before
    assert train(copy, "resume=never") == 0
    assert not (copy / ".lock").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tau=0.2", "tau must be 0.1 as in the run"),
        ("seed=1", "seed must be 0 as in the run"),
        ("batch_size=8", "batch_size must be 16 as in the run"),
        ("pretrain_iterations=5", "pretrain_iterations must be 4 as in the run"),
        ("resume=nowhere", "nowhere"),
        ("sigma_min=4", "sigma_min must be > 0 and < sigma_max=3.0, got 4.0"),
    ],
)
def test_rejected_in_the_folder_of_a_run(
    copy: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    before = contents(copy)
    assert train(copy, setting) == 2
    assert says in capsys.readouterr().err
    assert contents(copy) == before


def test_a_folder_with_a_run_of_another_task_is_rejected(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert cli.main(["train", "gmm25", f"output={copy}"]) == 2
    assert "task must be 'two_d' as in the run that" in capsys.readouterr().err
    assert contents(copy) == before
