"""The choice of preparation and detector by synthetic defects, never by a test set.

Detectors are compared by their AUROC on held-out good images or rows against the same with synthetic
defects. The best preparation is chosen, and the simplest detector that is not clearly worse than the best.
Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext.anomaly import bases, features, preparation, synthetic
from dxmi_ext.anomaly.collection import Good
from dxmi_ext.anomaly.dataset import AnomalyData
from dxmi_ext.anomaly.detectors import Detector, GaussianPositions, NearestNeighbors
from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.patchcore import image_scores
from dxmi_ext.anomaly.preparation import PREPARATIONS, prepared
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine import files, final, runlog
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runlog import write_json
from dxmi_ext.images.features import Extractor

METHODS = ("gaussian", "knn", "autoencoder", "dxmi")
"""Detectors to choose from, simplest first."""
NETWORKS = METHODS[2:]
"""Methods that are networks; every run has them, trained or not."""
_FITTED = METHODS[:2]  # with every preparation
_KEPT = 10_000  # positions, up to which no coreset is needed
_ENOUGH = 200  # held-out images or rows, which are used again with each kind of defect
_FILE = "choice.json"

Choice = dict[str, Any]
"""``preparations`` {method: name}, ``validation`` {method: {preparation: AUROC}}."""


def trained(cfg: Config) -> tuple[str, ...]:
    """The networks that a run trains: those of its detector, or all if it trains baselines too."""
    if cfg.comparison.baselines in ("tau0", "all") or cfg.detector.detector in ("auto", "dxmi"):
        return NETWORKS
    return tuple(name for name in NETWORKS if name == cfg.detector.detector)


class Validation(NamedTuple):
    """Features, before any preparation, of good data and of the same data with defects."""

    good: np.ndarray
    """[k, h, w, C]"""
    odd: np.ndarray
    """[kinds * k, h, w, C]: the same with defects, kind by kind."""

    @classmethod
    def of(cls, good: Good, backbone: Extractor | None, seed: int, device: torch.device) -> Validation:
        """Made from the held-out data, or from an evenly spaced subset of it."""
        count = len(good.held_out)
        rows = np.unique(np.linspace(0, count - 1, min(_ENOUGH, count)).round().astype(int))
        if backbone is None:
            mean = good.train[:, 0, 0].mean(0)
            odd = synthetic.odd_rows(good.held_out[rows, 0, 0], mean, seed=seed)
            return cls(good.held_out[rows], odd.reshape(-1, 1, 1, odd.shape[2]))
        assert good.held_out_images is not None
        images = synthetic.defective(good.held_out_images[rows], seed=seed)
        images = images.reshape(-1, *images.shape[2:])
        data = AnomalyData(images, np.ones(len(images), np.int64))
        return cls(good.held_out[rows], features.computed(data, backbone, device))


class Verdict(NamedTuple):
    """How well a detector separates good data from defects."""

    auroc: float
    """The mean over kinds of defects."""
    influence: np.ndarray
    """float64 [k]: contribution of each held-out image, without and with defects; the standard deviation
    divided by sqrt(k) is the standard error of the AUROC (DeLong et al. 1988, with images as clusters)."""


def judged(good: Tensor, odd: Tensor) -> Verdict:
    """The verdict on scores of good data [k] and of the same with defects [kinds * k]."""
    a, b = good.double().numpy(), odd.double().numpy().reshape(-1, len(good))
    higher = (b[:, :, None] > a) + 0.5 * (b[:, :, None] == a)  # [kinds, k with a defect, k good]
    influence = higher.mean((0, 1)) + higher.mean((0, 2))
    return Verdict(float(higher.mean()), influence)


def _best(verdicts: Mapping[str, Verdict]) -> str:
    return max(verdicts, key=lambda name: verdicts[name].auroc)


def simplest(verdicts: Mapping[str, Verdict]) -> str:
    """The first name that is not worse than the best by more than the standard error of the difference.

    Args:
        verdicts: verdicts by name, simplest first.
    """
    best = max(verdicts.values(), key=lambda verdict: verdict.auroc)
    return next(
        name
        for name, verdict in verdicts.items()
        if best.auroc - verdict.auroc <= _standard_error(best.influence - verdict.influence)
    )


def _standard_error(influence: np.ndarray) -> float:
    if len(influence) < 2:
        return math.inf
    return float(influence.std(ddof=1)) / math.sqrt(len(influence))


def judge(
    detector: Detector, preparation: nn.Module, validation: Validation, *, top_share: float = 0.0
) -> Verdict:
    """The verdict on a fitted or trained detector."""
    scores = []
    for features_ in validation:
        maps = prepared(features_, preparation)
        scores.append(image_scores(detector, maps, detector.score(maps), top_share=top_share))
    return judged(*scores)


def choose(run: Run, cfg: Config, good: Good, backbone: Extractor | None) -> Choice:
    """The preparation of each method: from the settings, or the best on synthetic defects.

    A run that resumes keeps its choice, and all ranks use the choice of the first.
    """
    path, choice = run.directory / _FILE, Choice()
    if run.ranks.first:
        if run.resumed_from:
            # Older runs, without a choice of preparations, have whitened features.
            choice = files.read_json(path) or _all("whitened")
        else:
            choice = choose_preparations(cfg, good, backbone, run.device)
            if not cfg.run.dry_run:
                write_json(path, choice)
    return Choice(run.ranks.agree(choice))


def choose_preparations(cfg: Config, good: Good, backbone: Extractor | None, device: torch.device) -> Choice:
    """The same without a run; the choice depends only on the settings and the data."""
    if (given := cfg.features.preparation) != "auto":
        return _all(given)
    validation = Validation.of(good, backbone, cfg.run.seed, device)
    verdicts: dict[str, dict[str, Verdict]] = {method: {} for method in _FITTED}
    for name in PREPARATIONS:
        prepares = preparation.make(name, good.train.shape[1:], **cfg.features.neighborhood).to(device)
        prepares.fit(good.train)
        maps = prepared(good.train, prepares)
        trials: dict[str, Detector] = {
            "gaussian": gaussian(cfg.run.seed, device),
            "knn": nearest_neighbors(
                len(maps.rows), cfg.run.seed, device, coreset="random"
            ),  # greedy is slow
        }
        for method, detector in trials.items():

            def tried(detector: Detector = detector, maps: FeatureMaps = maps) -> Verdict:
                detector.fit(maps)
                return judge(detector, prepares, validation, top_share=cfg.thresholds.top_share)  # noqa: B023

            if (verdict := final.attempt(f"{method} of {name} features", tried)) is not None:
                verdicts[method][name] = verdict
    chosen = {method: _best(found) if found else PREPARATIONS[0] for method, found in verdicts.items()}
    chosen["autoencoder"] = chosen[_leads(cfg)]
    numbers = {m: {name: round(v.auroc, 4) for name, v in found.items()} for m, found in verdicts.items()}
    return {"preparations": chosen, "validation": numbers}


def _leads(cfg: Config) -> str:
    """The method whose preparation the autoencoder and DxMI use, because trials of theirs would be slow."""
    return next((name for name in bases.names_of(cfg.networks.base) if name in _FITTED), "knn")


def _all(name: str) -> Choice:
    """The same preparation for every method, without trials."""
    return {"preparations": dict.fromkeys((*_FITTED, "autoencoder"), name), "validation": {}}


def nearest_neighbors(
    rows: int, seed: int, device: torch.device, *, coreset: str = "greedy"
) -> NearestNeighbors:
    """A nearest-neighbor detector that keeps 1 % of the positions, as PatchCore does, but at least 2,000 and
    at most 20,000. It keeps all of up to 10,000 positions, for which the search is as fast."""
    share = 1.0 if rows <= _KEPT else min(max(0.01, 2000 / rows), 20_000 / rows)
    return NearestNeighbors(share=share, coreset=coreset, seed=seed, device=device)


def gaussian(seed: int, device: torch.device) -> GaussianPositions:
    return GaussianPositions(dims=None, shrinkage=0.3, seed=seed, device=device)


def announce(cfg: Config, choice: Choice) -> None:
    """Notes which preparations were chosen, with the AUROC of each candidate."""
    for method, found in choice["validation"].items():
        also = ", and for the autoencoder and DxMI" if trained(cfg) and method == _leads(cfg) else ""
        shown = ", ".join(f"{name} {auroc:.3f}" for name, auroc in found.items())
        name = choice["preparations"][method]
        runlog.note(f"{name} features for {method}{also}; AUROC on synthetic defects: {shown}")
