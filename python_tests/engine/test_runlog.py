"""The run's log: every metric once, also after resuming; progress; json; no output if disabled."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch

from deaths import limited_file_size
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.learning import steps
from dxmi_ext.engine.output import plots, runlog
from dxmi_ext.engine.output.runlog import RunLog
from dxmi_ext.engine.storage import files


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
        file.write('{"phase": "dx')  # cut off by a kill
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
    assert "lost lines: expected 1000 bytes" in capsys.readouterr().err


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
        log.picture("dxmi", 0, draw)
        position = log.position()
        log.log("dxmi", 1, {"loss": 2.0})
        log.picture("dxmi", 1, draw)
    with RunLog(tmp_path, tensorboard=True) as log:
        log.truncate(position)
        assert [path.name for path in log.pictures.iterdir()] == ["dxmi_00000000.png"]
        log.log("dxmi", 1, {"loss": 3.0, "std": [5.0, 6.0]})
        log.picture("dxmi", 1, draw)
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("dxmi/loss")] == [(0, 1.0), (1, 3.0)]
    assert [events.Scalars(f"dxmi/std/{t}")[0].value for t in (0, 1)] == [5.0, 6.0]
    pictures = events.Images("dxmi/picture")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(0, 12, 9), (1, 12, 9)]
    assert pictures[0].encoded_image_string == (tmp_path / "pictures" / "dxmi_00000000.png").read_bytes()


def test_missing_tensorboard_is_noted_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with RunLog(tmp_path, tensorboard=True) as log:
        log.log("dxmi", 0, {"loss": 1.0})
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "tb").exists()


def draw(file: IO[bytes]) -> None:
    plots.images(file, torch.zeros(1, 3, 5, 8))


def test_without_matplotlib_a_note_says_that_there_are_no_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(file: IO[bytes]) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    with RunLog(tmp_path) as log:
        for iteration in (1, 2):
            log.log("dxmi", iteration, {})
            log.picture("dxmi", iteration, fail)
    assert (
        capsys.readouterr().err == "no pictures, since matplotlib is not installed: pip install matplotlib\n"
    )
    assert not log.pictures.exists()


class FakeWandb(ModuleType):
    """The part of wandb that a run uses: runs by id, with their rows by step, online or not."""

    class Error(Exception):
        pass

    def __init__(self, online: bool) -> None:
        super().__init__("wandb")
        self.online, self.settings = online, dict[str, Any]()
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.repeated: list[int] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        self.resumed = self.online and settings["id"] in self.rows
        self.mine = self.rows.setdefault(settings["id"], {})
        self.starting_step = max(self.mine) + 1 if self.resumed else 0
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        self.repeated += [step] if self.mine.keys() and step < max(self.mine) else []
        self.mine.setdefault(step, {}).update(row)

    def Image(self, picture: Any) -> tuple[int, int]:
        return picture.size  # type: ignore[no-any-return]

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize("online", [True, False])
def test_wandb_resumes_the_same_run_and_gets_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    wandb = FakeWandb(online)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def session(position: int, first: int, last: int) -> int:
        with RunLog(tmp_path, wandb="toys", config={"tau": 0.1}) as log:
            log.truncate(position)
            if not position:
                log.log("pretrain", 10, {"loss": 9.0})
            position = log.position()
            for iteration in range(first, last):
                log.log("dxmi", iteration, {"loss": float(iteration), "std": [math.nan, 2.0]})
                log.picture("dxmi", iteration, draw)
        return position

    position = session(0, 1, 5)
    session(position, 1, 3)  # killed earlier than before
    session(position, 1, 7)
    (steps,) = wandb.rows.values()
    assert list(steps) == [10, *range(11, 17)] and wandb.repeated == [] and wandb.exit_code == 0
    assert steps[10] == {"pretrain/loss": 9.0}
    assert steps[16].keys() == {"dxmi/loss", "dxmi/std/0", "dxmi/std/1", "dxmi/picture"}
    assert (steps[16]["dxmi/loss"], steps[16]["dxmi/std/1"], steps[16]["dxmi/picture"]) == (6.0, 2.0, (12, 9))
    assert math.isnan(steps[16]["dxmi/std/0"])
    told = {key: wandb.settings[key] for key in ("project", "dir", "config", "resume")}
    assert told == {"project": "toys", "dir": str(tmp_path), "config": {"tau": 0.1}, "resume": "allow"}
    assert "mode" not in wandb.settings  # WANDB_MODE decides


def test_wandb_gets_earlier_lines_and_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb(online=False))
    with RunLog(tmp_path) as log:
        log.log("dxmi", 1, {"loss": 1.0})
        position = log.position()
    with RunLog(tmp_path, wandb="toys") as log:
        log.truncate(position)
        log.log("dxmi", 2, {"loss": 2.0})
        log.truncate(position)  # in the same process
        log.log("dxmi", 2, {"loss": 3.0})
        log.log("dxmi", 3, {"loss": 4.0})
    (steps,) = wandb.rows.values()
    assert steps == {1: {"dxmi/loss": 1.0}, 2: {"dxmi/loss": 2.0}, 3: {"dxmi/loss": 4.0}}


def test_missing_wandb_is_an_error_if_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"wandb must be null unless wandb is installed, got 'toys': pip install wandb"
    ):
        RunLog(tmp_path, wandb="toys")
    RunLog(tmp_path, wandb="toys", enabled=False)  # the log of another rank


def test_one_process_at_a_time_gets_past_a_lock(tmp_path: Path) -> None:
    with files.lock(tmp_path / "a.lock"):
        with pytest.raises(files.Locked, match="another process"), files.lock(tmp_path / "a.lock"):
            pass
        assert (tmp_path / "a.lock").exists()
    with files.lock(tmp_path / "a.lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_write_json_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    runlog.write_json(path, {"seed": 0})
    with pytest.raises(TypeError):
        runlog.write_json(path, {"seed": object()})
    assert json.loads(path.read_text()) == {"seed": 0}
    assert list(tmp_path.iterdir()) == [path]


def test_vectors_are_logged_as_lists() -> None:
    metrics = {"std": torch.tensor([1.0, 2.0]), "failures": torch.zeros(()), "one": torch.tensor([3.0])}
    assert steps.to_host(metrics) == {"std": [1.0, 2.0], "failures": 0.0, "one": [3.0]}
