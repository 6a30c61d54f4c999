"""The command line: user errors, terminals and pipes, help, versions."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dxmi_ext import __version__, cli
from dxmi_ext.engine.output import terminal
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import recipe as two_d
from report_page import Page
from runs import SAMPLE_DATA, assert_same_run, draw, interrupt, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "8gaussians", "iteration=3"], "iteration: unknown key; did you mean iterations?"),
        (["train", "8gaussians", "iterations=many"], "iterations must be an integer, got 'many'"),
        (["train", "elsewhere/mine"], "recipe must be one of 2spirals, 8gaussians"),
        (["train", "mine.yaml"], "recipe must be an existing yaml file, got 'mine.yaml'"),
        (
            ["train", "8gaussians", "output=/dev/null/x"],
            "output must be a folder that can be written, got '/dev/null/x', which cannot be created: Not a",
        ),
        (["train", "8gaussians", "tau=-1"], "tau must be >= 0, got -1.0"),
        (["sample", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["evaluate", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["report", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["export", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["convert", "nowhere", "kind=edm"], "nowhere"),
        (["train", "~nobody-of-that-name/a.yaml"], "RECIPE must not begin with ~ where its home folder is"),
        (["train", "8gaussians", "seed=2**64"], "seed must be an integer, got '2**64'"),
        (["sample", ".", "n=10000000000000"], "n must be <= 100000000, got 10000000000000"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"dxmi {arguments[0]}: {says}") and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_recipes_nearest_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "8gaussian"]) == 2
    assert capsys.readouterr().err.endswith(", got '8gaussian'; did you mean 8gaussians?\n")


def test_a_missing_module_of_a_users_task_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task_that_is_broken.py").write_text("import no_such_library.part\n")
    Path("mine.yaml").write_text("task: task_that_is_broken\n")
    assert cli.main(["train", "mine.yaml"]) == 2
    assert capsys.readouterr().err == "dxmi train: module no_such_library is not installed\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "8gaussians", "--seed", "3"], "--seed is not an option; write a setting as seed=3"),
        (
            ["train", "--batch-size=64", "8gaussians"],
            "--batch-size is not an option; write a setting as batch_size=64",
        ),
        (
            ["train", "8gaussians", "--output", "a=3"],
            "--output is not an option; write a setting as output=VALUE",
        ),
        (["info", "--json"], "unexpected argument '--json'"),
        (["train", "8gaussians", "-s", "4"], "-s is not an option; write a setting as seed=3"),
        (["train", "8gaussians", "--dry"], "--dry is not an option; write a setting as dry=VALUE"),
        (["info", "x"], "unexpected argument 'x'"),
        (["train"], "RECIPE is missing; see dxmi train --help"),
    ],
)
def test_mistake_in_flags_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err) == (2, "", f"dxmi {arguments[0]}: {says}\n")


def test_the_nearest_command_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["trian", "8gaussians"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("dxmi: COMMAND must be one of train, pretrain, ")
    assert error.endswith(", got 'trian'; did you mean train?\n")


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_run_that_is_not_finished_is_one_line(
    copy: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "model")
    assert cli.main([command, str(copy)]) == 2
    wanted = f"dxmi {command}: RUN must be a finished run, got {str(copy)!r}, which has no model/\n"
    assert capsys.readouterr().err == wanted


def test_a_terminal_without_utf8_shows_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (("ascii", b"1 +- 2 \xe9 ?\n"), ("utf-8", "1 ± 2 ".encode() + b"\xe9 \xc4\xb1\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.accept_any_text()
        print("1 ± 2 \udce9 \u0131", flush=True)
        assert stream.buffer.getvalue() == shown  # type: ignore[attr-defined]


def test_a_run_in_a_folder_whose_name_is_not_utf8(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    interrupt(monkeypatch, 9)
    assert train(folder) == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(folder) == 0
    assert_same_run(folder, finished)
    assert read(folder / "summary.json")["resumed_from"] == [8]
    assert draw(folder, folder / "a.npz", "n=3").shape == (3, 2)
    assert cli.main(["evaluate", str(folder), f"output={folder}/a.json"]) == 0
    assert cli.main(["report", str(folder)]) == 0
    assert "caf\\udce9" in Page(folder / "report.html").text


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dxmi_ext.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (terminal.HUNG_UP, b"")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"dxmi_ext {__version__}\n")


def test_info_tells_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[0] for line in lines} >= {"dxmi_ext", "torch", "CPU kernels", "CUDA kernels"}


def test_help_lists_every_key_with_meaning_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "8gaussians", "--help"]) == 0
    out = capsys.readouterr().out
    for name, key in two_d.Config.keys().items():
        assert f"  {name}=" in out and key.metadata["help"] in out
    assert "recipe=8gaussians" in out
    for command, key in (
        *(("sample", "batch_size=null"), ("evaluate", "seed=0"), ("report", "output=null")),
        *(
            ("export", "output=null"),
            ("push", "repo=null"),
            ("convert", "(edm | consistency | consistency-teacher)"),
        ),
        *(("pretrain", "8gaussians"), ("train", "--dry-run")),
    ):
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert key in out
        assert cli.main(["help", command]) == 0
        assert capsys.readouterr().out == out


def test_module_as_a_command(finished: Path, tmp_path: Path) -> None:
    """In separate processes: exit statuses, and the same samples."""

    def dxmi(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dxmi_ext", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    mistake = dxmi("train", "8gaussians", "iteration=3")
    assert (mistake.returncode, mistake.stdout) == (2, "") and "did you mean iterations?" in mistake.stderr
    sample = dxmi("sample", str(finished), "n=5", "output=a.npz", "device=cpu")
    assert sample.returncode == 0, sample.stderr
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["samples"], draw(finished, tmp_path / "b.npz", "n=5"), rtol=1e-5)
