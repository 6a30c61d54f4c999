"""Runs that are killed or stopped, or meet full disks or damaged checkpoints, end with the same bytes."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import deaths
import runs
from deaths import leftovers, limited_file_size
from dxmi_ext import cli
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs import signals
from dxmi_ext.engine.storage import files
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import metrics
from kill_experiment import Experiment
from runs import DXMI, FEW_POINTS, PRETRAIN, SETTINGS, assert_same_run, read, train

for library in ("yaml", "sklearn"):
    pytest.importorskip(library)

SAMPLE_DATA, FSYNC = data.sample, files._fsync
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with runs.quick():
        yield
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS


def nth(n: int, function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """The function, with something done just before its n-th call, counted from 0."""
    calls = iter(range(10**9))

    def spy(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == n:
            action()
        return function(*args, **kwargs)

    return spy


def ask(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").iterdir())


# --- killed ------------------------------------------------------------------------------------------


def test_processes_killed_at_any_moment(tmp_path: Path) -> None:
    settings = [*SETTINGS, "pretrain_iterations=10", "iterations=20", "checkpoint_every=1"]
    experiment = Experiment(tmp_path, settings, seed=0)
    assert len(experiment.kills(3)) == 3
    assert experiment.damage == []


def test_a_run_that_dies_at_any_file_operation(finished: Path, tmp_path: Path) -> None:
    """Every seventh operation is tried; test_checkpoint.py tries all operations of a save."""
    for operation in itertools.count(3, step=7):
        folder = tmp_path / str(operation)
        with deaths.after(operation) as death:
            train(folder)
        if not death.died:
            break
        assert train(folder) == 0
        assert leftovers(folder) == []
        assert_same_run(folder, finished)
    assert operation > 50


def test_a_run_that_dies_again_and_again(finished: Path, tmp_path: Path) -> None:
    sessions = 0
    for operations in itertools.count(5):
        with deaths.after(operations) as death:
            train(tmp_path)
        if not death.died:
            break
        sessions += 1
    assert sessions > 5 and leftovers(tmp_path) == []
    assert_same_run(tmp_path, finished)


def test_a_crash_while_going_back_loses_no_log_line(finished: Path, tmp_path: Path) -> None:
    """At each death, the later checkpoints and their log lines are either both there or both removed."""
    for operation in range(4, 12):
        folder = shutil.copytree(finished, tmp_path / str(operation))
        with deaths.after(operation):
            train(folder, f"resume={folder}/checkpoints/step_00000008")
        assert train(folder) == 0
        assert_same_run(folder, finished)


# --- stopped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", list(HANDLERS))
@pytest.mark.parametrize(
    ("iteration", "saved"),
    [(0, 1), (2, 3), (PRETRAIN - 1, 4), (PRETRAIN, 5), (PRETRAIN + DXMI - 1, 10)],
)
def test_a_signal_ends_the_iteration_and_tells_how_to_resume(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    iteration: int,
    saved: int,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "sample", nth(iteration, SAMPLE_DATA, ask(number)))
        assert train(folder, "resume=never") == 128 + number
    assert steps(folder)[-1] == saved and not (folder / "model").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped; to resume: dxmi train 8gaussians")
    _, *command = shlex.split(last.partition(": ")[2])
    assert f"output={folder}" in command and "resume=never" not in command
    assert cli.main(command) == 0
    assert_same_run(folder, finished)
    assert read(folder / "summary.json")["resumed_from"] == [saved]


def test_a_signal_within_a_save_waits_for_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fsyncs are those of the folder of config.yaml and of the first checkpoint's files."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "_fsync", nth(2, FSYNC, ask(signal.SIGTERM)))
        assert train(tmp_path) == 143
    assert steps(tmp_path) == [0, 1] and leftovers(tmp_path) == []
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_a_signal_while_an_iteration_is_logged_saves_the_next(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runlog.RunLog, "log", nth(PRETRAIN + 2, runlog.RunLog.log, ask(signal.SIGTERM)))
        assert train(tmp_path) == 143
    assert steps(tmp_path)[-1] == PRETRAIN + 4 == len(runlog.read_metrics(tmp_path / "metrics.jsonl"))
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("place", ["building", "evaluation", "model"])
def test_a_signal_outside_the_phases_ends_at_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        if place == "building":
            patch.setattr(runs.two_d, "build", nth(0, runs.two_d.build, ask(signal.SIGTERM)))
        elif place == "evaluation":
            patch.setattr(metrics, "evaluate", nth(0, FEW_POINTS, ask(signal.SIGTERM)))
        else:
            save = runs.two_d.checkpoint._write
            patch.setattr(runs.two_d.checkpoint, "_write", nth(5, save, ask(signal.SIGTERM)))
        assert train(tmp_path) == 143
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "model").exists() == (place == "evaluation")
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: signal.Signals, status: int
) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    def both() -> None:
        ask(signal.SIGTERM)()
        ask(second)()

    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", end)
        patch.setattr(signals, "_ECHO_SECONDS", 0)
        patch.setattr(data, "sample", nth(PRETRAIN + 1, SAMPLE_DATA, both))
        with pytest.raises(SystemExit) as ended:
            train(tmp_path)
    assert ended.value.code == status
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_an_echo_of_a_signal_is_not_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        ask(signal.SIGTERM)()
        ask(signal.SIGTERM)()

    monkeypatch.setattr(signals, "_ECHO_SECONDS", 60)
    monkeypatch.setattr(data, "sample", nth(1, SAMPLE_DATA, twice))
    assert train(tmp_path) == 143
    assert "stopped; to resume" in capsys.readouterr().err


def test_off_the_main_thread_no_handler_is_installed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    look = nth(0, SAMPLE_DATA, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr(data, "sample", look)
    thread = threading.Thread(target=lambda: seen.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert seen == [HANDLERS[signal.SIGTERM], 0]
    assert_same_run(tmp_path, finished)


# --- a full disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "settings", "file"),
    [
        (100, [], "config.yaml"),
        (1800, ["checkpoint_every=100"], "metrics.jsonl"),
        (100_000, [], "tensors.safetensors"),
        (100_000, ["tensorboard=true", "checkpoint_every=100"], "tensors.safetensors"),
        (1800, ["tensorboard=true", "log_every=100"], "tensors.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_loses_nothing(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    settings: list[str],
    file: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data, "sample", nth(PRETRAIN, SAMPLE_DATA, ask(signal.SIGTERM)))
        assert train(tmp_path) == 143
    capsys.readouterr()
    with limited_file_size(size):
        assert train(tmp_path, *settings) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dxmi train: ")]
    assert len(errors) == 1 and "File too large" in errors[0] and file in errors[0]
    assert steps(tmp_path) == [4, 5] and leftovers(tmp_path) == []
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


# --- damaged checkpoints -----------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_skipped_but_rejected_by_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").unlink()
    bad = folder / "checkpoints" / "step_00000010"
    (bad / "state.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    assert train(folder, f"resume={bad}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dxmi train: {bad}/state.json: expected ") and error.endswith(" bytes, got 2\n")
    assert sorted(folder.rglob("*")) == before
    assert train(folder) == 0
    assert f"skipping a damaged checkpoint: {bad}/state.json" in capsys.readouterr().err
    assert_same_run(folder, finished)
    assert read(folder / "summary.json")["resumed_from"] == [8]


def test_if_all_checkpoints_are_damaged_the_user_decides(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "summary.json").unlink()
    for path in folder.glob("checkpoints/*/manifest.json"):
        path.unlink()
    assert train(folder) == 2
    assert "every checkpoint is damaged; resume=never starts afresh" in capsys.readouterr().err
    assert train(folder, "resume=never") == 0
    assert_same_run(folder, finished)
