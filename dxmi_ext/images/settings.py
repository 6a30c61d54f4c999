"""Settings of the task of images. Imports the engine and the method."""

from __future__ import annotations

import dataclasses

from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.run_settings import EvaluateSettings as EvaluateSettings_
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.settings import Effect, Rule, Settings, group, only_with, setting
from dxmi_ext.images.networks.unet import ARCHITECTURES
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import (
    BATCH_RULES,
    CHAIN_RULES,
    EFFECTS,
    ENERGY_RULES,
    LENGTH_RULES,
    REMOVED,
    RULES,
    DxMISettings,
    LengthSettings,
)

NO_START = "none"
"""Value of ``start`` that pretrains a network, whatever the recipe's start."""


@dataclasses.dataclass
class SourceSettings(Settings):
    heading = "data"
    data: str | None = setting(
        None, "path of images: CIFAR-10, MNIST's idx files, npz, or folders of images", path=True
    )
    cache: str | None = setting(
        None, "folder for decoded images; null: dxmi_ext in $XDG_CACHE_HOME or ~/.cache", path=True
    )
    image_size: int | None = setting(None, "height and width; null: unchanged", minimum=1, maximum=4096)
    flip: bool = setting(True, "random horizontal flips of the images")
    conditional: bool = setting(False, "conditioning of sampler, value and energy on the images' classes")


@dataclasses.dataclass
class ChainSettings(LengthSettings):
    heading = "the sampler's chain"
    steps: int = setting(10, "number of sampler steps T", minimum=2, maximum=10_000)
    schedule: str = setting(
        "fastdpm",
        "schedule of the sampler; edm is for EDM's networks",
        choices=("fastdpm", "ddim", "edm"),
    )
    prediction: str = setting(
        "eps", "prediction of the network in fastdpm and ddim", choices=("eps", "v", "x")
    )
    eta: float = setting(1.0, "factor of the posterior's std; 0: noise of min_std only", minimum=0, maximum=1)
    rho: float = setting(7.0, "density of EDM's noise levels near the data", minimum=0.1)
    sigma_min: float = setting(0.002, "EDM's last noise level", minimum=1e-6)
    sigma_max: float = setting(80.0, "EDM's first noise level", minimum=1e-6)
    sigma_data: float = setting(0.5, "standard deviation of the data, for EDM", minimum=1e-6)
    time_scale: float = setting(1.0, "factor of ln(sigma) / 4, the time of EDM's network", minimum=1e-6)
    stochastic_last: bool = setting(False, "stochastic last step of EDM, which ends at sigma_min")
    min_std: float = setting(1e-3, "lower bound of the initial sigma of a step", minimum=1e-6)
    denoised: bool = setting(False, "no noise in the last step of the trained sampler, in its samples alone")


@dataclasses.dataclass
class NetworkSettings(Settings):
    heading = "networks"
    start: str | None = setting(
        None,
        "network to start from: folder or name of a run, a diffusers folder, or hub:OWNER/NAME; null or "
        "none: pretrain one",
        path=True,
    )
    unet: str = setting("small", "architecture of a new U-Net", choices=tuple(ARCHITECTURES))
    patch: int = setting(
        1, "side of the patches of pixels that a new U-Net takes as channels", minimum=1, maximum=4096
    )
    value_kind: str = setting(
        "time_independent",
        "kind of value: time_independent: V^t = E (Algorithm 2); per_step; separate: with a separate energy",
        choices=("time_independent", "per_step", "separate"),
    )
    energy_network: str = setting(
        "resnet",
        "architecture of value and energy: resnet: a residual network; encoder: heads on the frozen encoder "
        "of the network that the sampler starts from",
        choices=("resnet", "encoder"),
    )
    energy_level: float = setting(
        0.1,
        "noise level of the encoder for images with less noise",
        minimum=1e-3,
        maximum=100,
    )
    energy_width: int = setting(
        128, "width of the value's and the energy's networks", minimum=1, maximum=4096
    )


@dataclasses.dataclass
class PretrainingSettings(Settings):
    heading = "pretraining"
    pretrain_lr: float = setting(2e-4, "learning rate of pretraining, decayed to 0", minimum=0)
    pretrain_batch_size: int | None = setting(
        None, "global batch size of pretraining; null: batch_size", minimum=1, maximum=2**20
    )
    pretrain_warmup: int = setting(0, "number of warmup iterations of pretraining", minimum=0)
    pretrain_ema_decay: float = setting(
        0.9995, "decay of the pretrained network's average", minimum=0, below=1
    )
    pretrain_clip: float = setting(1.0, "maximum gradient norm of pretraining; 0: no clipping", minimum=0)
    level_mean: float = setting(-1.2, "mean of ln(sigma) in pretraining for EDM")
    level_std: float = setting(1.2, "standard deviation of ln(sigma) in pretraining for EDM", minimum=0)


@dataclasses.dataclass
class EvaluationSettings(Settings):
    heading = "evaluation"
    features: str | None = setting(
        "efflite0",
        "feature extractors of the metrics, separated by commas: efflite0, classifier (a small one, trained "
        "on the data's classes), or the path of Inception's weights; null: no metrics",
        path=True,
    )
    evaluate_n: int = setting(10_000, "number of samples and of training images for the metrics", minimum=4)
    sample_batch: int = setting(250, "batch size in evaluation", minimum=1)


@dataclasses.dataclass
class Config(RunnableConfig):
    """Settings of an image run."""

    run: RunSettings = group(RunSettings, task="images", batch_size=128)
    algorithm: DxMISettings = group(DxMISettings)
    langevin: LangevinSettings = group(LangevinSettings)
    execution: ExecutionSettings = group(ExecutionSettings)
    source: SourceSettings = group(SourceSettings)
    chain: ChainSettings = group(ChainSettings)
    networks: NetworkSettings = group(NetworkSettings)
    pretraining: PretrainingSettings = group(PretrainingSettings)
    evaluation: EvaluationSettings = group(EvaluationSettings)

    removed = REMOVED
    rules = (
        Rule("task must be images, got {task}", lambda s: s.task == "images"),
        *RULES,
        *CHAIN_RULES,
        *BATCH_RULES,
        *ENERGY_RULES,
        *LENGTH_RULES,
        Rule(
            "lengths must be null unless schedule=edm, conditional=false, and energy_network=encoder or "
            "value_kind=time_independent, got {lengths}",
            lambda s: (
                s.lengths is None
                or (
                    s.schedule == "edm"
                    and not s.conditional
                    and (s.energy_network == "encoder" or s.value_kind == "time_independent")
                )
            ),
        ),
        Rule(
            "negatives must be sampler or refined in image recipes, got {negatives}",
            lambda s: s.trains_sampler,
        ),
        Rule(
            "sigma_min must be < sigma_max={sigma_max}, got {sigma_min}", lambda s: s.sigma_min < s.sigma_max
        ),
        *only_with("energy_network=encoder", lambda s: s.energy_network == "encoder", "energy_level"),
        Rule("skip_last must be <= steps={steps}, got {skip_last}", lambda s: s.skip_last <= s.steps),
        Rule(
            "pretrained must be true with start={start}, which is a pretrained network, got {pretrained}",
            lambda s: s.start in (None, NO_START) or s.pretrained,
        ),
    )
    effects = (
        *EFFECTS,
        Effect(
            "schedule=edm",
            lambda s: s.schedule == "edm",
            (
                "rho",
                "sigma_min",
                "sigma_max",
                "sigma_data",
                "time_scale",
                "stochastic_last",
                "level_mean",
                "level_std",
            ),
        ),
        Effect("schedule=fastdpm or ddim", lambda s: s.schedule != "edm", ("prediction",)),
        Effect(
            "pretrained=true",
            lambda s: s.pretrained,
            ("pretrain_iterations", *PretrainingSettings.keys()),
        ),
    )


@dataclasses.dataclass
class EvaluateSettings(EvaluateSettings_):
    """Settings of the command ``evaluate``."""

    n: int | None = setting(None, "number of samples; null: as in the run", minimum=4)
    data: str | None = setting(None, "path of the run's images now; null: unchanged", path=True)
    chain: str | None = setting(
        None,
        "sampler for the run's network: a chain such as fastdpm-4, ddim-100, ddpm-1000, edm-79 or "
        "edm-ancestral-100, or a solver, heun-18 or dpmpp-10; -clipped clips the predicted data to [-1, 1]",
    )
    steps: int | None = setting(
        None,
        "number of steps T, for a sampler of any number of steps; null: the run's steps",
        minimum=1,
    )
    against: str | None = setting(
        None,
        "images whose energies are compared with those of test images by AUROC, such as noise,blurred,PATH; "
        "null: none",
    )
    picture: str | None = setting(None, "png file to write a grid of samples to; null: none", path=True)
    neighbors: str | None = setting(
        None, "png file to write samples to, each with its nearest training images; null: none", path=True
    )
