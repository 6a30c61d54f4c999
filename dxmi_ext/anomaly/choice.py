"""The choice of preparation, patch and detector by synthetic defects, never by a test set.

Detectors are compared by their AUROC on held-out good images or rows against the same with synthetic
defects. The best preparation is chosen (for rows, whitening unless another is clearly better), then the patch
that is best for images and pixels together, and the simplest detector that is not clearly worse than the
best. Imports torch, numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dxmi_ext.anomaly.detectors import bases
from dxmi_ext.anomaly.detectors.common import Detector
from dxmi_ext.anomaly.detectors.gaussians import Gaussians
from dxmi_ext.anomaly.detectors.plain import GaussianPositions, NearestNeighbors
from dxmi_ext.anomaly.features.collection import Good
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.features.preparation import PREPARATIONS, make, prepared
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.anomaly.validation import Validation, Verdict, judge
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.output.runlog import write_json
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.storage import files
from dxmi_ext.images.metrics.features import Extractor

METHODS = ("gaussian", "knn", "gaussians", "autoencoder", "dxmi")
"""Detectors to choose from, simplest first."""
NETWORKS = METHODS[-2:]
"""Methods that are networks; every run has them, trained or not."""
_LEADING = METHODS[:2]  # plain detectors that decide on the patch, and whose preparation networks may take
PATCHES = (1, 3, 5, 9)
"""Sides of the neighborhood to choose from."""
_USUAL = 5  # the patch with which preparations are compared if it is chosen too
_KEPT = 10_000  # positions, up to which no coreset is needed
_CLEARLY = 3  # standard errors
_FILE = "choice.json"

Choice = dict[str, Any]
"""``preparations`` {method: name}, ``patch``, ``validation`` {method: {preparation: AUROC}} and, if the patch
was chosen, ``patches`` {method: {patch: [AUROC of images, of pixels]}}."""


def trained(cfg: Config) -> tuple[str, ...]:
    """The networks that a run trains: those of its detector, or all if it trains baselines too."""
    if cfg.comparison.baselines in ("tau0", "all") or cfg.detector.detector in ("auto", "dxmi"):
        return NETWORKS
    return tuple(name for name in NETWORKS if name == cfg.detector.detector)


def _best(verdicts: Mapping[str, Verdict], usual: str | None = None) -> str:
    """The name with the highest AUROC, but ``usual`` unless the highest is clearly better."""
    best = max(verdicts, key=lambda name: verdicts[name].auroc)
    if usual is None or usual not in verdicts:
        return best
    a, b = verdicts[best], verdicts[usual]
    return best if a.auroc - b.auroc > _CLEARLY * _standard_error(a.influence - b.influence) else usual


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


def choose(run: Run, cfg: Config, good: Good, backbone: Extractor | None) -> Choice:
    """The preparation of each method: from the settings, or the best on synthetic defects.

    A run that resumes keeps its choice, and all ranks use the choice of the first.
    """
    path, choice = run.directory / _FILE, Choice()
    if run.ranks.first:
        if run.resumed_from:
            # Older runs, without a choice of preparations, have whitened features.
            older = _all(cfg, "whitened") | {"patch": cfg.features.patch or _USUAL}
            choice = older | files.read_json(path)
        else:
            choice = choose_preparations(cfg, good, backbone, run.device)
            if not cfg.run.dry_run:
                write_json(path, choice)
    return Choice(run.ranks.agree(choice))


def fitted(cfg: Config) -> tuple[str, ...]:
    """The plain detectors: a vector has one position, for which local and pooled Gaussians are the same."""
    return METHODS[:3] if cfg.features.backbone is not None else METHODS[:2]


def settled(cfg: Config, patch: int | None) -> Config:
    """The settings with the chosen patch where they leave it open."""
    return cfg if cfg.features.patch is not None else cfg.replace(patch=patch or _USUAL)


def choose_preparations(cfg: Config, good: Good, backbone: Extractor | None, device: torch.device) -> Choice:
    """The same without a run; the choice depends only on the settings and the data."""
    given, patch = cfg.features.preparation, cfg.features.patch
    if given != "auto" and patch is not None:
        return _all(cfg, given) | {"patch": patch}
    validation, methods = Validation.of(good, backbone, cfg.run.seed, device), fitted(cfg)
    tries_patches = patch is None and good.train.shape[1:3] != (1, 1)
    total = len(PREPARATIONS) * len(methods) if given == "auto" else 0
    total += len(PATCHES) * len(_LEADING) if tries_patches else 0
    with runlog.Progress("choice of features", total, 0, enabled=True) as bar:
        trials = Trials(cfg, good, validation, device, bar)
        return _chosen(cfg, trials, methods, tries_patches)


def _chosen(cfg: Config, trials: Trials, methods: tuple[str, ...], tries_patches: bool) -> Choice:
    given, patch = cfg.features.preparation, cfg.features.patch
    choice = _all(cfg, given) | {"patch": patch or _USUAL}
    if given == "auto":
        verdicts = {name: trials.of(name, choice["patch"], methods) for name in PREPARATIONS}
        chosen = choice["preparations"]
        # Where the columns of a table are independent, synthetic defects of rows look like good rows.
        usual = "whitened" if cfg.features.backbone is None else None
        for method in methods:
            found = {name: each[method] for name, each in verdicts.items() if method in each}
            chosen[method] = _best(found, usual) if found else PREPARATIONS[0]
            choice["validation"][method] = {name: round(v.auroc, 4) for name, v in found.items()}
        chosen["autoencoder"] = chosen[_leads(cfg)]
    if tries_patches:
        choice |= _choose_patch(trials, choice["preparations"])
    return choice


def _choose_patch(trials: Trials, preparations: Mapping[str, str]) -> Choice:
    """The patch with the highest sum of the AUROCs of images and pixels, of the plain detectors together; the
    usual patch if none has all of these."""
    found: dict[str, dict[str, list[float]]] = {method: {} for method in _LEADING}
    totals = dict.fromkeys(PATCHES, 0.0)
    for patch in PATCHES:
        for method in _LEADING:
            verdict = trials.of(preparations[method], patch, (method,)).get(method)
            if verdict is None or math.isnan(verdict.auroc + verdict.pixel_auroc):
                totals[patch] = -math.inf
                continue
            totals[patch] += verdict.auroc + verdict.pixel_auroc
            found[method][str(patch)] = [round(verdict.auroc, 4), round(verdict.pixel_auroc, 4)]
    best = max(PATCHES, key=lambda patch: totals[patch])
    return {"patch": best if totals[best] > -math.inf else _USUAL, "patches": found}


class Trials:
    """Plain detectors fitted to the good data, and their verdicts, each computed once.

    Args:
        validation: good data and synthetic defects.
        bar: progress bar, which advances by one for each requested verdict.
    """

    def __init__(
        self, cfg: Config, good: Good, validation: Validation, device: torch.device, bar: runlog.Progress
    ) -> None:
        self.cfg, self.good, self.validation, self.device, self.bar = cfg, good, validation, device, bar
        self._known: dict[tuple[str, str, int], Verdict | None] = {}

    def of(self, preparation: str, patch: int, methods: Sequence[str]) -> dict[str, Verdict]:
        """The verdicts on methods by name, without those that cannot be fitted."""
        missing = [name for name in methods if (name, preparation, patch) not in self._known]
        if missing:
            shape, aligned = self.good.train.shape[1:], self.cfg.features.aligned
            prepares = make(preparation, shape, patch=patch, aligned=aligned)
            prepares.to(self.device).fit(self.good.train)
            maps = prepared(self.good.train, prepares)
            for name in missing:
                what = f"{name} of {preparation} features with patch={patch}"
                judged = functools.partial(self._judged, name, prepares, maps)
                self._known[name, preparation, patch] = final.attempt(what, judged)
        self.bar.update(len(methods))
        found = {name: self._known[name, preparation, patch] for name in methods}
        return {name: verdict for name, verdict in found.items() if verdict is not None}

    def _judged(self, method: str, prepares: nn.Module, maps: FeatureMaps) -> Verdict:
        seed = self.cfg.run.seed
        detector: Detector = Gaussians(seed=seed, device=self.device)
        if method == "gaussian":
            detector = gaussian(seed, self.device)
        elif method == "knn":  # a greedy coreset is slow
            detector = nearest_neighbors(len(maps.rows), seed, self.device, coreset="random")
        detector.fit(maps)
        return judge(detector, prepares, self.validation, top_share=self.cfg.thresholds.top_share)


def _leads(cfg: Config) -> str:
    """The method whose preparation the autoencoder and DxMI use, because trials of theirs would be slow."""
    return next((name for name in bases.names_of(cfg.networks.base) if name in _LEADING), "knn")


def _all(cfg: Config, name: str) -> Choice:
    """The same preparation for every method, without trials."""
    return {"preparations": dict.fromkeys((*fitted(cfg), "autoencoder"), name), "validation": {}}


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
    """Notes which preparations were chosen, with the AUROC of each candidate, for methods that have any."""
    for method, found in choice["validation"].items():
        if not found:
            continue
        also = ", and for the autoencoder and DxMI" if trained(cfg) and method == _leads(cfg) else ""
        shown = ", ".join(f"{name} {auroc:.3f}" for name, auroc in found.items())
        name = choice["preparations"][method]
        runlog.note(f"{name} features for {method}{also}; AUROC on synthetic defects: {shown}")
    for method, tried in choice.get("patches", {}).items():
        if not tried:
            continue
        shown = ", ".join(f"{patch}: {image:.3f} / {pixel:.3f}" for patch, (image, pixel) in tried.items())
        what = f"AUROC of images / pixels with synthetic defects by patch, {method}"
        runlog.note(f"patch={choice['patch']}; {what}: {shown}")
