"""Energies that start from plain detectors: exact at the start, saved completely, resumed exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dxmi_ext import cli
from dxmi_ext.anomaly import choice, model
from dxmi_ext.anomaly import recipe as anomaly
from dxmi_ext.anomaly.detectors import bases, networks
from dxmi_ext.anomaly.detectors.density import KernelDensity
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.engine.output import plots
from dxmi_ext.method.trainer import DxMITrainer

for library in ("yaml", "matplotlib"):
    pytest.importorskip(library)

CPU, D = torch.device("cpu"), 6
TINY = ["preparation=unit", "detector=dxmi", "latent_dim=2", "energy_width=8", "value_width=8"]
TINY += ["sampler_width=8", "steps=2", "batch_size=32", "pretrain_iterations=5", "device=cpu"]
TINY += ["tensorboard=false", "checkpoint_every=2", "picture_every=0"]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two kinds, and anomalies between and beside them."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(2, D))
    good = centers[rng.integers(2, size=400)] + 0.2 * rng.normal(size=(400, D))
    odd = centers.mean(0) + 0.4 * rng.normal(size=(60, D))
    path = tmp_path_factory.mktemp("data") / "table.npz"
    np.savez(path, X=np.concatenate((good, odd)), y=np.repeat([0, 1], [400, 60]))
    return path


def run(folder: Path, table: Path, *settings: str) -> int:
    return cli.main(["train", "anomaly-vectors", f"output={folder}", f"data={table}", *TINY, *settings])


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize("base", ["gaussian", "autoencoder", "density", "knn+gaussian"])
def test_dxmi_begins_at_its_base(base: str, table: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", table, f"base={base}", "iterations=0") == 0
    found = summary(tmp_path / "run")
    told = found["baselines"]
    assert found["image_auroc"] == told["base"] == told.get(base, told["base"])
    assert len({*told.values()}) == len(told) - 1 - (base in told)  # all others differ


@pytest.mark.parametrize("base", ["density", "knn+autoencoder"])
def test_a_run_with_a_base_resumes_exactly_scores_and_is_exported(
    base: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"base={base}", "iterations=5", "baselines=all"]
    assert run(tmp_path / "whole", table, *settings) == 0
    original, steps = DxMITrainer.step, 0

    def stop(trainer: DxMITrainer, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (4, 8):  # in the phase with tau = 0, and in DxMI
            raise KeyboardInterrupt
        return original(trainer, batch)

    monkeypatch.setattr(DxMITrainer, "step", stop)
    assert [run(tmp_path / "run", table, *settings) for _ in range(3)] == [130, 130, 0]
    final = "model/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    numbers, _ = anomaly.evaluate(tmp_path / "run", anomaly.EvaluateSettings(), CPU)
    assert numbers["baselines"] == summary(tmp_path / "whole")["baselines"]
    scorer = anomaly.load_scorer(tmp_path / "run", CPU)
    rows = np.load(table)["X"][:5]
    assert scorer.scores(rows).shape == (5,)  # type: ignore[operator]
    assert cli.main(["export", str(tmp_path / "run"), "onnx=false"]) == 0
    samples = [batch.samples for batch in anomaly.sample(tmp_path / "run", range(9), 0, 4, CPU)]
    assert torch.cat(samples).isfinite().all()


@pytest.mark.parametrize("base", ["+".join(bases.BASES)])
def test_only_the_correction_learns(base: str, table: Path, tmp_path: Path) -> None:
    settings = [f"base={base}", "baselines=none", "energy_lr=.1"]
    assert run(tmp_path / "run", table, *settings, "iterations=5") == 0
    assert run(tmp_path / "untrained", table, *settings, "iterations=0") == 0
    energy, untrained = (_energy(tmp_path / name) for name in ("run", "untrained"))
    x = torch.nn.functional.normalize(torch.randn(7, D, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(energy.base(x), untrained.base(x)) and torch.equal(untrained(x), untrained.base(x))
    assert energy.weight != 0
    torch.testing.assert_close(energy(3 * x), energy(x))  # x is projected onto the sphere


def _energy(folder: Path) -> bases.BasedEnergy:
    energy = model.load_model(folder, CPU)[1].energy_network
    assert isinstance(energy, bases.BasedEnergy)
    return energy


def test_a_base_is_in_nats_and_its_weight_is_not_negative() -> None:
    """On a Gaussian's own data, the energies are its negative log densities."""
    rng = torch.Generator().manual_seed(0)
    mean = torch.zeros(D).index_fill(0, torch.tensor(0), 1.0)
    x = mean + 0.002 * torch.randn(4000, D, generator=rng) * torch.arange(D)  # nearly on the sphere
    maps = FeatureMaps(torch.nn.functional.normalize(x, dim=1).numpy()[:, None, None])
    parts = networks.build(D, steps=2, energy_width=8, sampler_width=8, value_width=8)
    energy = bases.based(parts, [choice.gaussian(0, CPU)], nat=0.5).energy_network
    assert isinstance(energy, bases.BasedEnergy)
    base = energy.bases[0]
    base.distance.detector.shrinkage = 1e-3  # type: ignore[union-attr]
    bases.fit(energy, maps, maps)
    energies = energy.base(torch.from_numpy(maps.rows))
    assert energies.mean().item() == pytest.approx(0, abs=1e-3)
    assert energies.std().item() == pytest.approx(0.5 * math.sqrt(D / 2), rel=0.25)
    energy.weight.data.fill_(-1)
    few = torch.from_numpy(maps.rows[:5])
    torch.testing.assert_close(energy(few), energy.base(few))
    energy(few).sum().backward()
    assert energy.weight.grad is not None and energy.weight.grad > 0
    with pytest.raises(ValueError, match="nat must be > 0 and finite, got 0"):
        bases.BasedEnergy([base], energy.autoencoder, 0.0)  # type: ignore[list-item]


def test_several_bases_are_averaged(table: Path, tmp_path: Path) -> None:
    """The mean of the bases, each in nats."""
    x = torch.nn.functional.normalize(torch.randn(7, D, generator=torch.Generator().manual_seed(0)), dim=1)
    energies = []
    for i, base in enumerate(("knn", "gaussian", "knn+gaussian")):
        assert run(tmp_path / str(i), table, f"base={base}", "baselines=none", "iterations=0") == 0
        energies.append(_energy(tmp_path / str(i)).base(x))
    torch.testing.assert_close(energies[2], (energies[0] + energies[1]) / 2)


def test_a_kernel_density_is_that_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    rows, x = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    detector = KernelDensity()
    detector.fit(FeatureMaps(rows[:, None, None]))
    between = ((rows[:, None] - rows) ** 2).sum(2) + 1e9 * np.eye(50)
    h = float(detector.width)
    assert h == pytest.approx(0.1 * between.min(1).mean(), rel=1e-4)
    expected = np.sqrt(-h * np.log(np.exp(-((x[:, None] - rows) ** 2).sum(2) / h).mean(1)))
    np.testing.assert_allclose(detector.score(FeatureMaps(x[:, None, None]))[:, 0, 0], expected, rtol=1e-4)
    detector.width.fill_(1e-6)  # nearly the nearest row
    nearest = np.sqrt(((x[:, None] - rows) ** 2).sum(2).min(1))
    np.testing.assert_allclose(detector.score(FeatureMaps(x[:, None, None]))[:, 0, 0], nearest, rtol=1e-3)


def test_settings_that_conflict_with_a_base(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings, message in (
        (["base=knn", "tau=0"], "base must be none where the temperature of the entropy is 0, got knn"),
        (["base=knn+kmeans"], "base"),
        (["base=knn+knn"], "base must name each detector once, got knn+knn"),
        (
            ["base=autoencoder", "pretrained=false"],
            "base must be none with pretrained=false, got autoencoder",
        ),
    ):
        assert run(tmp_path / "run", table, *settings) == 2
        assert message in capsys.readouterr().err
