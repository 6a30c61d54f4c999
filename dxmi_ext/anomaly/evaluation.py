"""What a run comes to: thresholds, numbers of all methods, heat maps. Imports torch and ``dxmi_ext``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import comparison, metrics, plots
from dxmi_ext.anomaly.collection import Examined, Good
from dxmi_ext.anomaly.detectors import (
    Detector,
    EnergyDetector,
    GaussianPositions,
    NearestNeighbours,
    localise,
)
from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.model import AnomalyNetworks
from dxmi_ext.anomaly.networks import AutoencoderEnergy
from dxmi_ext.anomaly.preparation import prepared
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine import final, runlog
from dxmi_ext.images.features import Extractor
from dxmi_ext.method.networks import Networks

BASELINES = {"all": ("tau0", "langevin", "autoencoder", "knn", "gaussian"), "none": ()}
BASELINES["quick"] = BASELINES["all"][2:]
TRAINED = BASELINES["all"][:2]  # in phases of the run
PAPER = {  # DxMI, Table 5: all 15 classes of MVTec-AD
    "the paper, b4": {"image_auroc": 0.970, "pixel_auroc": 0.971},
    "  tau = 0": {"image_auroc": 0.679, "pixel_auroc": 0.846},
}
_SHOWN = 8  # defective pictures in heatmaps.png


def table(cfg: Config, numbers: dict[str, float]) -> str:
    """The run's methods, the paper's rows beside them for MVTec-AD."""
    title = f"{cfg.run.recipe}, {cfg.features.backbone or 'vectors'}, T = {cfg.networks.steps}, "
    title += f"tau = {cfg.algorithm.tau:g}"
    return f"{title}\n{comparison.table(numbers, PAPER if cfg.run.recipe == 'mvtec-ad' else None)}"


def announce(tested: Examined) -> None:
    """Says before a run which of its numbers it will lack."""
    final.announce_missing({"matplotlib": "pictures"} | ({} if tested.masks is None else {"scipy": "pro"}))
    truths = tested.anomalous, tested.masks, tested.classes, tested.class_names, tested.names
    for line in metrics.unmeasurable(*truths):
        runlog.note(line)


def detectors_of(networks: AnomalyNetworks, which: str, rows: int, seed: int) -> dict[str, Detector]:
    """By the names of ``comparison.TITLES``; the first is DxMI's."""
    device = networks.sampler.log_std.device
    energies: dict[str, nn.Module] = {"dxmi": networks.energy_network, **dict(networks.baselines.items())}
    energies["autoencoder"] = AutoencoderEnergy(networks.pretrained).to(device)
    detectors: dict[str, Detector] = {k: EnergyDetector(v, device=device) for k, v in energies.items()}
    # 1 % of the positions, as PatchCore keeps; of few rows more, of many no more than can be searched.
    share = min(1.0, max(0.01, 2000 / rows), 20_000 / rows)
    detectors["knn"] = NearestNeighbours(share=share, seed=seed, device=device)
    detectors["gaussian"] = GaussianPositions(dims=None, shrinkage=0.3, seed=seed, device=device)
    return {k: d for k, d in detectors.items() if k == "dxmi" or k in BASELINES[which]}


def calibrate(cfg: Config, networks: AnomalyNetworks, good: Good) -> dict[str, float]:
    energy = EnergyDetector(networks.energy_network, device=networks.sampler.log_std.device)
    size = None if cfg.features.backbone is None else cfg.features.size
    held_out = prepared(good.held_out, networks.preparation)
    quantiles = cfg.thresholds.quantile, cfg.thresholds.pixel_quantile
    return comparison.calibrate(energy, held_out, size, *quantiles, top_share=cfg.thresholds.top_share)


def numbers_of(
    cfg: Config,
    networks: AnomalyNetworks,
    which: str,
    good: FeatureMaps | None,
    tested: Examined,
    backbone: Extractor | None,
    thresholds: dict[str, float],
    seed: int,
) -> tuple[dict[str, float], Tensor | None]:
    """Numbers of all methods, and DxMI's score maps; what could not be measured is told."""
    if not len(tested.maps):
        print("nothing is tested: no scores")
        return thresholds, None
    maps = prepared(tested.maps, networks.preparation)
    detectors = detectors_of(networks, which, 1 if good is None else len(good.rows), seed)
    numbers, notes, scores = comparison.compare(
        detectors, good, tested, maps, backbone, thresholds["threshold"], top_share=cfg.thresholds.top_share
    )
    for note in notes:
        runlog.note(note)
    return thresholds | numbers, scores


def picture_of(networks: Networks, tested: Examined) -> Callable[[IO[bytes]], None] | None:
    """Draws heat maps of a few defective pictures while training."""
    assert isinstance(networks, AnomalyNetworks)
    few = tested.at(_shown(tested))
    if few.images is None or not len(few.maps):
        return None
    maps, device = prepared(few.maps, networks.preparation), networks.sampler.log_std.device

    def draw(file: IO[bytes]) -> None:
        heatmaps(file, EnergyDetector(networks.energy_network, device=device).score(maps), few, None)

    return draw


def heatmaps(path: IO[bytes] | Path, scores: Tensor, tested: Examined, threshold: float | None) -> None:
    """Of a few defective pictures, where there are any."""
    rows = _shown(tested)
    few = tested.at(rows)
    if few.images is None or not len(rows):
        return
    height, width = few.images.shape[2:]
    heat = localise(scores[torch.from_numpy(rows)], (height, width))
    masks = None if few.masks is None else torch.from_numpy(few.masks)
    plots.heatmaps(path, torch.from_numpy(few.images), heat, masks, threshold=threshold)


def _shown(tested: Examined) -> np.ndarray:
    """Defective pictures, evenly over all of them, int64."""
    rows = np.flatnonzero(tested.anomalous)
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).round().astype(int))]
