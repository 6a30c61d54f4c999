"""Anomaly detection: the features of good pictures, or vectors, are learned; what has a high energy is odd.

An autoencoder is pretrained on reconstruction; its error is the energy that DxMI trains further, beside a
sampler that starts from data perturbed in the autoencoder's latent space (DxMI, sec. 5.3). Thresholds come
from good pictures that nothing learned from. Imports torch and ``dxmi_ext``; backbones and matplotlib where
they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.anomaly import overview
from dxmi_ext.anomaly.collection import Examined, Good
from dxmi_ext.anomaly.evaluation import BASELINES, TRAINED, announce, calibrate, heatmaps, numbers_of, table
from dxmi_ext.anomaly.learning import Phases, learn, pretrain_autoencoder
from dxmi_ext.anomaly.model import AnomalyNetworks, build, fitted, load_model, save
from dxmi_ext.anomaly.preparation import prepared
from dxmi_ext.anomaly.scoring import Scorer, VectorScorer
from dxmi_ext.anomaly.settings import Config, EvaluateSettings
from dxmi_ext.anomaly.sources import (
    backbone_of,
    classes_of,
    columns_of,
    fingerprints,
    has_moved,
    path_of,
    source_of,
)
from dxmi_ext.engine import final
from dxmi_ext.engine.execution import check_graph
from dxmi_ext.engine.plots import curves
from dxmi_ext.engine.ranks import Ranks
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.samples import Batch
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.features import Extractor
from dxmi_ext.images.overview import Overview
from dxmi_ext.images.pixels import NOMINAL, Scale
from dxmi_ext.method import generate, noise

_TRIED = 8  # pictures of a dry run


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to its end and returns the summary, on the first rank."""
    run = Run(cfg, ranks, fingerprints(cfg))
    if run.finished():
        return {}
    with run:
        backbone, good, tested, networks = _prepare(run, cfg)
        maps = prepared(good.train, networks.preparation)
        averaged = learn(run, cfg, maps, networks, tested)
        if cfg.run.dry_run or not run.ranks.first:
            return {}
        thresholds = calibrate(cfg, averaged, good)
        save(run.directory / "model", averaged, cfg, backbone, good, tested, thresholds)
        numbers, scores = numbers_of(
            cfg, averaged, cfg.comparison.baselines, maps, tested, backbone, thresholds, cfg.run.seed
        )
        folder, threshold = run.directory, thresholds["pixel_threshold"]
        final.attempt("curves.png", lambda: curves(folder / "curves.png", folder / "metrics.jsonl"))
        if scores is not None:
            heat = scores
            final.attempt("heatmaps.png", lambda: heatmaps(folder / "heatmaps.png", heat, tested, threshold))
        summary = run.summarize(numbers)
    print(table(cfg, numbers))
    print(f"{run.directory}: summary.json, model/, pictures; {summary['wall_seconds']} s")
    return summary


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the autoencoder's pretraining alone; training with the same output goes on from it."""
    if not cfg.run.pretrained:
        raise ConfigError("pretrained: got false, but pretraining alone was asked for")
    run = Run(cfg, ranks, fingerprints(cfg))
    if run.finished():
        return
    with run:
        backbone, good, tested, networks = _prepare(run, cfg)
        if "pretrain" in run.past:
            print(f"{run.directory} is past its pretraining; nothing to do")
            return
        pretrain_autoencoder(run, cfg, prepared(good.train, networks.preparation), networks)
        if cfg.run.dry_run or not run.ranks.first:
            return
        thresholds = calibrate(cfg, networks, good)
        save(run.directory / "model", networks, cfg, backbone, good, tested, thresholds)
        print(f"{run.directory}: pretrained; `dxmi train` with output={run.directory} goes on from here")


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[Batch]:
    """Samples [m, C] of a run's final sampler, unit vectors but for the last step's noise, as
    `generate.batches`. They start from training data, of a row that (seed, i) chooses."""
    cfg, networks, about = load_model(directory, device)
    good = source_of(cfg, backbone_of(cfg, device, about), device, about=about).good(cfg.source.holdout)
    data = prepared(good.train, networks.preparation).rows
    key = noise.Draws(seed, "starts of samples", ["row"], device).at(0)["row"]

    def start(first: int, count: int) -> Tensor:
        chosen = noise.randint(len(data), count, key, sample_offset=first).cpu().numpy()
        return torch.from_numpy(data[chosen].astype(np.float32)).to(device)

    return generate.batches(networks, rows, seed, batch_size=batch_size, start=start, **options)


def evaluate(
    directory: Path, settings: EvaluateSettings, device: torch.device
) -> tuple[dict[str, float], str]:
    """The numbers of a run's final networks and their table, on its own test data or on others."""
    cfg, networks, about = load_model(directory, device)
    backbone, which = backbone_of(cfg, device, about), settings.baselines or cfg.comparison.baselines
    good, others = None, settings.data
    if others is not None and has_moved(cfg, directory, others, needed=which != "none"):
        cfg, others = cfg.replace(data=others), None
    if which != "none":
        source = source_of(cfg, backbone, device, about=about)
        good = prepared(source.good(cfg.source.holdout).train, networks.preparation)
    tested = source_of(cfg, backbone, device, data=others, about=about).tested()
    numbers, _ = numbers_of(cfg, networks, which, good, tested, backbone, about["thresholds"], settings.seed)
    return numbers, table(cfg, numbers)


def load(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks]:
    """A run's settings and final networks.

    Raises:
        checkpoint.CheckpointError: there are none, or they are damaged.
    """
    cfg, networks, _ = load_model(directory, device)
    return cfg, networks


def load_scorer(directory: Path, device: torch.device) -> Scorer | VectorScorer:
    """What scores new pictures, or vectors: a run's backbone, energy and thresholds.

    Raises:
        checkpoint.CheckpointError: there are no networks, or they are damaged.
        FeatureError: the backbone's weights are missing, or others than the run's.
    """
    cfg, networks, about = load_model(directory, device)
    backbone = backbone_of(cfg, device, about)
    if backbone is None:
        threshold, preparation = about["thresholds"]["threshold"], networks.preparation
        return VectorScorer(networks.energy_network, preparation, columns_of(about), threshold=threshold)
    return _scorer(cfg, networks, backbone, about["thresholds"], Scale.of(about.get("scale")))


def new_scorer(cfg: Config) -> Scorer:
    """A scorer that has learned nothing yet, of the shape of one that `fit` returns; on the CPU.

    Raises:
        ConfigError: the settings are of vectors.
        FeatureError: the backbone's weights are missing.
    """
    backbone = backbone_of(cfg, torch.device("cpu"))
    if backbone is None:
        raise ConfigError("backbone must be a network, got null, which is for vectors")
    channels, height, width = backbone(
        torch.zeros(1, 3, cfg.features.size, cfg.features.size, dtype=torch.uint8)
    ).shape[1:]
    networks = build(cfg, (height, width, channels), ())
    return _scorer(cfg, networks, backbone, {"threshold": 0.0, "pixel_threshold": 1.0})


def fit(phases: Phases, cfg: Config, good: Good, backbone: Extractor) -> Scorer:
    """What `train` learns from the features of good pictures, without baselines and without a folder.

    Args:
        phases: where and how it learns.
        cfg: settings of pictures.
        good: features by the backbone, as ``anomaly.collection.Pictures`` gives them.
    """
    networks = fitted(cfg, good, (), phases.device)
    averaged = learn(phases, cfg, prepared(good.train, networks.preparation), networks)
    return _scorer(cfg, averaged, backbone, calibrate(cfg, averaged, good))


def _scorer(
    cfg: Config,
    networks: AnomalyNetworks,
    backbone: Extractor,
    thresholds: dict[str, float],
    scale: Scale = NOMINAL,
) -> Scorer:
    return Scorer(
        backbone,
        networks.energy_network,
        preparation=networks.preparation,
        threshold=thresholds["threshold"],
        pixel_threshold=thresholds["pixel_threshold"],
        top_share=cfg.thresholds.top_share,
        scale=scale,
    )


def read(cfg: Config) -> Overview:
    """What the settings' data are, told before they are decoded.

    Raises:
        ConfigError: there are none.
        ImageDataError, VectorDataError: they cannot be read.
    """
    path = path_of(cfg)
    if cfg.features.backbone is None:
        return overview.of_vectors(path, cfg.source.train_share, cfg.run.seed)
    return overview.of_anomalies(path, classes_of(cfg), cfg.source.train_share)


def _prepare(run: Run, cfg: Config) -> tuple[Extractor | None, Good, Examined, AnomalyNetworks]:
    """Backbone, features and networks. What is missing shows here, not after hours."""
    check_graph(cfg.execution, run.device, run.ranks)
    backbone = backbone_of(cfg, run.device)
    if run.ranks.first:
        print(read(cfg).lines())
    source = source_of(cfg, backbone, run.device, few=_TRIED if cfg.run.dry_run else None)
    good, tested = source.good(cfg.source.holdout), source.tested()
    if run.ranks.first:
        print(f"{len(good.train)} good train, {len(good.held_out)} are held out for the thresholds; tested: "
              f"{len(tested.maps)}, {int(tested.anomalous.sum())} of them defective")  # fmt: skip
        if good.columns is not None and good.columns.constants:
            print(
                f"dropped: {good.columns.told()}, constant in the good rows to train on; a row that differs "
                "there is anomalous"
            )
        announce(tested)
    names = [name for name in BASELINES[cfg.comparison.baselines] if name in TRAINED]
    networks = fitted(cfg, good, names, run.device)
    run.describe(networks)
    return backbone, good, tested, networks
