"""`dxmi evaluate`, and the table of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dxmi_ext import cli
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.engine.runs import config
from dxmi_ext.two_d import recipe as two_d
from runs import SCORES, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


def test_evaluate_gives_the_runs_own_numbers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "numbers.json"
    assert cli.main(["evaluate", str(finished), f"output={output}", "device=cpu"]) == 0
    summary = read(finished / "summary.json")
    wanted = {"generator": "dxmi_ext", **{key: summary[key] for key in SCORES}}
    assert read(output) == pytest.approx(wanted)
    table = capsys.readouterr().out
    assert "8gaussians, T = 5, tau = 0.1, pretrained" in table and "the paper" in table
    assert f"{summary['sliced_wasserstein']:.3f}" in table and f"{summary['auroc']:.3f}" in table
    assert cli.main(["evaluate", str(finished), f"output={output}", "device=cpu", "samplings=1"]) == 0
    assert read(output)["sliced_wasserstein_std"] == 0  # from a single sampling
    options = ["device=cpu", "samplings=1", "log_partition=true", "paths=500"]
    for _ in range(2):  # the second overwrites the first
        assert cli.main(["evaluate", str(finished), f"output={output}", *options]) == 0
    assert {"log_partition", "log_partition_std", "log_partition_grid", "log_likelihood"} <= read(
        output
    ).keys()
    assert "backward kernel" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["picture", "neighbors"])
def test_a_picture_replaces_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    pytest.importorskip("diffusers")
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    assert cli.main(["evaluate", "fashion-mnist-t4", f"{key}={mine}"]) == 2
    assert f"{key} must be a new file or a grid of samples" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_outputs_of_one_evaluation_are_different_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    given = ["output=numbers.json", "picture=grid.png", f"neighbors={tmp_path}/grid.png"]
    assert cli.main(["evaluate", "fashion-mnist-t4", *given]) == 2
    wanted = "output and picture and neighbors must be different files, got 'numbers.json', 'grid.png', "
    assert wanted in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_kl_with_an_automatic_tau_uses_its_last_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "run", tmp_path / "numbers.json"
    assert train(folder, "tau_rate=.5", "samplings=2") == 0
    assert "tau = 0.1, then automatic" in capsys.readouterr().out
    factor = read(folder / "model/config.json")["tau_factor"]
    assert factor == pytest.approx(read_metrics(folder / "metrics.jsonl")[-1]["temperature"]) and factor != 1
    cfg, networks = two_d.load(folder, torch.device("cpu"))
    divergences = [
        two_d.evaluate_networks(cfg, networks, seed=0, tau_factor=each)["energy_kl"] for each in (factor, 1.0)
    ]
    summary = read(folder / "summary.json")
    assert divergences[0] == pytest.approx(summary["energy_kl"]) and divergences[0] != divergences[1]
    assert cli.main(["evaluate", str(folder), f"output={output}", "device=cpu"]) == 0
    wanted = {"generator": "dxmi_ext", **{key: summary[key] for key in SCORES}}
    assert read(output) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings", "title", "paper"),
    [
        ("tau=1", "T = 5, tau = 1, pretrained", "1.030"),
        ("tau_entropy=1 tau_velocity=1", "T = 5, tau = 1, pretrained", "1.030"),
        ("tau_entropy=.5", "T = 5, tau = 0.5 and 0.1, pretrained", None),
        ("tau_rate=.1", "T = 5, tau = 0.1, then automatic, pretrained", None),
    ],
)
def test_a_runs_row_names_its_taus(settings: str, title: str, paper: str | None) -> None:
    cfg = config.load(two_d.Config, None, settings.split())
    text = two_d.table(cfg, dict.fromkeys(SCORES, 0.5))
    assert title in text and (("the paper" not in text) if paper is None else paper in text)
