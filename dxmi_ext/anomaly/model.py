"""The networks of a run of anomaly detection, new and as it saved them. Imports torch and the method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dxmi_ext.anomaly import networks as sphere
from dxmi_ext.anomaly.collection import Examined, Good
from dxmi_ext.anomaly.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.anomaly.preparation import Whitened
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine import checkpoint
from dxmi_ext.engine.identity import settings_of
from dxmi_ext.images.features import Extractor
from dxmi_ext.method.networks import Networks

_NETWORK_KEYS = ["steps", "latent_dim", "energy_width", "value_width", "sampler_width", "depth"]
_NETWORK_KEYS += ["latent_std", "std", "last_std", "residual", "project"]
_BACKBONE_KEYS = ("backbone", "weights", "size", "grid")


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


def build(cfg: Config, shape: tuple[int, int, int], baselines: Sequence[str]) -> AnomalyNetworks:
    """The networks for maps [h, w, C] of features, their weights drawn from the seed."""
    preparation: nn.Module = nn.Identity()
    dim = shape[2]
    if cfg.features.whiten:
        preparation = Whitened(shape, patch=cfg.features.patch, aligned=cfg.features.aligned)
        dim += 1  # the coordinate that tells length
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        parts = sphere.build(dim, **{key: getattr(cfg.networks, key) for key in _NETWORK_KEYS})
    return AnomalyNetworks(parts, preparation, baselines)


def fitted(cfg: Config, good: Good, baselines: Sequence[str], device: torch.device) -> AnomalyNetworks:
    """New networks, and a preparation that knows what the good ones are like."""
    networks = build(cfg, good.train.shape[1:], baselines)
    if isinstance(networks.preparation, Whitened):
        networks.preparation.fit(good.train)
    return networks.to(device)


def save(
    path: Path,
    networks: AnomalyNetworks,
    cfg: Config,
    backbone: Extractor | None,
    good: Good,
    tested: Examined,
    thresholds: dict[str, float],
) -> None:
    """All that scoring needs but the backbone's weights, which are told by their digest."""
    about: dict[str, Any] = {"task": cfg.run.task, "backbone": None, "shape": good.train.shape[1:]}
    if good.columns is not None:
        about["columns"] = good.columns.to_json()
    if backbone is not None:
        about["backbone"] = {
            "identity": backbone.identity,
            **{k: getattr(cfg.features, k) for k in _BACKBONE_KEYS},
        }
    about |= {"networks": {k: getattr(cfg.networks, k) for k in _NETWORK_KEYS}, "thresholds": thresholds}
    about |= {"baselines": list(networks.baselines), "class_names": tested.class_names}
    about |= {} if tested.scale is None else {"scale": tested.scale}
    checkpoint.save_model(path, networks, about)


def load_model(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks, dict[str, Any]]:
    tensors, about = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        networks = build(cfg, tuple(about["shape"]), about["baselines"])
        networks.load_state_dict(tensors)
    return cfg, networks.to(device).eval(), about
