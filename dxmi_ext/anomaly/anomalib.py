"""DxMI as a model of anomalib, which its Engine trains and tests, and anomalib's pictures as data of ours.

Needs the extra ``anomalib``; written for version 2.7. Imports anomalib, torchvision, torch and ``dxmi_ext``.

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from dxmi_ext.anomaly.anomalib import DxMI

    Engine().train(model=DxMI(), datamodule=MVTecAD(category="bottle"))
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize
from tqdm import trange

from dxmi_ext.anomaly import backbones, detectors, networks
from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.networks import AutoencoderEnergy, LatentStart
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.anomaly.scoring import maps_of
from dxmi_ext.data import anomaly, anomaly_sources
from dxmi_ext.data.anomaly import AnomalyData
from dxmi_ext.metrics.features import Extractor
from dxmi_ext.trainer import DxMITrainer, Stepper


class DxMI(MemoryBankMixin, AnomalibModule):
    """The recipe ``anomaly``: an epoch of good pictures becomes features, from which `fit` learns.

    Args:
        settings: of the recipe, by name, as ``{"iterations": 2000, "backbone": "efficientnet_b4"}``; those of
            data, files and ranks say nothing here.
        top_share: as of `detectors.detect`.
        pre_processor, post_processor, evaluator, visualizer: as of any model of anomalib. A pre-processor
            must leave values in [0, 1], for the backbone scales them itself.
    """

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        top_share: float = 0.0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Any = True,
        visualizer: Any = True,
    ) -> None:
        from dxmi_ext.recipes.anomaly import Config

        cfg = Config(**settings or {})
        if cfg.backbone is None:
            raise ValueError("settings: got backbone=None, wants pictures")
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((cfg.size, cfg.size))
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.cfg = cfg
        backbone = backbones.load(cfg.backbone, size=cfg.size, grid=cfg.grid, weights=cfg.weights)
        channels = backbone(torch.zeros(1, 3, cfg.size, cfg.size, dtype=torch.uint8)).shape[1]
        keys = inspect.signature(networks.build).parameters
        self._shape = {"dim": channels} | {key: getattr(cfg, key) for key in keys if hasattr(cfg, key)}
        energy = networks.build(**self._shape).energy_network
        assert isinstance(energy, AutoencoderEnergy)
        self.model: _Detector = _Detector(backbone, energy, top_share)
        self._features: list[np.ndarray] = []

    @classmethod
    def from_run(cls, directory: Path | str, **options: Any) -> DxMI:
        """The detector of a finished run, to be tested or exported by anomalib."""
        from dxmi_ext.recipes import anomaly as recipe

        cfg, trained = recipe.load(Path(directory), torch.device("cpu"))
        made = cls(dataclasses.asdict(cfg), **options)
        made.model.energy.load_state_dict(trained.energy_network.state_dict())
        made._is_fitted = torch.tensor([True])
        return made

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Keeps features; the loss means nothing, Lightning wants one."""
        with torch.no_grad():
            features = self.model.features(batch.image).permute(0, 2, 3, 1)
        self._features.append(features.to("cpu", torch.float16).numpy())
        return torch.zeros((), requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Pretraining and DxMI on the features of the epoch; called by the mixin, once."""
        # A validation is about to start, perhaps, and under it nothing learns.
        with torch.inference_mode(False), torch.enable_grad():
            self._train(FeatureMaps(np.concatenate(self._features)))
        self._features = []

    def _train(self, maps: FeatureMaps) -> None:
        cfg = self.cfg
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            made = networks.build(**self._shape).to(self.device)
        energy, start = made.energy_network, made.sampler.start
        assert isinstance(energy, AutoencoderEnergy) and isinstance(start, LatentStart)
        if cfg.pretrained:
            pretrainer = ReconstructionPretrainer(
                energy.autoencoder, lr=cfg.pretrain_lr, iterations=cfg.pretrain_iterations
            )
            self._repeat(pretrainer, "pretrain", cfg.pretrain_iterations, maps)
            start.copy_from(energy.autoencoder)
        trainer = DxMITrainer(made, cfg, iterations=cfg.iterations, seed=cfg.seed)
        self._repeat(trainer, "dxmi", cfg.iterations, maps)
        averaged = trainer.averaged.energy_network
        assert averaged is not None
        self.model.energy.load_state_dict(averaged.state_dict())

    def _repeat(self, stepper: Stepper, phase: str, iterations: int, maps: FeatureMaps) -> None:
        cfg = self.cfg
        rows: dict[str, Any] = {"seed": cfg.seed, "stream": phase, "whole_images": cfg.whole_pictures}
        for i in trange(iterations, desc=phase, disable=None):
            stepper.step(maps.batch(i, cfg.batch_size, device=self.device, **rows))

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        return batch.update(**self.model(batch.image)._asdict())

    def configure_optimizers(self) -> None:
        """None of Lightning's: `fit` has its own."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "gradient_clip_val": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Whole pictures to that size; nothing is cut off."""
        resize = Resize(image_size or (224, 224), interpolation=InterpolationMode.BICUBIC, antialias=True)
        return PreProcessor(transform=Compose([resize]))


class _Detector(nn.Module):
    """float images [n, 3, size, size] in [0, 1] -> scores [n] and maps of their size, [n, 1, size, size]."""

    def __init__(self, backbone: Extractor, energy: AutoencoderEnergy, top_share: float) -> None:
        super().__init__()
        self.backbone, self.energy, self.top_share = (
            backbone,
            energy,
            top_share,
        )  # whose mode stays evaluation

    def features(self, images: Tensor) -> Tensor:
        return self.backbone.network(255 * images.clamp(0, 1))

    def forward(self, images: Tensor) -> InferenceBatch:
        maps = maps_of(self.features(images), self.energy)
        pixels = detectors.localise(maps, (images.shape[2], images.shape[3]))
        return InferenceBatch(
            pred_score=detectors.detect(maps, top_share=self.top_share), anomaly_map=pixels[:, None]
        )


def data_of(datamodule: AnomalibDataModule, *, split: str = "train", size: int | None = 224) -> AnomalyData:
    """The pictures of a datamodule as our own data, read by ours from the files that it names.

    Args:
        split: "train", its good pictures; or "test".
        size: as of ``data.anomaly.load``.

    Raises:
        ImageDataError: an unknown split, or a damaged file.
    """
    if split not in ("train", "test"):
        raise anomaly_sources.ImageDataError(f"split: got {split!r}, wants train or test")
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
    """Of a defect its name, of a good picture none."""
    label = row.get("label") or "anomaly"
    return str(getattr(label, "value", label)) if row["label_index"] == 1 else ""
