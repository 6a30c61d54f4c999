"""What the experiment ``anomaly`` does beside running its rows: features before, a summary of all after.

Half of CIFAR-10's classes are good, the other half anomalous, four times over (many versus many, as in UniAD,
You et al. 2022); one model has five good classes and no labels. Imports torch, numpy and ``dxmi_ext`` up to
the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dxmi_ext.anomaly.comparison import TITLES
from dxmi_ext.engine import files, runlog
from dxmi_ext.engine.config import ConfigError
from dxmi_ext.images import dataset, features

SPLITS = {"0-4": (0, 1, 2, 3, 4), "5-9": (5, 6, 7, 8, 9), "even": (0, 2, 4, 6, 8), "odd": (1, 3, 5, 7, 9)}
"""Which classes are good."""
EACH = 1000
"""Images of each class, the first ones: to train on, and to test on."""
GAINS = "gains.json"
DIRECTIONS = 256
"""Of the 1,280 features, the directions in which good images have most of their squares."""
_RESAMPLINGS = 1000
_BATCH = 100
_ABOUT = {"format": 1, "each": EACH, "directions": DIRECTIONS}


def prepare(data: str | None, folder: Path) -> None:
    """Writes the features of every split, SPLIT.npz, unless they are there.

    Args:
        data: images of ten classes or more in train and test, as `images.dataset.load` reads them.
        folder: where they are written.

    Raises:
        ConfigError: there are none, or too few.
        FeatureError: the network of the features is missing.
    """
    if files.read_json(folder / "about.json") == _ABOUT:
        return
    if data is None:
        raise ConfigError("data must be CIFAR-10's images, as an npz or a folder, got null")
    (x, y), (x_test, y_test) = (_features(data, split) for split in ("train", "test"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, good in SPLITS.items():
        train = x[np.isin(y, good)]
        _, vectors = np.linalg.eigh(train.T.astype(np.float64) @ train)
        directions = vectors[:, : -DIRECTIONS - 1 : -1].astype(np.float32)
        anomalous = ~np.isin(y_test, good)
        with files.file(folder / f"{name}.npz") as file:
            np.savez(file, X_train=train @ directions, X_test=x_test @ directions, y_test=anomalous)
    runlog.write_json(folder / "about.json", _ABOUT)


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
    """Means over the splits, and how far DxMI is ahead of plain methods, as a page shows them.

    Intervals want the scores of the runs, which are not kept beside the table: where some are missing, what
    an earlier time found is shown.

    Args:
        units: those that are done, of all splits.
        output: the folder of the table, where GAINS is written.
    """
    scores = _scores(units)
    found = gains(scores) if scores else files.read_json(output / GAINS)
    if not found:
        return ""
    if scores:
        runlog.write_json(output / GAINS, found)
    return _shown(found)


Scores = dict[str, dict[str, list[np.ndarray]]]
"""Split -> method -> scores [m] of each seed; ``anomalous`` among the methods."""


def gains(scores: Scores, *, resamplings: int = _RESAMPLINGS) -> dict[str, Any]:
    """The mean AUROC over splits and seeds of each method, and differences with their 95 % intervals.

    The intervals are of a bootstrap over test images, the same ones in every split and for every method.

    Args:
        scores: of the same test images in every split.
    """
    first = next(iter(scores.values()))
    m = len(first["anomalous"][0])
    weights = np.concatenate(
        (np.ones((1, m)), np.random.default_rng(0).multinomial(m, np.full(m, 1 / m), resamplings))
    ).astype(np.float32)
    names = [name for name in first if name != "anomalous" and all(name in each for each in scores.values())]
    means: dict[str, np.ndarray] = {}
    for name in names:
        every = [
            aurocs(one, of_split["anomalous"][0], weights)
            for of_split in scores.values()
            for one in of_split[name]
        ]
        means[name] = np.mean(every, axis=0)
    ours = [name for name in names if name.startswith("dxmi")]
    told: dict[str, Any] = {
        "mean": {name: round(float(value[0]), 4) for name, value in means.items()},
        "gains": {},
    }
    for mine in ours:
        for other in (name for name in names if name not in ours):
            difference = means[mine] - means[other]
            low, high = np.quantile(difference[1:], (0.025, 0.975))
            told["gains"].setdefault(mine, {})[other] = [
                round(float(x), 4) for x in (difference[0], low, high)
            ]
    return told


def aurocs(scores: np.ndarray, anomalous: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC for each weighting of the images, [r]; equal scores count by their order.

    Args:
        scores: [m].
        anomalous: bool [m].
        weights: float32 [r, m].
    """
    order, found = np.argsort(scores, kind="stable"), []
    odd = anomalous[order]
    for chunk in np.array_split(weights, max(1, len(weights) // 50)):
        ranked = chunk[:, order]
        good, bad = (np.where(which, ranked, 0) for which in (~odd, odd))
        below = np.cumsum(good, axis=1, dtype=np.float64)
        found.append((bad * below).sum(1) / bad.sum(1) / below[:, -1])
    return np.concatenate(found)


def _scores(units: Sequence[Any]) -> Scores:
    """The scores of runs that are here; empty unless every unit's is."""
    found: Scores = {}
    for unit in units:
        path = unit.folder / "test_scores.npz"
        if not path.is_file():
            return {}
        split, _, run = unit.row.name.partition("_")
        of_split = found.setdefault(split, {})
        with np.load(path) as arrays:
            own = {key: arrays[key] for key in arrays.files if key not in ("dxmi", "anomalous")}
            for name, each in ({run: arrays["dxmi"]} | own).items():
                of_split.setdefault(name, []).append(each)
            of_split["anomalous"] = [arrays["anomalous"]]
    return found if found.keys() == SPLITS.keys() else {}


def _shown(found: Mapping[str, Any]) -> str:
    others = list(next(iter(found["gains"].values())))
    heads = ["mean of the splits", "AUROC", *(f"ahead of {_title(name)}" for name in others)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, mean in found["mean"].items():
        differences = found["gains"].get(name, {}).values()
        cells = [f"{gain:+.3f} ({low:+.3f} to {high:+.3f})" for gain, low, high in differences]
        lines.append([_title(name), f"{mean:.3f}", *(cells or [""] * len(others))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _title(run: str) -> str:
    """Of a method, or of DxMI with a base, as ``dxmi-BASE``."""
    method, _, base = run.partition("-")
    return TITLES[method] + (f" from {TITLES[base]}" if base else "")
