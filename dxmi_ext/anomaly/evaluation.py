"""Evaluation of a run: the chosen detector, thresholds, metrics of all methods, and heat maps.

Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import choice, comparison, metrics
from dxmi_ext.anomaly.comparison import Method
from dxmi_ext.anomaly.detectors.bases import BasedEnergy
from dxmi_ext.anomaly.detectors.common import Detector, EnergyDetector, localize
from dxmi_ext.anomaly.detectors.gaussians import Gaussians
from dxmi_ext.anomaly.detectors.patchcore import PatchCore
from dxmi_ext.anomaly.detectors.plain import GaussianPositions, NearestNeighbors
from dxmi_ext.anomaly.features.collection import Examined, Good
from dxmi_ext.anomaly.features.preparation import prepared
from dxmi_ext.anomaly.model import AnomalyNetworks
from dxmi_ext.anomaly.scores import plots
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.anomaly.validation import Validation, Verdict, judge
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.storage import files
from dxmi_ext.images.metrics.features import Extractor
from dxmi_ext.method.networks import Networks

TRAINED = ("tau0", "langevin")
"""Baselines that are trained in phases of the run."""
BASELINES: dict[str, tuple[str, ...]] = {
    "none": (),
    "quick": ("base", "autoencoder", "knn", "patchcore", "gaussian", "gaussians"),
}
BASELINES |= {"tau0": (TRAINED[0], *BASELINES["quick"]), "all": (*TRAINED, *BASELINES["quick"])}
_FITTED = {"knn": NearestNeighbors, "gaussian": GaussianPositions, "gaussians": Gaussians}
PAPER = {  # DxMI, Table 5: means over all 15 classes of MVTec-AD
    "the paper, b4": {"image_auroc": 0.970, "pixel_auroc": 0.971},
    "  tau = 0": {"image_auroc": 0.679, "pixel_auroc": 0.846},
}
_SHOWN = 8  # defective images in heatmaps.png


def table(cfg: Config, numbers: Mapping[str, Any], detector: str) -> str:
    """A table of the run's methods, with the paper's results for MVTec-AD."""
    title = f"{cfg.run.recipe}, {cfg.features.backbone or 'vectors'}"
    if "dxmi" in choice.trained(cfg):
        title += f", T = {cfg.networks.steps}, tau = {cfg.algorithm.tau:g}"
    published = PAPER if cfg.run.recipe == "mvtec-ad" else None
    return f"{title}\n{comparison.table(numbers, detector, published, titles=_titles(cfg))}"


def _titles(cfg: Config) -> Mapping[str, str]:
    return comparison.titles_of(vectors=cfg.features.backbone is None)


def announce(tested: Examined) -> None:
    """Notes before a run which metrics it will skip."""
    final.announce_missing({"matplotlib": "pictures"} | ({} if tested.masks is None else {"scipy": "pro"}))
    truths = tested.anomalous, tested.masks, tested.classes, tested.class_names, tested.names
    for line in metrics.unmeasurable(*truths):
        runlog.note(line)


def methods_of(
    cfg: Config,
    networks: AnomalyNetworks,
    names: Iterable[str],
    good: np.ndarray | None,
) -> dict[str, Method]:
    """The available methods by their names in ``comparison.TITLES``.

    Args:
        names: names of the wanted methods.
        good: features [n, h, w, C] to which nearest neighbors and Gaussians are fitted; None: those are
            skipped unless the networks contain one.
    """
    methods: dict[str, Method] = {}
    for name in runlog.each("detectors", [name for name in comparison.TITLES if name in names]):
        if name == "patchcore":
            if (found := _patchcore(cfg, methods)) is not None:
                methods[name] = found
            continue
        prepares, detector = networks.preparation_of(name), _detector(cfg, networks, name, good)
        if detector is None:
            continue

        def learned(detector: Detector = detector, prepares: nn.Module = prepares) -> bool:
            if good is not None:
                detector.fit(prepared(good, prepares))
            return True

        fits = name in _FITTED and detector is not networks.shipped
        if not fits or final.attempt(_titles(cfg)[name], learned):
            methods[name] = Method(prepares, detector)
    return methods


def _patchcore(cfg: Config, methods: Mapping[str, Method]) -> Method | None:
    """PatchCore of images, on the memory of nearest neighbors if these are among the methods."""
    neighbors = methods.get("knn")
    if cfg.features.backbone is None or neighbors is None:
        return None
    assert isinstance(neighbors.detector, NearestNeighbors)
    return Method(neighbors.preparation, PatchCore(neighbors.detector))


def _detector(cfg: Config, networks: AnomalyNetworks, name: str, good: np.ndarray | None) -> Detector | None:
    """A trained detector, or one to be fitted; None if it is not available."""
    untrained = ({*TRAINED} - {*networks.baselines}) | ({*choice.NETWORKS} - {*networks.trained})
    if name in untrained or (name == "base" and not isinstance(networks.energy_network, BasedEnergy)):
        return None
    if name not in _FITTED:
        return EnergyDetector(networks.energy_of(name), device=networks.device)
    if type(networks.shipped) is _FITTED[name]:
        return networks.shipped
    if good is None or (name == "gaussians" and cfg.features.backbone is None):
        return None
    if name == "gaussians":
        return Gaussians(seed=cfg.run.seed, device=networks.device)
    if name == "gaussian":
        return choice.gaussian(cfg.run.seed, networks.device)
    return choice.nearest_neighbors(math.prod(good.shape[:3]), cfg.run.seed, networks.device)


def names_of(cfg: Config, which: str) -> set[str]:
    """Names of the methods of a run: those to compare and those to choose from."""
    chosen = choice.METHODS if cfg.detector.detector == "auto" else (cfg.detector.detector,)
    return {"dxmi", *BASELINES[which], *chosen}


def chosen(
    cfg: Config, methods: Mapping[str, Method], validation: Validation | None
) -> tuple[str, dict[str, Verdict]]:
    """The method that scores new images, and the verdict on every method.

    Args:
        validation: good data and synthetic defects; None: the settings name the detector, without verdicts.
    """
    verdicts: dict[str, Verdict] = {}
    judging = runlog.each("choice of the detector", methods.items()) if validation is not None else ()
    for name, (prepares, detector) in judging:

        def judged(prepares: nn.Module = prepares, detector: Detector = detector) -> Verdict:
            assert validation is not None
            return judge(detector, prepares, validation, top_share=cfg.thresholds.top_share)

        if (verdict := final.attempt(_titles(cfg)[name], judged)) is not None:
            verdicts[name] = verdict
    if cfg.detector.detector != "auto":
        return cfg.detector.detector, verdicts
    candidates = {name: verdicts[name] for name in choice.METHODS if name in verdicts}
    return (choice.simplest(candidates) if candidates else "dxmi"), verdicts


def calibrate(cfg: Config, method: Method, good: Good) -> dict[str, float]:
    """Thresholds for the scores of a method, from the held-out data."""
    size = None if cfg.features.backbone is None else cfg.features.size
    held_out = prepared(good.held_out, method.preparation)
    quantiles = cfg.thresholds.quantile, cfg.thresholds.pixel_quantile
    return comparison.calibrate(
        method.detector, held_out, size, *quantiles, top_share=cfg.thresholds.top_share
    )


def numbers_of(
    cfg: Config,
    methods: Mapping[str, Method],
    detector: str,
    tested: Examined,
    backbone: Extractor | None,
    thresholds: dict[str, float],
) -> tuple[dict[str, Any], Tensor | None, dict[str, np.ndarray]]:
    """Metrics of all methods, score maps of the detector, and scores of images by method; metrics that could
    not be computed are noted.

    Args:
        detector: name of the method that scores new images.
    """
    if not len(tested.maps):
        print("there are no test data: no metrics are computed")
        return thresholds, None, {}
    numbers, notes, maps, scores = comparison.compare(
        methods, detector, tested, backbone, thresholds["threshold"], top_share=cfg.thresholds.top_share
    )
    for note in notes:
        runlog.note(note)
    aurocs = {name: "image_auroc" if name == detector else f"{name}_image_auroc" for name in methods}
    found = {name: numbers[key] for name, key in aurocs.items() if key in numbers}
    return {**thresholds, **numbers, "baselines": found, **about(methods, detector)}, maps, scores


def about(methods: Mapping[str, Method], detector: str) -> dict[str, Any]:
    """The names of the detector, of its preparation and of the preparations of all methods."""
    names = {name: getattr(method.preparation, "name", "unit") for name, method in methods.items()}
    return {"detector": detector, "preparation": names[detector], "preparations": names}


def explanation(cfg: Config, numbers: Mapping[str, Any], verdicts: Mapping[str, Verdict]) -> str:
    """A line with the detector that scores new images and the AUROCs that decided the choice."""
    name, titles = numbers["detector"], _titles(cfg)
    line = f"detector: {titles[name]}, {numbers['preparation']} features"
    line += f", patch={numbers['patch']}" if "patch" in numbers else ""
    line += "" if cfg.detector.detector == "auto" else f", set by detector={name}"
    if not verdicts:
        return line
    best = ", ".join(f"{titles[key]} {verdict.auroc:.3f}" for key, verdict in verdicts.items())
    return f"{line}; AUROC on synthetic defects in held-out good data: {best}"


def judged_numbers(
    verdicts: Mapping[str, Verdict], before: Mapping[str, Mapping[str, float]], detector: str
) -> dict[str, Any]:
    """AUROC on synthetic defects by method, as ``validation`` and, prefixed as other metrics are, as
    ``synthetic_auroc``.

    Args:
        before: AUROC by preparation, for methods whose preparation was chosen.
    """
    final = {name: {**before.get(name, {}), "final": verdict.auroc} for name, verdict in verdicts.items()}
    prefixes = {name: "" if name == detector else f"{name}_" for name in verdicts}
    flat = {f"{prefixes[name]}synthetic_auroc": verdict.auroc for name, verdict in verdicts.items()}
    return {"validation": {**before, **final}, **flat}


def save_scores(path: Path, scores: Mapping[str, np.ndarray], tested: Examined) -> None:
    """Writes the scores of each method on the test data, in order, and whether the data are anomalous."""
    with files.file(path) as file:
        np.savez_compressed(file, anomalous=tested.anomalous, **scores)  # type: ignore[arg-type]


def picture_of(networks: Networks, tested: Examined) -> Callable[[IO[bytes]], None] | None:
    """A function that draws heat maps of a few defective images during training; None if there are none."""
    assert isinstance(networks, AnomalyNetworks)
    few = tested.at(_shown(tested))
    if few.images is None or not len(few.maps):
        return None
    maps, device = prepared(few.maps, networks.preparation), networks.device

    def draw(file: IO[bytes]) -> None:
        heatmaps(file, EnergyDetector(networks.energy_network, device=device).score(maps), few, None)

    return draw


def heatmaps(path: IO[bytes] | Path, scores: Tensor, tested: Examined, threshold: float | None) -> None:
    """Draws heat maps of a few defective images, if there are any."""
    rows = _shown(tested)
    few = tested.at(rows)
    if few.images is None or not len(rows):
        return
    height, width = few.images.shape[2:]
    heat = localize(scores[torch.from_numpy(rows)], (height, width))
    masks = None if few.masks is None else torch.from_numpy(few.masks)
    plots.heatmaps(path, torch.from_numpy(few.images), heat, masks, threshold=threshold)


def _shown(tested: Examined) -> np.ndarray:
    """Indices of evenly spaced defective images, int64."""
    rows = np.flatnonzero(tested.anomalous)
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).round().astype(int))]
