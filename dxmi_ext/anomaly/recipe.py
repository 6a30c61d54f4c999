"""Anomaly detection: an energy of features of good images, or of good vectors, scores deviations from them.

An autoencoder is pretrained on reconstruction; its error is the energy that DxMI trains further, together
with a sampler that starts from data perturbed in the autoencoder's latent space (DxMI, sec. 5.3). Thresholds
come from held-out good images. Imports torch and ``dxmi_ext``; backbones and matplotlib where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.anomaly import choice
from dxmi_ext.anomaly.choice import Choice
from dxmi_ext.anomaly.comparison import TITLES, Method
from dxmi_ext.anomaly.curve import Curve, measure_of
from dxmi_ext.anomaly.data import overview
from dxmi_ext.anomaly.detectors import bases, gaussians
from dxmi_ext.anomaly.detectors.common import MapDetector
from dxmi_ext.anomaly.evaluation import (
    BASELINES,
    TRAINED,
    about,
    announce,
    calibrate,
    chosen,
    explanation,
    heatmaps,
    judged_numbers,
    methods_of,
    names_of,
    numbers_of,
    save_scores,
    table,
)
from dxmi_ext.anomaly.features.collection import Examined, Good
from dxmi_ext.anomaly.features.preparation import PREPARATIONS, prepared
from dxmi_ext.anomaly.learning import Phases, learn, pretrain_autoencoder
from dxmi_ext.anomaly.model import AnomalyNetworks, build, fitted, load_model, save
from dxmi_ext.anomaly.scores import scoring
from dxmi_ext.anomaly.scores.scoring import Scorer, VectorScorer
from dxmi_ext.anomaly.settings import Config, EvaluateSettings
from dxmi_ext.anomaly.sources import (
    backbone_of,
    check_own,
    classes_of,
    columns_of,
    fingerprints,
    holds_own,
    path_of,
    source_of,
)
from dxmi_ext.anomaly.validation import Validation, Verdict
from dxmi_ext.engine import course
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.course import Finish
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.output.plots import curves
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data.overview import Overview
from dxmi_ext.images.data.pixels import NOMINAL, Scale
from dxmi_ext.images.metrics.features import Extractor
from dxmi_ext.method import generate, noise

SAMPLES = "feature vectors"
"""What samples are."""
_TRIED = 8  # images per split of a dry run
_ENOUGH = 20  # good rows


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to the end and returns the summary on the first rank."""
    run = Run(cfg, ranks, fingerprints(cfg))

    def learned() -> Finish:
        backbone, good, tested, networks, judged = _prepare(run, cfg)
        curve = _curve(run, cfg, tested, networks)
        averaged = learn(run, cfg, prepared(good.train, networks.preparation), networks, tested, curve)
        return lambda: finish(backbone, good, tested, averaged, judged, curve)

    def finish(
        backbone: Extractor | None,
        good: Good,
        tested: Examined,
        averaged: AnomalyNetworks,
        judged: Choice,
        curve: Curve | None,
    ) -> tuple[dict[str, Any], str]:
        methods = methods_of(cfg, averaged, names_of(cfg, cfg.comparison.baselines), good.train)
        detector, verdicts = _ship(cfg, averaged, methods, good, backbone)
        thresholds = calibrate(cfg, methods[detector], good)
        save(run.directory / "model", averaged, cfg, backbone, good, tested, thresholds, detector)
        numbers, heat, scores = numbers_of(cfg, methods, detector, tested, backbone, thresholds)
        numbers |= about(methods, detector) | {"trained": [*averaged.baselines, *averaged.trained]}
        numbers |= judged_numbers(verdicts, judged["validation"], detector)
        if backbone is not None:
            numbers |= {key: judged[key] for key in ("patch", "patches") if key in judged}
        numbers |= {} if curve is None else curve.numbers()
        folder, threshold = run.directory, thresholds["pixel_threshold"]
        if averaged.trained:
            final.attempt("curves.png", lambda: curves(folder / "curves.png", folder / "metrics.jsonl"))
        if heat is not None:
            maps = heat
            save_scores(folder / "test_scores.npz", scores, tested)
            final.attempt("heatmaps.png", lambda: heatmaps(folder / "heatmaps.png", maps, tested, threshold))
        return numbers, f"{table(cfg, numbers, detector)}\n{explanation(cfg, numbers, verdicts)}"

    return course.train(run, learned, "plots", cfg.execution)


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs only the pretraining of the autoencoder; training with the same output resumes after it."""
    if not cfg.run.pretrained:
        raise ConfigError("pretrained must be true for pretraining, got false")
    if not choice.trained(cfg):
        raise ConfigError(
            f"detector must be auto, dxmi or autoencoder for pretraining, got {cfg.detector.detector}"
        )
    run = Run(cfg, ranks, fingerprints(cfg))

    def learned() -> Callable[[], None]:
        backbone, good, tested, networks, _ = _prepare(run, cfg)
        pretrain_autoencoder(run, cfg, prepared(good.train, networks.preparation), networks)
        return lambda: save_pretrained(backbone, good, tested, networks)

    def save_pretrained(
        backbone: Extractor | None, good: Good, tested: Examined, networks: AnomalyNetworks
    ) -> None:
        networks.trained = choice.NETWORKS  # DxMI's energy before training
        thresholds = calibrate(cfg, methods_of(cfg, networks, ["dxmi"], None)["dxmi"], good)
        save(run.directory / "model", networks, cfg, backbone, good, tested, thresholds, "dxmi")

    text = "pretrained; `dxmi train` with output={directory} resumes here"
    course.pretrain(run, learned, text, cfg.execution)


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[Batch]:
    """Samples [m, C] from a run's final sampler, unit vectors up to the noise of the last step; see
    `generate.batches`. Sample i starts from a training row drawn from (seed, i)."""
    cfg, networks, model = load_model(directory, device)
    if "dxmi" not in networks.trained:
        raise ConfigError(
            f"{directory} must have a trained sampler, got a run with detector={cfg.detector.detector}, "
            "which trains none"
        )
    good = source_of(cfg, backbone_of(cfg, device, model), device, about=model).good(cfg.source.holdout)
    data = prepared(good.train, networks.preparation).rows
    key = noise.Draws(seed, "starts of samples", ["row"], device).at(0)["row"]

    def start(first: int, count: int) -> Tensor:
        chosen = noise.randint(len(data), count, key, sample_offset=first).cpu().numpy()
        return torch.from_numpy(data[chosen].astype(np.float32)).to(device)

    return generate.batches(networks, rows, seed, batch_size=batch_size, start=start, **options)


def evaluate(directory: Path, settings: EvaluateSettings, device: torch.device) -> tuple[dict[str, Any], str]:
    """Metrics of a run's final networks and their table, on its own test data or on other data. Good images
    or rows of other data are all for testing, unless these have a split.

    Raises:
        ConfigError: the run's data no longer exist, or its good data are needed and these are others.
    """
    cfg, networks, model = load_model(directory, device)
    backbone, which = backbone_of(cfg, device, model), settings.baselines or cfg.comparison.baselines
    detector, good, others = model["detector"], None, settings.data
    if untrained := [TITLES[name] for name in TRAINED if name in {*BASELINES[which]} - {*networks.baselines}]:
        runlog.note(f"baselines={which}: {directory} has not trained {' and '.join(untrained)}")
    if others is not None and holds_own(cfg, directory, others, needed=which != "none"):
        cfg, others = cfg.replace(data=others), None
    if others is None:
        check_own(cfg, directory)
    if which != "none":
        good = source_of(cfg, backbone, device, about=model).good(cfg.source.holdout).train
    tested = source_of(cfg, backbone, device, data=others, about=model).tested()
    methods = methods_of(cfg, networks, {detector, "dxmi", *BASELINES[which]}, good)
    numbers, *_ = numbers_of(cfg, methods, detector, tested, backbone, model["thresholds"])
    return numbers, table(cfg, numbers, detector)


def load(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks]:
    """The settings and final networks of a run.

    Raises:
        checkpoint.CheckpointError: the networks are missing or damaged.
    """
    cfg, networks, _ = load_model(directory, device)
    return cfg, networks


def load_scorer(directory: Path, device: torch.device) -> Scorer | VectorScorer:
    """The scorer of a run for new images or vectors: its backbone, detector and thresholds.

    Raises:
        checkpoint.CheckpointError: the networks are missing or damaged.
        FeatureError: the backbone's weights are missing or differ from the run's.
    """
    cfg, networks, model = load_model(directory, device)
    backbone = backbone_of(cfg, device, model)
    if backbone is None:
        thresholds, detector = model["thresholds"], model["detector"]
        return VectorScorer(
            networks.energy_of(detector),
            networks.preparation_of(detector),
            columns_of(model),
            threshold=thresholds["threshold"],
            about_threshold=scoring.about(thresholds),
        )
    scale = Scale.of(model.get("scale"))
    return _scorer(cfg, networks, backbone, model["thresholds"], model["detector"], scale)


def new_scorer(cfg: Config, preparation: str | None = None, patch: int | None = None) -> Scorer:
    """An untrained scorer on the CPU with the shapes of one that `fit` returns.

    Args:
        preparation, patch: name of the preparation and patch that `fit` chose; None: those of the settings,
            with placeholders where these leave the choice open.

    Raises:
        ConfigError: the settings are for vectors, or have a base whose size depends on the data.
        FeatureError: the backbone's weights are missing.
    """
    backbone = backbone_of(cfg, torch.device("cpu"))
    if backbone is None:
        raise ConfigError("backbone must be a network, got null, which is for vectors")
    if {*bases.names_of(cfg.networks.base)} & {*bases.FITTED}:
        raise ConfigError(f"base must be none or autoencoder without a run, got {cfg.networks.base}")
    channels, height, width = backbone(
        torch.zeros(1, 3, cfg.features.size, cfg.features.size, dtype=torch.uint8)
    ).shape[1:]
    name = preparation or cfg.features.preparation
    name = PREPARATIONS[0] if name == "auto" else name
    networks = build(choice.settled(cfg, patch), (height, width, channels), (), {"autoencoder": name})
    return _scorer(cfg, networks, backbone, {"threshold": 0.0, "pixel_threshold": 1.0})


def fit(phases: Phases, cfg: Config, good: Good, backbone: Extractor) -> Scorer:
    """Trains on features of good images as `train` does with detector=dxmi, without a folder.

    Args:
        phases: device, ranks and loop of the training.
        cfg: settings for images.
        good: features from the backbone, as in ``anomaly.features.collection.Pictures``.
    """
    found = choice.choose_preparations(cfg, good, backbone, phases.device)
    names = {"autoencoder": found["preparations"]["autoencoder"]}
    networks = fitted(choice.settled(cfg, found["patch"]), good, (), names, phases.device)
    averaged = learn(phases, cfg, prepared(good.train, networks.preparation), networks)
    method = methods_of(cfg, averaged, ["dxmi"], None)["dxmi"]
    return _scorer(cfg, averaged, backbone, calibrate(cfg, method, good))


def _scorer(
    cfg: Config,
    networks: AnomalyNetworks,
    backbone: Extractor,
    thresholds: dict[str, float],
    detector: str = "dxmi",
    scale: Scale = NOMINAL,
) -> Scorer:
    return Scorer(
        backbone,
        networks.energy_of(detector),
        preparation=networks.preparation_of(detector),
        threshold=thresholds["threshold"],
        pixel_threshold=thresholds["pixel_threshold"],
        top_share=cfg.thresholds.top_share,
        scale=scale,
        about_threshold=scoring.about(thresholds),
    )


def read(cfg: Config) -> Overview:
    """An overview of the settings' data without decoding them.

    Raises:
        ConfigError: no data are set.
        ImageDataError, VectorDataError: the data cannot be read.
    """
    path = path_of(cfg)
    if cfg.features.backbone is None:
        return overview.of_vectors(path, cfg.source.train_share, cfg.run.seed)
    return overview.of_anomalies(path, classes_of(cfg), cfg.source.train_share)


def _ship(
    cfg: Config,
    networks: AnomalyNetworks,
    methods: Mapping[str, Method],
    good: Good,
    backbone: Extractor | None,
) -> tuple[str, dict[str, Verdict]]:
    """Chooses the detector that scores new data, stores it in the networks, and returns it with the verdicts.

    Raises:
        ConfigError: the settings name a detector that could not be fitted.
    """
    validation = None
    if cfg.detector.detector == "auto" or backbone is None:  # fast for vectors
        validation = Validation.of(good, backbone, cfg.run.seed, networks.device)
    name, verdicts = chosen(cfg, methods, validation)
    if name not in methods:
        raise ConfigError(f"detector must be one that can be fitted to the data, got {name}")
    detector = methods[name].detector
    networks.shipped = detector if isinstance(detector, MapDetector) else None
    return name, verdicts


def _curve(run: Run, cfg: Config, tested: Examined, networks: AnomalyNetworks) -> Curve | None:
    """The curve of a run, if the settings ask for one and there are test data of both kinds."""
    if not cfg.comparison.curve_every or cfg.run.dry_run or not (run.ranks.first and len(tested.maps)):
        return None
    measure = measure_of(prepared(tested.maps, networks.preparation), tested, cfg.thresholds.top_share)
    return (
        None if measure is None else Curve(run.directory / "curve.json", cfg.comparison.curve_every, measure)
    )


def _prepare(run: Run, cfg: Config) -> tuple[Extractor | None, Good, Examined, AnomalyNetworks, Choice]:
    """Backbone, features, networks and the choice of preparations. Missing files and packages are reported
    here, before training."""
    backbone = backbone_of(cfg, run.device)
    if run.ranks.first:
        print(read(cfg).lines())
    source = source_of(cfg, backbone, run.device, few=_TRIED if cfg.run.dry_run else None)
    good, tested = source.good(cfg.source.holdout), source.tested()
    if cfg.detector.detector == "gaussians" and len(good.train) < gaussians.FEWEST:
        raise ConfigError(
            f"detector=gaussians needs >= {gaussians.FEWEST} good images for training, got {len(good.train)}"
        )
    if run.ranks.first:
        print(f"{len(good.train)} good for training, {len(good.held_out)} good held out for thresholds; "
              f"{len(tested.maps)} for testing, {int(tested.anomalous.sum())} of them defective")  # fmt: skip
        if backbone is None and (rows := len(good.train) + len(good.held_out)) < _ENOUGH:
            runlog.note(
                f"{rows} good rows are few: below {_ENOUGH}, detectors, thresholds and AUROCs are unreliable"
            )
        if good.columns is not None and good.columns.constants:
            print(
                f"dropped: {good.columns.described()}, constant in the good training rows; a row that "
                "differs there is anomalous"
            )
        announce(tested)
    judged = choice.choose(run, cfg, good, backbone)
    if run.ranks.first:
        choice.announce(cfg, judged)
    names = [name for name in BASELINES[cfg.comparison.baselines] if name in TRAINED]
    settled = choice.settled(cfg, judged["patch"])
    networks = fitted(settled, good, names, judged["preparations"], run.device)
    networks.trained = choice.trained(cfg)
    run.describe(networks)
    return backbone, good, tested, networks, judged
