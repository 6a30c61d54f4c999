"""The networks of an image run: new, pretrained or saved by a run, with the diffusion of their pretraining.

Imports torch, the engine and the method; diffusers where networks are built or read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext import tasks
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs.identity import settings_of
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.networks import pretrained
from dxmi_ext.images.networks.encoder import EncoderEnergy, EncoderValue, load_encoders
from dxmi_ext.images.networks.energy import ResNetEnergy, ResNetValue
from dxmi_ext.images.networks.level_networks import LevelEncoderValue, LevelTimed, see_steps_
from dxmi_ext.images.networks.pretrained import DDPM, EDM
from dxmi_ext.images.networks.unet import UNet, unet
from dxmi_ext.images.settings import NO_START, Config, PretrainingSettings
from dxmi_ext.method import schedules
from dxmi_ext.method.lengths import AnyLengthSampler, StepLevels
from dxmi_ext.method.networks import Networks, TimeIndependent
from dxmi_ext.method.sampler import GaussianSampler, Timed
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.method.solvers import SolverSampler, time_in_table

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
"""Prediction names of diffusers and of this package."""
_OF_PRETRAINED = ("schedule", "prediction", "sigma_data", "time_scale", "unet", "patch")
_KINDS: dict[str, Any] = {ours: theirs for theirs, ours in PREDICTIONS.items()}
_NO_NOISE = 1e-6  # standard deviation
Sampler = GaussianSampler | SolverSampler


def with_start(cfg: Config, shape: tuple[int, int, int], classes: int | None) -> Config:
    """The settings with a resolved ``start``: the folder of a run that ships with the package, or null if its
    network was pretrained on other data or with other settings."""
    start = cfg.networks.start
    if start is None or start == NO_START:
        return cfg.replace(start=None)
    folder = tasks.shipped().get(start)
    if folder is None or Path(start).is_dir():
        return cfg
    about = checkpoint.load_model_about(folder / "model")
    known, wanted = settings_of(Config, folder).flat(), cfg.flat()
    keys = ["pretrain_iterations", *PretrainingSettings.keys(), *_OF_PRETRAINED]
    differ = [f"{key}={wanted[key]}" for key in keys if wanted[key] != known[key]]
    if tuple(about["data_shape"]) != tuple(shape):
        differ = [f"images of shape {[*shape]}"]
    elif about["classes"] != classes:
        differ = [f"{classes or 'no'} classes"]
    if not differ:
        return cfg.replace(start=str(folder))
    runlog.note(f"{start} does not fit {', '.join(differ)}: this run pretrains a network of its own")
    return cfg.replace(start=None)


def network_of(cfg: Config, shape: tuple[int, int, int], classes: int | None) -> tuple[UNet, DDPM | EDM]:
    """The sampler's network, new or pretrained, and its diffusion.

    Raises:
        ConfigError: the pretrained network does not fit the data or the settings.
    """
    start, chain = cfg.networks.start, cfg.chain
    own: DDPM | EDM = DDPM(schedules.make_betas(), _KINDS[chain.prediction])
    if chain.schedule == "edm":
        own = EDM(chain.sigma_data, chain.sigma_min, chain.sigma_max, chain.time_scale)
    if start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            return unet(cfg.networks.unet, shape, classes, cfg.networks.patch), own
    if (Path(start) / "model").is_dir():
        network, diffusion, of = _of_run(Path(start))
        if of != (tuple(shape), classes):
            raise ConfigError(
                f"start must be for the data's shape and classes {(shape, classes)}, got {start} for {of}"
            )
    else:
        given = pretrained.load(start, shape, classes)
        network, diffusion = given.network, given.diffusion or own
    _check_fit(cfg, diffusion)
    return network, diffusion


def _check_fit(cfg: Config, diffusion: DDPM | EDM) -> None:
    """Checks that the settings match the diffusion of a pretrained network."""
    start, chain = cfg.networks.start, cfg.chain
    if isinstance(diffusion, EDM) != (chain.schedule == "edm"):
        kind = (
            "edm for EDM's network"
            if isinstance(diffusion, EDM)
            else "fastdpm or ddim for a network of betas"
        )
        raise ConfigError(f"schedule must be {kind} ({start}), got {chain.schedule}")
    if isinstance(diffusion, DDPM):
        if (predicts := PREDICTIONS[diffusion.prediction]) != chain.prediction:
            raise ConfigError(f"prediction must be {predicts} as in {start}, got {chain.prediction}")
        return
    if "sigma_data" in cfg.given and chain.sigma_data != diffusion.sigma_data:
        raise ConfigError(f"sigma_data must be {diffusion.sigma_data} as in {start}, got {chain.sigma_data}")
    if diffusion.boundary:
        raise ConfigError(f"start must be a denoiser, not a consistency model, got {start}")


def networks_of(
    cfg: Config, network: UNet, shape: tuple[int, ...], classes: int | None, diffusion: DDPM | EDM
) -> Networks:
    """All networks, with the given sampler network and a new value and energy."""
    schedule = schedule_of(cfg, diffusion, cfg.chain.steps)
    levels = None if cfg.chain.lengths is None else _levels(cfg, diffusion)
    value, energy = _energies(cfg, network, shape[0], classes, schedule, diffusion, levels)
    if levels is None:
        sampler = GaussianSampler(Timed(network, schedule), schedule, shape)
    else:
        sampler = _any_length(cfg, network, shape, diffusion, levels)
    kind = cfg.networks.value_kind
    if kind == "time_independent":
        return Networks(sampler, TimeIndependent(energy()))
    return Networks(sampler, value(), energy() if kind == "separate" else None)


def denoise_(sampler: GaussianSampler) -> None:
    """Removes the noise of the last step, so that samples are its means."""
    sampler.set_last_std(_NO_NOISE)


def _levels(cfg: Config, diffusion: DDPM | EDM) -> StepLevels:
    return StepLevels([schedule_of(cfg, diffusion, steps) for steps in cfg.chain.all_steps])


def _any_length(
    cfg: Config, network: UNet, shape: tuple[int, ...], diffusion: DDPM | EDM, levels: StepLevels
) -> AnyLengthSampler:
    """A sampler of chains of several lengths, and any other."""
    assert isinstance(diffusion, EDM)
    timed, schedule = LevelTimed(see_steps_(network), levels, diffusion), partial(schedule_of, cfg, diffusion)
    last = cfg.algorithm.train_last_std
    sampler = AnyLengthSampler(timed, schedule, shape, cfg.chain.all_steps, levels, train_last_std=last)
    sampler.favors_short = cfg.chain.length_draw == "short"
    sampler.use(cfg.chain.steps)
    return sampler


def _energies(
    cfg: Config,
    network: UNet,
    channels: int,
    classes: int | None,
    schedule: Schedule,
    diffusion: DDPM | EDM,
    levels: StepLevels | None,
) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """Constructors of a value V^t and of an energy."""
    width = cfg.networks.energy_width
    if cfg.networks.energy_network == "resnet":
        return (
            lambda: ResNetValue(channels, cfg.chain.steps, width, classes),
            lambda: ResNetEnergy(channels, width, classes),
        )
    time, scale = _seen_by_encoder(schedule, diffusion, cfg.networks.energy_level)

    def value() -> EncoderValue:
        if levels is None:
            return EncoderValue(network, time, scale, width)
        assert isinstance(diffusion, EDM)
        return LevelEncoderValue(network, levels, diffusion, cfg.networks.energy_level, width)

    return value, lambda: EncoderEnergy(network, time[-1], scale[-1], width)


def _seen_by_encoder(schedule: Schedule, diffusion: DDPM | EDM, level: float) -> tuple[Tensor, Tensor]:
    """The time and the input scale of a pretrained encoder for x_0 .. x_T, [T + 1] each: those of x_t's noise
    level, or of `level` if that is higher."""
    sigma = torch.cat((schedule.noise / schedule.signal, torch.zeros(1))).clamp(min=level)
    if isinstance(diffusion, EDM):
        return diffusion.time(sigma), diffusion.input_scale(sigma)
    time, least, largest = time_in_table(diffusion.betas)
    times = [time(min(max(s, least), largest)) for s in sigma.tolist()]
    return torch.tensor(times), torch.ones(len(times))


def schedule_of(cfg: Config, diffusion: DDPM | EDM, steps: int, places: Tensor | None = None) -> Schedule:
    """The schedule of a few-step sampler; ``places`` is for EDM's levels."""
    chain = cfg.chain
    if isinstance(diffusion, EDM):
        return schedules.edm(
            steps,
            sigma_max=chain.sigma_max,
            sigma_min=chain.sigma_min,
            rho=chain.rho,
            stochastic_last=chain.stochastic_last,
            eta=chain.eta,
            sigma_data=diffusion.sigma_data,
            time_scale=diffusion.time_scale,
            places=places,
            min_std=chain.min_std,
        )
    prediction, min_std = PREDICTIONS[diffusion.prediction], chain.min_std
    if chain.schedule == "ddim":
        return schedules.ddim(
            steps, eta=chain.eta, betas=diffusion.betas, prediction=prediction, min_std=min_std
        )
    if not are_linear(diffusion.betas):
        raise ConfigError("schedule must be ddim where betas are not DDPM's linear ones, got fastdpm")
    return schedules.fastdpm(steps, kappa=chain.eta, prediction=prediction, min_std=min_std)


def are_linear(betas: Tensor) -> bool:
    """Whether betas are DDPM's 1,000 linear ones."""
    usual = schedules.make_betas()
    return betas.shape == usual.shape and torch.allclose(betas, usual)


def prediction_of(diffusion: DDPM | EDM) -> tuple[str, float]:
    """The prediction and sigma_data of `schedules.from_levels` for a network."""
    if isinstance(diffusion, EDM):
        return "edm", diffusion.sigma_data
    return PREDICTIONS[diffusion.prediction], 0.5


def classes_of(sampler: Sampler) -> int | None:
    """The U-Net's number of classes; None if it is unconditional."""
    return next(module.classes for module in sampler.modules() if isinstance(module, UNet))


def save(path: Path, networks: Networks, data: ImageData, diffusion: DDPM | EDM) -> None:
    """Saves final networks with the config to rebuild them."""
    network = networks.sampler.network.network
    assert isinstance(network, UNet)
    about = {
        "task": "images",
        "data_shape": list(data.shape),
        "classes": classes_of(networks.sampler),
        "scale": data.scale,
        "unet": json.loads(network.model.to_json_string()),
        "patch": network.patch,
        "sees_steps": network.sees_steps,
    }
    if isinstance(diffusion, EDM):
        about |= {"prediction": "edm", **diffusion._asdict()}
    else:
        about |= {"prediction": PREDICTIONS[diffusion.prediction]}
        about |= {} if are_linear(diffusion.betas) else {"betas": diffusion.betas.tolist()}
    checkpoint.save_model(path, networks, about)


def load(directory: Path, device: torch.device) -> tuple[Config, Networks, DDPM | EDM]:
    """A run's settings, its final networks, and the diffusion of the sampler's network.

    Raises:
        checkpoint.CheckpointError: they are missing or damaged.
    """
    tensors, about = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        network, diffusion = _rebuilt(about)
        networks = networks_of(cfg, network, tuple(about["data_shape"]), about["classes"], diffusion)
        networks.load_state_dict(tensors | _encoders_of_start(cfg, networks, tensors))
    if cfg.chain.denoised:
        denoise_(networks.sampler)
    return cfg, networks.to(device).eval(), diffusion


def _encoders_of_start(cfg: Config, networks: Networks, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of frozen encoders, which a shipped run takes from its start, shipped too."""
    missing = {name for name in networks.state_dict() if ".encoder." in name} - tensors.keys()
    if not missing or cfg.networks.start not in tasks.shipped():
        return {}
    network, _, _ = _of_run(tasks.shipped()[cfg.networks.start])
    load_encoders(networks, network)
    return {name: weight for name, weight in networks.state_dict().items() if name in missing}


def _rebuilt(about: dict[str, Any]) -> tuple[UNet, DDPM | EDM]:
    """The network saved by `save`, without its weights, and its diffusion."""
    from diffusers import UNet2DModel

    # In evaluation mode, as networks loaded by diffusers: dropout is for pretraining.
    network = UNet(UNet2DModel.from_config(about["unet"]), about.get("patch", 1)).eval()
    if about.get("sees_steps"):
        see_steps_(network)
    if about["prediction"] == "edm":
        return network, EDM(**{name: about[name] for name in EDM._fields if name in about})
    betas = torch.tensor(about["betas"], dtype=torch.float64) if "betas" in about else schedules.make_betas()
    return network, DDPM(betas, _KINDS[about["prediction"]])


def _of_run(directory: Path) -> tuple[UNet, DDPM | EDM, tuple[tuple[int, ...], int | None]]:
    """The network of a run's sampler, its diffusion, and the shape and classes of its data."""
    tensors, about = checkpoint.load_model_state(directory / "model")
    if about.get("task") != "images":
        raise ConfigError(f"start must be a run of the task images, got {directory} of {about.get('task')}")
    prefix = "sampler.network.network."
    with checkpoint.fitting(directory):
        network, diffusion = _rebuilt(about)
        network.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
    return network, diffusion, (tuple(about["data_shape"]), about["classes"])
