"""The backbone and the data of a run from its settings. Imports torch and the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dxmi_ext.anomaly.data import dataset, vectors
from dxmi_ext.anomaly.data.vectors import Columns
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.anomaly.features.collection import Pictures, Source, Vectors
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs.identity import Fingerprints, changed, data_of, fingerprint, same_place
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data.contents import ImageDataError, UnreadableImages, VectorDataError
from dxmi_ext.images.data.pixels import Scale
from dxmi_ext.images.metrics.features import Extractor


def backbone_of(cfg: Config, device: torch.device, about: dict[str, Any] | None = None) -> Extractor | None:
    """The backbone of the settings, or None for vectors.

    Raises:
        ConfigError: the model ``about`` was trained with another backbone.
    """
    if cfg.features.backbone is None:
        return None
    options: dict[str, Any] = {
        "size": cfg.features.size,
        "grid": cfg.features.grid,
        "weights": cfg.features.weights,
    }
    # In older runs, without a choice of preparations, the backbone itself normalized its features.
    older = about is not None and backbones.is_normalized(about["backbone"]["identity"])
    backbone = backbones.load(cfg.features.backbone, normalize=older, **options)
    if about is not None and about["backbone"]["identity"] != backbone.identity:
        raise ConfigError(
            f"weights must be of {about['backbone']['identity']}, as in the run, got {backbone.identity}"
        )
    return backbone.to(device)


def source_of(
    cfg: Config,
    backbone: Extractor | None,
    device: torch.device,
    *,
    data: str | None = None,
    about: dict[str, Any] | None = None,
    few: int | None = None,
) -> Source:
    """The source of the settings' data, or of all classes of other data, which are all for testing unless
    they have a split.

    Args:
        data: path of other data; None: the settings' data.
        about: description of a model, whose scale or columns are used; None: those of the data.
        few: see `Pictures`.
    """
    path, train_share = data or path_of(cfg), 0.0 if data else cfg.source.train_share
    if backbone is None:
        return Vectors(path, train_share, cfg.run.seed, None if about is None else columns_of(about))
    classes = None if data else classes_of(cfg)
    scale = None if about is None else Scale.of(about.get("scale"))
    return Pictures(
        path,
        backbone,
        cfg.features.size,
        classes,
        train_share,
        cfg.source.cache,
        device,
        few,
        scale,
    )


def path_of(cfg: Config) -> str:
    if cfg.source.data is None:
        raise ConfigError("data must be the path of images or of a file of vectors, got null; see --help")
    return cfg.source.data


def classes_of(cfg: Config) -> list[str] | None:
    return None if cfg.source.classes is None else [name.strip() for name in cfg.source.classes.split(",")]


def columns_of(about: dict[str, Any]) -> Columns:
    """The columns of the vectors on which a model was trained; older models have no constant columns."""
    return Columns.from_json(about.get("columns", {"total": about["shape"][2], "constants": {}}))


def fingerprints(cfg: Config) -> Callable[[str], Fingerprints]:
    """A function that computes the fingerprints of the data at a path, as the run loads them."""

    def of_vectors(path: str) -> Fingerprints:
        train, test, anomalous = vectors.load(path, train_share=cfg.source.train_share, seed=cfg.run.seed)
        return {"train": fingerprint(train), "test": fingerprint(test, anomalous)}

    def of_pictures(path: str) -> Fingerprints:
        options: dict[str, Any] = {
            "size": cfg.features.size,
            "train_share": cfg.source.train_share,
            "cache": cfg.source.cache,
        }
        options["classes"] = classes_of(cfg)
        found = {"train": dataset.load(path, split="train", **options)}
        try:
            found["test"] = dataset.load(path, split="test", scale=found["train"].scale, **options)
        except UnreadableImages:
            raise
        except ImageDataError:  # there may be no test data
            pass
        known = {} if cfg.run.output is None else data_of(Path(cfg.run.output))
        prints = {}
        for split, data in found.items():
            # A single class has the name of its folder or file, which may be renamed; older runs stored it.
            names = data.class_names if len(data.class_names) > 1 else []
            parts = data.fingerprint, data.labels, data.classes
            older = fingerprint(*parts, data.class_names)
            prints[split] = older if known.get(split) == older else fingerprint(*parts, names)
        return prints

    return of_vectors if cfg.features.backbone is None else of_pictures


def holds_own(cfg: Config, directory: Path, data: str, *, needed: bool) -> bool:
    """Whether ``data`` are a run's own data, at their path or at another.

    Args:
        needed: whether the run's good data are needed to fit baselines.

    Raises:
        ConfigError: the run's data are needed but no longer exist at their path, and these are others.
    """
    own, known = path_of(cfg), data_of(directory)
    if same_place(data, own):
        return True
    if known and not _changed_training(cfg, known, data):
        return True
    if Path(own).exists() or not needed:
        return False
    if known:
        raise ConfigError(
            f"data must have the good data on which {directory} was trained (no longer at {own!r}), got "
            f"{data!r}, which has another fingerprint; baselines=none does not require them"
        )
    runlog.note(f"{directory} has no fingerprint of its data; {data} is assumed to contain them")
    return True


def check_own(cfg: Config, directory: Path) -> None:
    """Checks that the settings' data are those of a run. Test data may have changed, with a note.

    Raises:
        ConfigError: the data do not exist, or the run was trained on others.
    """
    path, known = path_of(cfg), data_of(directory)
    if not Path(path).exists():
        raise ConfigError(f"data: {path} does not exist; data=PATH names another place")
    splits = changed(known, fingerprints(cfg)(path)) if known else []
    if "train" in splits:
        raise ConfigError(
            f"data must have the good data on which {directory} was trained, got {path!r}, which has another "
            "fingerprint; data=PATH names a copy of them, or other data to test on"
        )
    if splits:
        runlog.note(f"the test data at {path} have changed since {directory} was trained")


def _changed_training(cfg: Config, known: Fingerprints, data: str) -> bool:
    """Whether other good data would be trained on if a run read these data."""
    try:
        return "train" in changed(known, fingerprints(cfg)(data))
    except UnreadableImages:
        raise
    except (ImageDataError, VectorDataError):  # in another layout, or without data for training
        return True
