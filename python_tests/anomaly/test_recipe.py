"""Tiny runs of the anomaly recipes: from data to a table, stopped and resumed, and errors."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dxmi_ext import cli, tasks
from dxmi_ext.anomaly import choice, comparison, model, sources
from dxmi_ext.anomaly import recipe as anomaly
from dxmi_ext.anomaly.data import dataset
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.anomaly.features.collection import Examined, Pictures
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.anomaly.scores.scoring import false_alarm_interval
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.output import plots
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.runs.identity import fingerprint
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import folders
from dxmi_ext.images.metrics.features import Extractor
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.reproduce import many_classes

for library in ("yaml", "scipy", "matplotlib"):
    pytest.importorskip(library)
Image = pytest.importorskip("PIL.Image")

CPU, TRAINERS = torch.device("cpu"), (ReconstructionPretrainer, DxMITrainer, LangevinTrainer)
TINY = ["size=16", "grid=4", "latent_dim=3", "energy_width=8", "value_width=8", "sampler_width=8"]
TINY += [
    "preparation=whitened",
    "detector=dxmi",
    "patch=3",
    "top_share=.1",
    "batch_size=32",
    "steps=2",
    "device=cpu",
    "tensorboard=false",
    "pretrain_lr=.01",
]
SHORT = ["pretrain_iterations=3", "iterations=3", "checkpoint_every=2", "log_every=1", "picture_every=3"]


class Patches(torch.nn.Module):
    """Means over 4 x 4 pixels, and their differences from the mean of the image."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, x: Tensor) -> list[Tensor]:
        means = F.avg_pool2d(x, 4)
        return [means, self.gain * (means - means.mean((2, 3), keepdim=True))]


@pytest.fixture(autouse=True)
def backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str, *, weights: str | None = None, **options: Any) -> Extractor:
        return backbones.backbone(Patches(float(weights or 1)), "patches", **options)

    monkeypatch.setattr(backbones, "load", load)
    monkeypatch.setattr(plots, "curves", lambda *_: None)  # which takes seconds


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_mvtec(root: Path) -> Path:
    """Two classes of plain colors with noise; screws are gray, in two sizes. Defects are bright spots."""
    rng = np.random.default_rng(0)
    for name, color in (("bottle", (150, 60, 60)), ("screw", (90, 90, 90))):
        for kind, count in (("train/good", 8), ("test/good", 4), ("test/spot", 4)):
            for i in range(count):
                size = 16 if name == "bottle" or i % 2 else 24
                pixels = np.clip(rng.normal(color, 6, (size, size, 3)), 0, 255).astype(np.uint8)
                mask = np.zeros((size, size), np.uint8)
                if "spot" in kind:
                    pixels[4:9, 4:9], mask[4:9, 4:9] = (20, 160, 250), 255
                    save(root / name / f"ground_truth/spot/{i:03}_mask.png", mask)
                save(root / name / kind / f"{i:03}.png", pixels if name == "bottle" else pixels[..., 2])
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mvtec(tmp_path_factory.mktemp("data") / "mvtec")


def run(folder: Path, data: Path, *settings: str, recipe: str = "mvtec-ad", command: str = "train") -> int:
    shared = [f"output={folder}", f"data={data}", f"cache={data.parent / 'cache'}", *TINY, *SHORT]
    return cli.main([command, recipe, *shared, *settings])


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all baselines; tests must not modify it."""
    with pytest.MonkeyPatch.context() as patch:
        backbone.__wrapped__(patch)  # type: ignore[attr-defined]
        folder = tmp_path_factory.mktemp("finished") / "run"
        assert run(folder, data, "curve_every=2") == 0
        yield folder


# --- a run -------------------------------------------------------------------------------------------


def test_a_run_ends_in_a_table_images_and_numbers(finished: Path) -> None:
    numbers = summary(finished)
    phases = [row["phase"] for row in read_metrics(finished / "metrics.jsonl")]
    assert list(dict.fromkeys(phases)) == ["pretrain", "tau0", "langevin", "dxmi"]
    metrics = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pro")
    for prefix in ("", "tau0_", "langevin_", "autoencoder_", "knn_", "patchcore_", "gaussian_", "gaussians_"):
        assert all(0 <= numbers[f"{prefix}{metric}"] <= 1 for metric in metrics)
        assert numbers[f"{prefix}latency_ms"] > 0
    assert numbers["knn_image_auroc"] == 1  # so the data are easy
    per_class = [numbers[f"image_auroc/{name}"] for name in ("bottle", "screw")]
    assert numbers["image_auroc"] == pytest.approx(sum(per_class) / 2)
    per_class = [numbers[f"knn_pixel_auroc/{name}"] for name in ("bottle", "screw")]
    assert numbers["knn_pixel_auroc"] == pytest.approx(sum(per_class) / 2)
    curves = many_classes.curves_of(numbers)
    assert {name: list(curve) for name, curve in curves.items()} == {
        name: [0, 2, 3] for name in ("dxmi", "tau0", "langevin")
    }
    assert curves["dxmi"][3] == numbers["image_auroc"] and curves["tau0"][3] == numbers["tau0_image_auroc"]
    assert 0 <= numbers["found"] <= 1 and 0 <= numbers["false_alarms"] <= 1
    assert (finished / "pictures/dxmi_00000003.png").stat().st_size
    assert Image.open(finished / "heatmaps.png").size == (2 + 8 * 18, 2 + 3 * 18)
    numbers, table = anomaly.evaluate(finished, anomaly.EvaluateSettings(), CPU)
    exact = {k: v for k, v in numbers.items() if "latency" not in k}
    assert exact == {key: summary(finished)[key] for key in exact} and len(exact) > 30
    assert "the paper" in table and "  screw" in table and "pixel AUROC" in table


def test_a_run_is_evaluated_on_its_data_wherever_they_are(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    moved, other = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(data, tmp_path / "other")
    save(other / "bottle/train/good/000.png", np.zeros((16, 16, 3), np.uint8))
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(f"data: {data}", f"data: {tmp_path}/gone"))
    with pytest.raises(ConfigError, match="gone does not exist; data=PATH names another place"):
        anomaly.evaluate(folder, anomaly.EvaluateSettings(), CPU)
    numbers, _ = anomaly.evaluate(folder, anomaly.EvaluateSettings(data=str(moved)), CPU)
    exact = {k: v for k, v in numbers.items() if "latency" not in k}
    assert exact == {key: summary(finished)[key] for key in exact} and "knn_image_auroc" in exact
    with pytest.raises(ConfigError, match="has another fingerprint"):
        anomaly.evaluate(folder, anomaly.EvaluateSettings(data=str(other)), CPU)
    before = (folder / "config.yaml").read_bytes()
    assert run(folder, other, "iterations=4", "curve_every=2") == 2
    assert "fingerprint" in capsys.readouterr().err and path.read_bytes() == before
    assert run(folder, moved, "curve_every=2") == 0
    assert "finished; nothing to do" in capsys.readouterr().out


def test_the_split_of_other_data_is_not_that_of_the_run(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other good images are all tested. Changed good data of the run itself are an error, changed test data a
    note."""
    folder, own = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(data, tmp_path / "own")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(f"data: {data}", f"data: {own}"))
    plain = anomaly.EvaluateSettings(baselines="none")
    save(own / "bottle/test/good/900.png", np.full((16, 16, 3), 99, np.uint8))
    anomaly.evaluate(folder, plain, CPU)
    assert f"the test data at {own} have changed" in capsys.readouterr().err
    save(own / "bottle/train/good/000.png", np.zeros((16, 16, 3), np.uint8))
    for given in (plain, dataclasses.replace(plain, data=str(own))):
        with pytest.raises(ConfigError, match=f"the good data on which {folder} was trained, got"):
            anomaly.evaluate(folder, given, CPU)
    for i in range(6):
        save(tmp_path / f"parts/good/{i}.png", np.full((16, 16, 3), 40 * i, np.uint8))
    cfg, _, _ = model.load_model(folder, CPU)
    backbone = sources.backbone_of(cfg, CPU)
    assert len(sources.source_of(cfg, backbone, CPU, data=str(tmp_path / "parts")).tested().maps) == 6


def test_data_of_one_class_may_be_renamed(tmp_path: Path) -> None:
    """Their only class has the name of the folder, which older runs have in their fingerprint."""
    for i in range(3):
        save(tmp_path / f"parts/good/{i}.png", np.full((8, 8, 3), i, np.uint8))
    shutil.copytree(tmp_path / "parts", tmp_path / "renamed")
    settings = ["size=8", f"cache={tmp_path}/cache", f"output={tmp_path}/run"]
    prints = sources.fingerprints(config.load(anomaly.Config, tasks.find("anomaly"), settings))
    parts = prints(str(tmp_path / "parts"))
    assert prints(str(tmp_path / "renamed")) == parts
    train = dataset.load(tmp_path / "parts", size=8, cache=tmp_path / "cache")
    before = fingerprint(train.fingerprint, train.labels, train.classes, ["parts"])
    (tmp_path / "run").mkdir()
    folders.mark(tmp_path / "run", "run", data={"train": before})
    assert prints(str(tmp_path / "parts")) == parts | {"train": before}


def test_a_run_stopped_in_every_phase_ends_in_the_same_bytes(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def stop(trainer: Any, batch: Tensor, step: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:  # in each session, so that all make progress
            raise KeyboardInterrupt
        return step(trainer, batch)

    sessions = 0
    with monkeypatch.context() as patch:
        for trainer in TRAINERS:
            original = trainer.step
            patch.setattr(trainer, "step", lambda self, batch, step=original: stop(self, batch, step))
        while run(tmp_path / "run", data) == 130:
            steps, sessions = 0, sessions + 1
    assert sessions > 4
    final = "model/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (finished / final).read_bytes()
    pretrained = tmp_path / "pretrained"
    assert run(pretrained, data, command="pretrain") == 0 and run(pretrained, data) == 0
    assert (pretrained / final).read_bytes() == (finished / final).read_bytes()


def test_learning_without_a_folder_ends_in_the_same_scorer(finished: Path, data: Path) -> None:
    """As the adapter to anomalib trains, into a scorer whose shapes are fixed in advance."""

    class Phases:
        device, ranks, rows = CPU, Ranks(), (32, 0)

        def phase(self, name: str, stepper: Any, iterations: int, batch: Any, picture: Any = None) -> None:
            for i in range(iterations):
                stepper.step(batch(i))

    cfg = config.load(anomaly.Config, finished / "config.yaml")
    backbone = backbones.load("", size=cfg.features.size, grid=cfg.features.grid, normalize=False)
    good = Pictures(data, backbone, cfg.features.size, cache=data.parent / "cache").good(cfg.source.holdout)
    scorer, expected = anomaly.fit(Phases(), cfg, good, backbone), anomaly.load_scorer(finished, CPU)
    assert (scorer.threshold, scorer.pixel_threshold) == (expected.threshold, expected.pixel_threshold)
    made = anomaly.new_scorer(cfg)
    made.load_state_dict(scorer.state_dict())
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    for each in (scorer, made):
        assert torch.equal(each.scores(each.maps(images)), expected.scores(expected.maps(images)))


def test_a_longer_run_learns_the_defects(data: Path, tmp_path: Path) -> None:
    settings = ["pretrain_iterations=100", "iterations=10", "baselines=none", "picture_every=0", "patch=1"]
    assert run(tmp_path, data, *settings, recipe="anomaly") == 0
    numbers = summary(tmp_path)
    assert numbers["image_auroc"] > 0.9 and numbers["pixel_auroc"] > 0.9
    assert not [key for key in numbers if key.startswith("knn")]


def test_summed_gaussians_of_too_few_images_are_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):  # four for training, one of them held out
        save(tmp_path / f"parts/good/{i}.png", np.full((16, 16, 3), 40 * i, np.uint8))
    assert run(tmp_path / "run", tmp_path / "parts", "detector=gaussians", recipe="anomaly") == 2
    shown = capsys.readouterr()
    assert "detector=gaussians needs >= 4 good images for training, got 3" in shown.err
    assert "pretrain" not in shown.err


def test_a_run_of_images_chooses_by_defects_that_it_makes(data: Path, tmp_path: Path) -> None:
    """Its heat maps, thresholds and scores are those of the chosen detector."""
    settings = ["preparation=auto", "detector=auto", "picture_every=0", "holdout=.4", "patch=null"]
    assert run(tmp_path / "run", data, *settings, recipe="anomaly") == 0
    found = summary(tmp_path / "run")
    assert found["patch"] in choice.PATCHES and found["patches"]["knn"].keys() == {"1", "3", "5", "9"}
    _, networks = anomaly.load(tmp_path / "run", CPU)
    assert {each.patch for each in (networks.preparation, *networks.others.values())} == {found["patch"]}
    detector, told = found["detector"], found["validation"]
    assert found["image_auroc"] == found["baselines"][detector] > 0.9
    assert max(told, key=lambda name: told[name]["final"]) in ("knn", "patchcore", "gaussian", "gaussians")
    assert (tmp_path / "run/heatmaps.png").exists()
    scorer = anomaly.load_scorer(tmp_path / "run", CPU)
    assert (scorer.threshold, scorer.pixel_threshold) == (found["threshold"], found["pixel_threshold"])
    tested = Pictures(data, scorer.backbone, 16, cache=data.parent / "cache").tested()
    assert tested.images is not None
    maps = scorer.maps(torch.from_numpy(tested.images.copy()))
    numbers, _ = comparison.measure(scorer.scores(maps), maps, tested)
    assert numbers["image_auroc"] == pytest.approx(found["image_auroc"], abs=0.02)
    assert cli.main(["export", str(tmp_path / "run"), "onnx=false"]) == 0


def test_samples_start_from_training_data_and_are_keyed_by_their_row(finished: Path) -> None:
    drawn = [
        torch.cat([batch.samples for batch in anomaly.sample(finished, rows, 0, size, CPU)])
        for rows, size in ((range(7), 7), (range(7), 3), (range(2, 7), 4))
    ]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn[2], drawn[0][2:], rtol=1e-4, atol=1e-4)
    assert drawn[0].shape == (7, 7) and (drawn[0].norm(dim=1) - 1).abs().max() < 0.5


def test_new_images_are_scored_as_the_runs_own(finished: Path, data: Path, tmp_path: Path) -> None:
    found = summary(finished)
    scorer = anomaly.load_scorer(finished, CPU)
    assert (scorer.threshold, scorer.pixel_threshold) == (found["threshold"], found["pixel_threshold"])
    tested = Pictures(data, scorer.backbone, 16, cache=data.parent / "cache").tested()
    assert tested.images is not None
    maps = scorer.maps(torch.from_numpy(tested.images.copy()))
    numbers, _ = comparison.measure(scorer.scores(maps), maps, tested)
    assert numbers["pixel_auroc"] == pytest.approx(found["pixel_auroc"], abs=0.01)
    folders = [str(data / name / "test") for name in ("bottle", "screw")]
    output = tmp_path / "scores"
    assert cli.main(["score", str(finished), *folders, f"output={output}", "device=cpu"]) == 0
    with (output / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_good = [row["anomalous"] == "1" for row in rows if "/good/" in row["path"]]
    assert sum(of_good) / len(of_good) == pytest.approx(found["false_alarms"])
    assert sorted(float(row["score"]) for row in rows) == pytest.approx(
        sorted(scorer.scores(maps).tolist()), rel=1e-4
    )


def test_a_run_knows_its_backbone(finished: Path) -> None:
    cfg, _, about = model.load_model(finished, CPU)
    cfg.features.weights = "2"
    with pytest.raises(ConfigError, match=r"weights must be of patches-.*, as in the run, got patches-"):
        sources.backbone_of(cfg, CPU, about)


# --- data --------------------------------------------------------------------------------------------


def test_dry_run_tries_each_phase_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The baselines have a tau of their own, or none.
    assert run(tmp_path / "run", data, "tau_rate=.1", "--dry-run") == 0
    shown = capsys.readouterr().out
    phases = [line.split(":")[0] for line in shown.splitlines() if "one iteration" in line]
    assert phases == ["pretrain", "tau0", "langevin", "dxmi"] and not (tmp_path / "run").exists()


def test_held_out_images_are_the_last_of_each_class(data: Path) -> None:
    pictures = Pictures(data, backbones.load("", size=16, grid=4), 16, cache=data.parent / "cache")
    good, whole = pictures.good(0.25), pictures.good(0.001)
    assert len(good.train) == 12 and len(good.held_out) == 4 and len(whole.held_out) == 2
    rows = {each.tobytes() for each in good.train}
    assert not rows & {each.tobytes() for each in good.held_out}
    assert np.array_equal(whole.held_out[0], good.held_out[1])  # the last image of bottle


def test_metrics_that_the_data_do_not_allow_are_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders without masks; then without defects."""
    mvtec = write_mvtec(tmp_path / "mvtec")
    (tmp_path / "own").mkdir()
    (mvtec / "bottle/train/good").rename(tmp_path / "own/good")
    assert run(tmp_path / "none", tmp_path / "own", recipe="anomaly") == 0
    shown = capsys.readouterr().err  # once before the run, once at its end
    assert "own: image metrics will be skipped: all 2 tested are good" in shown
    assert "own: image metrics are skipped: all 2 tested are good" in shown
    assert "image_auroc" not in summary(tmp_path / "none") and summary(tmp_path / "none")["threshold"] > 0
    assert not (tmp_path / "none/heatmaps.png").exists()
    (mvtec / "bottle/test/spot").rename(tmp_path / "own/spot")
    assert run(tmp_path / "some", tmp_path / "own", recipe="anomaly") == 0
    shown = capsys.readouterr().out
    assert "AUROC" in shown and "pixel AUROC" not in shown
    assert "pixel_auroc" not in summary(tmp_path / "some") and (tmp_path / "some/heatmaps.png").exists()
    settings = anomaly.EvaluateSettings(data=str(write_mvtec(tmp_path / "other")), baselines="none")
    numbers, _ = anomaly.evaluate(tmp_path / "some", settings, CPU)
    assert "pixel_auroc" in numbers and "knn_image_auroc" not in numbers
    untrained = anomaly.EvaluateSettings(baselines="all")
    assert "tau0_image_auroc" not in anomaly.evaluate(tmp_path / "some", untrained, CPU)[0]
    assert "has not trained DxMI, tau = 0 and Langevin negatives" in capsys.readouterr().err


def test_runs_are_not_read_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "parts"
    root.mkdir()
    (write_mvtec(tmp_path / "mvtec") / "bottle/train/good").rename(root / "good")
    (tmp_path / "mvtec/bottle/test/spot").rename(root / "spot")
    monkeypatch.chdir(root)
    for i in range(2):
        assert run(Path(f"runs/{i}"), Path("."), "baselines=none", "cache=../cache", recipe="anomaly") == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"{root} (good and defects): train good: 6; test 6 (good: 2, spot: 4)" in lines
    assert list(root.glob("runs/0/*.png")) and "skipped: runs (results of dxmi)" in lines


@pytest.mark.parametrize("every", [True, False])
def test_masks_that_mark_nothing_end_no_run(
    every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_mvtec(tmp_path / "data")
    masks = sorted((data / "screw/ground_truth/spot").iterdir())
    for mask in masks if every else masks[:1]:
        save(mask, np.zeros_like(np.asarray(Image.open(mask))))
    assert run(tmp_path / "run", data, "classes=screw") == 0
    found, shown = summary(tmp_path / "run"), capsys.readouterr().err
    assert f"{4 if every else 1} of the 4 masks of defective images are empty, such as that of" in shown
    assert ("pixel_auroc" in found) != every and found["image_auroc"] > 0.5


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, corrupt = write_mvtec(tmp_path / "a"), write_mvtec(tmp_path / "b")
    shutil.rmtree(missing / "screw/ground_truth")
    (corrupt / "screw/train/good/003.png").write_bytes(b"no picture")
    for data, message in (
        (missing, "spot/000.png: its mask is missing, expected"),
        (corrupt, "screw/train/good/003.png: cannot be decoded"),
        (tmp_path / "nowhere", "nowhere does not exist; `dxmi data --help` lists the layouts"),
    ):
        assert run(tmp_path / "run", data, "--dry-run") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=null"], "data must be the path of images or of a file of vectors, got null"),
        (["classes=bottle,nut"], "got nut; it has "),
        (["negatives=short_run"], "negatives must be sampler or refined (baselines=all"),
        (["classes=bottle,bottle"], "classes must be distinct, got bottle, bottle"),
        (["patch=4"], "patch must be odd, got 4"),
        (["last_std=1"], "last_std must be <= std=0.03, got 1.0"),
        (["max_std=.02"], "max_std must be >= std=0.03, got 0.02"),
        (["shard=true"], "shard must be false: these networks are small, got true"),
        (
            ["backbone=null", "weights=file"],
            "weights needs images (backbone=null means vectors), got weights=file",
        ),
        (["backbone=resnet"], "backbone must be one of efflite0, efflite0_deep, "),
        (["holdout=1"], "holdout must be < 1, got 1.0"),
    ],
)
def test_bad_settings(
    settings: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, data, *settings) == 2
    assert message in capsys.readouterr().err


# --- numbers -----------------------------------------------------------------------------------------


class Given:
    """A detector whose scores are its maps' first channel."""

    def fit(self, maps: FeatureMaps) -> None: ...

    def score(self, maps: FeatureMaps) -> Tensor:
        return torch.from_numpy(maps.maps[..., 0].astype(np.float32))


@pytest.mark.parametrize(("quantile", "rank"), [(0.5, 10), (0.9, 18), (0.95, 19), (0.99, 19), (0.0, 1)])
def test_the_threshold_is_the_score_of_a_rank(
    quantile: float, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 19 scores; another good image scores above the k-th lowest with probability 1 - k / 20."""
    maps = np.random.default_rng(0).permutation(19).astype(np.float32)[:, None, None, None] + 1
    found = comparison.calibrate(Given(), FeatureMaps(maps), None, quantile, 0.5)
    low, high = false_alarm_interval(19, rank)
    assert found == {
        **{"threshold": rank, "pixel_threshold": 10, "held_out": 19},
        **{"false_alarms_low": low, "false_alarms_high": high},
    }
    assert ("requires at least 99 held-out scores, got 19" in capsys.readouterr().err) == (quantile == 0.99)


def test_classes_of_one_kind_are_left_out_and_named() -> None:
    scores = torch.tensor([0.0, 1.0, 5.0, 5.0]).view(4, 1, 1)
    anomalous, classes = np.array([False, True, False, False]), np.array([0, 0, 1, 1])
    tested = Examined(scores.numpy()[..., None], anomalous, classes, ["nut", "pill"])
    numbers, notes = comparison.measure(scores.flatten(), scores, tested)
    assert numbers["image_auroc"] == numbers["image_auroc/nut"] == 1 and "image_auroc/pill" not in numbers
    assert notes == ["pill: image metrics are skipped: all 2 tested are good"]
    found = comparison.at_threshold(scores.flatten(), tested, 2.0)
    assert found == {"found": 0.0, "false_alarms": pytest.approx(2 / 3)} and math.isfinite(found["found"])


def test_a_run_keeps_the_scale_of_its_images_and_takes_odd_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 12 bits in 16 and names that are not UTF-8, single images are scaled like the training images."""
    data, odd = write_mvtec(tmp_path / "data"), os.fsdecode(b"caf\xe9")
    for path in (data / "screw").rglob("*.png"):
        if "ground_truth" not in path.parts:
            save(path, np.asarray(Image.open(path)).astype(np.uint16) * 16)
    dark = np.full((16, 16), 300, np.uint16)
    save(data / f"screw/test/good/{odd}.png", dark)
    for name in ("test", "ground_truth"):
        (data / f"screw/{name}/spot").rename(data / f"screw/{name}/{odd}")
    (data / "screw").rename(data / odd)
    assert run(tmp_path / "run", data) == 0
    assert "image_auroc/caf\\xe9" in summary(tmp_path / "run")
    scorer = anomaly.load_scorer(tmp_path / "run", CPU)
    assert scorer.scale == (4095, None)
    scored = str(data / odd / f"test/good/{odd}.png")
    assert cli.main(["score", str(tmp_path / "run"), scored]) == 0
    with (tmp_path / "run/scores/scores.csv").open(encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file)
    expected = scorer.scores(scorer.maps(torch.full((1, 3, 16, 16), 19, dtype=torch.uint8)))
    assert row["path"] == scored and float(row["score"]) == pytest.approx(float(expected), rel=1e-5)
    settings = anomaly.EvaluateSettings(data=str(data), baselines="none")
    assert anomaly.evaluate(tmp_path / "run", settings, CPU)[0]["image_auroc"] > 0
