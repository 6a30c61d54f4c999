"""The phases of a run: the autoencoder's pretraining, trained baselines, DxMI. Imports the method."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from dxmi_ext.anomaly.curve import Curve
from dxmi_ext.anomaly.evaluation import picture_of
from dxmi_ext.anomaly.features.collection import Examined
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.model import AnomalyNetworks
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.anomaly.settings import Config
from dxmi_ext.engine.compute import execution
from dxmi_ext.engine.compute.prefetch import Prefetcher
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.steps import Trainable
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.trainer import DxMITrainer


class Phases(Protocol):
    """The part of a `Run` that training uses: the device, the ranks, and the loop over steps."""

    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def rows(self) -> tuple[int, int]:
        """Number of this rank's rows of a batch, and the index of the first."""

    def phase(
        self,
        name: str,
        stepper: Trainable,
        iterations: int,
        batch: Callable[[int], Tensor],
        picture: Callable[[IO[bytes]], None] | None = None,
    ) -> None: ...


def learn(
    run: Phases,
    cfg: Config,
    maps: FeatureMaps,
    networks: AnomalyNetworks,
    tested: Examined | None = None,
    curve: Curve | None = None,
) -> AnomalyNetworks:
    """Runs all phases in turn and returns the averaged networks.

    Args:
        networks: networks whose ``trained`` names what to train: nothing, the autoencoder, or DxMI too.
        tested: test data for heat maps during training.
        curve: curve of the phases that train energies; None: nothing is measured.
    """
    if cfg.run.pretrained and "autoencoder" in networks.trained:
        pretrain_autoencoder(run, cfg, maps, networks)
    if "dxmi" not in networks.trained:
        return networks
    for name in networks.baselines:
        _train_baseline(run, cfg, name, maps, networks, curve)
    trainer = DxMITrainer(networks, cfg.algorithm, **_options(run, cfg, cfg.run.iterations))
    averaged = trainer.averaged
    assert isinstance(averaged, AnomalyNetworks)
    draw = None if tested is None else picture_of(averaged, tested)
    with _batches(cfg, maps, "dxmi", run, cfg.run.iterations) as batches:
        stepper = _measured(curve, "dxmi", trainer, cfg.run.iterations)
        run.phase("dxmi", stepper, cfg.run.iterations, batches, draw)
    return averaged


def pretrain_autoencoder(run: Phases, cfg: Config, maps: FeatureMaps, networks: AnomalyNetworks) -> None:
    """Pretrains the autoencoder, from which energy and sampler start."""
    autoencoder = networks.energy_network.autoencoder
    execution.prepare(cfg.execution, autoencoder, data_shape=networks.sampler.data_shape)
    pretrainer = ReconstructionPretrainer(
        autoencoder,
        lr=cfg.pretraining.pretrain_lr,
        iterations=cfg.run.pretrain_iterations,
        ranks=run.ranks,
        execution=cfg.execution,
    )
    with _batches(cfg, maps, "pretrain", run, cfg.run.pretrain_iterations) as batches:
        run.phase("pretrain", pretrainer, cfg.run.pretrain_iterations, batches)
    networks.begin_from(pretrainer.autoencoder, maps)


def _train_baseline(
    run: Phases, cfg: Config, name: str, maps: FeatureMaps, networks: AnomalyNetworks, curve: Curve | None
) -> None:
    """Trains a baseline energy in separate networks, from the same start and on the same batches."""
    trial = copy.deepcopy(networks)
    iterations = cfg.run.iterations
    options, fixed = _options(run, cfg, iterations), dataclasses.replace(cfg.algorithm, tau_rate=0.0)
    trainer: DxMITrainer | LangevinTrainer
    if name == "tau0":
        no_costs = dataclasses.replace(fixed, tau=0.0, tau_entropy=None, tau_velocity=None)
        trainer = DxMITrainer(trial, no_costs, **options)
    else:
        chains = dataclasses.replace(fixed, negatives="short_run")
        trainer = LangevinTrainer(trial, chains, **options)
    with _batches(cfg, maps, "dxmi", run, iterations) as batches:
        run.phase(name, _measured(curve, name, trainer, iterations), iterations, batches)
    # If the run resumed in this phase, only the trial contains the results of the phases before.
    networks.begin_from(trial.pretrained, maps)
    networks.baselines.load_state_dict(trial.baselines.state_dict())
    averaged = trainer.averaged.energy_network
    assert averaged is not None
    networks.baselines[name].load_state_dict(averaged.state_dict())


def _measured(
    curve: Curve | None, name: str, trainer: DxMITrainer | LangevinTrainer, iterations: int
) -> Trainable:
    energy = trainer.averaged.energy_network
    return trainer if curve is None or energy is None else curve.of(name, trainer, energy, iterations)


def _options(run: Phases, cfg: Config, iterations: int) -> dict[str, Any]:
    """Arguments of a trainer besides networks and algorithm."""
    options: dict[str, Any] = {"iterations": iterations, "seed": cfg.run.seed, "ranks": run.ranks}
    return options | {"langevin": cfg.langevin, "execution": cfg.execution}


def _batches(cfg: Config, maps: FeatureMaps, phase: str, run: Phases, iterations: int) -> Prefetcher:
    """Prefetched batches: iteration -> this rank's rows of the data."""
    count, offset = run.rows

    def batch(iteration: int) -> Tensor:
        rows: dict[str, Any] = {"offset": offset, "count": count, "whole_images": cfg.features.whole_pictures}
        return maps.batch(iteration, cfg.run.batch_size, seed=cfg.run.seed, stream=phase, **rows)

    return Prefetcher(batch, run.device, iterations)
