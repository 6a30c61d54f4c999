"""The experiment ``magnetic-tiles``: anomaly detection on images. Imports ``anomaly.comparison``."""

from __future__ import annotations

from dxmi_ext.anomaly import comparison
from dxmi_ext.reproduce.experiments import Experiment, Row

_TILES = {"aligned": True, "size": 192, "baselines": "all", "preparation": "whitened", "detector": "dxmi"}


def _tiles(name: str, label: str) -> Row:
    return Row(name, label, {}, recipe="anomaly", of="dxmi", prefix=f"{name}_")


MAGNETIC_TILES = Experiment(
    "magnetic-tiles",
    "Magnetic tiles: anomaly detection on CPU cores",
    [
        Row("dxmi", "DxMI", _TILES, recipe="anomaly"),
        *(_tiles(*method) for method in comparison.TITLES.items() if method[0] != "dxmi"),
    ],
    columns={
        "image_auroc": "AUROC",
        "pixel_auroc": "pixel AUROC",
        "image_ap": "AP",
        "pixel_ap": "pixel AP",
        "pro": "PRO",
    },
    notes="""\
952 good and 392 defective images of 128 x 128 (Huang et al. 2018, `data=magnetic_tile_128.npz`), split by
their sorted numbers: 599 for training, 67 held out for the thresholds, 678 for testing. All methods are parts
of one run per seed, on the same features. The features and their whitening were chosen while looking at this
test set, so the figures are optimistic for all methods alike.""",
    seeds=3,
)
