"""Choice of preparations and detectors by synthetic defects: the defects, the rule, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dxmi_ext import cli
from dxmi_ext.anomaly import choice, validation
from dxmi_ext.anomaly import recipe as anomaly
from dxmi_ext.anomaly.data import synthetic
from dxmi_ext.anomaly.detectors.plain import GaussianPositions, NearestNeighbors
from dxmi_ext.anomaly.features import preparation
from dxmi_ext.engine.output import plots
from dxmi_ext.engine.runs import config

for library in ("yaml", "matplotlib"):
    pytest.importorskip(library)

CPU = torch.device("cpu")
TINY = ["latent_dim=3", "energy_width=8", "value_width=8", "sampler_width=8", "steps=2", "batch_size=32"]
TINY += ["device=cpu", "tensorboard=false", "pretrain_iterations=3", "iterations=3", "checkpoint_every=2"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "curves", lambda *_: None)  # which takes seconds


# --- synthetic defects -------------------------------------------------------------------------------


def test_a_defect_changes_a_small_part_of_a_image() -> None:
    images = np.random.default_rng(0).integers(60, 180, (12, 3, 40, 60), np.uint8)
    made, masks = synthetic.defective(images, seed=1)
    assert made.shape == (3, 12, 3, 40, 60) and made.dtype == np.uint8
    share = (made != images).any(axis=2).mean(axis=(2, 3))
    assert (share > 0).all() and share.max() < 0.45 and share.mean() < 0.15
    assert masks.shape == (3, 12, 40, 60) and masks.any(axis=(2, 3)).mean() > 0.9
    changed = (made != images).any(axis=2)
    assert changed[masks].mean() > 0.8  # a pixel of a defect may have its old value by chance
    assert not changed[0][~masks[0]].any() and changed[1:][~masks[1:]].mean() < 0.15  # soft edges
    assert all(
        np.array_equal(a, b) for a, b in zip(synthetic.defective(images, seed=1), (made, masks), strict=True)
    )
    assert not np.array_equal(synthetic.defective(images, seed=2)[0], made)
    patches = made[0][(made[0] != images)]  # pixels from other places
    assert patches.min() >= 60 and patches.max() < 180
    synthetic.defective(images[:1, :, :1, :2])  # a single, tiny image


def test_each_kind_of_synthetic_row_keeps_its_invariants() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat([[10.0, 0], [-10, 0]], 2000, axis=0) + rng.normal(size=(4000, 2))
    rows = np.concatenate((rows, rows @ [[1], [2]]), axis=1)  # the third depends on the others
    mean = rows.mean(0)
    mixed, exchanged, moved = synthetic.odd_rows(rows, mean, seed=0)
    np.testing.assert_allclose(mixed.mean(0), mean, atol=1)
    np.testing.assert_allclose(np.cov(mixed.T), np.cov(rows.T), rtol=0.1, atol=1)
    np.testing.assert_allclose(mixed @ [1, 2, -1], 0, atol=1e-9)  # on the plane of good rows
    assert (np.abs(mixed[:, 0]) < 6).mean() > 0.2 > (np.abs(rows[:, 0]) < 6).mean()  # between classes
    assert all(np.isin(exchanged[:, i], rows[:, i]).all() for i in range(3))
    assert (np.abs(exchanged @ [1, 2, -1]) > 1e-9).mean() > 0.3
    np.testing.assert_array_equal(np.sort(moved, axis=1), np.sort(rows, axis=1))
    assert synthetic.odd_rows(rows[:1], mean).shape == (3, 1, 3)


# --- the rule ----------------------------------------------------------------------------------------


def test_a_verdict_is_the_mean_auroc_of_its_kinds() -> None:
    good, odd = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 50)
    odd[0], odd[1] = good + 1, good[torch.randperm(50)]
    verdict = validation.judged(good, odd.flatten())
    by_hand = [((o[:, None] > good).double() + 0.5 * (o[:, None] == good)).mean() for o in odd]
    assert verdict.auroc == pytest.approx(float(sum(by_hand)) / 2)
    assert verdict.influence.mean() == pytest.approx(2 * verdict.auroc)
    assert float(by_hand[1]) == pytest.approx(0.5)


def test_its_standard_error_is_the_deviation_over_samples() -> None:
    """The standard error of the difference between two detectors on the same images."""
    rng, differences, told = np.random.default_rng(0), [], []
    for _ in range(300):
        x, noise = rng.normal(size=(2, 80)), rng.normal(size=(2, 2, 80))
        scores = [x + each * size for each, size in zip(noise, (0.3, 1.0), strict=True)]
        a, b = (validation.judged(torch.from_numpy(s[0]), torch.from_numpy(s[1] + 1)) for s in scores)
        differences.append(a.auroc - b.auroc)
        told.append(choice._standard_error(a.influence - b.influence))
    assert np.mean(told) == pytest.approx(np.std(differences), rel=0.15)


def test_the_simplest_that_is_not_clearly_worse_is_chosen() -> None:
    def verdict(auroc: float, spread: float = 0.2, n: int = 100) -> validation.Verdict:
        influence = 2 * auroc + spread * np.random.default_rng(int(1000 * auroc)).normal(size=n)
        return validation.Verdict(auroc, influence)

    assert choice.simplest({"a": verdict(0.89), "b": verdict(0.9), "c": verdict(0.7)}) == "a"
    assert choice.simplest({"a": verdict(0.7), "b": verdict(0.9), "c": verdict(0.91)}) == "b"
    assert choice.simplest({"a": verdict(0.8, n=1), "b": verdict(0.9, n=1)}) == "a"  # no standard error


def test_rows_are_whitened_unless_another_preparation_is_clearly_better() -> None:
    """With independent columns, synthetic defects look like good rows, and the best AUROC is chance."""

    def verdict(auroc: float) -> validation.Verdict:
        noise = np.random.default_rng(int(1000 * auroc)).normal(size=100)
        return validation.Verdict(auroc, 2 * auroc + 0.2 * noise)

    by_chance = {"unit": verdict(0.505), "centered": verdict(0.49), "whitened": verdict(0.5)}
    assert choice._best(by_chance) == "unit" and choice._best(by_chance, "whitened") == "whitened"
    assert choice._best(by_chance | {"unit": verdict(0.7)}, "whitened") == "unit"


def test_the_patch_is_best_for_images_and_pixels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {1: 0.7, 3: 0.8, 5: 0.85, 9: 0.9}
    pixels = {1: 0.9, 3: 0.88, 5: 0.8, 9: 0.7}

    def verdicts(self: choice.Trials, name: str, patch: int, methods: Any) -> dict[str, validation.Verdict]:
        return {m: validation.Verdict(images[patch], np.zeros(1), pixels[patch]) for m in methods}

    monkeypatch.setattr(choice.Trials, "of", verdicts)
    trials = choice.Trials.__new__(choice.Trials)
    names = {"gaussian": "unit", "knn": "whitened"}
    found = choice._choose_patch(trials, names)
    assert found["patch"] == 3 and found["patches"]["knn"]["9"] == [0.9, 0.7]
    pixels[3] = float("nan")  # synthetic defects too small for a mask
    found = choice._choose_patch(trials, names)
    assert found["patch"] == 5 and found["patches"]["knn"].keys() == {"1", "5", "9"}
    json.dumps(found, allow_nan=False)  # NaN is not valid JSON


def test_pixels_are_judged_by_the_masks_of_defects() -> None:
    masks = np.zeros((4, 32, 32), bool)
    masks[0, :8], masks[1, 8:16], masks[2, :, 16:] = True, True, True
    maps = torch.from_numpy(masks[:, ::8, ::8].astype(np.float32))
    assert validation._pixel_auroc(maps, masks, 2) > 0.97
    assert validation._pixel_auroc(-maps, masks, 2) < 0.03
    assert np.isnan(validation._pixel_auroc(maps, np.zeros_like(masks), 2))


# --- runs --------------------------------------------------------------------------------------------


def write_rows(path: Path) -> Path:
    """Good rows near a plane, and anomalous ones off it with the same standard deviations."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(2, 12))
    good = rng.normal(size=(600, 2)) @ basis + 0.2 * rng.normal(size=(600, 12))
    odd = good.std(0) * rng.normal(size=(60, 12))
    units = 10.0 ** (np.arange(12) / 4)
    np.savez(path, X=np.concatenate((good, odd)) * units + 500, y=np.repeat([0, 1], [600, 60]))
    return path


def train(folder: Path, data: Path, *settings: str) -> dict[str, Any]:
    given = [f"output={folder}", f"data={data}", *TINY, *settings]
    assert cli.main(["train", "anomaly-vectors", *given]) == 0
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.npz")


def test_a_run_chooses_says_what_and_scores_by_it(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(tmp_path / "run", rows)
    assert found["detector"] in ("gaussian", "knn")  # three iterations train no network
    assert found["preparation"] == found["preparations"][found["detector"]] == "whitened"
    assert found["baselines"].keys() == {"gaussian", "knn", "autoencoder", "dxmi"}
    assert found["image_auroc"] == found["baselines"][found["detector"]] > 0.9
    assert found["validation"]["knn"].keys() == {"unit", "centered", "whitened", "final"}
    shown = capsys.readouterr()
    assert "whitened features for knn, and for the autoencoder and DxMI; AUROC on synth" in shown.err
    assert "detector: " in shown.out and ", whitened features; AUROC on synthetic defects" in shown.out
    scorer = anomaly.load_scorer(tmp_path / "run", CPU)
    assert scorer.threshold == found["threshold"]
    assert isinstance(scorer.energy, GaussianPositions | NearestNeighbors)
    again, _ = anomaly.evaluate(tmp_path / "run", anomaly.EvaluateSettings(), CPU)
    assert {k: v for k, v in again.items() if "latency" not in k}.items() <= found.items()
    alone, _ = anomaly.evaluate(tmp_path / "run", anomaly.EvaluateSettings(baselines="none"), CPU)
    assert alone["image_auroc"] == found["image_auroc"]  # from the model, without a fit
    more, _ = anomaly.evaluate(tmp_path / "run", anomaly.EvaluateSettings(baselines="all"), CPU)
    assert more["baselines"] == found["baselines"]  # tau = 0 and Langevin were not trained


@pytest.mark.parametrize("detector", ["dxmi", "autoencoder", "knn", "gaussian"])
def test_a_detector_and_a_preparation_can_be_forced(detector: str, rows: Path, tmp_path: Path) -> None:
    settings = [f"detector={detector}", "preparation=centered", "baselines=none"]
    found = train(tmp_path / "run", rows, *settings)
    assert (found["detector"], found["preparation"]) == (detector, "centered")
    assert detector in found["baselines"]
    assert found["validation"][detector] == {"final": found["synthetic_auroc"]}
    scorer = anomaly.load_scorer(tmp_path / "run", CPU)
    values = np.load(rows)["X"].astype(np.float64)
    assert cli.main(["export", str(tmp_path / "run"), "onnx=false"]) == 0
    exported = torch.export.load(tmp_path / "run/detector/detector.pt2").module()
    torch.testing.assert_close(
        exported(torch.from_numpy(values)), scorer.scores(values), atol=1e-5, rtol=1e-5
    )
    assert cli.main(["score", str(tmp_path / "run"), str(rows), f"output={tmp_path / 'scores'}"]) == 0


@pytest.mark.parametrize(
    ("detector", "baselines", "trained"),
    [
        ("knn", "quick", []),
        ("autoencoder", "quick", ["autoencoder"]),
        ("gaussian", "all", ["tau0", "langevin", "autoencoder", "dxmi"]),
    ],
)
def test_only_what_is_needed_is_trained(
    detector: str,
    baselines: str,
    trained: list[str],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    found = train(folder, rows, f"detector={detector}", f"baselines={baselines}", "preparation=centered")
    assert found["trained"] == trained
    assert found["baselines"].keys() == {"gaussian", "knn", *trained}
    log = folder / "metrics.jsonl"
    phases = {json.loads(line)["phase"] for line in log.read_text().splitlines()} if log.exists() else set()
    assert phases == {"pretrain" if name == "autoencoder" else name for name in trained}
    again, _ = anomaly.evaluate(folder, anomaly.EvaluateSettings(), CPU)
    assert again["baselines"] == found["baselines"]
    capsys.readouterr()
    if "dxmi" not in trained:
        assert cli.main(["sample", str(folder), "n=4"]) == 2
        assert f"must have a trained sampler, got a run with detector={detector}" in capsys.readouterr().err
    if not trained:
        given = [f"output={tmp_path / 'other'}", f"data={rows}", *TINY, f"detector={detector}"]
        assert cli.main(["pretrain", "anomaly-vectors", *given]) == 2
        assert "detector must be auto, dxmi or autoencoder for pretraining" in capsys.readouterr().err


def test_a_run_that_resumes_keeps_its_choice(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"output={tmp_path / 'run'}", f"data={rows}", *TINY]
    assert cli.main(["pretrain", "anomaly-vectors", *given]) == 0
    assert json.loads((tmp_path / "run/choice.json").read_text())["preparations"]["knn"] == "whitened"
    monkeypatch.setattr(choice, "choose_preparations", lambda *_: pytest.fail("it chose again"))
    assert cli.main(["train", "anomaly-vectors", *given]) == 0
    monkeypatch.undo()
    whole = tmp_path / "whole"
    train(whole, rows)
    model = "model/model.safetensors"
    assert (whole / model).read_bytes() == (tmp_path / "run" / model).read_bytes()


def test_the_former_name_of_centered_is_read(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In settings, and in a run's choice.json, checkpoints and model."""
    assert config.load(anomaly.Config, None, ["preparation=centred"]).features.preparation == "centered"
    names = {"gaussian": "centred", "knn": "unit", "autoencoder": "unit"}
    chosen = {"preparations": names, "patch": 5, "validation": {}}
    monkeypatch.setattr(choice, "choose_preparations", lambda *_: chosen)
    given = ["anomaly-vectors", f"data={rows}", *TINY, "detector=gaussian", "baselines=tau0"]
    with monkeypatch.context() as earlier:
        earlier.setattr(preparation.Centered, "name", "centred")
        earlier.setattr(preparation, "_FORMER", {})
        assert cli.main(["train", *given, f"output={tmp_path / 'whole'}"]) == 0
        assert cli.main(["pretrain", *given, f"output={tmp_path / 'run'}"]) == 0
    assert "centred" in (tmp_path / "whole/model/config.json").read_text()
    found, _ = anomaly.evaluate(tmp_path / "whole", anomaly.EvaluateSettings(), CPU)
    assert found["preparation"] == "centered"
    assert cli.main(["train", *given, f"output={tmp_path / 'run'}"]) == 0
    again = json.loads((tmp_path / "run/summary.json").read_text())
    assert again["preparation"] == "centered" and again["baselines"] == found["baselines"]


def test_a_run_from_before_there_was_a_choice_scores_as_it_did(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml has the key whiten, its model neither a detector nor the names of preparations."""
    folder = tmp_path / "run"
    found = train(folder, rows, "detector=dxmi", "preparation=whitened")
    values = np.load(rows)["X"].astype(np.float64)
    expected = anomaly.load_scorer(folder, CPU).scores(values)
    lines = (folder / "config.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("detector:", "preparation:"))]
    (folder / "config.yaml").write_text("\n".join([*kept, "whiten: true", ""]))
    about = json.loads((folder / "model/config.json").read_text())
    for key in ("detector", "preparations"):
        del about[key]
    (folder / "model/config.json").write_text(json.dumps(about))
    assert torch.equal(anomaly.load_scorer(folder, CPU).scores(values), expected)
    assert "whiten is no longer a setting and is ignored; preparation takes" in capsys.readouterr().err
    again, _ = anomaly.evaluate(folder, anomaly.EvaluateSettings(), CPU)
    assert again["image_auroc"] == found["image_auroc"] and again["detector"] == "dxmi"
    with pytest.raises(config.ConfigError, match="whiten is no longer a setting"):
        config.load(anomaly.Config, None, ["whiten=true"])
