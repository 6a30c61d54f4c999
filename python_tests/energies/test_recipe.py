"""Runs of the task from the command line: numbers, exact resume, own targets, conflicting settings."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dxmi_ext import cli
from dxmi_ext.energies import plots
from dxmi_ext.energies.evaluation import table
from dxmi_ext.energies.settings import Config
from dxmi_ext.energies.targets import TARGETS, Target
from dxmi_ext.engine.output import runlog
from dxmi_ext.method.stepper import Stepper

SMALL = [
    *(
        "device=cpu",
        "iterations=4",
        "checkpoint_every=1",
        "log_every=1",
        "tensorboard=false",
        "picture_every=0",
    ),
    *("batch_size=8", "steps=3", "sampler_width=8", "value_width=8", "sampler_steps=2"),
    *("paths=64", "compared=32"),
]
OWN = "import torch\ndef energy(x): return (x - 1).square().sum(1)\n"


def train(recipe: str, folder: Path, *settings: str) -> int:
    return cli.main(["train", recipe, f"output={folder}", *SMALL, *settings])


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def model(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_a_run_has_its_numbers_and_can_be_sampled_and_evaluated(
    sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train("gmm25", run, f"sampler={sampler}") == 0
    found = summary(run)
    assert found["sampler"] == sampler and found["log_partition_true"] == 0
    for key in ("log_partition", "log_partition_std", "elbo", "ess", "eubo", "w2", "w2_floor", "modes"):
        assert isinstance(found[key], float | int), key
    assert found["elbo"] <= found["log_partition"]
    assert found["evaluations"] == {"dxmi": 24_904, "vgs": 24_456}[sampler]
    assert found["evaluations_per_sample"] == 3
    assert "ELBO gap" in capsys.readouterr().out
    assert (run / "samples.png").is_file()

    numbers = tmp_path / "numbers.json"
    assert cli.main(["evaluate", str(run), f"output={numbers}", "device=cpu"]) == 0
    again = json.loads(numbers.read_text())
    assert again["elbo"] == pytest.approx(found["elbo"]) and again["w2"] == pytest.approx(found["w2"])
    capsys.readouterr()
    options = [f"output={numbers}", "device=cpu", "log_partition=false", "annealing=3", "tempering=2"]
    assert cli.main(["evaluate", str(run), *options]) == 0
    without = json.loads(numbers.read_text())
    assert without["ais_evaluations"] == 8000 and "elbo" not in without
    assert without["w2"] == pytest.approx(found["w2"])
    assert without["tempering_evaluations"] == 6000
    printed = capsys.readouterr().out
    assert "annealed importance sampling, 3 levels" in printed and "parallel tempering, 2 sweeps" in printed

    drawn = []
    for size in (3, 10):
        output = tmp_path / f"samples{size}.npz"
        settings = [f"output={output}", "n=10", f"batch_size={size}", "device=cpu"]
        assert cli.main(["sample", str(run), *settings]) == 0
        drawn.append(np.load(output)["samples"])
    assert drawn[0].shape == (10, 2)
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert cli.main(["sample", str(run), "guidance=1"]) == 2
    assert cli.main(["export", str(run)]) == 2


@pytest.mark.parametrize("name", ["gmm9", "manywell32", "dw4"])
@pytest.mark.parametrize("odd", [1, 100], ids=["some", "all"])
def test_samples_that_are_not_finite_are_no_reason_to_stop(name: str, odd: int) -> None:
    pytest.importorskip("matplotlib")
    target = TARGETS[name]()
    drawn, file = torch.randn(100, target.dim), io.BytesIO()
    drawn[:odd] = torch.inf
    plots.samples(file, target, drawn, None)
    assert len(file.getvalue()) > 1000


def test_an_energy_without_a_value_at_some_points_has_contours_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(axes.Axes, "contourf", lambda self, x, y, values, **_: drawn.append(values))
    target = Target("half a plane", 2, lambda x: -x[:, 0].log())
    plots.samples(io.BytesIO(), target, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), None)
    assert 0.5 < np.isfinite(drawn[0]).mean() < 1


def test_the_table_has_published_rows_only_of_numbers_that_it_has() -> None:
    cfg = Config.of({"recipe": "gmm25", "task": "energies", "pretrained": False, "energy": "gmm25"})
    assert "PIS" in table(cfg, {"log_partition_true": 0.0, "elbo_gap": 1.0})
    assert "PIS" not in table(cfg, {"log_partition_true": 0.0, "w2": 1.0})


@pytest.mark.parametrize("settings", [["sampler=dxmi"], ["sampler=vgs"], ["sampler=vgs", "replay=0.7"]])
def test_an_interrupted_run_ends_at_the_same_bytes(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train("gmm9", whole, *settings) == 0
    step = Stepper.step

    def failing(self: Stepper, batch: Any) -> Any:
        if self.iteration == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", failing)
        assert train("gmm9", parts, *settings) == 130
    assert train("gmm9", parts, *settings) == 0
    assert summary(parts)["resumed_from"] == [2]
    assert model(parts) == model(whole)
    rows = [
        [{k: v for k, v in row.items() if k not in runlog.TIMING_FIELDS} for row in runlog.read_metrics(log)]
        for log in (whole / "metrics.jsonl", parts / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_particles_keep_their_center_of_mass(sampler: str, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "samples.npz"
    own = "particles=3"
    (tmp_path / "own_pairs.py").write_text(
        "def energy(x):\n"
        "    p = x.view(len(x), 3, 2)\n"
        "    pairs = [p[:, i] - p[:, j] for i in range(3) for j in range(i)]\n"
        "    return sum((pair.square().sum(1) - 2).square() for pair in pairs)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        settings = ["target=own_pairs:energy", "dim=6", own, f"sampler={sampler}"]
        assert train("energy", run, *settings) == 0
        assert cli.main(["sample", str(run), f"output={output}", "n=5", "device=cpu"]) == 0
    samples = np.load(output)["samples"]
    assert samples.shape == (5, 6)
    np.testing.assert_allclose(samples.reshape(5, 3, 2).mean(1), 0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_an_infinite_energy_is_no_center_of_values(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = "import torch\ndef energy(x): return x.square().sum(1).where(x.abs().amax(1) < 3, torch.inf)\n"
    (tmp_path / "walled.py").write_text(own)
    settings = ["target=walled:energy", "dim=2", "scale=.5", "var_first=40", f"sampler={sampler}"]
    assert train("energy", tmp_path / "run", *settings, "rollback_after=0") == 0
    tensors = load_file(tmp_path / "run/model/model.safetensors")
    assert summary(tmp_path / "run")["log_partition"] < 5
    centers = [tensor for name, tensor in tensors.items() if name.endswith("center")]
    assert centers and all(center.abs().max() < 100 for center in centers)


def test_own_target_belongs_to_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run keeps the hash of its target's source; with another source, it neither resumes nor samples."""
    monkeypatch.chdir(tmp_path)
    own, run = tmp_path / "own_target.py", tmp_path / "run"
    own.write_text(OWN)
    settings = ["target=own_target:energy", "dim=2"]
    assert train("gmm25", run, *settings) == 0
    found = summary(run)
    assert found["target"] == "own_target:energy" and len(found["target_source"]) == 32
    assert found["log_partition_true"] is None and "w2" not in found
    assert train("gmm25", run, *settings, "iterations=5") == 0  # goes on
    assert summary(run)["resumed_from"] == [4]

    own.write_text(OWN.replace("- 1", "- 2"))
    capsys.readouterr()
    assert train("gmm25", run, *settings, "iterations=6") == 2
    assert "target_source must be" in (error := capsys.readouterr().err) and str(run) in error
    assert cli.main(["sample", str(run), "device=cpu"]) == 2
    assert "its source has changed" in capsys.readouterr().err
    own.unlink()
    assert cli.main(["evaluate", str(run), "device=cpu"]) == 2
    assert "no module 'own_target'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("energy", [], "target must be MODULE:FUNCTION, got null"),
        ("energy", ["target=a:b"], "dim must be given with target=a:b, got null"),
        ("energy", ["target=own_missing:b", "dim=2"], "no module 'own_missing'"),
        ("gmm25", ["dim=3"], "dim must be 2 with energy=gmm25, got 3"),
        ("gmm25", ["particles=2"], "particles must be null with energy=gmm25, got 2"),
        ("gmm25", ["target_source=x"], "target_source must be null, got x"),
        ("gmm25", ["schedule=vp"], "schedule must be ve with sampler=dxmi, got vp"),
        ("gmm25", ["sampler=vgs", "schedule=vp"], "must be < steps=3 with schedule=vp, got 150.0 and 0.4"),
        ("dw4", ["per_dimension=true"], "per_dimension must be false with particles=4, got true"),
        ("gmm25", ["pretrained=true"], "pretrained must be false"),
        ("gmm25", ["td_loss=mse"], "td_loss is no longer a setting; sampler=vgs has a fixed value"),
        ("energy", ["target=a:b", "dim=5", "particles=2"], "particles=2 must divide dim, got 5"),
    ],
)
def test_settings_at_odds_are_named(
    recipe: str, settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe, tmp_path / "run", *settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_there_is_no_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "gmm25", f"output={tmp_path / 'run'}"]) == 2
    assert "one with a pretraining" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["dxmi", "vgs"])
def test_every_recipe_can_be_tried(sampler: str, tmp_path: Path) -> None:
    for recipe in ("gmm40", "funnel10", "manywell32", "dw4", "lj13"):
        settings = [each for each in SMALL if not each.startswith("steps")]
        arguments = [*settings, "steps=2", f"sampler={sampler}", f"output={tmp_path / 'none'}"]
        assert cli.main(["train", recipe, *arguments, "--dry-run"]) == 0
    assert not (tmp_path / "none").exists()
