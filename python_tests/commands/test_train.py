"""`dxmi train`: the files of a run, pictures during training, dry runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi_ext import cli
from dxmi_ext.engine.output.runlog import TIMING_FIELDS
from dxmi_ext.engine.settings import LARGEST_SEED
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import plots as point_plots
from dxmi_ext.two_d import recipe as two_d
from report_page import Page
from runs import DXMI, PRETRAIN, SAMPLE_DATA, SCORES, SETTINGS, contents, draw, interrupt, model, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


def test_folder_of_a_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("dxmi.json", "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model", "tb"),
        *("samples.png", "energy.png", "paths.png", "curves.png"),
    }
    assert "iterations: 6\n" in (finished / "config.yaml").read_text()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        *("step_00000008", "step_00000010")
    ]
    assert model(finished).keys() == {"model.safetensors", "config.json"}
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["iteration"]) for row in rows] == [
        *(("pretrain", i + 1) for i in range(PRETRAIN)),
        *(("dxmi", i + 1) for i in range(DXMI)),
    ]


def test_summary_has_the_contracts_keys(finished: Path) -> None:
    summary = read(finished / "summary.json")
    told = {key: summary[key] for key in ("seed", "device", "world_size", "batch_size_per_rank")}
    assert told == {"seed": 0, "device": "cpu", "world_size": 1, "batch_size_per_rank": 16}
    assert summary["resumed_from"] == [] and summary["wall_seconds"] > 0
    assert summary["versions"].keys() >= {"dxmi_ext", "torch", "python"}
    assert all(isinstance(summary[key], float) for key in SCORES)


def test_metrics_tell_each_step_and_the_pace(finished: Path) -> None:
    pretraining, *_, last = (json.loads(line) for line in (finished / "metrics.jsonl").open())
    pace = {"iterations_per_second", "samples_per_second"}
    assert pretraining.keys() == {"phase", "iteration", "loss", "network_failures"} | pace
    assert last.keys() & set(TIMING_FIELDS) == {"iterations_per_second", "samples_per_second"}  # on a CPU
    assert last["samples_per_second"] == pytest.approx(16 * last["iterations_per_second"], rel=1e-3)
    lists = {name: len(value) for name, value in last.items() if isinstance(value, list)}
    per_step = dict.fromkeys(("std", "velocity_var", "sq_displacement", "log_prob", "value_loss"), 5)
    assert lists == per_step | {"sampler_loss": 2}


def test_default_folder_and_a_users_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("task: two_d\ndata: checkerboard\nsteps: 3\npretrained: false\n")
    assert cli.main(["train", "mine.yaml", *SETTINGS]) == 0
    (folder,) = Path("runs").iterdir()
    # The recipe has the name of its file.
    assert folder.name.startswith("mine-") and read(folder / "summary.json")["recipe"] == "mine"
    cfg, networks = two_d.load(folder, torch.device("cpu"))
    assert (cfg.density.data, networks.sampler.steps) == ("checkerboard", 3)
    assert "pretrain" not in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("native", [False, True])
def test_slow_bfloat16_is_noted(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert train(tmp_path, "precision=bfloat16", "dry_run=true") == 0
    assert ("precision=bfloat16 is emulated on this processor" in capsys.readouterr().err) != native


def test_the_largest_seed_trains_to_the_end(tmp_path: Path) -> None:
    seed = LARGEST_SEED
    assert train(tmp_path, f"seed={seed}", "samplings=2") == 0
    assert read(tmp_path / "summary.json")["seed"] == seed
    assert draw(tmp_path, tmp_path / "a.npz", "n=2", f"seed={seed}").shape == (2, 2)


def test_pictures_while_training_change_nothing_and_are_the_same_after_an_interruption(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def energy(file: Any, energies: torch.Tensor, points: torch.Tensor, **_: Any) -> None:
        file.write(points.numpy().tobytes())  # instead of a plot, which takes long

    monkeypatch.setattr(point_plots, "energy", energy)
    monkeypatch.setattr(point_plots, "samples", lambda file, data, points, **_: energy(file, data, points))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "picture_every=3") == 0
    interrupt(monkeypatch, 10)  # pretraining also asks for the data of pictures
    assert train(parts, "picture_every=3") == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(parts, "picture_every=3") == 0
    pictures = [{p.name: p.read_bytes() for p in (f / "pictures").iterdir()} for f in (whole, parts)]
    assert pictures[0].keys() == {"pretrain_00000003.png", "dxmi_00000003.png", "dxmi_00000006.png"}
    assert pictures[0] == pictures[1] and len(set(pictures[0].values())) == 3
    assert model(whole) == model(parts) == model(finished)
    assert cli.main(["report", str(parts)]) == 0
    assert "dxmi_00000006" in Page(parts / "report.html").text
    assert train(whole, "picture_every=0", "resume=never") == 0
    assert not (whole / "pictures").exists()


def test_typed_settings_without_effect_are_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the recipe are not: its tau_margin belongs to its tau_rate, which is overridden."""
    typed = ["tau_rate=0", "length_draw=short", "tau_hold=.2"]
    assert cli.main(["train", "8gaussians-auto", *SETTINGS, *typed, "--dry-run"]) == 0
    assert capsys.readouterr().err == (
        "note: tau_hold has no effect without tau_rate > 0 or tau_cooling < 1; "
        "length_draw has no effect without lengths\n"
    )


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_dry_run_tries_each_phase_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "8gaussians", "--dry-run", *SETTINGS, "tau=0.2", "sampler_width=10"]) == 0
    out, err = capsys.readouterr()
    assert list(tmp_path.iterdir()) == [] and err == ""
    assert "tau: 0.2\n" in out and "iterations: 6\n" in out and "dry_run: false\n" in out
    # step embedding, first layer, two hidden layers, last layer, log sigma
    assert f"sampler: {5 * 10 + 3 * 10 + 2 * 110 + 11 * 2 + 5} parameters" in out and "value: " in out
    phases = [line for line in out.splitlines() if "one iteration" in line]
    assert [line.split(":")[0] for line in phases] == ["pretrain", "dxmi"][: 1 + (command == "train")]
    assert all("loss " in line and "MiB" in line for line in phases)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_dry_run_leaves_a_run_alone(copy: Path, capsys: pytest.CaptureFixture[str], resume: str) -> None:
    before = contents(copy)
    other = ["tau=0.2"] if resume == "never" else []
    assert train(copy, "--dry-run", f"resume={resume}", *other) == 0
    assert "dxmi: one iteration" in capsys.readouterr().out
    assert contents(copy) == before
