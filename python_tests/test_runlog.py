"""The run's log: metrics once each, also after resuming; progress; json; silence where disabled."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from deaths import limited_file_size
from dxmi_ext import runlog
from dxmi_ext.runlog import RunLog


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        log.log("pretrain", 0, {"loss": 0.5})
        log.log("dxmi", 7, {"loss": math.nan, "value": math.inf})
    assert rows(tmp_path / "run") == [
        {"phase": "pretrain", "iteration": 0, "loss": 0.5},
        {"phase": "dxmi", "iteration": 7, "loss": None, "value": None},
    ]


def test_a_metric_of_the_samplers_steps_is_a_list(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.log("dxmi", 1, {"std": [0.5, math.nan, 2]})
    assert rows(tmp_path) == [{"phase": "dxmi", "iteration": 1, "std": [0.5, None, 2.0]}]


def test_reading_stops_at_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert runlog.read_metrics(path) == []
    path.write_text('{"phase": "dxmi", "iteration": 1}\n{"phase": "dxmi", "iteration": 2}')
    assert runlog.read_metrics(path) == [{"phase": "dxmi", "iteration": 1}]


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    with limited_file_size(100), RunLog(tmp_path) as log:
        log.log("dxmi", 1, {"loss": 1})
        with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
            log.log("dxmi", 2, {"loss": [1.0] * 100})


def test_a_resumed_run_logs_every_iteration_once(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for iteration in range(5):
            log.log("dxmi", iteration, {"loss": 1.0})
            if iteration == 2:
                position = log.position()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "dx')  # torn by a kill
    with RunLog(tmp_path) as log:
        log.truncate(position)
        for iteration in range(3, 6):
            log.log("dxmi", iteration, {"loss": 2.0})
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_a_fresh_start_drops_old_metrics_and_lost_ones_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path) as log:
        log.log("dxmi", 0, {})
    with RunLog(tmp_path) as log:
        log.truncate(0)
        assert log.position() == 0
        log.truncate(1000)
        log.log("dxmi", 1, {})
    assert [row["iteration"] for row in rows(tmp_path)] == [1]
    assert "the checkpoint knows 1000" in capsys.readouterr().err


def test_disabled_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        RunLog(tmp_path / "run", enabled=False, tensorboard=True) as log,
        log.progress("dxmi", 3) as progress,
    ):
        log.log("dxmi", 0, {"loss": 1.0})
        log.truncate(0)
        log.note("text")
        progress.update(3, loss=1.0)
        assert log.position() == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(Path())
    with log.progress("dxmi", 10, start=4) as progress:
        progress.update(2, value=0.123456, energy=2.0)
        log.note("a note")
        progress.update(4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("dxmi: 4/10") and lines[-1].startswith("dxmi: 10/10")
    assert lines[-1].endswith("value=0.123, energy=2]")
    assert "a note" in lines
    assert all(line and "\r" not in line for line in lines)


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with RunLog(Path()).progress("dxmi", 10) as progress:
        progress.update(10)
    assert "\r" in screen.getvalue() and "100%" in screen.getvalue()


def test_tensorboard_follows_metrics_also_after_resuming(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, tensorboard=True) as log:
        log.log("dxmi", 0, {"loss": 1.0})
        position = log.position()
        log.log("dxmi", 1, {"loss": 2.0})
    with RunLog(tmp_path, tensorboard=True) as log:
        log.truncate(position)
        log.log("dxmi", 1, {"loss": 3.0, "std": [5.0, 6.0]})
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("dxmi/loss")] == [(0, 1.0), (1, 3.0)]
    assert [events.Scalars(f"dxmi/std/{t}")[0].value for t in (0, 1)] == [5.0, 6.0]


def test_absent_tensorboard_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with RunLog(tmp_path, tensorboard=True) as log:
        log.log("dxmi", 0, {"loss": 1.0})
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "tb").exists()


def test_write_json_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    runlog.write_json(path, {"seed": 0})
    with pytest.raises(TypeError):
        runlog.write_json(path, {"seed": object()})
    assert json.loads(path.read_text()) == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]
