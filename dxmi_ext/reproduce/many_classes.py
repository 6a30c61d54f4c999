"""The experiment ``anomaly``: one model over many classes. Its rows, its features, and a summary of all rows.

Half of CIFAR-10's classes are good, the other half anomalous, in four splits (many versus many, as in UniAD,
You et al. 2022); one model has five good classes and no labels. Imports torch, numpy and ``dxmi_ext`` up to
``reproduce.experiments``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dxmi_ext.anomaly.comparison import TITLES
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs.config import ConfigError
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data import dataset
from dxmi_ext.images.metrics import features
from dxmi_ext.reproduce import gains, plots
from dxmi_ext.reproduce.experiments import Experiment, Row, markdown_table

SPLITS = {"0-4": (0, 1, 2, 3, 4), "5-9": (5, 6, 7, 8, 9), "even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)}
"""The good classes of each split."""
EACH = 1000
"""Number of images of each class, the first ones, for training and for testing."""
GAINS = "gains.json"
DIRECTIONS = 256
"""Number of directions of the 1,280 features: those in which good images have the largest squares."""
_BATCH = 100

_SETTINGS: dict[str, Any] = {
    "preparation": "unit",
    "detector": "dxmi",
    "tau": 0.01,
    "cost_reduction": "sum",
    "batch_size": 128,
    "pretrain_iterations": 2000,
    "iterations": 80,
    "latent_dim": 64,
    "energy_width": 256,
    "sampler_width": 128,
    "std": 0.02,
    "last_std": 0.012,
    "latent_std": 0.05,
    "sampler_lr": 2e-6,
    "energy_lr": 2e-3,
    "gamma": 0.05,
    "ema_decay": 0.95,
    "lr_decay": "constant",
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "knn": {"base": "knn"},
    "density": {"base": "density"},
    "knn+gaussian": {"base": "knn+gaussian"},
    "knn, gamma .01": {"base": "knn", "gamma": 0.01},
    "knn, gamma .2": {"base": "knn", "gamma": 0.2},
    "knn, energy_lr .0005": {"base": "knn", "energy_lr": 5e-4},
    "knn, std .1": {"base": "knn", "std": 0.1, "last_std": 0.03},
}
"""Settings to choose from: base, weight of the squares, learning rate of the energy, sampler's noise."""
CHOSEN = "knn"
"""The candidate of the rows of all splits, .001 below the first of `choice_of`."""
TRIED = "even"
"""Split on which the other candidates run, with seed 0; its test labels have no part in the choice."""
_WITHOUT_A_BASE = {"gamma": 0.1, "energy_lr": 1e-5}
CURVE = "curve"
"""Rows of longer runs without a base, with all trained baselines, for curves. All splits have them."""
_PICTURE = "anomaly-curve.png"
_CURVE: dict[str, Any] = {
    "baselines": "all",
    "curve_every": 100,
    "iterations": 3600,
    "tau": 0.1,
    "gamma": 0.1,
    "scaled_steps": True,
    "std": 0.0125,
    "last_std": 0.0045,
    "sampler_lr": 5e-4,
    "energy_lr": 1e-4,
    "ema_decay": 0.99,
}
_NEAR: dict[str, Any] = {
    "tau": 0.001,
    "max_std": 0.0125,
    "sampler_lr": 5e-5,
    "sampler_wait": 300,
    "td_lambda": 0.9,
    "expected_cost": True,
}
LONGER: dict[str, tuple[str, dict[str, Any]]] = {
    CURVE: (f"DxMI for {_CURVE['iterations']:,} iterations", _CURVE),
    "long": ("DxMI for 10,800 iterations", _CURVE | {"iterations": 10_800, "baselines": "tau0"}),
    "near": ("DxMI with samples near the data", _CURVE | _NEAR | {"baselines": "tau0"}),
}
"""Titles and settings of runs without a base that train the autoencoder."""
_BASES = {"knn": TITLES["knn"], "density": "kernel density", "knn+gaussian": "nearest neighbors and Gaussian"}


def _rows() -> list[Row]:
    ours = [_row(split, f"dxmi-{CHOSEN}", baselines="tau0", **CANDIDATES[CHOSEN]) for split in SPLITS]
    parts = [
        dataclasses.replace(
            row,
            name=f"{split}_{name}",
            label=f"{split}, {TITLES[name]}",
            of=row.name,
            prefix=f"{name}_",
        )
        for split, row in zip(SPLITS, ours, strict=True)
        for name in ("base", "tau0", "autoencoder", "knn", "gaussian")
    ]
    plain = [_row(split, "dxmi", seeds=1, **_WITHOUT_A_BASE) for split in SPLITS]
    others = {name: settings for name, settings in CANDIDATES.items() if name != CHOSEN}
    tried = [_row(TRIED, f"dxmi-{name}", seeds=1, **settings) for name, settings in others.items()]
    longer = [_row(split, CURVE, **_CURVE) for split in SPLITS]
    further = [_row(TRIED, name, seeds=1, **LONGER[name][1]) for name in LONGER if name != CURVE]
    tau0 = [
        dataclasses.replace(
            row, name=f"{row.name}_tau0", label=f"{row.label}, tau = 0", of=row.name, prefix="tau0_"
        )
        for row in further
    ]
    return [*ours, *parts, *plain, *tried, *longer, *further, *tau0]


def _row(split: str, run: str, seeds: int | None = None, **settings: Any) -> Row:
    given = {"data": f"{split}.npz", "baselines": "none"} | _SETTINGS | settings
    name = re.sub(r"[^\w.+-]+", "-", run)
    return Row(f"{split}_{name}", f"{split}, {_title(run)}", given, recipe="anomaly-vectors", seeds=seeds)


def choice_of(units: Sequence[Any]) -> dict[str, float]:
    """AUROC on synthetic defects in held-out good rows of each candidate that has run, the best first.

    Args:
        units: finished units; those of split TRIED with seed 0 count.
    """
    rows = {_row(TRIED, f"dxmi-{name}").name: name for name in CANDIDATES}
    found = {
        rows[unit.row.name]: files.read_json(unit.path)["numbers"]["synthetic_auroc"]
        for unit in units
        if unit.row.name in rows and unit.seed == 0
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def prepare(data: str | None, folder: Path) -> None:
    """Writes the features of every split, SPLIT.npz.

    Args:
        data: images of ten classes or more in train and test, as `images.data.dataset.load` reads them.
        folder: existing folder of the features.

    Raises:
        ConfigError: there are no images, or too few.
        FeatureError: the weights of the feature network are missing.
    """
    if data is None:
        raise ConfigError("data must be CIFAR-10's images, as an npz or a folder, got null")
    (x, y), (x_test, y_test) = (_features(data, split) for split in ("train", "test"))
    for name, good in SPLITS.items():
        train = x[np.isin(y, good)]
        _, vectors = np.linalg.eigh(train.T.astype(np.float64) @ train)
        directions = vectors[:, : -DIRECTIONS - 1 : -1].astype(np.float32)
        anomalous = ~np.isin(y_test, good)
        test = x_test @ directions
        np.savez(folder / f"{name}.npz", X_train=train @ directions, X_test=test, y_test=anomalous)


def _features(data: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of the first images of each class, float32 [n, 1280] of length 1, and labels int64 [n]."""
    from tqdm import tqdm

    images = dataset.load(data, split=split)
    if images.labels is None or (counts := np.bincount(images.labels, minlength=10)[:10]).min() < EACH:
        got = "none" if images.labels is None else f"{counts.min()}"
        raise ConfigError(f"data must have {EACH} {split} images or more of ten classes each, got {got}")
    rows = np.sort(np.concatenate([np.flatnonzero(images.labels == i)[:EACH] for i in range(10)]))
    network, found = features.efficientnet_lite0(), []
    for start in tqdm(range(0, len(rows), _BATCH), desc=f"features, {split}", unit="batch", disable=None):
        found.append(network(torch.from_numpy(images.images[rows[start : start + _BATCH]])).numpy())
    x = np.concatenate(found)
    return x / np.linalg.norm(x, axis=1, keepdims=True), images.labels[rows]


def summary(units: Sequence[Any], output: Path) -> str:
    """Means over the splits, and the lead of DxMI over plain methods, in Markdown.

    Intervals require the scores of the runs, which are not kept beside the table. If some are missing, the
    results in GAINS are shown instead.

    Args:
        units: finished units of all splits.
        output: folder of the table, to which GAINS is written.
    """
    scores = _scores(units)
    found = gains.of(scores) if scores else files.read_json(output / GAINS)
    if scores:
        runlog.write_json(output / GAINS, found)
    parts = (_shown(found) if found else "", _curves(units, output), _chosen(choice_of(units)))
    return "\n\n".join(part for part in parts if part)


def _scores(units: Sequence[Any]) -> gains.Scores:
    """The scores of all units; empty if a run's folder is missing."""
    found: gains.Scores = {}
    for unit in (unit for unit in units if _run_of(unit) not in LONGER):
        path = unit.folder / "test_scores.npz"
        if not path.is_file():
            return {}
        split, run = unit.row.name.partition("_")[0], _run_of(unit)
        of_split = found.setdefault(split, {})
        with np.load(path) as arrays:
            own = {key: arrays[key] for key in arrays.files if key not in ("dxmi", "anomalous")}
            for name, each in ({run: arrays["dxmi"]} | own).items():
                of_split.setdefault(name, []).append(each)
            of_split["anomalous"] = [arrays["anomalous"]]
    return found if found.keys() == SPLITS.keys() else {}


def _chosen(aurocs: Mapping[str, float]) -> str:
    """A sentence with the numbers by which settings are chosen."""
    if not aurocs:
        return ""
    best = next(iter(aurocs))
    listed = ", ".join(f"{name} {value:.3f}" for name, value in aurocs.items())
    line = f"AUROC on synthetic defects by settings (split {TRIED}, seed 0): {listed}."
    return line + ("" if best == CHOSEN else f" The rows of all splits use {CHOSEN}, not {best}.")


def _run_of(unit: Any) -> str:
    """A unit's row without its split."""
    return str(unit.row.name.partition("_")[2])


def curves_of(numbers: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """AUROC on the test data by iteration, for each method that a run has measured as it trained."""
    found: dict[str, dict[int, float]] = {}
    for key, value in numbers.items():
        if key.startswith("curve/"):
            _, method, iteration = key.split("/")
            found.setdefault(method, {})[int(iteration)] = value
    return {name: dict(sorted(found[name].items())) for name in TITLES if name in found}


def _curves(units: Sequence[Any], output: Path) -> str:
    """Draws the mean curves of the longer runs, and describes them in Markdown; empty if none has run."""
    runs: dict[str, list[dict[str, dict[int, float]]]] = {split: [] for split in SPLITS}
    for unit in (unit for unit in units if _run_of(unit) == CURVE):
        runs[unit.row.name.partition("_")[0]].append(curves_of(files.read_json(unit.path)["numbers"]))
    runs = {split: found for split, found in runs.items() if found}
    if not runs:
        return ""
    means = {split: _mean_curves(found) for split, found in runs.items()}
    mean = _mean_curves([*means.values()])
    with files.file(output / _PICTURE) as file:
        plots.curves(file, {TITLES[name]: curve for name, curve in mean.items()}, "AUROC")
    heads = ["without a base", *runs, "mean", "at first", "lowest", "highest"]
    rows = []
    for name, curve in mean.items():
        end = max(curve)
        late = [value for i, value in curve.items() if 2 * i >= end]
        ends = [means[split][name][end] for split in runs]
        cells = (*ends, curve[end], curve[min(curve)], min(late), max(late))
        rows.append([TITLES[name], *(f"{value:.3f}" for value in cells)])
    seeds = ", ".join(f"{split}: {len(found)}" for split, found in runs.items())
    return (
        f"AUROC after {end:,} iterations without a base, tau = {_CURVE['tau']}: means over seeds ({seeds}). "
        "Last columns: the mean of the splits before training, and its range in the second half.\n\n"
        f"{markdown_table(heads, rows)}\n\n![AUROC over iterations]({_PICTURE})"
    )


def _mean_curves(runs: Sequence[Mapping[str, Mapping[int, float]]]) -> dict[str, dict[int, float]]:
    """The mean of the runs' curves, by method."""
    return {
        name: {i: float(np.mean([run[name][i] for run in runs])) for i in curve}
        for name, curve in runs[0].items()
    }


def _shown(found: Mapping[str, Any]) -> str:
    others = list(next(iter(found["gains"].values()), ()))
    heads = ["mean of the splits", "AUROC", *(f"ahead of {_title(name)}" for name in others)]
    rows = []
    for name, mean in found["mean"].items():
        differences = found["gains"].get(name, {}).values()
        cells = [f"{gain:+.3f} ({low:+.3f} to {high:+.3f})" for gain, low, high in differences]
        rows.append([_title(name), f"{mean:.3f}", *(cells or [""] * len(others))])
    return markdown_table(heads, rows)


def _title(run: str) -> str:
    """Title of a method, or of DxMI from a base: ``dxmi-BASE``."""
    if run in LONGER:
        return LONGER[run][0]
    method, _, base = run.partition("-")
    name, comma, change = base.partition(",")
    if not base:
        return TITLES[method]
    return f"{TITLES[method]} from {_BASES[name]}{comma}{change}"


ANOMALY = Experiment(
    "anomaly",
    "One model over many classes: halves of CIFAR-10",
    _rows(),
    columns={"image_auroc": "AUROC", "image_ap": "AP", "synthetic_auroc": "AUROC on synthetic defects"},
    notes=f"""\
Five classes of CIFAR-10 are good, without labels, and the other five are anomalous, in four splits (many
versus many, as in UniAD). {EACH} images of each class are for training, a tenth of them held out, and as many
for testing. Features: those of EfficientNet-lite0 at 96 pixels, pooled, of length 1, in the {DIRECTIONS}
directions in which good images have the largest squares. All methods of a run see the same features; tau = 0
has the same base, autoencoder and settings as DxMI. In brackets: 95 % intervals of a paired bootstrap over
test images. Synthetic defects are made from held-out good rows; settings were chosen by them as far as
docs/anomaly-results.md describes.
`data`: CIFAR-10's images, as folders or an npz.""",
    seeds=3,
    prepare=prepare,
    prepared={"format": 1, "each": EACH, "directions": DIRECTIONS},
    summary=summary,
)
