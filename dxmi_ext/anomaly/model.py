"""Creates, saves and loads the networks of a run of anomaly detection. Imports torch and the method."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dxmi_ext.anomaly import choice
from dxmi_ext.anomaly.detectors import bases
from dxmi_ext.anomaly.detectors import networks as sphere
from dxmi_ext.anomaly.detectors.bases import BaseAlone, BasedEnergy
from dxmi_ext.anomaly.detectors.common import MapDetector
from dxmi_ext.anomaly.detectors.density import KernelDensity
from dxmi_ext.anomaly.detectors.gaussians import Gaussians
from dxmi_ext.anomaly.detectors.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.anomaly.features import preparation
from dxmi_ext.anomaly.features.collection import Examined, Good
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.features.preparation import Preparation, prepared, rename_former
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine.runs.identity import settings_of
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.images.metrics.features import Extractor
from dxmi_ext.method.costs import density_temperature
from dxmi_ext.method.networks import Networks

_NETWORK_KEYS = ["steps", "latent_dim", "energy_width", "value_width", "sampler_width", "depth"]
_NETWORK_KEYS += ["latent_std", "std", "last_std", "max_std", "residual", "scaled_steps", "project"]
_SHIPPED = "shipped."
_BACKBONE_KEYS = ("backbone", "weights", "size", "grid")


class AnomalyNetworks(Networks):
    """The networks of DxMI, preparations of features, baseline energies, and a fitted detector if chosen.

    Args:
        parts: networks from `anomaly.detectors.networks.build`.
        preparation: features -> points on the sphere, for the autoencoder and the methods based on it.
        others: further preparations.
        preparations: names of preparations by method: "autoencoder" and the fitted methods.
        baselines: names of baseline energies.

    Attributes:
        shipped: fitted detector that was chosen instead of an energy; None if an energy was chosen.
        trained: names in ``choice.NETWORKS`` that have been or will be trained.
    """

    energy_network: AutoencoderEnergy | BasedEnergy
    shipped: MapDetector | None
    trained: tuple[str, ...]

    def __init__(
        self,
        parts: Networks,
        preparation: nn.Module,
        others: Sequence[Preparation],
        preparations: Mapping[str, str],
        baselines: Sequence[str],
    ) -> None:
        super().__init__(parts.sampler, parts.value, parts.energy_network)
        self.preparation, self.preparations = preparation, dict(preparations)
        self.others = nn.ModuleDict({other.name: other for other in others})
        self.others.register_load_state_dict_pre_hook(rename_former)
        self.shipped, self.trained = None, choice.NETWORKS
        self.baselines = nn.ModuleDict(dict.fromkeys(baselines, nn.Identity()))
        self.renew_baselines()

    @property
    def device(self) -> torch.device:
        return self.sampler.log_std.device

    def preparation_of(self, method: str) -> nn.Module:
        """The preparation of features for a method, by its name in ``comparison.TITLES``."""
        name = self.preparations.get(method, "")
        return dict(self.others.items()).get(name, self.preparation)

    def energy_of(self, method: str) -> nn.Module:
        """The scoring module of a method that is not fitted again, for `detectors.maps_of`."""
        if method == "dxmi":
            return self.energy_network
        if method == "autoencoder":
            return AutoencoderEnergy(self.pretrained).to(self.device)
        if method == "base":
            assert isinstance(self.energy_network, BasedEnergy)
            return BaseAlone(self.energy_network)
        if method in self.baselines:
            return self.baselines[method]
        assert self.shipped is not None, method
        return self.shipped

    @property
    def pretrained(self) -> SphereAutoencoder:
        """The pretrained autoencoder, from which samples start."""
        assert isinstance(self.sampler.start, LatentStart)
        return self.sampler.start.autoencoder

    def begin_from(self, autoencoder: SphereAutoencoder, maps: FeatureMaps) -> None:
        """Copies a pretrained autoencoder to the energy and to the start of samples.

        Args:
            maps: prepared maps of good data.
        """
        self.energy_network.autoencoder.load_state_dict(autoencoder.state_dict())
        self.pretrained.load_state_dict(autoencoder.state_dict())
        bases.begin(self.energy_network, maps)

    def renew_baselines(self) -> None:
        """Makes the baseline energies copies of the current energy."""
        for name in self.baselines:
            self.baselines[name] = copy.deepcopy(self.energy_network).requires_grad_(False)


def build(
    cfg: Config,
    shape: tuple[int, int, int],
    baselines: Sequence[str],
    preparations: Mapping[str, str],
    detectors: Sequence[MapDetector | None] = (),
) -> AnomalyNetworks:
    """New networks for maps [h, w, C] of features, with weights drawn from the seed.

    Args:
        preparations: see `AnomalyNetworks`; empty: features are already points on the sphere.
        detectors: bases in the order of the setting ``base``; see `bases.based`.
    """
    own: nn.Module = nn.Identity()
    dim, others = shape[2], list[Preparation]()
    preparations = {method: preparation.present(name) for method, name in preparations.items()}
    if preparations:
        main = preparations["autoencoder"]
        own = made = preparation.make(main, shape, **cfg.features.neighborhood)
        dim = made.dim
        names = sorted({*preparations.values()} - {main})
        others = [preparation.make(name, shape, **cfg.features.neighborhood) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        parts = sphere.build(dim, **{key: getattr(cfg.networks, key) for key in _NETWORK_KEYS})
        if detectors:
            parts = bases.based(parts, detectors, nat=density_temperature(cfg.algorithm, dim))
    return AnomalyNetworks(parts, own, others, preparations, baselines)


def fitted(
    cfg: Config, good: Good, baselines: Sequence[str], preparations: Mapping[str, str], device: torch.device
) -> AnomalyNetworks:
    """New networks whose preparations and bases are fitted to the good data."""
    detectors = _bases(cfg, math.prod(good.train.shape[:3]))
    networks = build(cfg, good.train.shape[1:], baselines, preparations, detectors).to(device)
    for each in (networks.preparation, *networks.others.values()):
        assert isinstance(each, Preparation)
        each.fit(good.train)
    if any(detector is not None for detector in detectors):
        maps = (prepared(each, networks.preparation) for each in (good.train, good.held_out))
        bases.fit(networks.energy_network, *maps)
        networks.renew_baselines()
    return networks


def save(
    path: Path,
    networks: AnomalyNetworks,
    cfg: Config,
    backbone: Extractor | None,
    good: Good,
    tested: Examined,
    thresholds: dict[str, float],
    detector: str,
) -> None:
    """Saves all that scoring requires except the backbone's weights, which are identified by their digest.

    Args:
        detector: name of the method that scores.
    """
    about: dict[str, Any] = {"task": cfg.run.task, "backbone": None, "shape": good.train.shape[1:]}
    if good.columns is not None:
        about["columns"] = good.columns.to_json()
    if backbone is not None:
        about["backbone"] = {
            "identity": backbone.identity,
            **{k: getattr(cfg.features, k) for k in _BACKBONE_KEYS},
        }
    about |= {"networks": {k: getattr(cfg.networks, k) for k in _NETWORK_KEYS}, "thresholds": thresholds}
    about |= {"detector": detector, "preparations": networks.preparations}
    about["patch"] = getattr(networks.preparation, "patch", None)
    about["trained"] = list(networks.trained)
    about |= {"baselines": list(networks.baselines), "class_names": tested.class_names}
    about |= {} if tested.scale is None else {"scale": tested.scale}
    checkpoint.save_model(path, networks, about)


def load_model(directory: Path, device: torch.device) -> tuple[Config, AnomalyNetworks, dict[str, Any]]:
    tensors, about = checkpoint.load_model_state(directory / "model", device)
    cfg = choice.settled(settings_of(Config, directory), about.get("patch"))
    with checkpoint.fitting(directory):
        if "preparations" not in about:  # an older run, without a choice of preparations
            whitened = "preparation.whitening" in tensors
            about |= {"detector": "dxmi", "preparations": {"autoencoder": "whitened"} if whitened else {}}
        detectors = _bases(cfg, 1)
        networks = build(cfg, tuple(about["shape"]), about["baselines"], about["preparations"], detectors)
        if any(name.startswith(_SHIPPED) for name in tensors):
            networks.shipped = _fittable(about["detector"], 1, cfg.run.seed)
        for name, module in networks.named_modules():
            if isinstance(module, MapDetector):  # the sizes of its buffers depend on the data
                module.take({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
        networks.load_state_dict(tensors)
        networks.trained = tuple(about.get("trained", choice.NETWORKS))
    return cfg, networks.to(device).eval(), about


def _bases(cfg: Config, rows: int) -> list[MapDetector | None]:
    """Unfitted detectors of the setting ``base``; None for the autoencoder."""
    return [_fittable(name, rows, cfg.run.seed) for name in bases.names_of(cfg.networks.base)]


def _fittable(name: str, rows: int, seed: int) -> MapDetector | None:
    """An unfitted detector for so many positions; None if the named method is not fitted."""
    cpu = torch.device("cpu")
    if name == "knn":
        return choice.nearest_neighbors(rows, seed, cpu)
    if name == "density":
        return KernelDensity(seed=seed)
    if name == "gaussians":
        return Gaussians(seed=seed)
    return choice.gaussian(seed, cpu) if name == "gaussian" else None
