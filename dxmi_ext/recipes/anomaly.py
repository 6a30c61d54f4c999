"""Anomaly detection: the features of good pictures, or vectors, are learned; what has a high energy is odd.

An autoencoder is pretrained on reconstruction; its error is the energy that DxMI goes on training, beside a
sampler that starts from data perturbed in the autoencoder's latent space (DxMI, sec. 5.3). Thresholds come
from good pictures that nothing learned from. Imports torch and ``dxmi_ext``; backbones and matplotlib where
they are used.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext import checkpoint, config, generate, noise, plots, runlog, speed
from dxmi_ext.anomaly import backbones, comparison
from dxmi_ext.anomaly import networks as sphere
from dxmi_ext.anomaly.collection import Examined, Good, Pictures, Source, Vectors
from dxmi_ext.anomaly.detectors import (
    Detector,
    EnergyDetector,
    GaussianPositions,
    NearestNeighbours,
    localise,
)
from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.anomaly.preparation import Whitened, prepared
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.anomaly.scoring import Scorer, VectorScorer
from dxmi_ext.config import ConfigError, setting
from dxmi_ext.contrastive import LangevinTrainer
from dxmi_ext.data import anomaly as data_anomaly
from dxmi_ext.data import overview
from dxmi_ext.data import vectors as data_vectors
from dxmi_ext.data.image_sources import ImageDataError
from dxmi_ext.data.overview import Overview
from dxmi_ext.data.pixels import NOMINAL, Scale
from dxmi_ext.data.vectors import Columns
from dxmi_ext.metrics import anomaly as metrics
from dxmi_ext.metrics import final
from dxmi_ext.metrics.features import Extractor
from dxmi_ext.networks import Networks
from dxmi_ext.prefetch import Prefetcher
from dxmi_ext.ranks import Ranks
from dxmi_ext.run import Fingerprints, Run, changed, data_of, fingerprint, settings_of
from dxmi_ext.trainer import DxMISettings, DxMITrainer, Stepper, check_cuda_graph

BASELINES = {"all": ("tau0", "langevin", "autoencoder", "knn", "gaussian"), "none": ()}
BASELINES["quick"] = BASELINES["all"][2:]
TRAINED = BASELINES["all"][:2]  # in phases of the run
PAPER = {  # DxMI, Table 5: all 15 classes of MVTec-AD
    "the paper, b4": {"image_auroc": 0.970, "pixel_auroc": 0.971},
    "  tau = 0": {"image_auroc": 0.679, "pixel_auroc": 0.846},
}
_NETWORK_KEYS = ["steps", "latent_dim", "energy_width", "value_width", "sampler_width", "depth"]
_NETWORK_KEYS += ["latent_std", "std", "last_std", "residual", "project"]
_BACKBONE_KEYS = ("backbone", "weights", "size", "grid")
_SHOWN = 8  # defective pictures in heatmaps.png
_TRIED = 8  # pictures of a dry run


@dataclasses.dataclass
class Config(DxMISettings, config.RunConfig):
    """Settings of a run of anomaly detection; the defaults are for pictures and two CPU cores."""

    heading = "data, features, networks and comparison"
    task: str = setting("anomaly", "what kind of recipe", choices=("anomaly",))
    iterations: int = setting(300, "iterations of DxMI", minimum=0, maximum=config.LARGEST_RUN)
    pretrain_iterations: int = setting(
        500, "iterations of the autoencoder's pretraining", minimum=0, maximum=config.LARGEST_RUN
    )
    batch_size: int = setting(256, "positions, or vectors, in a global batch", minimum=1, maximum=2**20)
    log_every: int = setting(20, "iterations between lines of metrics.jsonl", minimum=1)
    data: str | None = setting(
        None,
        "pictures as of MVTec-AD or VisA, good/ beside DEFECT/, or an npz; of vectors, an npz with X, y",
        path=True,
    )
    classes: str | None = setting(None, "which classes of the pictures, as bottle,cable; null: all")
    train_share: float = setting(0.7, "of good ones, where data have no split", minimum=0.01, below=1)
    holdout: float = setting(0.1, "of good training ones, kept for the thresholds", minimum=0.001, below=1)
    quantile: float = setting(0.99, "of their scores: the threshold", minimum=0, maximum=1)
    pixel_quantile: float = setting(0.995, "of their pixels' scores: that of pixels", minimum=0, maximum=1)
    cache: str | None = setting(
        None, "folder of decoded pictures and features; null: that of the user", path=True
    )
    backbone: str | None = setting(
        "efflite0_deep", "of the features; null: data are vectors", choices=backbones.BACKBONES
    )
    weights: str | None = setting(None, "safetensors file of efficientnet_b4's weights", path=True)
    size: int = setting(224, "height and width that pictures are brought to", minimum=8, maximum=4096)
    grid: int = setting(14, "height and width of the maps of features", minimum=1, maximum=1024)
    whiten: bool = setting(
        True, "features by their covariance over good pictures, length kept; false: each to length 1 alone"
    )
    patch: int = setting(
        5, "whitened is the mean over so many neighbours each way, an odd number", minimum=1, maximum=99
    )
    aligned: bool = setting(
        False, "objects stand at the same place in all pictures, so each position has a mean of its own"
    )
    top_share: float = setting(
        0.03,
        "a picture's score is the mean of this share of its map, the highest; 0: the highest one",
        minimum=0,
        maximum=1,
    )
    whole_pictures: bool = setting(False, "batches of pictures; false: of positions of all pictures")
    steps: int = setting(5, "T, steps of the sampler", minimum=2, maximum=1000)
    latent_dim: int = setting(16, "of the autoencoder's latents", minimum=1, maximum=2**14)
    energy_width: int = setting(128, "width of the autoencoder's hidden layers", minimum=1, maximum=2**14)
    value_width: int = setting(64, "width of the value's", minimum=1, maximum=2**14)
    sampler_width: int = setting(128, "width of the sampler's", minimum=1, maximum=2**14)
    depth: int = setting(3, "linear layers of each, of encoder and decoder each", minimum=1, maximum=100)
    latent_std: float = setting(0.05, "noise on latents, of length 1, at the start of samples", minimum=0)
    std: float = setting(0.03, "sigma of the sampler's first step, at first", minimum=1e-6)
    last_std: float = setting(0.01, "sigma of its last step, at first", minimum=1e-6)
    residual: bool = setting(True, "the sampler's network tells where to go from x; false: where to")
    project: bool = setting(True, "the energy brings x to the sphere first")
    pretrain_lr: float = setting(1e-3, "learning rate of pretraining, decayed to 0", minimum=0)
    sampler_steps: int = setting(
        1, "sampler steps an iteration; T of them use the whole path", minimum=1, maximum=1000
    )
    sampler_lr: float = setting(1e-4, "learning rate of the sampler's network", minimum=0)
    log_std_lr: float = setting(1e-3, "learning rate of log sigma", minimum=0)
    value_lr: float = setting(1e-3, "learning rate of the value", minimum=0)
    energy_lr: float = setting(3e-4, "learning rate of the energy", minimum=0)
    energy_clip: float = setting(0.1, "largest gradient norm of the energy; 0: any", minimum=0)
    baselines: str = setting(
        "quick",
        "to compare with: quick: the autoencoder alone, nearest neighbours, Gaussians; all: also what has to "
        "be trained: tau = 0, Langevin negatives",
        choices=("all", "quick", "none"),
    )
    baseline_iterations: int | None = setting(
        None, "of trained ones; null: as of DxMI", minimum=0, maximum=config.LARGEST_RUN
    )
    langevin_steps: int = setting(5, "Langevin steps an iteration, of the baseline", minimum=1, maximum=10**6)
    langevin_step_size: float = setting(2e-4, "s in x - s grad E(x) + noise z", minimum=1e-8)
    langevin_noise: float | None = setting(
        0.005, "noise of a step; null: sqrt(2 s tau), for samples of exp(-E / tau)", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_std > self.std:
            raise ConfigError(f"last_std: got {self.last_std}, wants at most std={self.std}")
        if self.skip_last > self.steps:
            raise ConfigError(f"skip_last: got {self.skip_last}, wants at most steps={self.steps}")
        if not self.trains_sampler:
            raise ConfigError(
                f"negatives: got {self.negatives}, wants sampler or refined; baselines=all compares with "
                "Langevin negatives"
            )
        if self.shard:
            raise ConfigError("shard: got true, wants false: these networks are small")
        if self.backbone is None:
            for key in ("weights", "classes", "whiten", "patch", "aligned"):
                if self.changed(key):
                    got = getattr(self, key)
                    raise ConfigError(f"{key}: got {got}, wants none: data are vectors (backbone=null)")


@dataclasses.dataclass
class EvaluateSettings(config.EvaluateSettings):
    """Settings of the command ``evaluate``."""

    data: str | None = setting(None, "what to test on; null: the run's own test data", path=True)
    baselines: str | None = setting(
        None, "all, quick or none; null: as in the run", choices=("all", "quick", "none")
    )


class AnomalyNetworks(Networks):
    """Those of DxMI, what prepares their data, and energies that were trained otherwise.

    Args:
        parts: of `anomaly.networks.build`.
        preparation: features -> points of the sphere (`anomaly.preparation`).
        baselines: names of the energies to compare with.
    """

    energy_network: AutoencoderEnergy

    def __init__(self, parts: Networks, preparation: nn.Module, baselines: Sequence[str]) -> None:
        super().__init__(parts.sampler, parts.value, parts.energy_network)
        self.preparation = preparation
        energies = {name: copy.deepcopy(self.energy_network).requires_grad_(False) for name in baselines}
        self.baselines = nn.ModuleDict(energies)

    @property
    def pretrained(self) -> SphereAutoencoder:
        """The autoencoder as pretraining left it, which samples start from."""
        assert isinstance(self.sampler.start, LatentStart)
        return self.sampler.start.autoencoder

    def begin_from(self, autoencoder: SphereAutoencoder) -> None:
        """Takes a pretrained autoencoder as the energy's and as that which samples start from."""
        self.energy_network.autoencoder.load_state_dict(autoencoder.state_dict())
        self.pretrained.load_state_dict(autoencoder.state_dict())


class Phases(Protocol):
    """What learning needs of a `Run`: where it happens, and what repeats its steps."""

    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def rows(self) -> tuple[int, int]:
        """How many rows of a batch are this rank's, and the first of them."""

    def phase(
        self,
        name: str,
        stepper: Stepper,
        iterations: int,
        batch: Callable[[int], Tensor],
        picture: Callable[[IO[bytes]], None] | None = None,
    ) -> None: ...


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to its end and returns the summary, on the first rank."""
    run = Run(cfg, ranks, _fingerprints(cfg))
    if run.finished():
        return {}
    with run:
        backbone, good, tested, networks = _prepare(run, cfg)
        maps = prepared(good.train, networks.preparation)
        averaged = _learn(run, cfg, maps, networks, tested)
        if cfg.dry_run or not run.ranks.first:
            return {}
        thresholds = _calibrate(cfg, averaged, good)
        _save_model(run.directory / "model", averaged, cfg, backbone, good, tested, thresholds)
        numbers, scores = _numbers(cfg, averaged, cfg.baselines, maps, tested, backbone, thresholds, cfg.seed)
        folder, threshold = run.directory, thresholds["pixel_threshold"]
        final.attempt("curves.png", lambda: plots.curves(folder / "curves.png", folder / "metrics.jsonl"))
        if scores is not None:
            heat = scores
            final.attempt("heatmaps.png", lambda: _heatmaps(folder / "heatmaps.png", heat, tested, threshold))
        summary = run.summarize(numbers)
    print(table(cfg, numbers))
    print(f"{run.directory}: summary.json, model/, pictures; {summary['wall_seconds']} s")
    return summary


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the autoencoder's pretraining alone; training with the same output goes on from it."""
    if not cfg.pretrained:
        raise ConfigError("pretrained: got false, but pretraining alone was asked for")
    run = Run(cfg, ranks, _fingerprints(cfg))
    if run.finished():
        return
    with run:
        backbone, good, tested, networks = _prepare(run, cfg)
        if "pretrain" in run.past:
            print(f"{run.directory} is past its pretraining; nothing to do")
            return
        _pretrain(run, cfg, prepared(good.train, networks.preparation), networks)
        if cfg.dry_run or not run.ranks.first:
            return
        thresholds = _calibrate(cfg, networks, good)
        _save_model(run.directory / "model", networks, cfg, backbone, good, tested, thresholds)
        print(f"{run.directory}: pretrained; `dxmi train` with output={run.directory} goes on from here")


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[generate.Batch]:
    """Samples [m, C] of a run's final sampler, unit vectors but for the last step's noise, as
    `generate.batches`. They start from training data, of a row that (seed, i) chooses."""
    cfg, networks, about = _load(directory, device)
    good = _source(cfg, _backbone(cfg, device, about), device, about=about).good(cfg.holdout)
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
    cfg, networks, about = _load(directory, device)
    backbone, which = _backbone(cfg, device, about), settings.baselines or cfg.baselines
    good, others = None, settings.data
    if others is not None and _has_moved(cfg, directory, others, needed=which != "none"):
        cfg, others = dataclasses.replace(cfg, data=others), None
    if which != "none":
        source = _source(cfg, backbone, device, about=about)
        good = prepared(source.good(cfg.holdout).train, networks.preparation)
    tested = _source(cfg, backbone, device, data=others, about=about).tested()
    numbers, _ = _numbers(cfg, networks, which, good, tested, backbone, about["thresholds"], settings.seed)
    return numbers, table(cfg, numbers)


def load(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks]:
    """A run's settings and final networks.

    Raises:
        checkpoint.CheckpointError: there are none, or they are damaged.
    """
    cfg, networks, _ = _load(directory, device)
    return cfg, networks


def _load(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks, dict[str, Any]]:
    tensors, about = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        networks = _build(cfg, tuple(about["shape"]), about["baselines"])
        networks.load_state_dict(tensors)
    return cfg, networks.to(device).eval(), about


def load_scorer(directory: Path, device: torch.device) -> Scorer | VectorScorer:
    """What scores new pictures, or vectors: a run's backbone, energy and thresholds.

    Raises:
        checkpoint.CheckpointError: there are no networks, or they are damaged.
        FeatureError: the backbone's weights are missing, or others than the run's.
    """
    cfg, networks, about = _load(directory, device)
    backbone = _backbone(cfg, device, about)
    if backbone is None:
        threshold, preparation = about["thresholds"]["threshold"], networks.preparation
        return VectorScorer(networks.energy_network, preparation, _columns(about), threshold=threshold)
    return _scorer(cfg, networks, backbone, about["thresholds"], Scale.of(about.get("scale")))


def new_scorer(cfg: Config) -> Scorer:
    """A scorer that has learned nothing yet, of the shape of one that `fit` returns; on the CPU.

    Raises:
        ConfigError: the settings are of vectors.
        FeatureError: the backbone's weights are missing.
    """
    backbone = _backbone(cfg, torch.device("cpu"))
    if backbone is None:
        raise ConfigError("backbone must be a network, got null, which is for vectors")
    channels, height, width = backbone(torch.zeros(1, 3, cfg.size, cfg.size, dtype=torch.uint8)).shape[1:]
    networks = _build(cfg, (height, width, channels), ())
    return _scorer(cfg, networks, backbone, {"threshold": 0.0, "pixel_threshold": 1.0})


def fit(phases: Phases, cfg: Config, good: Good, backbone: Extractor) -> Scorer:
    """What `train` learns from the features of good pictures, without baselines and without a folder.

    Args:
        phases: where and how it learns.
        cfg: settings of pictures.
        good: features by the backbone, as ``anomaly.collection.Pictures`` gives them.
    """
    networks = _fitted_networks(cfg, good, (), phases.device)
    averaged = _learn(phases, cfg, prepared(good.train, networks.preparation), networks)
    return _scorer(cfg, averaged, backbone, _calibrate(cfg, averaged, good))


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
        top_share=cfg.top_share,
        scale=scale,
    )


def read(cfg: Config) -> Overview:
    """What the settings' data are, told before they are decoded.

    Raises:
        ConfigError: there are none.
        ImageDataError, VectorDataError: they cannot be read.
    """
    path = _path(cfg)
    if cfg.backbone is None:
        return overview.of_vectors(path, cfg.train_share, cfg.seed)
    return overview.of_anomalies(path, _classes(cfg), cfg.train_share)


def table(cfg: Config, numbers: dict[str, float]) -> str:
    """The run's methods, the paper's rows beside them for MVTec-AD."""
    title = f"{cfg.recipe}, {cfg.backbone or 'vectors'}, T = {cfg.steps}, tau = {cfg.tau:g}"
    return f"{title}\n{comparison.table(numbers, PAPER if cfg.recipe == 'mvtec-ad' else None)}"


def _prepare(run: Run, cfg: Config) -> tuple[Extractor | None, Good, Examined, AnomalyNetworks]:
    """Backbone, features and networks. What is missing shows here, not after hours."""
    check_cuda_graph(cfg, run.device, run.ranks)
    backbone = _backbone(cfg, run.device)
    if run.ranks.first:
        print(read(cfg).lines())
    source = _source(cfg, backbone, run.device, few=_TRIED if cfg.dry_run else None)
    good, tested = source.good(cfg.holdout), source.tested()
    if run.ranks.first:
        print(f"{len(good.train)} good train, {len(good.held_out)} are held out for the thresholds; tested: "
              f"{len(tested.maps)}, {int(tested.anomalous.sum())} of them defective")  # fmt: skip
        if good.columns is not None and good.columns.constants:
            print(
                f"dropped: {good.columns.told()}, constant in the good rows to train on; a row that differs "
                "there is anomalous"
            )
        _announce(tested)
    names = [name for name in BASELINES[cfg.baselines] if name in TRAINED]
    networks = _fitted_networks(cfg, good, names, run.device)
    run.describe(networks)
    return backbone, good, tested, networks


def _fitted_networks(
    cfg: Config, good: Good, baselines: Sequence[str], device: torch.device
) -> AnomalyNetworks:
    """New networks, and a preparation that knows what the good ones are like."""
    networks = _build(cfg, good.train.shape[1:], baselines)
    if isinstance(networks.preparation, Whitened):
        networks.preparation.fit(good.train)
    return networks.to(device)


def _announce(tested: Examined) -> None:
    """Says before a run which of its numbers it will lack."""
    final.announce_missing({"matplotlib": "pictures"} | ({} if tested.masks is None else {"scipy": "pro"}))
    truths = tested.anomalous, tested.masks, tested.classes, tested.class_names, tested.names
    for line in metrics.unmeasurable(*truths):
        runlog.note(line)


def _backbone(cfg: Config, device: torch.device, about: dict[str, Any] | None = None) -> Extractor | None:
    """The settings', which has to be the one that a model is of, if it says."""
    if cfg.backbone is None:
        return None
    options: dict[str, Any] = {"size": cfg.size, "grid": cfg.grid, "weights": cfg.weights}
    backbone = backbones.load(cfg.backbone, normalise=not cfg.whiten, **options)
    if about is not None and about["backbone"]["identity"] != backbone.identity:
        raise ConfigError(
            f"weights: got those of {backbone.identity}, the run is of {about['backbone']['identity']}"
        )
    return backbone.to(device)


def _source(
    cfg: Config,
    backbone: Extractor | None,
    device: torch.device,
    *,
    data: str | None = None,
    about: dict[str, Any] | None = None,
    few: int | None = None,
) -> Source:
    """Of the settings' data, or of all classes of others; as a model says that its images or vectors are."""
    path = data or _path(cfg)
    if backbone is None:
        return Vectors(path, cfg.train_share, cfg.seed, None if about is None else _columns(about))
    classes = None if data else _classes(cfg)
    scale = None if about is None else Scale.of(about.get("scale"))
    return Pictures(path, backbone, cfg.size, classes, cfg.train_share, cfg.cache, device, few, scale)


def _path(cfg: Config) -> str:
    if cfg.data is None:
        raise ConfigError("data: got none, wants the path of pictures, or of an npz; `--help` tells more")
    return cfg.data


def _classes(cfg: Config) -> list[str] | None:
    return None if cfg.classes is None else cfg.classes.split(",")


def _columns(about: dict[str, Any]) -> Columns:
    """Of the vectors that a model is of; older ones have no constant columns."""
    return Columns.from_json(about.get("columns", {"total": about["shape"][2], "constants": {}}))


def _fingerprints(cfg: Config) -> Callable[[str], Fingerprints]:
    """Those of the data at a path, as the run sees them."""

    def of_vectors(path: str) -> Fingerprints:
        train, test, anomalous = data_vectors.load(path, train_share=cfg.train_share, seed=cfg.seed)
        return {"train": fingerprint(train), "test": fingerprint(test, anomalous)}

    def of_pictures(path: str) -> Fingerprints:
        options: dict[str, Any] = {"size": cfg.size, "train_share": cfg.train_share, "cache": cfg.cache}
        options["classes"] = _classes(cfg)
        found = {"train": data_anomaly.load(path, split="train", **options)}
        with suppress(ImageDataError):  # there may be nothing to test
            found["test"] = data_anomaly.load(path, split="test", scale=found["train"].scale, **options)
        return {
            split: fingerprint(data.fingerprint, data.labels, data.classes, data.class_names)
            for split, data in found.items()
        }

    return of_vectors if cfg.backbone is None else of_pictures


def _has_moved(cfg: Config, directory: Path, data: str, *, needed: bool) -> bool:
    """Whether data are those of the run, which are no longer where they were.

    Args:
        needed: whether the run's own good data are, to fit baselines to.

    Raises:
        ConfigError: they are needed, and these are others.
    """
    if cfg.data is None or Path(cfg.data).exists() or not needed:
        return False
    known = data_of(directory)
    if "train" in changed(known, _fingerprints(cfg)(data)):
        raise ConfigError(
            f"data: {data!r} must have the good ones that {directory} was trained on (they are no longer at "
            f"{cfg.data!r}), but has another fingerprint; baselines=none does without"
        )
    if not known:
        runlog.note(f"{directory} has no fingerprint of its data; {data} is taken to hold them")
    return True


def _build(cfg: Config, shape: tuple[int, int, int], baselines: Sequence[str]) -> AnomalyNetworks:
    """The networks for maps [h, w, C] of features, their weights drawn from the seed."""
    preparation: nn.Module = nn.Identity()
    dim = shape[2]
    if cfg.whiten:
        preparation = Whitened(shape, patch=cfg.patch, aligned=cfg.aligned)
        dim += 1  # the coordinate that tells length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        parts = sphere.build(dim, **{key: getattr(cfg, key) for key in _NETWORK_KEYS})
    return AnomalyNetworks(parts, preparation, baselines)


def _learn(
    run: Phases, cfg: Config, maps: FeatureMaps, networks: AnomalyNetworks, tested: Examined | None = None
) -> AnomalyNetworks:
    """All phases in turn; returns the averaged networks.

    Args:
        tested: what pictures are drawn of meanwhile.
    """
    if cfg.pretrained:
        _pretrain(run, cfg, maps, networks)
    for name in networks.baselines:
        _train_baseline(run, cfg, name, maps, networks)
    trainer = DxMITrainer(networks, cfg, iterations=cfg.iterations, seed=cfg.seed, ranks=run.ranks)
    averaged = trainer.averaged
    assert isinstance(averaged, AnomalyNetworks)
    draw = None if tested is None else _picture(averaged, tested)
    with _batches(cfg, maps, "dxmi", run, cfg.iterations) as batches:
        run.phase("dxmi", trainer, cfg.iterations, batches, draw)
    return averaged


def _pretrain(run: Phases, cfg: Config, maps: FeatureMaps, networks: AnomalyNetworks) -> None:
    speed.prepare(cfg, networks.sampler, networks.energy_network.autoencoder)
    pretrainer = ReconstructionPretrainer(
        networks.energy_network.autoencoder,
        lr=cfg.pretrain_lr,
        iterations=cfg.pretrain_iterations,
        ranks=run.ranks,
        settings=cfg,
    )
    with _batches(cfg, maps, "pretrain", run, cfg.pretrain_iterations) as batches:
        run.phase("pretrain", pretrainer, cfg.pretrain_iterations, batches)
    networks.begin_from(pretrainer.autoencoder)


def _train_baseline(
    run: Phases, cfg: Config, name: str, maps: FeatureMaps, networks: AnomalyNetworks
) -> None:
    """Trains an energy otherwise, in networks of its own, from the same start and on the same batches."""
    trial = copy.deepcopy(networks)
    given = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(DxMISettings)}
    iterations = cfg.iterations if cfg.baseline_iterations is None else cfg.baseline_iterations
    given["tau_rate"] = 0.0
    options: dict[str, Any] = {"iterations": iterations, "seed": cfg.seed, "ranks": run.ranks}
    trainer: DxMITrainer | LangevinTrainer
    if name == "tau0":
        settings = DxMISettings(**given | {"tau": 0.0, "tau_entropy": None, "tau_velocity": None})
        trainer = DxMITrainer(trial, settings, **options)
    else:
        trainer = LangevinTrainer(trial, DxMISettings(**given | {"negatives": "short_run"}), **options)
    with _batches(cfg, maps, "dxmi", run, iterations) as batches:
        run.phase(name, trainer, iterations, batches)
    # Of a run that was resumed in this phase, only the trial has what the phases before it made.
    networks.begin_from(trial.pretrained)
    networks.baselines.load_state_dict(trial.baselines.state_dict())
    averaged = trainer.averaged.energy_network
    assert averaged is not None
    networks.baselines[name].load_state_dict(averaged.state_dict())


def _batches(cfg: Config, maps: FeatureMaps, phase: str, run: Phases, iterations: int) -> Prefetcher:
    """iteration -> this rank's rows of the data."""
    count, offset = run.rows

    def batch(iteration: int) -> Tensor:
        rows: dict[str, Any] = {"offset": offset, "count": count, "whole_images": cfg.whole_pictures}
        return maps.batch(iteration, cfg.batch_size, seed=cfg.seed, stream=phase, **rows)

    return Prefetcher(batch, run.device, iterations)


def _detectors(networks: AnomalyNetworks, which: str, rows: int, seed: int) -> dict[str, Detector]:
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


def _calibrate(cfg: Config, networks: AnomalyNetworks, good: Good) -> dict[str, float]:
    energy = EnergyDetector(networks.energy_network, device=networks.sampler.log_std.device)
    size = None if cfg.backbone is None else cfg.size
    held_out = prepared(good.held_out, networks.preparation)
    quantiles = cfg.quantile, cfg.pixel_quantile
    return comparison.calibrate(energy, held_out, size, *quantiles, top_share=cfg.top_share)


def _numbers(
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
    detectors = _detectors(networks, which, 1 if good is None else len(good.rows), seed)
    numbers, notes, scores = comparison.compare(
        detectors, good, tested, maps, backbone, thresholds["threshold"], top_share=cfg.top_share
    )
    for note in notes:
        runlog.note(note)
    return thresholds | numbers, scores


def _picture(networks: Networks, tested: Examined) -> Callable[[IO[bytes]], None] | None:
    """Draws heat maps of a few defective pictures while training."""
    assert isinstance(networks, AnomalyNetworks)
    few = tested.at(_shown(tested))
    if few.images is None or not len(few.maps):
        return None
    maps, device = prepared(few.maps, networks.preparation), networks.sampler.log_std.device

    def draw(file: IO[bytes]) -> None:
        _heatmaps(file, EnergyDetector(networks.energy_network, device=device).score(maps), few, None)

    return draw


def _heatmaps(path: IO[bytes] | Path, scores: Tensor, tested: Examined, threshold: float | None) -> None:
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


def _save_model(
    path: Path,
    networks: AnomalyNetworks,
    cfg: Config,
    backbone: Extractor | None,
    good: Good,
    tested: Examined,
    thresholds: dict[str, float],
) -> None:
    """All that scoring needs but the backbone's weights, which are told by their digest."""
    about: dict[str, Any] = {"task": cfg.task, "backbone": None, "shape": good.train.shape[1:]}
    if good.columns is not None:
        about["columns"] = good.columns.to_json()
    if backbone is not None:
        about["backbone"] = {"identity": backbone.identity, **{k: getattr(cfg, k) for k in _BACKBONE_KEYS}}
    about |= {"networks": {k: getattr(cfg, k) for k in _NETWORK_KEYS}, "thresholds": thresholds}
    about |= {"baselines": list(networks.baselines), "class_names": tested.class_names}
    about |= {} if tested.scale is None else {"scale": tested.scale}
    checkpoint.save_model(path, networks, about)
