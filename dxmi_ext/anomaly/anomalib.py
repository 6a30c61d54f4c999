"""DxMI as an anomalib model, trained and tested by anomalib's Engine; anomalib data modules as `AnomalyData`.

Requires the extras ``anomalib`` and ``images``; written for anomalib 2.7. Imports anomalib, torchvision,
torch and ``dxmi_ext``, including the recipe, to which this module is a front end.

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from dxmi_ext.anomaly.anomalib import DxMI

    Engine().train(model=DxMI(), datamodule=MVTecAD(category="bottle"))
    Engine().predict(model=DxMI.from_run("runs/parts"), data_path="new-images")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from torch import Tensor, nn
from tqdm import trange

from dxmi_ext import tasks
from dxmi_ext.anomaly import recipe as recipe_anomaly
from dxmi_ext.anomaly.anomalib_parts import OwnThresholds, Visualizer, WholeImages, resized_images, to_uint8
from dxmi_ext.anomaly.data import dataset as anomaly
from dxmi_ext.anomaly.data import layouts as anomaly_sources
from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.anomaly.detectors import common
from dxmi_ext.anomaly.features import collection, feature_maps
from dxmi_ext.anomaly.scores.scoring import Scorer
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning import health
from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.settings import ConfigError

_ELSEWHERE = {"recipe", "task", "output", "device", "threads", "shard", "resume", "dry_run"}
_ELSEWHERE |= {"checkpoint_every", "keep_checkpoints", "rollbacks", "rollback_lr"}
_ELSEWHERE |= {"log_every", "picture_every", "tensorboard", "wandb"}
_ELSEWHERE |= {"data", "classes", "train_share", "cache", "baselines", "detector"}
"""Settings of the recipe that the Engine or the data module decides, or that have no meaning here, because
DxMI's energy is always trained."""
_PREPARATION, _PATCH = "dxmi_preparation", "dxmi_patch"  # in a checkpoint


class DxMI(MemoryBankMixin, AnomalibModule):
    """The recipe ``anomaly``: `fit` trains on the features of one epoch of good images.

    It computes the same as the command ``dxmi``: it is trained on the same images and settings as ``dxmi
    train`` with detector=dxmi, ``pred_score`` is the score that ``dxmi score`` writes, and ``pred_label`` and
    ``pred_mask`` use thresholds from held-out good images. This requires the defaults:

    - ``pre_processor=True``: it resizes whole images with Pillow, as ``dxmi`` does. A custom one must keep
      values in [0, 1], without ``Normalize``, because the backbone normalizes them itself.
    - ``post_processor=True``: anomalib's own ``PostProcessor`` maps scores to [0, 1] and takes its thresholds
      from validation images, including defective ones.
    - No augmentations in the data module, and ``max_epochs`` = 1, which is the default here.

    anomalib decodes the files. Both decode opaque images with 8 bits per channel and without an EXIF
    orientation identically. Convert other images first: anomalib clips 16-bit values at 255, shows the colors
    of transparent pixels, and ignores the EXIF orientation.

    With the same number of CPU threads, training gives the same result as ``dxmi train``; otherwise the same
    up to rounding. Checkpoints restore the whole detector. An exported model (``Engine.export``) does not
    resize with Pillow, so its input must have the size ``settings["size"]``. ``dxmi export`` writes a
    detector that does not require anomalib.

    Args:
        settings: settings that override the recipe's, such as ``{"iterations": 2000, "top_share": 0}``.
        recipe: name of a recipe for anomaly detection on images, or path of a yaml file.
        pre_processor, post_processor, evaluator, visualizer: as for any anomalib model.

    Raises:
        ConfigError: a setting is unknown, invalid, or not available in this class.
        FeatureError: the backbone's weights are missing.
    """

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        recipe: str = "anomaly",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Any = True,
        visualizer: Any = True,
    ) -> None:
        cfg = _config(recipe, settings or {})
        super().__init__(
            pre_processor=WholeImages(cfg.features.size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.cfg = cfg
        self.model: _Detector = _Detector(recipe_anomaly.new_scorer(cfg))
        self._images: list[Tensor] = []
        self._paths: list[str] = []

    @classmethod
    def from_run(cls, directory: Path | str, **options: Any) -> DxMI:
        """The detector of a finished image run, for testing, export or prediction with anomalib.

        It is the detector that the run chose. Lightning checkpoints contain only DxMI's energy: keep the run.

        Args:
            directory: directory of the run.
            options: arguments of the class except ``settings`` and ``recipe``, which are the run's.

        Raises:
            ConfigError, CheckpointError, FeatureError: as in `anomaly.recipe.load_scorer`.
        """
        scorer = recipe_anomaly.load_scorer(Path(directory), torch.device("cpu"))
        if not isinstance(scorer, Scorer):
            raise ConfigError(f"directory must contain an image run, got a vector run: {directory}")
        cfg = config.load(recipe_anomaly.Config, Path(directory) / "config.yaml")
        recipe = _config("anomaly", {}).flat()
        settings = {k: v for k, v in cfg.flat().items() if k not in _ELSEWHERE and v != recipe[k]}
        made = cls(settings, **options)
        made._take(scorer)
        made._is_fitted = torch.tensor([True])
        return made

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Stores the resized images for `fit` and returns a constant loss, because Lightning requires one."""
        if not self._is_fitted:
            self._images.append(resized_images(to_uint8(batch.image), self.cfg.features.size).cpu())
            self._paths += batch.image_path or []
        return torch.zeros((), requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Runs pretraining and DxMI on the features of the epoch's images. The mixin calls this once.

        Raises:
            ImageDataError: there are fewer than two images.
            health.Diverged: losses remain non-finite.
        """
        count = sum(map(len, self._images))
        if count < 2:
            raise anomaly_sources.ImageDataError(f"training requires >= 2 images, got {count}")
        images = torch.cat(self._images).numpy()
        if len(self._paths) == count:  # the loader shuffles, but training depends on the order
            images = images[sorted(range(count), key=lambda i: anomaly_sources.natural(self._paths[i]))]
        # The caller may have disabled gradients for validation.
        with torch.inference_mode(False), torch.enable_grad():
            backbone, device = self.model.scorer.backbone, self.device
            data = AnomalyData(images, np.zeros(count, np.int64), split="train")
            maps, holdout = feature_maps.computed(data, backbone, device), self.cfg.source.holdout
            good = collection.divided(maps, holdout, images=images)
            self._take(recipe_anomaly.fit(_Phases(self.cfg, device), self.cfg, good, backbone))
        self._images, self._paths = [], []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the name of the chosen preparation, and the chosen patch."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_PREPARATION], checkpoint[_PATCH] = self._chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Creates a detector with the shapes of the stored one."""
        super().on_load_checkpoint(checkpoint)
        name, patch = (checkpoint.get(key) for key in (_PREPARATION, _PATCH))
        if name is not None and (name, patch) != self._chosen:
            self.model.scorer = recipe_anomaly.new_scorer(self.cfg, name, patch)

    @property
    def _chosen(self) -> tuple[str | None, int | None]:
        """The name of the scorer's preparation, and its patch."""
        name, patch = (getattr(self.model.scorer.preparation, key, None) for key in ("name", "patch"))
        return name, patch

    def _take(self, scorer: Scorer) -> None:
        self.model.scorer = scorer
        if isinstance(self.post_processor, OwnThresholds):
            self.post_processor.set(scorer.threshold, scorer.pixel_threshold)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> None:
        """Returns no optimizer for Lightning, because `fit` creates its own."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "gradient_clip_val": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Returns a pre-processor that resizes whole images to a square size, without cropping."""
        height, width = image_size or (224, 224)
        if height != width:
            raise ValueError(f"image_size must be square, got {height} x {width}")
        return WholeImages(height)

    def configure_post_processor(self) -> PostProcessor:
        return OwnThresholds()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        return Visualizer()


def _config(recipe: str, settings: dict[str, Any]) -> recipe_anomaly.Config:
    """The recipe's settings overridden by the given ones, validated as on the command line."""
    for key in _ELSEWHERE & settings.keys():
        raise ConfigError(f"settings must not contain {key}, which anomalib decides here")
    given = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items()]
    return config.load(recipe_anomaly.Config, tasks.find(recipe), given)


class _Phases:
    """Runs the steps of a phase on the model's device, without checkpoints or rollbacks."""

    def __init__(self, cfg: recipe_anomaly.Config, device: torch.device) -> None:
        self.device, self.ranks, self.rows = device, Ranks(), (cfg.run.batch_size, 0)
        self._patience = cfg.run.rollback_after

    def phase(
        self,
        name: str,
        stepper: Trainable,
        iterations: int,
        batch: Callable[[int], Tensor],
        picture: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        metrics: dict[str, Tensor] = {}
        for i in trange(iterations, desc=name, disable=None):
            metrics = stepper.step(batch(i))
        failures = health.failures({k: v for k, v in metrics.items() if v.ndim == 0})
        if 0 < self._patience <= max(failures.values(), default=0):
            raise health.Diverged(f"{name}: consecutive non-finite steps at the end: {failures}")


class _Detector(nn.Module):
    """float images [n, 3, H, W] in [0, 1] -> scores [n] and maps of energies, [n, 1, H, W]."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, images: Tensor) -> InferenceBatch:
        if torch.compiler.is_compiling():  # the checks of an Extractor cannot be exported
            given = self.scorer.backbone.network(to_uint8(images))
            maps = common.maps_of(self.scorer.preparation(given), self.scorer.energy)
        else:
            maps = self.scorer.maps(resized_images(to_uint8(images), self.scorer.size))
        pixels = common.localize(maps, (images.shape[2], images.shape[3]))
        return InferenceBatch(pred_score=self.scorer.scores(maps), anomaly_map=pixels[:, None])


def data_of(datamodule: AnomalibDataModule, *, split: str = "train", size: int | None = 224) -> AnomalyData:
    """The images of a datamodule as `AnomalyData`, decoded by ``dxmi_ext`` from the files that it lists.

    Args:
        split: "train" for its good images, or "test".
        size: see ``dataset.load``.

    Raises:
        ImageDataError: the split is unknown, or a file is damaged.
    """
    if split not in ("train", "test"):
        raise anomaly_sources.ImageDataError(f"split must be train or test, got {split!r}")
    datamodule.setup()
    samples = getattr(datamodule, f"{split}_data").samples.to_dict("records")
    kinds = [_kind(row) for row in samples]
    label_names = ["good", *sorted({kind for kind in kinds if kind})]
    items, masked = [], split == "test"
    for row, kind in zip(samples, kinds, strict=True):
        path, mask = str(row["image_path"]), str(row.get("mask_path") or "") if kind else ""
        masked &= bool(mask or not kind)
        label = label_names.index(kind or "good")
        items.append(anomaly_sources.picture_item(path, 0, label, path, Path(mask) if mask else None))
    source = anomaly_sources.Source([], items, [datamodule.category or datamodule.name], label_names, masked)
    return anomaly.decoded(source, split, size)


def _kind(row: dict[str, Any]) -> str:
    """The name of the defect; empty for a good image."""
    label = row.get("label") or "anomaly"
    return str(getattr(label, "value", label)) if row["label_index"] == 1 else ""
