"""The experiment ``surfaces``: one detector over three classes, magnetic tiles and two kinds of solar cells.

Imports numpy, ``dxmi_ext`` up to ``reproduce.experiments``, and elpv-dataset where the images are prepared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dxmi_ext.anomaly.comparison import TITLES
from dxmi_ext.anomaly.data import layouts
from dxmi_ext.engine.runs.config import ConfigError
from dxmi_ext.images.data import pixels
from dxmi_ext.reproduce.experiments import Experiment, Row

CLASSES = ("tiles", "monocrystalline", "polycrystalline")
_COLLECTION = "classes"  # folder of the three classes, in the layout of MVTec-AD
_TRAIN_SHARE = 0.7
_DEFECTIVE = 0.5  # probability of a defect from which a solar cell counts as defective
_SETTINGS: dict[str, Any] = {"data": _COLLECTION, "size": 192, "patch": 5, "detector": "dxmi"}
_BASE: dict[str, Any] = {
    "base": "knn",
    "energy_lr": 2e-3,
    "gamma": 0.05,
    "iterations": 80,
    "pretrain_iterations": 2000,
    "ema_decay": 0.95,
    "lr_decay": "constant",
    "sampler_lr": 2e-6,
    "latent_dim": 64,
    "energy_width": 256,
}


def _rows() -> list[Row]:
    runs = {
        "dxmi": ("DxMI", "all", {}),
        "dxmi-knn": (f"DxMI from {TITLES['knn']}", "tau0", _BASE),
        "dxmi-gaussian": ("DxMI from one Gaussian", "tau0", _BASE | {"base": "gaussian"}),
    }
    parts = {
        "dxmi": ("tau0", "langevin", "autoencoder", "knn", "patchcore", "gaussian"),
        "dxmi-knn": ("tau0", "autoencoder"),
        "dxmi-gaussian": ("tau0", "base", "gaussians"),
    }
    rows = []
    for run, (label, baselines, settings) in runs.items():
        row = Row(run, label, _SETTINGS | {"baselines": baselines} | settings, recipe="anomaly")
        rows.append(row)
        for name in parts[run]:
            title = TITLES[name] + (f", beside {label}" if settings else "")
            rows.append(
                dataclasses.replace(row, name=f"{run}_{name}", label=title, of=run, prefix=f"{name}_")
            )
    return rows


def prepare(data: str | None, folder: Path) -> None:
    """Writes the three classes as folders of MVTec-AD's layout.

    The first 70 % of the good images of each class are for training, in the order of their numbers: cells of
    one solar module have consecutive numbers. Solar cells have no masks, so their masks are empty, and pixel
    metrics are those of the tiles.

    Args:
        data: the magnetic tiles, in any layout that `dxmi train anomaly` reads.
        folder: folder of the experiment's data.

    Raises:
        ConfigError: there are no tiles, or elpv-dataset is not installed.
        ImageDataError: the tiles cannot be read.
    """
    if data is None:
        raise ConfigError("data must be the magnetic tiles, as an npz or a folder, got null")
    cells = _solar_cells()
    for split in ("train", "test"):
        source = layouts.find(Path(data), split, None, _TRAIN_SHARE)
        items = source.items
        _write(folder / _COLLECTION / CLASSES[0], split, ((bool(i.label), i.image, i.mask) for i in items))
        for name, (images, defective) in cells.items():
            _write(folder / _COLLECTION / name, split, _of_split(images, defective, split))


_Image = tuple[bool, Callable[[], np.ndarray], Callable[[], np.ndarray] | None]
"""Whether it is defective, the image [H, W, C], and its mask [H, W]."""


def _solar_cells() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [n, H, W] of both kinds of cells, and whether they are defective, [n]."""
    try:
        from elpv_dataset.utils import load_dataset
    except ModuleNotFoundError as error:
        raise ConfigError(
            "elpv-dataset must be installed for the solar cells: pip install elpv-dataset "
            "(CC BY-NC-SA 4.0, not for commercial use)"
        ) from error
    images, probabilities, kinds = load_dataset()
    return {
        name: (images[kinds == kind], probabilities[kinds == kind] >= _DEFECTIVE)
        for name, kind in zip(CLASSES[1:], ("mono", "poly"), strict=True)
    }


def _of_split(images: np.ndarray, defective: np.ndarray, split: str) -> Iterable[_Image]:
    good, bad = np.flatnonzero(~defective), np.flatnonzero(defective)
    end = round(_TRAIN_SHARE * len(good))
    for i in good[:end] if split == "train" else np.concatenate([good[end:], bad]):
        yield bool(defective[i]), partial(images.__getitem__, (i, ..., None)), None


def _write(folder: Path, split: str, images: Iterable[_Image]) -> None:
    """Writes a split of a class in MVTec-AD's layout."""
    from PIL import Image

    for i, (defective, image, mask) in enumerate(images):
        kind = "defect" if defective else "good"
        picture = pixels.eight_bits(image(), None, str(i))[:, :, 0]
        found = {folder / split / kind: picture}
        if defective:
            marked = np.zeros(picture.shape, bool) if mask is None else mask()
            found[folder / "ground_truth" / kind] = 255 * marked.astype(np.uint8)
        for where, array in found.items():
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(where / f"{i:04}.png")


SURFACES = Experiment(
    "surfaces",
    "One detector over three classes of surfaces",
    _rows(),
    columns={
        "image_auroc": "AUROC",
        **{f"image_auroc/{name}": name for name in CLASSES},
        "image_ap": "AP",
        "pixel_auroc": "pixel AUROC",
        "pro": "AUPRO",
    },
    notes=f"""\
Magnetic tiles (Huang et al. 2018) and electroluminescence images of mono- and polycrystalline solar cells
(Buerhop-Lutz et al. 2018, package elpv-dataset, CC BY-NC-SA 4.0), as one model without labels of the classes.
A cell is defective if its probability of a defect is {_DEFECTIVE} or more. AUROC and AP are means over the
classes, pixel AUROC and AUPRO those of the tiles, the only class with masks. The first {_TRAIN_SHARE:.0%} of
the good images of each class train, a tenth of them held out. Every method has the preparation that detects
synthetic defects best, networks that of nearest neighbors.
`data`: the tiles, as in `magnetic-tiles`.""",
    seeds=3,
    prepare=prepare,
    prepared={"format": 1, "train_share": _TRAIN_SHARE, "defective": _DEFECTIVE},
)
