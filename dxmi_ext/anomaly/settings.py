"""Settings of anomaly detection. Imports the engine, the method, and backbones, bases and preparations."""

from __future__ import annotations

import dataclasses
from typing import Any

from dxmi_ext.anomaly.detectors import bases
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.anomaly.features.preparation import PREPARATIONS, present
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.run_settings import EvaluateSettings as EvaluateSettings_
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.settings import Effect, Rule, Settings, group, only_with, setting
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import (
    BATCH_RULES,
    CHAIN_RULES,
    REMOVED,
    RULES,
    TAU_EFFECTS,
    DxMISettings,
)

_BASE = "|".join(bases.BASES)


@dataclasses.dataclass
class SourceSettings(Settings):
    heading = "data"
    data: str | None = setting(
        None,
        "path of images in the layout of MVTec-AD or VisA, of good/ beside DEFECT/, or of an npz; for "
        "vectors, path of a file with X and y",
        path=True,
    )
    classes: str | None = setting(None, "names of the classes to use, such as bottle,cable; null: all")
    train_share: float = setting(
        0.7, "share of the good data for training if the data have no split", minimum=0.01, below=1
    )
    holdout: float = setting(
        0.1, "share of the good training data that is held out for thresholds", minimum=0.001, below=1
    )
    cache: str | None = setting(
        None,
        "folder for decoded images and features; null: dxmi_ext in $XDG_CACHE_HOME or ~/.cache",
        path=True,
    )


@dataclasses.dataclass
class FeatureSettings(Settings):
    heading = "features"
    backbone: str | None = setting(
        "efflite0_deep", "network of the features; null: the data are vectors", choices=backbones.BACKBONES
    )
    weights: str | None = setting(None, "safetensors file of efficientnet_b4's weights", path=True)
    size: int = setting(224, "height and width that images are resized to", minimum=8, maximum=4096)
    grid: int = setting(14, "height and width of the feature maps", minimum=1, maximum=1024)
    preparation: str = setting(
        "auto",
        "preparation of features: unit: scaled to length 1; centered: the mean subtracted first; whitened: "
        "by the covariance; auto: for each method, what detects synthetic defects in held-out data best, for "
        "vectors whitened unless another is clearly better",
        choices=("auto", *PREPARATIONS),
    )
    patch: int | None = setting(
        5,
        "side of the neighborhood over which features are averaged, an odd number; 1: no averaging; null: of "
        "1, 3, 5 and 9, the one with which plain detectors find and locate synthetic defects best",
        minimum=1,
        maximum=99,
    )
    aligned: bool = setting(
        False, "separate means for each position, for objects at the same place in all images"
    )
    whole_pictures: bool = setting(False, "batches of whole images; false: of positions of all images")

    def __post_init__(self) -> None:
        self.preparation = present(self.preparation)
        super().__post_init__()

    @property
    def neighborhood(self) -> dict[str, Any]:
        """Arguments common to all preparations; the patch must be chosen."""
        return {"patch": self.patch, "aligned": self.aligned}


@dataclasses.dataclass
class NetworkSettings(Settings):
    heading = "networks"
    base: str = setting(
        "none",
        "plain detector whose energy DxMI starts from and corrects: gaussian, knn, density (a kernel "
        "density), autoencoder, or several, as in knn+gaussian; none: DxMI starts from the autoencoder and "
        "trains it",
        pattern=rf"none|({_BASE})(\+({_BASE}))*",
    )
    steps: int = setting(5, "number of sampler steps T", minimum=2, maximum=1000)
    latent_dim: int = setting(16, "dimension of the autoencoder's latents", minimum=1, maximum=2**14)
    energy_width: int = setting(128, "width of the autoencoder's hidden layers", minimum=1, maximum=2**14)
    value_width: int = setting(64, "width of the value's hidden layers", minimum=1, maximum=2**14)
    sampler_width: int = setting(128, "width of the sampler's hidden layers", minimum=1, maximum=2**14)
    depth: int = setting(3, "number of linear layers of each network", minimum=1, maximum=100)
    latent_std: float = setting(0.05, "noise on the latents, of length 1, that samples start from", minimum=0)
    std: float = setting(0.03, "initial sigma of the sampler's first step, per dimension", minimum=1e-6)
    last_std: float = setting(0.01, "initial sigma of the sampler's last step, per dimension", minimum=1e-6)
    max_std: float | None = setting(
        None,
        "upper bound of sigma in training, per dimension; null: 1/sqrt(C), where noise is as long as the "
        "unit vectors that it is added to, or std if larger",
        minimum=1e-6,
    )
    residual: bool = setting(
        True, "prediction of the step from x by the sampler's network; false: prediction of the next x"
    )
    scaled_steps: bool = setting(
        False,
        "division of the sampler's steps by sqrt(C), the scale of coordinates of unit vectors, which suits "
        "the learning rates of other networks",
    )
    project: bool = setting(True, "projection of x onto the sphere before its energy is computed")


@dataclasses.dataclass
class PretrainingSettings(Settings):
    heading = "pretraining"
    pretrain_lr: float = setting(1e-3, "learning rate of pretraining, decayed to 0", minimum=0)


@dataclasses.dataclass
class DetectorSettings(Settings):
    heading = "detector"
    detector: str = setting(
        "auto",
        "detector: DxMI's energy, its autoencoder alone, nearest neighbors, a Gaussian (for images "
        "one per position) or, for images, its sum with a pooled Gaussian (gaussians); auto: the simplest of "
        "those that best detect synthetic defects in held-out data",
        choices=("auto", "dxmi", "autoencoder", "knn", "gaussian", "gaussians"),
    )


@dataclasses.dataclass
class ThresholdSettings(Settings):
    heading = "scores and thresholds"
    top_share: float = setting(
        0.03,
        "share of an image's positions, the highest scores, whose mean is its score; 0: the maximum",
        minimum=0,
        maximum=1,
    )
    quantile: float = setting(0.99, "quantile of held-out scores that is the threshold", minimum=0, maximum=1)
    pixel_quantile: float = setting(
        0.995, "quantile of held-out scores of pixels that is their threshold", minimum=0, maximum=1
    )


@dataclasses.dataclass
class ComparisonSettings(Settings):
    heading = "comparison"
    baselines: str = setting(
        "quick",
        "methods in the table: quick: the autoencoder alone, nearest neighbors, Gaussians; tau0: also DxMI "
        "with tau = 0, which is trained; all: also Langevin negatives; none: DxMI and the detector alone",
        choices=("all", "tau0", "quick", "none"),
    )
    curve_every: int = setting(
        0,
        "number of iterations between measurements of the AUROC on test data, for a curve in summary.json; "
        "0: none",
        minimum=0,
    )


@dataclasses.dataclass
class Config(RunnableConfig):
    """Settings of a run of anomaly detection; the defaults are for images and two CPU cores."""

    run: RunSettings = group(
        RunSettings,
        task="anomaly",
        iterations=300,
        pretrain_iterations=500,
        batch_size=256,  # positions, or vectors
        log_every=20,
    )
    algorithm: DxMISettings = group(
        DxMISettings,
        sampler_steps=1,
        sampler_lr=1e-4,
        log_std_lr=1e-3,
        value_lr=1e-3,
        energy_lr=3e-4,
        energy_clip=0.1,
    )
    langevin: LangevinSettings = group(
        LangevinSettings, langevin_steps=5, langevin_step_size=2e-4, langevin_noise=0.005
    )
    execution: ExecutionSettings = group(ExecutionSettings)
    source: SourceSettings = group(SourceSettings)
    features: FeatureSettings = group(FeatureSettings)
    networks: NetworkSettings = group(NetworkSettings)
    pretraining: PretrainingSettings = group(PretrainingSettings)
    detector: DetectorSettings = group(DetectorSettings)
    thresholds: ThresholdSettings = group(ThresholdSettings)
    comparison: ComparisonSettings = group(ComparisonSettings)

    removed = REMOVED | {
        "whiten": "preparation takes its place",
        "baseline_iterations": "iterations also sets those of baselines",
    }
    rules = (
        Rule("task must be anomaly, got {task}", lambda s: s.task == "anomaly"),
        *RULES,
        *CHAIN_RULES,
        *BATCH_RULES,
        Rule(
            "negatives must be sampler or refined (baselines=all compares with Langevin negatives), got "
            "{negatives}",
            lambda s: s.trains_sampler,
        ),
        Rule("patch must be odd, got {patch}", lambda s: s.patch is None or s.patch % 2 == 1),
        Rule("last_std must be <= std={std}, got {last_std}", lambda s: s.last_std <= s.std),
        Rule(
            "max_std must be >= std={std}, got {max_std}",
            lambda s: s.max_std is None or s.max_std >= s.std,
        ),
        Rule("skip_last must be <= steps={steps}, got {skip_last}", lambda s: s.skip_last <= s.steps),
        Rule(
            "base must be none where the temperature of the entropy is 0, got {base}",
            lambda s: s.base == "none" or bool(s.entropy_tau),
        ),
        Rule(
            "base must be none with pretrained=false, got {base}",
            lambda s: s.pretrained or s.base == "none",
        ),
        Rule(
            "detector must not be autoencoder with pretrained=false, got {detector}",
            lambda s: s.pretrained or s.detector != "autoencoder",
        ),
        Rule(
            "base must name each detector once, got {base}",
            lambda s: len({*bases.names_of(s.base)}) == len(bases.names_of(s.base)),
        ),
        Rule(
            "scaled_steps must be false with residual=false, got {scaled_steps}",
            lambda s: s.residual or not s.scaled_steps,
        ),
        Rule(
            "detector must not be gaussians for vectors, got {detector}",
            lambda s: s.backbone is not None or s.detector != "gaussians",
        ),
        Rule("shard must be false: these networks are small, got {shard}", lambda s: not s.shard),
        *only_with(
            "images (backbone=null means vectors)",
            lambda s: s.backbone is not None,
            "weights",
            "classes",
            "patch",
            "aligned",
        ),
    )
    effects = (
        *TAU_EFFECTS,
        Effect(
            "negatives=refined or baselines=all",
            lambda s: s.negatives == "refined" or s.baselines == "all",
            ("langevin_steps", "langevin_step_size", "langevin_noise", "langevin_clip"),
        ),
        Effect(
            "pretrained=true",
            lambda s: s.pretrained,
            ("pretrain_iterations", *PretrainingSettings.keys()),
        ),
    )


@dataclasses.dataclass
class EvaluateSettings(EvaluateSettings_):
    """Settings of the command ``evaluate``."""

    data: str | None = setting(None, "data to test on; null: the run's own test data", path=True)
    baselines: str | None = setting(
        None, "methods in the table; null: as in the run", choices=("all", "tau0", "quick", "none")
    )
